"""Planners against worlds whose best plans are known: a gridworld, a linear-quadratic system, small worlds by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, perturb, small_config
from tiny_runs import tiny_config

from dreamer.agent import Agent
from dreamer.distributions import MaskedOneHot, MultiOneHot, Normal, OneHot
from dreamer.env_config import GridworldConfig
from dreamer.envs.suites.gridworld import Grid
from dreamer.model import act_by_planner
from dreamer.planner_config import SETTINGS, PlannerConfig
from dreamer.planners.mcts import improved
from dreamer.planners.sequences import explore
from dreamer.planners.table import PLANNERS, make_planner
from dreamer.planners.tabular import Table, TabularWorld, greedy, policy_values, value_iteration
from dreamer.types import ACTION_MASK, Space, mask_space
from dreamer.values import ConfigError

DISCOUNT = 0.99
#: What each planner is given: everything else is its own.
ON_GRIDS: dict[str, dict[str, Any]] = {
    "random_shooting": {"candidates": 4096, "horizon": 8},
    "cem": {"candidates": 1000, "rounds": 10, "elites": 20, "horizon": 8},
    "mppi": {"candidates": 1000, "rounds": 10, "elites": 50, "horizon": 8, "temperature": 1.0, "policy_share": 0.0},
    "gradient": {"candidates": 256, "rounds": 20, "step_size": 0.3, "horizon": 8},
    "mcts": {"simulations": 64},
}
ON_ICE: dict[str, dict[str, Any]] = {
    "cem": {"candidates": 256, "rounds": 8, "elites": 25},
    "mppi": {"candidates": 256, "rounds": 8, "elites": 25, "horizon": 12, "policy_share": 0.0},
    "mcts": {"simulations": 64},
}
ON_SYSTEMS: dict[str, dict[str, Any]] = {
    "random_shooting": {"candidates": 512, "horizon": 3},
    "cem": {"candidates": 100, "rounds": 5, "elites": 10, "horizon": 5},
    "mppi": {"candidates": 128, "rounds": 5, "elites": 16, "horizon": 3, "std": 1.0},
    "gradient": {"candidates": 4, "rounds": 40, "step_size": 0.05, "horizon": 5},
    "mcts": {"candidates": 16, "simulations": 64},
    "dream_mpc": {"candidates": 16, "rounds": 10, "horizon": 3},
}


def flipped(table: Table) -> Table:
    return table._replace(reward=-table.reward)


@functools.cache
def lake(slip: float) -> tuple[Table, int]:
    """FrozenLake's map: (table, start)."""
    grid = Grid.of(GridworldConfig(slip=slip))
    return Table(*grid.probabilities()), grid.start


def choices(name: str, options: dict[str, Any], world: TabularWorld, draws: int) -> np.ndarray:
    """How often (C, A) a planner chooses each action in each of 16 cells, over a few keys."""
    plan = make_planner(PlannerConfig(name=name, **options))
    decide = jax.jit(lambda key: plan(world, world.at(np.arange(16)), key)[0])
    return np.mean([decide(jax.random.key(i)) for i in range(draws)], 0)


# The grid


@pytest.mark.parametrize("name", ON_GRIDS)
def test_where_nothing_slips_every_planner_finds_the_shortest_way(name):
    table, _ = lake(0.0)
    live = ~table.terminal
    q = table.action_values(value_iteration(table, 0.95), 0.95)
    best = np.isclose(q, q.max(-1, keepdims=True))

    def optimal(table: Table) -> float:
        found = choices(name, ON_GRIDS[name], TabularWorld(table, 0.95), 4)
        return float((found * best).sum(-1)[live].mean())

    assert optimal(table) >= (0.99 if name == "mcts" else 0.95)
    assert optimal(flipped(table)) < 0.7


@pytest.mark.parametrize(("name", "least"), [("cem", 0.76), ("mppi", 0.76), ("mcts", 0.749)])
def test_on_the_slippery_lake(name, least):
    """The chance to reach the goal, exactly, with a new plan in every cell; the critic knows only random play."""
    table, start = lake(2 / 3)
    score = lambda policy: policy_values(table, policy)[start]  # noqa: E731
    assert score(choices(name, ON_ICE[name], TabularWorld(table, DISCOUNT), 16)) >= least
    assert score(choices(name, ON_ICE[name], TabularWorld(flipped(table), DISCOUNT), 4)) < 0.1


