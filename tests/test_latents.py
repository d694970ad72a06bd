"""Every kind of latent: what RSSM and replay need of it; normals against scipy; what a model makes of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from learner_data import CHEAP, B, T, perturb, random_batch, small_config

from dreamer import features
from dreamer.agent import Agent
from dreamer.config import ModelConfig
from dreamer.latents import LATENTS, Deterministic, Gaussian, Latent
from dreamer.types import Space

VECTOR = {"position": Space("vector", (3,))}
DISCRETE = {"action": Space("discrete", (), (3,))}
RNG = np.random.default_rng(0)


def latent_of(kind: str) -> Latent:
    return LATENTS[kind](ModelConfig(latent=kind, stoch=3, classes=4))


def outputs(latent: Latent, *batch: int) -> jax.Array:
    """What a network says of distributions."""
    return latent.shaped(jnp.asarray(RNG.normal(0, 1, (*batch, latent.numbers)), jnp.float32))


@pytest.mark.parametrize("kind", LATENTS)
def test_what_every_latent_keeps(kind):
    latent = latent_of(kind)
    p, q = latent.dist(outputs(latent, 2, 5)), latent.dist(outputs(latent, 2, 5))
    drawn = p.sample(jax.random.key(0))
    assert latent.init(2, jnp.bfloat16).shape == (2, *drawn.shape[2:]) and not latent.init(2, jnp.float32).any()
    assert latent.flat(drawn).shape == (2, 5, latent.width)
    assert latent.kl(p, q).shape == latent.entropy(p).shape == (2, 5)
    sure = latent.dist(latent.shaped(jnp.full(latent.numbers, -1e3).at[0].set(1e3)))
    assert (latent.entropy(p) > latent.least_entropy - 1e-4).all() and latent.entropy(
        sure
    ) > latent.least_entropy - 1e-4
    assert (latent.kl(p, q) > 0).all() and abs(latent.kl(p, p)).max() < 1e-6
    np.testing.assert_array_equal(p.sample(None), p.mode())
    np.testing.assert_array_equal(drawn, p.sample(jax.random.key(0)))
    stored = latent.pack(drawn)
    assert stored.shape[2:] == latent.stored().shape and stored.dtype == latent.stored().dtype
    back = latent.unpack(stored, jnp.float32)
    assert back.dtype == jnp.float32
    np.testing.assert_allclose(back, drawn, rtol=2**-8)
    # What was stored once is exact from then on.
    np.testing.assert_array_equal(np.float32(latent.pack(back)), np.float32(stored))


@pytest.mark.parametrize("kind", LATENTS)
def test_the_order_of_items_and_features_changes_no_number(kind):
    latent = latent_of(kind)
    logits = RNG.normal(0, 1, (5, latent.numbers))

    def tell(last: bool) -> Any:
        with features.items_last(last):
            drawn = latent.dist(latent.shaped(features.enter(jnp.asarray(logits)))).mode()
            return features.leave((drawn, latent.flat(drawn)))

    with jax.enable_x64(True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), tell(False), tell(True))


def test_gaussians_against_scipy():
    """KL by numerical integration of p ln(p / q); entropy; the deviation, which is never below 0.1."""
    latent = Gaussian(2)
    with jax.enable_x64(True):
        logits = RNG.normal(0, 2, (2, 4, latent.numbers))
        p, q = map(latent.dist, logits)
        kl, entropy = latent.kl(p, q), latent.entropy(p)
        ps, qs = (scipy.stats.norm(x[:, :2], np.log1p(np.exp(x[:, 2:])) + 0.1) for x in logits)
        np.testing.assert_allclose(entropy, ps.entropy().sum(-1), rtol=1e-9)
        for i in range(4):
            expected = 0.0
            for a, b, s, t in zip(ps.mean()[i], qs.mean()[i], ps.std()[i], qs.std()[i], strict=True):
                one, other = scipy.stats.norm(a, s), scipy.stats.norm(b, t)
                density = lambda x, one=one, other=other: one.pdf(x) * (one.logpdf(x) - other.logpdf(x))  # noqa: E731
                expected += scipy.integrate.quad(density, a - 12 * s, a + 12 * s, points=[a])[0]
            np.testing.assert_allclose(kl[i], expected, rtol=1e-7)
        assert latent.dist(jnp.full((1, 4), -1e3)).std.min() == 0.1


def test_gaussian_samples_are_normal_and_reparametrised():
    latent = Gaussian(1)
    logits = jnp.broadcast_to(jnp.array([0.7, -0.4]), (4000, 2))
    sample, pull = jax.vjp(lambda x: latent.dist(x).sample(jax.random.key(0)), logits)
    std = np.log1p(np.exp(-0.4)) + 0.1
    assert scipy.stats.kstest(np.asarray(sample[:, 0]), scipy.stats.norm(0.7, std).cdf).pvalue > 1e-3
    (slopes,) = pull(jnp.ones_like(sample))
    np.testing.assert_array_equal(slopes[:, 0], 1)
    # z = (sample - mean) / std moves with the deviation, whose slope is a sigmoid.
    z = (np.asarray(sample[:, 0]) - 0.7) / std
    np.testing.assert_allclose(slopes[:, 1], z / (1 + np.exp(0.4)), rtol=1e-3, atol=1e-4)


def test_points_have_no_chance_and_half_their_squared_distance():
    latent = Deterministic(3)
    one, other = latent.dist(jnp.array([1.0, 2, 3])), latent.dist(jnp.array([1.0, 0, 4]))
    np.testing.assert_array_equal(one.sample(jax.random.key(3)), [1, 2, 3])
    assert latent.kl(one, other) == 2.5 and latent.entropy(one) == 0


@pytest.mark.parametrize("kind", ["gaussian", "deterministic"])
def test_a_model_of_other_latents_filters_stores_and_is_looked_at(kind):
    agent = Agent(VECTOR, DISCRETE, small_config(model={"latent": kind}))
    state, batch = agent.init(0), random_batch(agent)
    assert agent.extras["stoch"].shape == (4,) and agent.extras["stoch"].dtype.name == "bfloat16"
    params = perturb(state["params"])

    def see(params: Any) -> tuple[Any, dict[str, jax.Array]]:
        model = agent.model(params)
        found = model.world_model.loss(*model.split_batch(batch), model.actor_critic, {}, jax.random.key(0))
        return found.seen, found.losses

    seen, losses = jax.device_get(jax.jit(see, compiler_options=CHEAP)(params))
    latent = latent_of(kind) if kind == "deterministic" else Gaussian(4)
    posterior, prior = latent.dist(seen.posterior), latent.dist(seen.prior)
    np.testing.assert_allclose(losses["dyn"], np.maximum(latent.kl(posterior, prior), 1), rtol=1e-4)
    np.testing.assert_array_equal(losses["dyn"], losses["rep"])
    drawn = seen.states["stoch"]
    # Samples scatter around the posterior as its deviations say.
    z = (drawn - posterior.mode()) / getattr(posterior, "std", 1.0)
    assert z.shape == (B, T, 4) and (0.5 < z.std() < 1.6 and abs(z).max() < 4 if kind == "gaussian" else not z.any())
    np.testing.assert_array_equal(seen.feature, np.concatenate([seen.states["deter"], drawn], -1))
    views = agent.report(params, batch, jax.random.key(0))
    assert "probs" not in views and views["kl"].shape == (B, T)
    rng = np.random.default_rng(0)
    first = {"position": rng.normal(0, 1, (5, 3)).astype(np.float32), "is_first": np.ones(5, bool)}
    carry, _, extras = agent.policy(params, agent.init_policy(5), first, jax.random.key(1))
    np.testing.assert_array_equal(extras["stoch"], carry["stoch"].astype(jnp.bfloat16))
