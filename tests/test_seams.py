"""Other latents, objectives, actors, behaviours and groups of parameters take their places; no other room notices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_envs import Scripted
from flax import nnx
from learner_data import CHEAP, B, T, fixed_normal, perturb, random_batch, small_config
from tiny_runs import tiny_config, vector_env

from dreamer import distributions, features
from dreamer.actor_critic import ActorCritic
from dreamer.agent import Agent
from dreamer.config import OptimizerConfig
from dreamer.distributions import Normal
from dreamer.networks import Linear
from dreamer.objectives import OBJECTIVES, Objective, Seen
from dreamer.optimizer import Slow, make_optimizer
from dreamer.replay import Replay, ReplayError
from dreamer.run import components, loaded_agent
from dreamer.run.collector import Collector
from dreamer.run.reports import make_report
from dreamer.run.training import train
from dreamer.saves.checkpoint import Checkpointer
from dreamer.types import Field, Space, replay_fields

VECTOR = {"position": Space("vector", (3,))}
DISCRETE = {"action": Space("discrete", (), (3,))}
PUSH = {"push": Space("vector", (2,))}


# Stand-ins


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A latent of independent normals (..., S), as PlaNet has it."""

    width: int

    @property
    def numbers(self) -> int:
        return 2 * self.width

    def init(self, batch: int, dtype: Any) -> jax.Array:
        return jnp.zeros((batch, self.width), dtype)

    def shaped(self, x: jax.Array) -> jax.Array:
        return x

    def dist(self, logits: jax.Array) -> Normal:
        mean, raw = features.split(logits, 2)
        return Normal(mean, jax.nn.softplus(raw) + 0.1)

    def kl(self, p: Normal, q: Normal) -> jax.Array:
        ratio = jnp.square(p.std / q.std)
        return (0.5 * (ratio + jnp.square((p.mean - q.mean) / q.std) - 1 - jnp.log(ratio))).sum(p.over)

    def entropy(self, p: Normal) -> jax.Array:
        return p.entropy()

    def shown(self, p: Normal) -> dict[str, jax.Array]:
        return {}

    def flat(self, stoch: jax.Array) -> jax.Array:
        return stoch

    def stored(self) -> Field:
        return Field((self.width,), np.dtype(np.float32), latent=True)

    def pack(self, stoch: jax.Array) -> jax.Array:
        return stoch.astype(jnp.float32)

    def unpack(self, stored: jax.Array, dtype: Any) -> jax.Array:
        return stored.astype(dtype)


class SelfPrediction(Objective):
    """Predicts no observation but what a slow copy of the encoder makes of it, with noise that needs a key."""

    def __init__(self, width: int, tokens: int, spaces: Any, config: Any, loss: Any, *, rngs: nnx.Rngs) -> None:
        self.out = Linear(width, tokens, rngs=rngs)
        super().__init__({"self": 2.0}, {"encoder": Slow(("world_model", "encoder"), 0.25)})

    def losses(self, seen: Seen, observations: Any, slow: Any, key: Any) -> dict[str, jax.Array]:
        target = slow["encoder"](observations, seen.actions.shape[:2], seen.actions.dtype)
        noise = 0.01 * jax.random.normal(key, target.shape)
        return {"self": jnp.square(self.out(seen.feature) - jax.lax.stop_gradient(target + noise)).mean(-1)}


def lookup(model: Any, state: Any, key: Any, allowed: Any, memory: Any) -> tuple[jax.Array, dict, dict]:
    """Acts by a table of the first units' signs, and has replay remember which row it was and a number of the key's.

    It counts the steps of an episode for itself, and has replay remember them too.
    """
    row = (state["deter"][:, :3] > 0).astype(jnp.int32).sum(-1)
    drawn = jax.random.uniform(key, row.shape)
    count = memory.get("count", jnp.zeros_like(row)) + 1
    action = jax.nn.one_hot(row % 3, model.actions["action"].flat_width)
    return action, {"row": row.astype(jnp.uint8), "drawn": drawn, "step": count}, {"count": count}


class Dynamics(ActorCritic):
    """A behaviour whose loss may be differentiated through the dream."""

    through_dreams = staticmethod(lambda x: x)


@pytest.fixture
def gaussian(monkeypatch):
    monkeypatch.setattr("dreamer.rssm.make_latent", lambda config: Gaussian(config.stoch))


@pytest.fixture
def self_prediction(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "reconstruction", SelfPrediction)


# Latent


