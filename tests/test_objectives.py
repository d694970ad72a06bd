"""What latents predict other than observations: against the formulas written out, and what it teaches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, B, T, perturb, random_batch, small_config, weights

from dreamer.agent import Agent
from dreamer.distributions import OneHot
from dreamer.objectives import (
    OBJECTIVES,
    Networks,
    Objective,
    Reconstruction,
    Seen,
    SelfPrediction,
    Several,
    Targets,
    ValueEquivalence,
)
from dreamer.presets import load_config
from dreamer.types import Space, Spaces
from dreamer.values import ConfigError

VECTOR: Spaces = {"position": Space("vector", (3,))}
DISCRETE: Spaces = {"action": Space("discrete", (), (3,))}
#: Those of encodings.
PREDICTIVE = [name for name, row in OBJECTIVES.items() if not issubclass(row, Reconstruction | ValueEquivalence)]


def make(*names: str, **loss: Any) -> Agent:
    return Agent(VECTOR, DISCRETE, small_config(loss={"objective": names, **loss}))


def parameters(agent: Agent) -> Any:
    return perturb(agent.init(0)["params"])


def networks(agent: Agent, model: Any, slow: Any) -> Networks:
    return Networks(model.world_model, model.actor_critic, agent.slow_modules(slow))


def losses(agent: Agent, params: Any, slow: Any, batch: Mapping[str, Any], key: Any = None) -> tuple[Any, Any]:
    """What the model saw of a batch, and the losses of its objective."""
    model = agent.model(params)
    context, actions, trained = model.split_batch(batch)
    seen = model.world_model.see(context, actions, trained, key)
    return seen, model.world_model.objective.losses(seen, trained, networks(agent, model, slow), key)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", PREDICTIVE)
def test_losses_are_the_formulas_written_out(name):
    agent = make(name)
    params, batch = parameters(agent), random_batch(agent)
    slow = agent.slow_copies(perturb(params, seed=1, size=0.1))
    seen, found = losses(agent, params, slow, batch)
    ours = agent.model(params).world_model
    tokens, feature, deter = (np.float64(x) for x in (seen.tokens, seen.feature, seen.states["deter"]))
    if name == "redundancy_reduction":
        x = (feature @ np.float64(ours.objective.projection.kernel[...])).reshape(B * T, -1)
        y = tokens.reshape(B * T, -1)
        x, y = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (x, y))
        expected = 0.0
        for i in range(x.shape[1]):
            for j in range(y.shape[1]):
                correlation = (x[:, i] * y[:, j]).mean()
                expected += (1 - correlation) ** 2 if i == j else 5e-4 * correlation**2
        np.testing.assert_allclose(found["barlow"], np.full((B, T), expected), rtol=1e-4)
    elif name == "predict_encoding":
        x = np.float64(ours.objective.out(ours.objective.mlp(jnp.float32(deter))))
        np.testing.assert_allclose(found["encoding"], 1 - (unit(x) * unit(tokens)).sum(-1), rtol=1e-4, atol=1e-5)
    else:
        prior = np.float64(ours.rssm.latent.flat(ours.rssm.latent.dist(seen.prior).sample(None)))
        x = np.float64(ours.objective.out(ours.objective.mlp(jnp.float32(np.concatenate([deter, prior], -1)))))
        trained = {key: value[:, 1:] for key, value in batch.items()}
        target = np.float64(agent.slow_modules(slow)["encoder"](trained, (B, T), jnp.float32))
        assert np.abs(target - tokens).max() > 0.01  # the slow encoder's, not the encoder's own
        squared = np.square(unit(x) - unit(target)).sum(-1)
        np.testing.assert_allclose(found["self"], squared, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PREDICTIVE)
def test_targets_are_data(name):
    """Where neither states nor predictions depend on it, the encoding gets no gradient."""
    agent = make(name)
    params, batch = parameters(agent), random_batch(agent)
    seen, _ = losses(agent, params, agent.slow_copies(params), batch)

    def total(tokens: jax.Array, slow: Any) -> jax.Array:
        model = agent.model(params)
        trained = {key: value[:, 1:] for key, value in batch.items()}
        told = model.world_model.objective.losses(
            seen._replace(tokens=tokens), trained, networks(agent, model, slow), None
        )
        return sum(x.sum() for x in told.values())

    slow = agent.slow_copies(params)
    of_tokens = jax.grad(lambda tokens: total(tokens, slow))(seen.tokens)
    of_slow = jax.grad(lambda slow: total(seen.tokens, slow))(slow)
    assert not np.abs(of_tokens).any() and not any(np.abs(x).any() for x in jax.tree.leaves(of_slow))


def gradients(agent: Agent, params: Any, batch: Any) -> Any:
    state = agent.init(0)
    slopes = jax.jit(jax.grad(agent.loss, has_aux=True), compiler_options=CHEAP)
    return slopes(params, agent.slow_copies(params), state["return_scale"], batch, jax.random.key(0))[0]


def test_a_probe_learns_to_draw_and_changes_nothing_else():
    watched, alone = make("redundancy_reduction", "probe"), make("redundancy_reduction")
    params, batch = parameters(watched), random_batch(watched)
    world = dict(params["world_model"])
    parts = world.pop("objective")["parts"]
    without = params | {"world_model": world | {"objective": parts["redundancy_reduction"]}}
    ours, oracle = gradients(watched, params, batch), gradients(alone, without, batch)
    found = ours["world_model"].pop("objective")["parts"]
    expected = oracle["world_model"].pop("objective")
    jax.tree.map(np.testing.assert_array_equal, (ours, found["redundancy_reduction"]), (oracle, expected))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found["probe"]))


def test_each_trains_the_encoder_and_the_dynamics():
    for name in PREDICTIVE:
        agent = make(name, reward=0, cont=0, dyn=0, rep=0, policy=0, value=0, replay_value=0)
        found = gradients(agent, parameters(agent), random_batch(agent))["world_model"]
        for part in ("encoder", "rssm", "objective"):
            assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(found[part])), (name, part)
        assert not any(np.abs(x).any() for x in jax.tree.leaves(found["reward"])), name


def two_hot(logits: np.ndarray, target: float) -> float:
    """Cross entropy with the two bins around a number."""
    half = np.expm1(np.abs(np.linspace(-20, 0, len(logits) // 2 + 1)))
    bins = np.concatenate([-half, half[:-1][::-1]])
    above = int(np.searchsorted(bins, target))
    share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
    log_probs = logits - np.log(np.exp(logits).sum())
    return float(-(1 - share) * log_probs[above - 1] - share * log_probs[above])


@pytest.mark.parametrize("gradient", ["reinforce", "search"])
def test_value_equivalence_is_muzeros_loss_in_a_slow_loop(gradient, monkeypatch):
    """Step by step, state by state, with targets from a stand-in; and in the gradient, each step counts half."""
    steps, rng = 3, np.random.default_rng(2)
    with jax.enable_x64(True):
        agent = Agent(
            VECTOR, DISCRETE, small_config({"latent": "deterministic"}, {"objective": ["value_equivalence"],
            "unroll": steps}, {"gradient": gradient})
        )  # fmt: skip
        params = jax.tree.map(lambda x: x.astype(jnp.float64), parameters(agent))
        batch, value = random_batch(agent, length=6), rng.normal(0, 2, (B, 6))
        logits = rng.normal(0, 1, (B, 6, 3))
        wanted = Targets(jnp.asarray(value), {"action": OneHot(jnp.asarray(logits))})
        monkeypatch.setattr(type(agent.model(params).actor_critic), "targets", lambda *arguments: wanted)
        found = {name: np.asarray(x) for name, x in losses(agent, params, agent.slow_copies(params), batch)[1].items()}
        model = agent.model(params)
        context, actions, trained = model.split_batch(batch)
        seen = model.world_model.see(context, actions, trained, None)
        rssm, ended = model.world_model.rssm, np.asarray(trained["is_last"])
        expected = {name: np.zeros((B, 6)) for name in found}
        for b in range(B):
            for t in range(6):
                state = {name: x[b, t][None] for name, x in seen.states.items()}
                for k in range(steps + 1):
                    if t + k >= 6 or (k and ended[b, t + k - 1]):
                        break
                    share = 1 / steps if k else 1.0
                    if k:
                        state = rssm.imagine_step(state, actions[b, t + k][None], None)
                    x = rssm.feature(state)
                    if k:
                        reward = np.asarray(model.world_model.reward(x).logits[0])
                        expected["unroll_rew"][b, t] += share * two_hot(reward, trained["reward"][b, t + k])
                        p, c = 1 / (1 + np.exp(-float(model.world_model.cont(x).logit[0]))), model.world_model.discount
                        c = 0.0 if trained["is_terminal"][b, t + k] else c
                        expected["unroll_con"][b, t] -= share * (c * np.log(p) + (1 - c) * np.log(1 - p))
                    if not ended[b, t + k]:
                        critic = np.asarray(model.actor_critic.value(x).logits[0])
                        expected["unroll_val"][b, t] += share * two_hot(critic, value[b, t + k])
                        want = np.exp(logits[b, t + k]) / np.exp(logits[b, t + k]).sum()
                        ours = np.asarray(model.actor_critic.policy(x)["action"].log_probs[0])
                        expected["unroll_pol"][b, t] += share * (want * (np.log(want) - ours)).sum()
    assert ended[0, 0] and not expected["unroll_rew"][0, 0] and expected["unroll_rew"][1].all(where=np.arange(6) < 5)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_gradient_is_halved_from_step_to_step():
    """A linear world whose state is multiplied by its weight, read after each of three steps."""

    class Doubling:
        def imagine_step(self, state: Any, action: jax.Array, key: Any) -> Any:
            return {"deter": 2 * state["deter"]}

    config = small_config(loss={"objective": ["value_equivalence"], "unroll": 3})
    objective = ValueEquivalence(4, 4, {}, config.model, config.loss, rngs=weights())
    actions = jnp.zeros((1, 1, 3, 2))

    def read(start: jax.Array) -> jax.Array:
        seen = Seen(*[jnp.zeros(())] * 2, {"deter": start}, *[jnp.zeros(())] * 3)
        return objective._unrolled(seen, actions, Doubling(), None)["deter"][0, 0, :, 0]

    start = jnp.ones((1, 1, 1))
    np.testing.assert_array_equal(read(start), [2, 4, 8])
    np.testing.assert_array_equal(jax.jacobian(read)(start)[:, 0, 0, 0], [2, 4 / 2, 8 / 4])


class LiveTarget(SelfPrediction):
    """Predicts the encoder's own encoding, which may come to meet it."""

    def target(self, seen: Any, observations: Any, encoder: Any) -> jax.Array:
        return seen.tokens


