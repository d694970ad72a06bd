"""Other objectives and actors take their places; no other room notices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_envs import Scripted
from flax import nnx
from learner_data import B, T, random_batch, small_config
from tiny_runs import tiny_config, vector_env

from dreamer.agent import Agent
from dreamer.networks import Linear
from dreamer.objectives import OBJECTIVES, Objective, Seen
from dreamer.optimizer import Slow
from dreamer.replay import Replay, ReplayError
from dreamer.run import components, loaded_agent
from dreamer.run.collector import Collector
from dreamer.run.reports import make_report
from dreamer.run.training import train
from dreamer.saves.checkpoint import Checkpointer
from dreamer.types import Space, replay_fields

VECTOR = {"position": Space("vector", (3,))}
DISCRETE = {"action": Space("discrete", (), (3,))}


# Stand-ins


class SelfPrediction(Objective):
    """Predicts no observation but what a slow copy of the encoder makes of it, with noise that needs a key."""

    def __init__(self, width: int, tokens: int, spaces: Any, config: Any, loss: Any, *, rngs: nnx.Rngs) -> None:
        self.out = Linear(width, tokens, rngs=rngs)
        super().__init__({"self": 2.0}, {"encoder": Slow(("world_model", "encoder"), 0.25)})

    def losses(self, seen: Seen, batch: Any, networks: Any, key: Any) -> dict[str, jax.Array]:
        target = networks.slow["encoder"](batch, seen.actions.shape[:2], seen.actions.dtype)
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


@pytest.fixture
def self_prediction(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "reconstruction", SelfPrediction)


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


# All at once


@pytest.mark.usefixtures("self_prediction")
def test_a_run_of_stand_ins_learns_saves_goes_on_and_is_evaluated(tmp_path, monkeypatch):
    @functools.cache
    def build(*spaces: Any) -> Agent:
        observations, actions = map(dict, spaces)
        return Agent(observations, actions, tiny_config(model__latent="gaussian"), chooses=lookup)

    def make(config: Any, observations: Any, actions: Any, devices: Any = ()) -> Agent:
        return build(tuple(observations.items()), tuple(actions.items()))

    monkeypatch.setattr(components, "make_agent", make)
    monkeypatch.setattr(loaded_agent, "make_agent", make)
    options = {"logdir": str(tmp_path), "run__report_every": 60, "run__eval_policy": "sample", "log__videos": True}
    for steps in (80, 120):
        assert (
            train(tiny_config(run__agent_steps=steps, run__final_eval=True, model__latent="gaussian", **options)) == 0
        )
    _, state, meta = Checkpointer(tmp_path, read_only=True).restore()
    assert meta["agent_steps"] == 120 and set(state["slow"]) == {"value", "encoder"}
    assert meta["replay"]["fields"]["stoch"]["dtype"] == "bfloat16" and "row" in meta["replay"]["fields"]
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "train/loss/self" in lines and "eval/score" in lines and "report/latent_dead" not in lines