@pytest.mark.usefixtures("gaussian")
def test_a_latent_says_how_states_are_stored_compared_and_read():
    agent = Agent(VECTOR, DISCRETE, small_config())
    state, batch = agent.init(0), random_batch(agent)
    batch["stoch"] = np.random.default_rng(0).normal(0, 1, batch["stoch"].shape).astype(np.float32)
    assert agent.extras["stoch"] == Field((4,), np.dtype(np.float32), latent=True)
    params = perturb(state["params"])

    def see(params: Any) -> tuple[Any, dict[str, jax.Array]]:
        model = agent.model(params)
        found = model.world_model.loss(*model.split_batch(batch), {}, jax.random.key(0))
        return found.seen, found.losses

    seen, losses = jax.device_get(jax.jit(see, compiler_options=CHEAP)(params))
    (mean, std), (other, spread) = (
        (x[..., :4], np.log1p(np.exp(x[..., 4:])) + 0.1) for x in (np.float64(seen.posterior), np.float64(seen.prior))
    )
    kl = np.log(spread / std) + (std**2 + (mean - other) ** 2) / (2 * spread**2) - 0.5
    np.testing.assert_allclose(losses["dyn"], np.maximum(kl.sum(-1), 1), rtol=1e-4)
    np.testing.assert_array_equal(losses["dyn"], losses["rep"])
    # Samples scatter around the posterior as its deviations say.
    z = (seen.states["stoch"] - mean) / std
    assert z.shape == (B, T, 4) and 0.5 < z.std() < 1.6 and abs(z).max() < 4
    np.testing.assert_array_equal(seen.feature, np.concatenate([seen.states["deter"], seen.states["stoch"]], -1))
    carry, _, extras = agent.policy(params, agent.init_policy(5), _observation(5), jax.random.key(1))
    np.testing.assert_array_equal(extras["stoch"], carry["stoch"])


# Objective and slow weights


@pytest.mark.usefixtures("self_prediction")
def test_an_objective_may_predict_nothing_and_have_slow_weights_of_its_own():
    agent = Agent(VECTOR, DISCRETE, small_config())
    state, batch = agent.init(0), random_batch(agent)
    assert set(state["slow"]) == {"value", "encoder"}
    before = jax.device_get(state["slow"])
    history = []
    for _ in range(60):
        state, _, metrics = agent.train_step(state, batch)
        history.append(float(metrics["loss/self"]))
        if len(history) == 1:
            expected = jax.tree.map(
                lambda old, new: 0.75 * old + 0.25 * new, before["encoder"], state["params"]["world_model"]["encoder"]
            )
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state["slow"]["encoder"], expected)
    assert "loss/position" not in metrics and np.mean(history[-5:]) < 0.5 * np.mean(history[:5])
    views = agent.report(state["params"], batch, jax.random.key(0))
    assert views["true"] == views["pred"] == {} and views["open_reward"].shape == (B, T)
    report = make_report(agent, state, batch, batch, metrics)
    assert report.videos == {} and report.page().ndim == 3


def test_loss_terms_without_a_scale_are_refused(monkeypatch):
    class Nameless(SelfPrediction):
        def losses(self, *arguments: Any) -> dict[str, jax.Array]:
            return {"other": super().losses(*arguments)["self"]}

    monkeypatch.setitem(OBJECTIVES, "reconstruction", Nameless)
    agent = Agent(VECTOR, DISCRETE, small_config())
    with pytest.raises(ValueError, match="'other'.* and their scales .*'self'"):
        jax.eval_shape(agent.learn, jax.eval_shape(agent.create, 0), random_batch(agent))


# Acting


def _observation(envs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"position": rng.normal(0, 1, (envs, 3)).astype(np.float32), "is_first": np.ones(envs, bool)}


def test_what_an_actor_remembers_comes_back_with_the_batch_and_is_never_rewritten():
    envs = vector_env(lambda index, seed: Scripted([(1.0, False, False)] * 6 + [(1.0, True, False)]))
    agent = Agent(envs.observation_spaces, envs.action_spaces, tiny_config(), chooses=lookup)
    rewritten = {name: field.latent for name, field in agent.extras.items()}
    assert rewritten == {"deter": True, "stoch": True, "row": False, "drawn": False, "step": False}
    state = agent.init(0)
    collector = Collector(agent, envs, np.asarray(state["key"]), "policy")
    replay = Replay(replay_fields(envs.observation_spaces, envs.action_spaces, agent.extras), 1, 100, 9, 0)
    for _ in range(30):
        replay.add(collector.act(state["params"]))
        collector.wait()
    envs.close()
    batch = replay.gather(selection := replay.select(4))
    np.testing.assert_array_equal(batch["row"], (np.asarray(batch["deter"], np.float32)[..., :3] > 0).sum(-1))
    np.testing.assert_array_equal(batch["action"], batch["row"] % 3)
    assert len(np.unique(batch["drawn"])) > 8
    # Its memory of an episode goes from step to step, and is empty where one begins.
    assert (batch["step"][batch["is_first"]] == 1).all() and batch["is_first"].any()
    follows = ~batch["is_first"][:, 1:]
    np.testing.assert_array_equal(batch["step"][:, 1:][follows], batch["step"][:, :-1][follows] + 1)
    trained = agent.model(state["params"]).split_batch(batch)[2]
    np.testing.assert_array_equal(trained["row"], batch["row"][:, 1:])
    with pytest.raises(ReplayError, match="expected latents among"):
        replay.write(selection, {"row": batch["row"][:, 1:]})


