"""Ways of learning behaviour other than REINFORCE: gradients against differences, whose values, which weights."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, fixed_normal, perturb, random_batch, small_config

from dreamer import behaviours, distributions, schema
from dreamer.actor_critic import RETURN_SCALES, VALUES, lambda_return
from dreamer.agent import Agent
from dreamer.behaviours import BEHAVIOURS
from dreamer.config import ActorCriticConfig, Config, PlannerConfig
from dreamer.latents import LATENTS
from dreamer.model import act_by_planner
from dreamer.objectives import OBJECTIVES, Networks
from dreamer.optimizer import OPTIMIZERS, Slow
from dreamer.presets import load_config
from dreamer.replay.priorities import MASSES
from dreamer.rssm import DYNAMICS
from dreamer.types import Space
from dreamer.values import ConfigError
from dreamer.world_model import FREE_NATS

VECTOR = {"position": Space("vector", (3,))}
PUSH = {"push": Space("vector", (2,))}
TURN = {"turn": Space("discrete", (), (3,))}
PLAIN: dict[str, Any] = {"entropy": 0, "return_scale": "none", "slow_scale": 0, "lambda_": 0.8}
SCALE = {"low": jnp.float32(0), "high": jnp.float32(0)}


def build(actions: dict[str, Space] = PUSH, horizon: int = 3, **behaviour: Any) -> tuple[Agent, Any]:
    """An agent of Gaussian latents, and float64 weights whose policy says the same of every state."""
    options = PLAIN | {"horizon": horizon} | behaviour
    agent = Agent(VECTOR, actions, small_config({"latent": "gaussian", "value_head": "normal"}, None, options))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), perturb(agent.init(0)["params"]))
    first = params["actor_critic"]["policy"]["mlp"]["layers"]["0"]["linear"]
    first["kernel"] = jnp.zeros_like(first["kernel"])
    return agent, params


def starts() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {"deter": jnp.asarray(rng.normal(0, 1, (5, 16))), "stoch": jnp.asarray(rng.normal(0, 1, (5, 4)))}


def dreamed(agent: Agent, params: Any) -> tuple[Any, Any]:
    """A dream and its losses, the slow critic a third of the critic."""
    model = agent.model(params)
    third = jax.tree.map(lambda x: jax.lax.stop_gradient(x) / 3, params["actor_critic"]["value"])
    slow = agent.slow_modules({"value": third})
    dream = model.dream(slow, starts(), jax.random.key(0))
    return dream, model.actor_critic.imagination_loss(dream, SCALE)[0]


def slopes(agent: Agent, params: Any, term: str = "policy") -> Any:
    loss = lambda params: dreamed(agent, params)[1][term].mean()  # noqa: E731
    return jax.jit(jax.grad(loss), compiler_options=CHEAP)(params)


def along(tree: Any, other: Any) -> float:
    return float(sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)))


@pytest.fixture
def exact(monkeypatch):
    """float64, and normal draws that do not change."""
    monkeypatch.setattr(distributions, "draw_normal", fixed_normal)
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("values", ["own", "slow"])
def test_the_dynamics_gradient_against_differences(values):
    """The slope of weighted returns along a change of the policy; no other weight has one."""
    agent, params = build(gradient="dynamics", values=values)
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 1, x.shape)), params["actor_critic"]["policy"])

    @jax.jit
    def parts(far: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns and weights (H, 5), from what a dream's heads say."""
        policy = jax.tree.map(lambda x, d: x + far * d, params["actor_critic"]["policy"], way)
        dream, _ = dreamed(agent, {**params, "actor_critic": {**params["actor_critic"], "policy": policy}})
        value = dream.value if values == "own" else dream.slow_value
        return lambda_return(dream.reward, value, dream.cont, 0.8), jnp.cumprod(dream.cont, 0)[:-1]

    weight = parts(0.0)[1]
    difference = -float((weight * (parts(1e-5)[0] - parts(-1e-5)[0])).mean() / 2e-5)
    grads = slopes(agent, params)
    assert abs(difference) > 1e-3
    np.testing.assert_allclose(along(grads["actor_critic"]["policy"], way), difference, rtol=1e-5)
    frozen = (grads["world_model"], grads["actor_critic"]["value"])
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(frozen))
    # The critic learns from these dreams as from data.
    by_critic = slopes(agent, params, "value")
    moved = {
        name: any(np.asarray(x).any() for x in jax.tree.leaves(tree))
        for name, tree in by_critic["actor_critic"].items()
    }
    assert moved == {"policy": False, "value": True}
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(by_critic["world_model"]))


