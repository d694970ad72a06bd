"""The world model's loss: KL terms and continue targets by hand, and which loss trains which part of the agent."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from learner_data import CHEAP, B, T, fix_draws, perturb, random_batch, small_config

from dreamer.agent import Agent
from dreamer.config import ModelConfig
from dreamer.latents import LATENTS
from dreamer.types import Space
from dreamer.world_model import FREE_NATS, Observed

OBSERVATIONS = {"position": Space("vector", (3,))}
ACTIONS = {"action": Space("discrete", (), (3,))}


@pytest.fixture(scope="module", autouse=True)
def fixed_draws():
    with pytest.MonkeyPatch.context() as patch:
        fix_draws(patch)
        yield


@pytest.fixture(scope="module")
def agent():
    # Without free nats every KL has a gradient.
    return Agent(OBSERVATIONS, ACTIONS, small_config(loss=dict(free_nats=0)))


@pytest.fixture(scope="module")
def params(agent):
    return perturb(agent.init(0)["params"])


def observe(agent: Agent, params: Any, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Losses, states and logits of the world model on a batch."""

    def forward(params: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        model = agent.model(params)
        found: Observed = model.world_model.loss(*model.split_batch(batch), model.actor_critic, {}, jax.random.key(0))
        logits = {"posterior": found.seen.posterior, "prior": found.seen.prior}
        return {"losses": found.losses, "metrics": found.metrics, **logits}

    return jax.device_get(jax.jit(forward, compiler_options=CHEAP)(params, batch))


def spelled_out_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Sum over variables and classes of p ln(p / q), 1 % uniform in both, one (B, T) entry after the other."""
    total = np.zeros(p.shape[:2])
    for index in np.ndindex(p.shape[:3]):
        mixes = []
        for logits in (np.float64(p[index]), np.float64(q[index])):
            odds = np.exp(logits - logits.max())
            mixes.append(0.99 * odds / odds.sum() + 0.01 / len(odds))
        total[index[:2]] += sum(a * math.log(a / b) for a, b in zip(*mixes, strict=True))
    return total


def test_kl_terms_spelled_out(agent, params):
    seen = observe(agent, params, random_batch(agent))
    kl = spelled_out_kl(seen["posterior"], seen["prior"])
    assert kl.min() > 0
    np.testing.assert_allclose(seen["losses"]["dyn"], kl, rtol=1e-3)
    np.testing.assert_allclose(seen["losses"]["rep"], kl, rtol=1e-3)


def test_free_nats_are_for_each_state_and_not_for_the_mean(agent, params):
    batch = random_batch(agent)
    kl = np.float64(observe(agent, params, batch)["losses"]["dyn"])
    middle = float(np.median(kl))
    free = Agent(OBSERVATIONS, ACTIONS, small_config(loss=dict(free_nats=middle)))
    losses = observe(free, params, batch)["losses"]
    for term in ("dyn", "rep"):
        np.testing.assert_allclose(losses[term], np.maximum(kl, middle), rtol=1e-4)
    assert (kl < middle).any() and losses["dyn"].mean() > max(kl.mean(), middle)


def test_free_nats_may_be_those_of_the_mean(agent, params):
    """As DreamerV1 has it: max(n, mean KL), with all of the gradient or none; against the KL without free nats."""
    batch = random_batch(agent)
    kl = np.float64(observe(agent, params, batch)["losses"]["dyn"])
    for nats in (kl.mean() * 0.9, kl.mean() * 1.1):
        other = Agent(OBSERVATIONS, ACTIONS, small_config(loss=dict(free_nats=nats, free_nats_of="mean")))
        losses = observe(other, params, batch)["losses"]
        for term in ("dyn", "rep"):
            np.testing.assert_allclose(losses[term].mean(), max(kl.mean(), nats), rtol=1e-4)
            assert (losses[term].std() > 0) == (nats < kl.mean())


def test_balance_is_two_scales(agent, params):
    """DreamerV2's loss, a KL(sg(q) || p) + (1 - a) KL(q || sg(p)), and V1's KL(q || p): gradients by given logits."""
    (_, free), latent = FREE_NATS["step"], LATENTS["categorical"](ModelConfig(stoch=2, classes=3, unimix=0))
    draws = np.random.default_rng(0).normal(0, 1, (2, 4, 2, 3))
    sg = jax.lax.stop_gradient

    def ours(q: jax.Array, p: jax.Array, dyn: float, rep: float) -> jax.Array:
        one, other = (free(latent.kl(*map(latent.dist, pair)), 0) for pair in ((sg(q), p), (q, sg(p))))
        return dyn * one.mean() + rep * other.mean()

    with jax.enable_x64(True):
        q, p = map(jnp.asarray, draws)
        qs, ps = (scipy.special.softmax(x, -1) for x in draws)
        apart = np.log(qs / ps)
        # dKL/dq = q (ln q/p - KL), by the softmax's Jacobian; dKL/dp = p - q.
        by_q, by_p = qs * (apart - (qs * apart).sum(-1, keepdims=True)) / 4, (ps - qs) / 4
        for dyn, rep in ((0.8, 0.2), (1, 1)):
            slopes = jax.grad(ours, argnums=(0, 1))(q, p, dyn, rep)
            np.testing.assert_allclose(slopes[0], rep * by_q, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(slopes[1], dyn * by_p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["reward_head", "value_head"])
def test_numbers_may_be_unit_normals(kind):
    """Half the squared error, ln of a unit normal's density without its constant; the first prediction is 0."""
    agent = Agent(OBSERVATIONS, ACTIONS, small_config({kind: "normal"}))
    model = agent.model(agent.init(0)["params"])
    head = {"reward_head": model.world_model.reward, "value_head": model.actor_critic.value}[kind]
    x, target = jnp.ones((B, T, model.world_model.rssm.width)), jnp.asarray(random_batch(agent)["reward"][:, 1:])
    assert not head(x).mode().any()
    expected = -scipy.stats.norm.logpdf(np.float64(target)) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(head(x).loss(target), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_continue_target_and_first_predictions(agent, inside):
    """Before training the reward is exactly 0; the continue loss is a cross entropy with (1 - terminal) gamma.

    Without gamma where the discount stands beside the head's predictions.
    """
    params = agent.init(0)["params"]
    cont = params["world_model"]["cont"]["out"]
    cont["kernel"], cont["bias"] = jnp.zeros_like(cont["kernel"]), jnp.full_like(cont["bias"], 1.5)
    batch = random_batch(agent)
    batch["is_terminal"][0, 1] = True
    if not inside:
        agent = Agent(OBSERVATIONS, ACTIONS, small_config(loss=dict(free_nats=0, discount_in_cont=False)))
    losses = observe(agent, params, batch)["losses"]
    target = np.where(batch["is_terminal"][:, 1:], 0, 1 - 1 / 333 if inside else 1)
    assert target[0, 0] == 0 and (target != 0).sum() == B * T - 1
    expected = target * np.log1p(np.exp(-1.5)) + (1 - target) * np.log1p(np.exp(1.5))
    np.testing.assert_allclose(losses["con"], expected, rtol=1e-5)
    # Uniform logits: ln 31 wherever the target lies.
    np.testing.assert_allclose(losses["rew"], math.log(31), rtol=1e-5)
    assert agent.model(params).actor_critic.discount == (1 if inside else 1 - 1 / 333)


PARTS = {
    "encoder": ("world_model", "encoder"),
    "posterior": ("world_model", "rssm", "posterior_logits"),
    "dynamics": ("world_model", "rssm", "gates"),
    "prior": ("world_model", "rssm", "prior_logits"),
    "decoder": ("world_model", "objective"),
    "reward": ("world_model", "reward"),
    "cont": ("world_model", "cont"),
    "policy": ("actor_critic", "policy"),
    "value": ("actor_critic", "value"),
}
FILTER = {"encoder", "posterior", "dynamics"}
TRAINS = {
    "position": FILTER | {"decoder"},
    "rew": FILTER | {"reward"},
    "con": FILTER | {"cont"},
    "dyn": FILTER | {"prior"},
    "rep": FILTER,
    "policy": {"policy"},
    "value": {"value"},
    "repval": FILTER | {"value"},
}


def test_each_loss_trains_exactly_its_parts(agent, params):
    """The truth table above. `dyn` reaches the encoder through the deterministic state; `rep` never the prior."""
    state, batch = agent.init(0), random_batch(agent)
    slow = perturb(state["slow"], seed=1)
    assert set(agent.model(params).scales) == set(TRAINS)

    def total(params: Any, scales: dict[str, jax.Array]) -> jax.Array:
        metrics = agent.loss(params, slow, state["return_scale"], batch, jax.random.key(0))[1].metrics
        return sum(scale * metrics[f"loss/{term}"] for term, scale in scales.items())

    slope = jax.jit(jax.grad(total), compiler_options=CHEAP)
    for term, trained in TRAINS.items():
        grads = slope(params, {k: jnp.float32(k == term) for k in TRAINS})
        moved = set()
        for part, path in PARTS.items():
            tree = grads
            for name in path:
                tree = tree[name]
            moved |= {part} if any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree)) else set()
        assert moved == trained, term