# Gradient through dreams


@pytest.mark.usefixtures("gaussian")
def test_a_behaviour_may_be_differentiated_through_the_dreams_dynamics(monkeypatch):
    """The slope of dreamed rewards along a change of the policy, against differences, in float64; DreamerV3's is 0."""
    monkeypatch.setattr(distributions, "draw_normal", fixed_normal)
    rng, found = np.random.default_rng(0), {}
    with jax.enable_x64(True):
        for kind in (ActorCritic, Dynamics):
            monkeypatch.setattr("dreamer.model.ActorCritic", kind)
            agent = Agent(VECTOR, PUSH, small_config())
            params = jax.tree.map(lambda x: x.astype(jnp.float64), perturb(agent.init(0)["params"]))
            policy = params["actor_critic"]["policy"]
            along = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 1, x.shape)), policy)
            starts = {"deter": jnp.asarray(rng.normal(0, 1, (3, 16))), "stoch": jnp.asarray(rng.normal(0, 1, (3, 4)))}

            def dreamed(far: jax.Array, agent: Agent = agent, params: Any = params, along: Any = along) -> jax.Array:
                moved = jax.tree.map(lambda x, d: x + far * d, params["actor_critic"]["policy"], along)
                model = agent.model({**params, "actor_critic": {**params["actor_critic"], "policy": moved}})
                dream = model.dream({"value": model.actor_critic.value}, starts, jax.random.key(0))  # noqa: B023
                return (dream.reward + dream.cont).sum()

            run = jax.jit(jax.value_and_grad(dreamed), compiler_options=CHEAP)
            found[kind] = float(run(0.0)[1]), float((run(1e-5)[0] - run(-1e-5)[0]) / 2e-5)
    slope, difference = found[Dynamics]
    assert abs(difference) > 1e-3
    np.testing.assert_allclose(slope, difference, rtol=1e-5)
    slope, difference = found[ActorCritic]
    assert slope == 0 and abs(difference) > 1e-3


# Groups of parameters

_POLICY = ("actor_critic", "policy")


def test_groups_of_parameters_are_trained_as_if_they_were_alone():
    """Three groups in one tree, against an optimizer for each group's own tree."""
    options = {
        "": OptimizerConfig(learning_rate=1e-2, warmup=0),
        "actor_critic": OptimizerConfig(learning_rate=1e-3, warmup=3),
        "actor_critic.policy": OptimizerConfig(learning_rate=1e-1, warmup=0, clip=1e6),
    }
    rng = np.random.default_rng(0)
    draw = lambda: {"kernel": jnp.asarray(rng.normal(0, 1, (3, 4)), jnp.float32)}  # noqa: E731
    tree = lambda: {"world_model": draw(), "actor_critic": {"policy": draw(), "policy_2": draw()}}  # noqa: E731
    params = tree()
    paths = {
        "": ("world_model",),
        "actor_critic": ("actor_critic", "policy_2"),
        "actor_critic.policy": ("actor_critic", "policy"),
    }
    part = lambda whole, name: Slow(paths[name], 1.0).of(whole)  # noqa: E731
    whole, alone = make_optimizer(options), {name: make_optimizer({"": one}) for name, one in options.items()}
    state, states = whole.init(params), {name: one.init(part(params, name)) for name, one in alone.items()}
    for _ in range(4):
        grads = tree()
        updates, state = whole.update(grads, state, params)
        for name, one in alone.items():
            expected, states[name] = one.update(part(grads, name), states[name], part(params, name))
            np.testing.assert_array_equal(part(updates, name)["kernel"], expected["kernel"], err_msg=name)


# All at once


@pytest.mark.usefixtures("gaussian", "self_prediction")
def test_a_run_of_stand_ins_learns_saves_goes_on_and_is_evaluated(tmp_path, monkeypatch):
    @functools.cache
    def build(*spaces: Any) -> Agent:
        observations, actions = map(dict, spaces)
        return Agent(observations, actions, tiny_config(), chooses=lookup)

    def make(config: Any, observations: Any, actions: Any, devices: Any = ()) -> Agent:
        return build(tuple(observations.items()), tuple(actions.items()))

    monkeypatch.setattr(components, "make_agent", make)
    monkeypatch.setattr(loaded_agent, "make_agent", make)
    options = {"logdir": str(tmp_path), "run__report_every": 60, "run__eval_policy": "sample", "log__videos": True}
    for steps in (80, 120):
        assert train(tiny_config(run__agent_steps=steps, run__final_eval=True, **options)) == 0
    _, state, meta = Checkpointer(tmp_path, read_only=True).restore()
    assert meta["agent_steps"] == 120 and set(state["slow"]) == {"value", "encoder"}
    assert meta["replay"]["fields"]["stoch"]["dtype"] == "float32" and "row" in meta["replay"]["fields"]
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "train/loss/self" in lines and "eval/score" in lines and "report/latent_dead" not in lines