def test_a_planner_with_the_true_critic_is_optimal_at_once():
    table, start = lake(2 / 3)
    values = value_iteration(table)
    world = TabularWorld(table, 1.0, greedy(table, values), values)
    plan = make_planner(PlannerConfig(name="mcts", simulations=16, horizon=1))
    chosen = np.asarray(jax.jit(lambda key: plan(world, world.at(np.arange(16)), key)[0])(jax.random.key(0)))
    q = table.action_values(values, 1.0)
    np.testing.assert_allclose((q * chosen).sum(-1), q.max(-1), atol=1e-6)


def test_what_a_search_teaches_is_the_best_policy_and_its_value():
    """With the best policy's values, one step ahead, exactly; with those of random play, a better policy everywhere."""
    table, _ = lake(0.0)
    live, values = ~table.terminal, value_iteration(table, 0.95)
    q = table.action_values(values, 0.95)
    best = np.isclose(q, q.max(-1, keepdims=True))

    def taught(world: TabularWorld, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        settings = PlannerConfig(name="mcts", **options).settled()
        search = jax.jit(lambda key: improved(settings, world, world.at(np.arange(16)), key))
        weights, value = jax.tree.map(np.asarray, search(jax.random.key(0)))
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        return (weights * best).sum(-1)[live], value[live]

    share, value = taught(TabularWorld(table, 0.95, greedy(table, values, 0.95), values), horizon=1)
    np.testing.assert_allclose(share, 1, atol=1e-5)
    np.testing.assert_allclose(value, values[live], rtol=1e-5)
    share, value = taught(TabularWorld(table, 0.95))
    assert (share > best.mean(-1)[live] + 0.01).all()
    uniform = policy_values(table, np.full((16, 4), 0.25), 0.95)[live]
    assert (value > uniform).all() and (value <= values[live] + 1e-5).all()


class Idle:
    """Nothing is worth anything, and the policy is always the same."""

    actions = {"turn": Space("discrete", (), (4,))}
    probs = np.array([0.5, 0.3, 0.15, 0.05])

    def step(self, state: jax.Array, action: jax.Array, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return state, jnp.zeros(len(state)), jnp.full(len(state), DISCOUNT)

    def value(self, state: jax.Array) -> jax.Array:
        return jnp.zeros(len(state))

    def policy(self, state: jax.Array) -> dict[str, OneHot]:
        return {"turn": OneHot(jnp.tile(jnp.log(self.probs), (len(state), 1)))}

    def allowed(self, state: jax.Array) -> None:
        return None


@pytest.mark.parametrize(("gumbel", "expected"), [(0.0, [1, 0, 0, 0]), (1.0, Idle.probs)])
def test_a_search_that_explores_draws_actions_as_it_finds_them_good(gumbel, expected):
    plan = make_planner(PlannerConfig(name="mcts", simulations=8, gumbel=gumbel))
    drawn = jax.jit(lambda key: plan(Idle(), jnp.zeros((2000, 1)), key)[0])(jax.random.key(0))
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.03)


# The linear-quadratic system


class LinearQuadratic:
    """x' = A x + B u, cost x Q x + u R u, with the exact critic -x P x of the Riccati equation and a policy that knows
    nothing. sign -1: the cost is a reward."""

    A, B = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.3]])
    Q, R = np.diag([1.0, 0.1]), np.array([[0.1]])
    STARTS = np.array([[0.4, 0.0], [-0.3, 0.3], [0.2, -0.4], [0.5, -0.2]])

    def __init__(self, sign: float = 1.0) -> None:
        self.actions, self.sign = {"push": Space("vector", (1,))}, sign
        P = self.Q
        for _ in range(2000):
            self.gain = np.linalg.solve(self.R + DISCOUNT * self.B.T @ P @ self.B, DISCOUNT * self.B.T @ P @ self.A)
            P = self.Q + DISCOUNT * self.A.T @ P @ (self.A - self.B @ self.gain)
        self.P = P

    def step(self, state: jax.Array, action: jax.Array, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        cost = self._form(state, self.Q) + self._form(action, self.R)
        new = state @ self.A.T + action @ self.B.T
        return new, -self.sign * cost, jnp.full(state.shape[:1], DISCOUNT)

    def value(self, state: jax.Array) -> jax.Array:
        return -self.sign * self._form(state, self.P)

    def policy(self, state: jax.Array) -> dict[str, Normal]:
        return {"push": Normal(jnp.zeros_like(state[:, :1]), jnp.ones_like(state[:, :1]))}

    def allowed(self, state: jax.Array) -> None:
        return None

    @staticmethod
    def _form(x: jax.Array, matrix: np.ndarray) -> jax.Array:
        return jnp.einsum("mi,ij,mj->m", x, matrix, x)


@functools.cache
def relative_cost(name: str, sign: float = 1.0, steps: int = 40, **options: Any) -> float:
    """The cost of acting by a planner, divided by that of Riccati's controller. It plans anew in every step."""
    real, model = LinearQuadratic(), LinearQuadratic(sign)
    plan = make_planner(PlannerConfig(name=name, **ON_SYSTEMS[name], **options))
    starts = jnp.asarray(real.STARTS, jnp.float32)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        state, before, total, weight = carry
        action, extras = plan(model, state, key, before)
        state, reward, cont = real.step(state, action, None)
        return (state, extras.get("plan"), total - weight * reward, weight * cont), None

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def run(key: jax.Array) -> jax.Array:
        shape = (len(starts), PlannerConfig(name=name, **ON_SYSTEMS[name]).settled().horizon, 1)
        before = None if name == "mcts" else jnp.zeros(shape)
        carry = starts, before, jnp.zeros(len(starts)), jnp.ones(len(starts))
        state, _, total, weight = jax.lax.scan(step, carry, jax.random.split(key, steps))[0]
        return total - weight * real.value(state)

    return float(run(jax.random.key(0)).sum() / -real.value(starts).sum())


def test_the_oracle_s_controller_stays_within_the_actions_bounds():
    real = LinearQuadratic()
    assert abs(real.STARTS @ real.gain.T).max() < 1


@pytest.mark.parametrize("name", ON_SYSTEMS)
def test_a_linear_quadratic_system_costs_little_more_than_by_riccati(name):
    within = {"cem": 1.03, "mppi": 1.03, "gradient": 1.03, "random_shooting": 1.2, "dream_mpc": 1.2, "mcts": 1.5}
    assert 1 - 1e-4 <= relative_cost(name) < within[name]
    assert relative_cost(name, -1.0, 20) > 3


def test_without_the_critic_nothing_follows_the_horizon():
    """One step of it: the cheapest action is none at all, and the plan costs what the state does."""
    options = {"horizon": 1, "candidates": 64, "rounds": 6, "elites": 8}
    plan = make_planner(PlannerConfig(name="cem", critic=False, **options))
    model = LinearQuadratic()
    state = jnp.asarray(model.STARTS, jnp.float32)
    action, extras = jax.jit(functools.partial(plan, model))(state, jax.random.key(0))
    np.testing.assert_allclose(action, 0, atol=0.02)
    np.testing.assert_allclose(extras["planned"], np.diag(-state @ model.Q @ state.T), atol=1e-4)


# Masks, and several kinds of actions at once


class Corridor:
    """Places 0 to 9; a mask allows two of four moves, by place: to stay and, in turn, +1 or +2; reward: the place.

    A forbidden move pays 1000, so that whoever plans one has it in the planned return.
    """

    def __init__(self) -> None:
        self.actions = {"action": Space("discrete", (), (4,))}

    def _mask(self, place: jax.Array) -> jax.Array:
        even = jnp.array([True, True, False, False])
        odd = jnp.array([True, False, True, False])
        return jnp.where((place % 2 == 0)[:, None], even, odd)

    def step(self, state: jax.Array, action: jax.Array, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        index = action.argmax(-1)
        legal = jnp.take_along_axis(self._mask(state), index[:, None], 1)[:, 0]
        new = jnp.minimum(state + index, 9)
        reward = jnp.where(legal, new / 9, 1000.0) + 0.0 * action.sum(-1)
        return new, reward, jnp.full(state.shape, 0.9)

    def value(self, state: jax.Array) -> jax.Array:
        return state / 9

    def policy(self, state: jax.Array) -> dict[str, MaskedOneHot]:
        return {"action": MaskedOneHot(jnp.zeros((*state.shape, 4)), self._mask(state))}

    def allowed(self, state: jax.Array) -> jax.Array:
        return self._mask(state)


@pytest.mark.parametrize("name", [name for name in PLANNERS if name != "dream_mpc"])
def test_masks_hold_in_every_planned_step(name):
    world, options = Corridor(), {"candidates": 32, "policy_share": 0.25, "horizon": 5}
    config = PlannerConfig(name=name, **{k: v for k, v in options.items() if k in SETTINGS[name]})
    places = jnp.arange(10)
    if "elites" in SETTINGS[name]:
        config = PlannerConfig(**{**vars(config), "elites": 4, "rounds": 3})
    action, extras = jax.jit(functools.partial(make_planner(config), world))(places, jax.random.key(0))
    chosen = np.asarray(action.argmax(-1))
    assert np.take_along_axis(np.asarray(world.allowed(places)), chosen[:, None], 1).all()
    assert (np.asarray(extras["planned"]) < 10).all()


class Mixed:
    """Two discrete choices and a push: a single step's reward is 1 for (2, 0), less the distance of the push to 0.5."""

    def __init__(self) -> None:
        self.actions = {"a": Space("discrete", (2,), (3, 2)), "push": Space("vector", (2,))}

    def step(self, state: jax.Array, action: jax.Array, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        reward = action[:, 2] * action[:, 3] - jnp.square(action[:, 5:] - 0.5).sum(-1)
        return state, reward, jnp.full(state.shape, 0.5)

    def value(self, state: jax.Array) -> jax.Array:
        return 0 * state

    def policy(self, state: jax.Array) -> dict[str, Any]:
        zeros = lambda width: jnp.zeros((*state.shape, width))  # noqa: E731
        return {"a": MultiOneHot(zeros(5), (3, 2)), "push": Normal(zeros(2), zeros(2) + 0.5)}

    def allowed(self, state: jax.Array) -> None:
        return None


@pytest.mark.parametrize("name", [name for name in PLANNERS if name != "dream_mpc"])
def test_several_actions_of_different_kinds(name):
    own = {"random_shooting": {"candidates": 512, "horizon": 1}, "mppi": {"rounds": 6}, "cem": {"horizon": 2}}
    own["mcts"] = {"candidates": 64, "simulations": 128}
    config = PlannerConfig(name=name, **own.get(name, {}))
    action, _ = jax.jit(functools.partial(make_planner(config), Mixed()))(jnp.zeros(2), jax.random.key(0))
    assert action.shape == (2, 7) and set(np.unique(action[:, :5])) <= {0, 1}
    np.testing.assert_array_equal(action[:, :3].sum(-1), 1)
    np.testing.assert_array_equal(action[:, 3:5].sum(-1), 1)
    assert abs(np.asarray(action[:, 5:])).max() <= 1
    reward = np.asarray(Mixed().step(jnp.zeros(2), action, None)[1])
    assert (reward > {"cem": 0.97, "mppi": 0.97, "gradient": 0.9}.get(name, 0.3)).all()


def test_dream_mpc_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="continuous actions .* take --planner.name gradient"):
        make_planner(PlannerConfig(name="dream_mpc"))(Mixed(), jnp.zeros(2), jax.random.key(0))


# Keys, traces, noise


@pytest.mark.parametrize("name", PLANNERS)
def test_a_key_decides_the_plan_and_nothing_is_traced_again(name):
    """From step to step, the state, the last plan and the key change: by `mcts` no plan is kept."""
    world, traces = LinearQuadratic(), []
    plan = make_planner(PlannerConfig(name=name, **ON_SYSTEMS[name]))

    @jax.jit
    def decide(state: jax.Array, key: jax.Array, before: Any) -> Any:
        traces.append(1)
        return plan(world, state, key, before)

    state = jnp.asarray(world.STARTS, jnp.float32)
    before = None if name == "mcts" else jnp.zeros((4, ON_SYSTEMS[name]["horizon"], 1))
    found = [decide(state, jax.random.key(seed), before) for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
    assert (np.asarray(found[0][0]) != np.asarray(found[2][0])).any()
    for _ in range(3):
        action, extras = decide(state, jax.random.key(0), before)
        state, before = world.step(state, action, None)[0], extras.get("plan")
    assert len(traces) == 1


@pytest.mark.parametrize("name", PLANNERS)
def test_an_agent_s_decisions_are_one_program(name):
    """Compiled for the first step; the steps after it, and the first of the next episode, take the same."""
    spaces = {"push": Space("vector", (2,))}
    budget = {"horizon": 2, "candidates": 4, "elites": 2, "rounds": 2, "simulations": 4}
    options = PlannerConfig(name=name, noise=0.1, **{k: v for k, v in budget.items() if k in SETTINGS[name]})
    agent = Agent(VECTOR, spaces, small_config(), chooses=act_by_planner(options))
    params, carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), agent.shapes), agent.init_policy(2)
    for i, first in enumerate([True, False, False, True]):
        seen = {"position": np.full((2, 3), i, np.float32), "is_first": np.full(2, first)}
        carry, action, _ = agent.policy(params, carry, seen, jax.random.key(i))
        assert action["push"].shape == (2, 2)
    assert agent.policy._cache_size() == 1


def test_noise_moves_continuous_actions_and_sometimes_replaces_discrete_ones():
    spaces, count = Mixed().actions, 20_000
    action = jnp.tile(jnp.array([0, 0, 1, 1, 0, 0.0, 0.0]), (count, 1))
    moved = np.asarray(explore(action, None, spaces, 0.3, jax.random.key(0)))
    np.testing.assert_allclose(moved[:, 5:].std(0), 0.3, atol=0.01)
    # A random class is the old one by chance.
    np.testing.assert_allclose((moved[:, 2] != 1).mean(), 0.3 * 2 / 3, atol=0.02)
    np.testing.assert_allclose((moved[:, 3] != 1).mean(), 0.3 / 2, atol=0.02)
    allowed = jnp.tile(jnp.array([False, True, True, False]), (count, 1))
    single = {"action": Space("discrete", (), (4,))}
    start = jnp.tile(jnp.eye(4)[1], (count, 1))
    moved = np.asarray(explore(start, allowed, single, 1.0, jax.random.key(0)))
    np.testing.assert_allclose(moved.mean(0), [0, 0.5, 0.5, 0], atol=0.02)


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "mcts", "elites": 3}, "setting of the planner mcts .*simulations.*got planner.elites"),
        ({"name": "cem", "candidates": 8}, r"planner.elites <= planner.candidates \(8\), got 100"),
        ({"horizon": 3}, "planner.horizon null without a planner"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(**{f"planner__{name}": value for name, value in options.items()})


# The agent's world model as a world

VECTOR, DISCRETE = {"position": Space("vector", (3,))}, {"action": Space("discrete", (), (3,))}


@pytest.mark.parametrize("learned", [True, False])
def test_the_learned_world_predicts_what_imagination_does(learned):
    """Along the policy's most likely actions: the same rewards, continuations and values, the discount in them once."""
    config = small_config(loss={"discount_in_cont": learned})
    agent = Agent(VECTOR, DISCRETE, config)
    params = perturb(agent.init(0)["params"])
    rng = np.random.default_rng(0)
    rssm = jax.eval_shape(lambda: agent.init_policy(4))
    starts = {
        "deter": jnp.asarray(rng.normal(0, 1, rssm["deter"].shape), jnp.float32),
        "stoch": jax.nn.one_hot(
            rng.integers(0, rssm["stoch"].shape[-1], rssm["stoch"].shape[:-1]), rssm["stoch"].shape[-1]
        ),
    }

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def both(params: Any) -> Any:
        model = agent.model(params)
        dream = model.dream({"value": model.actor_critic.value}, starts, None)
        world, state = model.as_world(starts, None)
        found = []
        for action in dream.actions:
            np.testing.assert_array_equal(action.shape, (4, 3))
            state, reward, cont = world.step(state, action, None)
            found.append((reward, cont, world.value(state)))
        dreamed = tuple(x[1:] for x in (dream.reward, dream.cont, dream.value))
        return dreamed, jax.tree.map(lambda *x: jnp.stack(x), *found)

    dreamed, found = both(params)
    gamma = 1 - 1 / config.actor_critic.discount_horizon
    np.testing.assert_allclose(found[0], dreamed[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], dreamed[1] * (1 if learned else gamma), rtol=1e-5)
    np.testing.assert_allclose(found[2], dreamed[2], rtol=1e-4, atol=1e-5)


def test_masks_from_the_environment_and_from_dreams():
    observations = {**VECTOR, ACTION_MASK: mask_space(DISCRETE)}
    options = PlannerConfig(name="mppi", candidates=16, elites=4, rounds=2, noise=0.5)
    agent = Agent(observations, DISCRETE, small_config(), chooses=act_by_planner(options))
    params = perturb(agent.init(0)["params"])
    mask = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]], np.int32)
    seen = {"position": np.ones((4, 3), np.float32), ACTION_MASK: mask, "is_first": np.ones(4, bool)}
    carry = agent.init_policy(4)
    assert carry["plan"].shape == (4, 3, 3)
    for i in range(5):
        carry, action, extras = agent.policy(params, carry, seen, jax.random.key(i))
        chosen = np.asarray(action["action"])
        assert mask[np.arange(3), chosen[:3]].all()
        assert extras["planned"].shape == (4,) and np.isfinite(extras["planned"]).all()
        seen["is_first"] = np.zeros(4, bool)
