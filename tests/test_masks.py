"""Masked actions: never taken, in environments and in dreams; the rest is the renormalised distribution."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, perturb, random_batch, small_config

from dreamer import distributions
from dreamer.agent import Agent
from dreamer.distributions import MaskedOneHot, OneHot
from dreamer.types import Space

CLASSES = 18


@pytest.fixture(scope="module")
def drawn():
    """Logits and masks of 64 rows; every mask allows something, one allows a single class, one all."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (64, CLASSES)).astype(np.float32)
    allowed = rng.random((64, CLASSES)) < 0.4
    allowed[:, 3] |= ~allowed.any(-1)
    allowed[0], allowed[1] = False, True
    allowed[0, 7] = True
    return logits, allowed


# The distribution


def test_it_is_the_renormalised_distribution(drawn):
    logits, allowed = drawn
    dist = MaskedOneHot(jnp.asarray(logits), jnp.asarray(allowed))
    entropies = np.asarray(dist.entropy())
    every = MaskedOneHot(jnp.asarray(logits)[:, None], jnp.asarray(allowed)[:, None]).log_prob(jnp.eye(CLASSES))
    for row in range(len(logits)):
        classes = np.flatnonzero(allowed[row])
        odds = np.exp(logits[row, classes].astype(np.float64))
        probs = odds / odds.sum()
        assert math.isclose(entropies[row], -(probs * np.log(probs)).sum(), rel_tol=1e-4, abs_tol=1e-6)
        np.testing.assert_allclose(every[row, classes], np.log(probs), rtol=1e-4, atol=1e-6)
    probs = np.asarray(dist.probs)
    assert (probs[~allowed] == 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    assert entropies[0] == 0


def test_ten_thousand_draws_and_the_mode_are_allowed(drawn):
    """Forbidden logits are the largest by far, and every mask is met by more than 150 draws."""
    logits, allowed = drawn
    logits = np.where(allowed, logits, 50.0).astype(np.float32)
    dist = MaskedOneHot(jnp.asarray(logits), jnp.asarray(allowed))
    samples = np.asarray(jax.vmap(dist.sample)(jax.random.split(jax.random.key(0), 160)))
    assert samples.shape[0] * samples.shape[1] > 10_000
    assert ((samples == 0) | (samples == 1)).all() and (samples.sum(-1) == 1).all()
    assert not samples[:, ~allowed].any()
    # The allowed ones are all met, as often as they are likely: each mean within five standard errors.
    probs = np.asarray(dist.probs)
    error = np.sqrt(probs * (1 - probs) / len(samples))
    assert (np.abs(samples.mean(0) - probs) <= 5 * error + 1e-6).all()
    best = np.where(allowed, logits, -np.inf).argmax(-1)
    np.testing.assert_array_equal(np.asarray(dist.mode()).argmax(-1), best)
    np.testing.assert_array_equal(np.asarray(dist.sample(None)).argmax(-1), best)


def test_a_draw_that_rounding_put_on_a_forbidden_class_becomes_the_mode(monkeypatch):
    monkeypatch.setattr(distributions, "draw_class", lambda key, probs: jnp.full(probs.shape[:-1], 2))
    logits = jnp.asarray([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    dist = MaskedOneHot(logits, jnp.asarray([[True, True, False], [True, True, True]]))
    assert dist.sample(jax.random.key(0)).argmax(-1).tolist() == [1, 2]


def test_forbidden_logits_get_no_gradient(drawn):
    logits, allowed = drawn
    weights = jnp.asarray(np.random.default_rng(1).normal(size=logits.shape), jnp.float32)

    def functions(logits: jax.Array) -> dict[str, jax.Array]:
        dist = MaskedOneHot(logits, jnp.asarray(allowed))
        taken = dist.sample(jax.random.key(1))
        return {
            "log_prob": dist.log_prob(jax.lax.stop_gradient(taken)).sum(),
            "entropy": dist.entropy().sum(),
            "straight_through": (taken * weights).sum(),
        }

    for name, gradient in jax.jacobian(functions)(jnp.asarray(logits)).items():
        assert np.isfinite(gradient).all(), name
        assert (np.asarray(gradient)[~allowed] == 0).all(), name
        assert np.abs(np.asarray(gradient)[allowed]).max() > 1e-3, name


def test_a_mask_that_allows_all_or_nothing_changes_no_number(drawn):
    logits, _ = drawn
    plain = OneHot(jnp.asarray(logits))
    for value in (True, False):
        dist = MaskedOneHot(jnp.asarray(logits), jnp.full(logits.shape, value))
        np.testing.assert_array_equal(dist.log_probs, plain.log_probs)
        np.testing.assert_array_equal(dist.sample(jax.random.key(2)), plain.sample(jax.random.key(2)))
        np.testing.assert_array_equal(dist.entropy(), plain.entropy())


# The agent

OBSERVATIONS = {"position": Space("vector", (3,)), "action_mask": Space("discrete", (5,), (2,) * 5)}
ACTIONS = {"action": Space("discrete", (), (5,))}


def agent_of(imagine_mask: str = "predict") -> Agent:
    return Agent(OBSERVATIONS, ACTIONS, small_config(actor_critic={"imagine_mask": imagine_mask}))


@pytest.fixture(scope="module")
def agent():
    return agent_of()


@pytest.fixture(scope="module")
def params(agent):
    """The policy longs for action 4; the decoder says that only 1 and 2 are ever allowed."""
    params = perturb(agent.init(0)["params"])
    head = params["actor_critic"]["policy"]["heads"]["action"]["logits"]
    head["bias"] = head["bias"].at[4].set(9.0)
    mask = params["world_model"]["objective"]["decoder"]["heads"]["action_mask"]
    signs = jnp.asarray([-1.0, 1.0, 1.0, -1.0, -1.0])
    mask["bias"] = jnp.stack([-99 * signs, 99 * signs], -1).reshape(-1)
    return params


@pytest.mark.parametrize("sampled", [True, False])
def test_the_policy_takes_allowed_actions(agent, params, sampled):
    rng, envs = np.random.default_rng(2), 10_000
    masks = (rng.random((envs, 5)) < 0.4).astype(np.int32)
    masks[masks.sum(-1) == 0, 2] = 1
    position = rng.normal(size=(envs, 3)).astype(np.float32)
    obs = {"position": position, "action_mask": masks, "is_first": np.ones(envs, bool)}
    key = jax.random.key(0) if sampled else None
    carry, action, _ = agent.policy(params, agent.init_policy(envs), obs, key)
    taken = np.asarray(action["action"])
    assert masks[np.arange(envs), taken].all()
    assert set(np.unique(taken)) == set(range(5)), "all are taken where they are allowed"
    np.testing.assert_array_equal(np.asarray(carry["action"]).argmax(-1), taken)


def dream_of(agent: Agent, params: Any) -> tuple[Any, np.ndarray]:
    """Allowed actions where one was taken, or None, and the actions taken (H, 200) of a dream."""

    def dream(params: Any) -> tuple:
        model = agent.model(params)
        stored = {k: v[:, 0] for k, v in random_batch(agent).items() if k in agent.extras}
        starts = jax.tree.map(lambda x: jnp.repeat(x, 100, 0), model.world_model.rssm.unpack(stored, jnp.float32))
        dream = model.dream({"value": model.actor_critic.value}, starts, jax.random.key(3))
        return dream.allowed, dream.actions.argmax(-1)

    allowed, actions = jax.jit(dream, compiler_options=CHEAP)(params)
    return allowed, np.asarray(actions)


def test_dreams_keep_to_the_predicted_mask(agent, params):
    allowed, actions = dream_of(agent, params)
    np.testing.assert_array_equal(allowed, np.broadcast_to([False, True, True, False, False], (3, 200, 5)))
    assert set(np.unique(actions)) == {1, 2}


def test_dreams_may_ignore_masks(params):
    allowed, actions = dream_of(agent_of("ignore"), params)
    assert allowed is None
    assert (actions == 4).mean() > 0.9


def test_the_losses_are_those_of_the_masked_policy(agent, params):
    """Two actions left, equally likely: the entropy is ln 2, and the forbidden logits get no gradient."""
    head = params["actor_critic"]["policy"]["heads"]["action"]["logits"]
    even = {"kernel": jnp.zeros_like(head["kernel"]), "bias": jnp.asarray([5.0, 1.0, 1.0, -2.0, 9.0])}
    policy = params["actor_critic"]["policy"] | {"heads": {"action": {"logits": even}}}
    params = params | {"actor_critic": params["actor_critic"] | {"policy": policy}}
    state = agent.init(0)
    gradients = jax.jit(jax.grad(agent.loss, has_aux=True), compiler_options=CHEAP)
    grads, (_, _, metrics, *_) = gradients(
        params, state["slow"], state["return_scale"], random_batch(agent), jax.random.key(0)
    )
    assert math.isclose(metrics["ent/action"], math.log(2), rel_tol=1e-5)
    assert math.isclose(metrics["rand/action"], math.log(2) / math.log(5), rel_tol=1e-5)
    got = np.asarray(grads["actor_critic"]["policy"]["heads"]["action"]["logits"]["bias"])
    assert (got[[0, 3, 4]] == 0).all() and (got[[1, 2]] != 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert "loss/action_mask" in metrics, "the mask is predicted like any other observation"


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="single discrete action"):
        Agent(OBSERVATIONS, {"action": Space("vector", (2,))}, small_config())
    with pytest.raises(ValueError, match="single discrete action"):
        Agent(OBSERVATIONS, ACTIONS | {"more": Space("discrete", (), (5,))}, small_config())
    with pytest.raises(ValueError, match="one entry per action"):
        Agent(OBSERVATIONS | {"action_mask": Space("vector", (5,))}, ACTIONS, small_config())
    with pytest.raises(ValueError, match="imagine_mask ignore"):
        Agent(OBSERVATIONS, ACTIONS, small_config(dict(decoder_keys="position")))
    blind = small_config(dict(decoder_keys="position"), actor_critic={"imagine_mask": "ignore"})
    assert Agent(OBSERVATIONS, ACTIONS, blind).masked