def test_without_the_frozen_target_self_prediction_collapses_and_with_it_does_not(monkeypatch):
    """Nothing else is trained: the mean cosine between the encodings of different observations."""

    def alike(objective: type[Objective]) -> list[float]:
        monkeypatch.setitem(OBJECTIVES, "self_prediction", objective)
        agent = make("self_prediction", reward=0, cont=0, dyn=0, rep=0, policy=0, value=0, replay_value=0)
        state, batch, found = agent.init(0), random_batch(agent), []
        for turn in range(201):
            if turn % 200 == 0:
                seen, _ = losses(agent, state["params"], state["slow"], batch)
                x = unit(np.float64(seen.tokens).reshape(B * T, -1))
                found.append(float((x @ x.T)[~np.eye(B * T, dtype=bool)].mean()))
            state, _, _ = agent.train_step(state, batch)
        return found

    live, frozen = alike(LiveTarget), alike(SelfPrediction)
    assert live[0] == frozen[0] < 0.2
    assert live[1] > 0.6 and frozen[1] < 0.2


def test_several_objectives_are_all_their_losses_and_the_predictions_of_one():
    agent = make("self_prediction", "reconstruction", "predict_encoding")
    model = agent.model(parameters(agent))
    objective = model.world_model.objective
    assert isinstance(objective, Several)
    assert objective.scales == {"self": 500.0, "position": 1.0, "encoding": 500.0}
    assert set(objective.slow) == {"encoder"}
    feature = jnp.ones((2, model.world_model.rssm.width))
    alone = objective.parts["reconstruction"].predict(feature)["position"].mode()
    np.testing.assert_array_equal(objective.predict(feature)["position"].mode(), alone)
    blind = make("self_prediction", "predict_encoding").model
    assert blind(parameters(make("self_prediction", "predict_encoding"))).world_model.objective.predict(feature) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss.objective": ["probe", "reconstruction"]}, "one of reconstruction, autoencoding and probe at most"),
        ({"loss.objective": ["probe", "probe"]}, "expected each objective once"),
        ({"loss.self_prediction": 2.0}, "expected loss.self_prediction 500 without self_prediction in loss.objective"),
        (
            {"loss.objective": "probe", "loss.target_rate": 0.5},
            "expected loss.target_rate 0.05 without self_prediction",
        ),
        (
            {"loss.objective": "predict_encoding", "loss.reconstruction": 0.5},
            "without reconstruction or autoencoding or probe",
        ),
        ({"loss.objective": "redundancy_reduction", "optimizer.accumulate": 2}, "expected optimizer.accumulate 1 with"),
        ({"loss.objective": "spell"}, "self_prediction"),
        (
            {
                "loss.objective": "value_equivalence",
                "actor_critic.gradient": "search",
                "actor_critic.explore": 1.0,
                "model.ensemble": 3,
            },
            "expected actor_critic.gradient reinforce, dynamics or mixed with actor_critic.explore",
        ),
        ({"loss.unroll": 3}, "expected loss.unroll 5 without value_equivalence in loss.objective"),
        (
            {"actor_critic.gradient": "search"},
            "expected value_equivalence in loss.objective with",
        ),
    ],
)
def test_what_cannot_be_together_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        load_config([], changes)


def test_one_name_is_a_list_of_one(tmp_path):
    """As runs of before there could be several have it."""
    (tmp_path / "old.yaml").write_text("loss:\n  objective: probe\n")
    assert load_config([tmp_path / "old.yaml"]).loss.objective == ("probe",)
    assert load_config([], {"loss.objective": "probe"}).loss.objective == ("probe",)
