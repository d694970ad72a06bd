"""Does an ensemble know what its model does not? On a grid of 5 x 5 cells without ice, whose truth is a table.

python docs/results/fidelity/unknown.py [SEEDS] [OUT.png] trains a small world model, which sees the cell's number, on
90 random walks of two steps that begin anywhere, so that some pairs of cell and action were tried often and some never.
It prints, for each seed, how the ensemble's disagreement goes with the true error of a step, and what plans promise and
keep, by the penalty; and draws both.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dreamer.agent import Agent
from dreamer.coders import join_actions
from dreamer.env_config import GridworldConfig
from dreamer.envs.suites.gridworld import Gridworld
from dreamer.planner_config import PlannerConfig
from dreamer.planners.sequences import try_out
from dreamer.planners.table import make_planner
from dreamer.planners.tabular import Table, TabularWorld
from dreamer.presets import load_config
from dreamer.records.drawing import COLORS, Axes, Page

GRID = GridworldConfig(layout="random", side=5, seed=1, slip=0.0, starts="anywhere", observe="cell")
WALKS, STEPS, B, T = 90, 2, 16, 12
DISCOUNT = 1 - 1 / 20
PENALTIES = (0.0, 0.3, 1.0, 3.0, 10.0)
#: Draws of a step, over which its outcomes are counted.
DRAWS = 16
CONFIG = {
    "run.batch_size": B, "run.batch_length": T, "model.ensemble": 5, "model.deter": 64, "model.blocks": 4,
    "model.hidden": 32, "model.units": 32, "model.stoch": 4, "model.classes": 16, "actor_critic.horizon": 2,
    "actor_critic.imagine_last": 2, "loss.free_nats": 0.1, "optimizer.learning_rate": 2e-3, "optimizer.warmup": 50,
    "actor_critic.discount_horizon": 20,
}  # fmt: skip


class Found(NamedTuple):
    """For each state that was met and each action (4, M): the ensemble's disagreement on the step, and the probability
    that the model puts into wrong cells. For each penalty: what plans promise, by the model alone, and keep."""

    disagreement: np.ndarray
    error: np.ndarray
    believed: np.ndarray
    real: np.ndarray

    @property
    def correlation(self) -> float:
        return float(np.corrcoef(self.disagreement.ravel(), self.error.ravel())[0, 1])


def walk(env: Gridworld, walks: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Random walks one after the other, as replay has them, (steps in all, ...)."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(walks):
        now = env.reset()
        for step in range(steps + 1):
            over = step == steps or bool(now["is_last"])
            rows.append({**now, "is_last": np.asarray(over), "action": rng.integers(4, dtype=np.int32)})
            if over:
                break
            now = env.step(rows[-1])
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def train(agent: Agent, data: dict[str, np.ndarray], updates: int, seed: int) -> Any:
    """The weights after so many updates on sequences that begin anywhere in the data."""
    rng, state = np.random.default_rng(seed), agent.init(seed)
    latents = {name: np.zeros((B, T + 1, *field.shape), field.dtype) for name, field in agent.extras.items()}
    for _ in range(updates):
        at = rng.integers(0, len(data["reward"]) - T, B)[:, None] + np.arange(T + 1)
        state, *_ = agent.train_step(state, {name: value[at] for name, value in data.items()} | latents)
    return state["params"]


def study(seed: int, updates: int = 1500, penalties: tuple[float, ...] = PENALTIES) -> Found:
    env = Gridworld(GRID, 16, seed)
    truth = Table(*env.grid.probabilities())
    agent = Agent(env.observation_spaces, env.action_spaces, load_config(["debug"], CONFIG))
    params = train(agent, walk(env, WALKS, STEPS, seed), updates, seed)
    met = walk(env, 24, 24, seed + 100)
    live = ~met["is_last"]
    cells = met["cell"][live]

    @jax.jit
    def see(params: Any, met: Any) -> Any:
        """The states after each step."""
        batch = {name: value[None] for name, value in met.items()}
        taken = join_actions({"action": batch["action"]}, agent.actions, agent.dtype)
        led = jnp.concatenate([jnp.zeros_like(taken[:, :1]), taken[:, :-1]], 1)
        carry = agent.init_policy(1)
        context = {name: carry[name] for name in ("deter", "stoch")}
        return jax.tree.map(lambda x: x[0], agent.model(params).world_model.see(context, led, batch, None).states)

    states = jax.tree.map(lambda x: x[np.flatnonzero(live)], see(params, met))

    @jax.jit
    def ask(params: Any, states: Any) -> tuple[jax.Array, jax.Array]:
        """Of each action (4, M, ...): where it is thought to lead, and the disagreement on that."""
        world = agent.model(params).world_model

        def one(action: jax.Array) -> tuple[jax.Array, jax.Array]:
            taken = jnp.tile(jax.nn.one_hot(action, 4)[None], (len(cells), 1))

            def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
                x = world.rssm.feature(world.rssm.imagine_step(states, taken, key))
                return world.objective.predict(x)["cell"].parts[0].probs, world.ensemble.disagreement(x)

            return jax.tree.map(lambda x: x.mean(0), jax.lax.map(draw, jax.random.split(jax.random.key(0), DRAWS)))

        return jax.lax.map(one, jnp.arange(4))

    led, disagreement = jax.device_get(ask(params, states))
    error = np.abs(led - np.moveaxis(truth.transition[cells], 1, 0)).sum(-1) / 2

    first = np.unique(cells, return_index=True)[1]
    roots, true_world = jax.tree.map(lambda x: x[first], states), TabularWorld(truth, DISCOUNT)

    def plan(penalty: float) -> tuple[float, float]:
        """Mean of all cells: the return of the plan by the model without penalty, and by the table."""
        options = {"horizon": 10, "candidates": 256, "rounds": 6, "elites": 25}
        config = PlannerConfig(name="cem", critic=False, penalty=penalty, **options)

        @jax.jit
        def returns(params: Any, key: jax.Array) -> list[jax.Array]:
            model = agent.model(params)
            chosen = make_planner(config)(*model.as_world(roots, None, penalty), key)[1]["plan"][:, None]
            worlds = model.as_world(roots, None), (true_world, true_world.at(cells[first]))
            return [try_out(world, at, chosen, config.settled(), key).returns.mean() for world, at in worlds]

        believed, real = np.mean([jax.device_get(returns(params, jax.random.key(i))) for i in range(4)], 0)
        return believed, real

    believed, real = np.transpose([plan(penalty) for penalty in penalties])
    return Found(disagreement, error, believed, real)


def draw(found: list[Found]) -> np.ndarray:
    """uint8 (H, W, 3): errors by disagreement, and promises by penalty."""
    page, size = Page(800, 300), (400, 300)
    points = []
    for one in found:
        x, y = one.disagreement.ravel(), one.error.ravel()
        points.append([(x[at].mean(), y[at].mean()) for at in np.array_split(np.argsort(x), 10)])
    top = max(point[0] for line in points for point in line)
    words = f"tenths of all steps by disagreement; seeds: {len(found)}"
    axes = Axes(page, (0, 0), size, "A step's true error", words, ("disagreement", ""), (0, top), (0, 1))
    axes.frame()
    for i, line in enumerate(points):
        axes.curve(*np.transpose(line), COLORS[i], f"seed {i}", dots=True)
    steps = np.arange(len(PENALTIES))
    believed, real = (np.mean([getattr(one, name) for one in found], 0) for name in ("believed", "real"))
    labels = (f"planner.penalty {', '.join(f'{p:g}' for p in PENALTIES)}", "")
    axes = Axes(page, (400, 0), size, "Plans: promised and kept", "discounted return", labels, (0, 4), (0, 2))
    axes.frame()
    axes.curve(steps, believed, COLORS[1], "promised by the model", dots=True)
    axes.curve(steps, real, COLORS[0], "true", dots=True)
    return page.array()


if __name__ == "__main__":
    seeds, out = int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2] if len(sys.argv) > 2 else "unknown.png"
    results = []
    for seed in range(seeds):
        results.append(study(seed))
        found = results[-1]
        print(f"seed {seed}: correlation {found.correlation:.2f}, wrong {found.error.mean():.2f} on average")
        for penalty, believed, real in zip(PENALTIES, found.believed, found.real, strict=True):
            print(
                f"  penalty {penalty:4g}  promised {believed:.2f}  true {real:.2f}  gap {believed - real:.2f}",
                flush=True,
            )
        Image.fromarray(draw(results)).save(out)