@pytest.mark.usefixtures("exact")
def test_mixed_is_a_share_of_each():
    found = {}
    for kind in ("reinforce", "dynamics", "mixed"):
        agent, params = build(gradient=kind, reinforce_share=0.3, horizon=2)
        found[kind] = slopes(agent, params)["actor_critic"]["policy"]
    expected = jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, found["reinforce"], found["dynamics"])
    assert along(found["reinforce"], found["reinforce"]) > 1e-6 < along(found["dynamics"], found["dynamics"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found["mixed"], expected)


@pytest.mark.usefixtures("exact")
def test_one_hot_actions_carry_the_gradient_of_their_probabilities():
    """One step, spelled out: the slope of the return by the one-hot action, through the softmax to its logits."""
    agent, params = build(TURN, gradient="dynamics", horizon=1, values="own")
    grads = slopes(agent, params)["actor_critic"]["policy"]["heads"]["turn"]["logits"]["bias"]

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def spelled_out() -> tuple[jax.Array, jax.Array]:
        model, (dream, _) = agent.model(params), dreamed(agent, params)
        rssm, key = model.world_model.rssm, jax.random.split(jax.random.split(jax.random.key(0), 1)[0])[1]

        def loss(action: jax.Array) -> jax.Array:
            x = rssm.feature(rssm.imagine_step(starts(), action, key))
            reward, cont = (head(x).mode() for head in (model.world_model.reward, model.world_model.cont))
            return -(dream.cont[0] * (reward + cont * model.actor_critic.value(x).mode())).mean()

        probs = model.actor_critic.policy(rssm.feature(starts()))["turn"].probs
        by_action = jax.grad(loss)(dream.actions[0])
        return dream.actions[0], probs * (by_action - (probs * by_action).sum(-1, keepdims=True))

    action, expected = spelled_out()
    assert (action.sum(-1) == 1).all() and abs(expected).max() > 1e-4
    np.testing.assert_allclose(grads, expected.sum(0), rtol=1e-6)


def test_a_slow_copy_may_be_taken_now_and_then():
    where, slow, weights = Slow(("a", "b"), 1.0, every=3), {"w": jnp.float32(0)}, {"w": jnp.float32(0)}
    for update in range(1, 8):
        weights = {"w": jnp.float32(update)}
        slow = where.update(slow, {"a": {"b": weights}}, jnp.int32(update))
        assert slow["w"] == update - update % 3
    assert Slow(("a",), 0.25).update({"w": 1.0}, {"a": {"w": 3.0}}, jnp.int32(7)) == {"w": 1.5}


def test_noise_is_for_sampled_actions_alone():
    plain, noisy = (Agent(VECTOR, PUSH, small_config(actor_critic={"noise": noise})) for noise in (0, 0.3))
    params, count = plain.init(0)["params"], 4000
    seen = {"position": np.zeros((count, 3), np.float32), "is_first": np.ones(count, bool)}
    carry, key = lambda: plain.init_policy(count), jax.random.key(0)
    same, moved = (np.asarray(one.policy(params, carry(), seen, key)[1]["push"]) for one in (plain, noisy))
    inside = abs(same) < 0.3  # where nothing is cut off
    np.testing.assert_allclose((moved - same)[inside].std(), 0.3, rtol=0.1)
    modes = [one.policy(params, carry(), seen, None)[1]["push"] for one in (plain, noisy)]
    np.testing.assert_array_equal(*modes)


# A planner alone


def test_a_search_teaches_returns_with_its_values(monkeypatch):
    """The policy is what the search says; values are lambda-returns along the replay, spelled out, bootstrapped with
    the values that it found, the last one of a batch alone."""
    options = {"gradient": "search", "lambda_": 0.8, "discount_horizon": 20}
    config = small_config({"latent": "deterministic"}, {"objective": ["value_equivalence"]}, options)
    agent = Agent(VECTOR, TURN, config)
    rng, batch = np.random.default_rng(0), random_batch(agent)
    found = rng.dirichlet(np.ones(3), 8).astype(np.float32), rng.normal(0, 1, 8).astype(np.float32)
    monkeypatch.setattr(behaviours, "improved", lambda settings, world, state, key: jax.tree.map(jnp.asarray, found))
    model = agent.model(perturb(agent.init(0)["params"]))
    context, actions, trained = model.split_batch(batch)
    seen = model.world_model.see(context, actions, trained, None)
    taught = model.actor_critic.targets(seen, trained, None, Networks(model.world_model, model.actor_critic, {}), None)
    np.testing.assert_allclose(taught.policy["turn"].probs, found[0].reshape(2, 4, 3), rtol=1e-5)
    values, expected = found[1].reshape(2, 4), np.zeros((2, 4))
    for b in range(2):
        follows = expected[b, 3] = values[b, 3]
        for t in (2, 1, 0):
            last, terminal = trained["is_last"][b, t + 1], trained["is_terminal"][b, t + 1]
            mixed = values[b, t + 1] if last else 0.2 * values[b, t + 1] + 0.8 * follows
            follows = expected[b, t] = trained["reward"][b, t + 1] + (0 if terminal else 0.95) * mixed
    np.testing.assert_allclose(taught.value, expected, rtol=1e-5)


def test_a_search_refuses_what_it_cannot_choose_between():
    config = small_config(None, {"objective": ["value_equivalence"]}, {"gradient": "search"})
    with pytest.raises(ValueError, match="expected a single discrete action for actor_critic.gradient search"):
        Agent(VECTOR, PUSH, config)


ALONE: dict[str, Any] = {"actor_critic.gradient": "none", "planner.name": "cem", "planner.critic": False}


def test_without_a_policy_only_the_world_model_learns():
    small = small_config(actor_critic={"horizon": 3})
    planner = PlannerConfig(name="cem", critic=False, horizon=2, candidates=8, rounds=2, elites=3)
    behaviour = ActorCriticConfig(gradient="none", horizon=3)
    config = Config(
        model=small.model, run=small.run, optimizer=small.optimizer, actor_critic=behaviour, planner=planner
    )
    agent = Agent(VECTOR, PUSH, config, chooses=act_by_planner(planner))
    state = agent.init(0)
    before, batch = jax.device_get(state["params"]), random_batch(agent)
    for _ in range(3):
        state, _, metrics = agent.train_step(state, batch)
    after = jax.device_get(state["params"])
    jax.tree.map(np.testing.assert_array_equal, after["actor_critic"], before["actor_critic"])
    moved = {name: (after["world_model"]["rssm"][name]["kernel"] != old["kernel"]).any()
             for name, old in before["world_model"]["rssm"].items() if "kernel" in old}  # fmt: skip
    assert all(moved.values()) and moved
    assert {name for name in metrics if name.startswith("loss/")} == {
        f"loss/{n}" for n in ("position", "rew", "con", "dyn", "rep")
    }
    assert bool(Agent.finite(metrics))
    views = agent.report(state["params"], batch, jax.random.key(0))
    assert not np.asarray(views["value"]).any() and np.isfinite(views["dream_reward"]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planner.name": None}, "expected a planner .* got planner.name null; name one"),
        ({"planner.critic": True}, "planner.critic false"),
        ({"planner.name": "mcts"}, "got mcts"),
        ({"planner.name": "mppi"}, "planner.policy_share 0 .* got 0.046875"),
        ({"optimizer.accumulate": 2}, "expected optimizer.accumulate 1 with actor_critic.gradient none"),
        ({"actor_critic.noise": 0.3}, "expected actor_critic.noise 0 where a planner acts"),
    ],
)
def test_what_a_planner_alone_cannot_have(changes, words):
    load_config([], ALONE)
    with pytest.raises(ConfigError, match=words):
        load_config([], ALONE | changes)


TABLES = {
    "model.latent": LATENTS, "model.dynamics": DYNAMICS, "loss.objective": OBJECTIVES, "loss.free_nats_of": FREE_NATS,
    "actor_critic.gradient": BEHAVIOURS, "actor_critic.values": VALUES, "actor_critic.return_scale": RETURN_SCALES,
    "optimizer.kind": OPTIMIZERS, "replay.selection.priority": MASSES,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_an_option(name):
    choices = get_args(schema.options()[name].annotation)
    # Of an option with several values, the choices are those of each.
    assert (get_args(choices[0]) if choices[-1] is Ellipsis else choices) == tuple(TABLES[name])
