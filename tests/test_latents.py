"""Every kind of latent: what RSSM and replay need of it; normals against scipy; what a model makes of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from learner_data import CHEAP, B, T, perturb, random_batch, small_config

from dreamer import features
from dreamer.agent import Agent
from dreamer.config import ModelConfig
from dreamer.latents import LATENTS, Deterministic, Gaussian, Latent, Mixture
from dreamer.presets import load_config
from dreamer.types import Space
from dreamer.values import ConfigError

VECTOR = {"position": Space("vector", (3,))}
DISCRETE = {"action": Space("discrete", (), (3,))}
RNG = np.random.default_rng(0)


def latent_of(kind: str) -> Latent:
    return LATENTS[kind](ModelConfig(latent=kind, stoch=3, classes=4))


def outputs(latent: Latent, *batch: int) -> jax.Array:
    """What a network says of posteriors."""
    return latent.shaped(jnp.asarray(RNG.normal(0, 1, (*batch, latent.numbers)), jnp.float32))


def prior_outputs(latent: Latent, *batch: int) -> jax.Array:
    return latent.shaped(jnp.asarray(RNG.normal(0, 1, (*batch, latent.prior_numbers)), jnp.float32))


@pytest.mark.parametrize("kind", LATENTS)
def test_what_every_latent_keeps(kind):
    latent = latent_of(kind)
    p, q = latent.dist(outputs(latent, 2, 5)), latent.prior(prior_outputs(latent, 2, 5))
    drawn = p.sample(jax.random.key(0))
    assert drawn.shape == q.sample(jax.random.key(0)).shape
    assert latent.init(2, jnp.bfloat16).shape == (2, *drawn.shape[2:]) and not latent.init(2, jnp.float32).any()
    assert latent.flat(drawn).shape == (2, 5, latent.width)
    assert latent.kl(p, q).shape == latent.entropy(p).shape == latent.entropy(q).shape == (2, 5)
    assert latent.dyn(p, q, drawn).shape == latent.rep(p, q).shape == (2, 5)
    assert latent.mean(p).shape == latent.mean(q).shape == drawn.shape
    sure = [latent.dist(latent.shaped(jnp.full(latent.numbers, -1e3).at[0].set(1e3))),
            latent.prior(latent.shaped(jnp.full(latent.prior_numbers, -1e3).at[0].set(1e3)))]  # fmt: skip
    for one in (p, q, *sure):
        assert (latent.entropy(one) > latent.least_entropy - 1e-4).all()
        np.testing.assert_array_equal(one.sample(None), one.mode())
    assert (latent.kl(p, q) > 0).all()
    if kind != "mixture":  # where posteriors and priors are of one kind
        assert abs(latent.kl(p, p)).max() < 1e-6
        np.testing.assert_array_equal(latent.dyn(p, q, drawn), latent.kl(p, q))
        np.testing.assert_array_equal(latent.rep(p, q), latent.kl(p, q))
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
    logits, of_prior = (RNG.normal(0, 1, (5, width)) for width in (latent.numbers, latent.prior_numbers))

    def tell(last: bool) -> Any:
        with features.items_last(last):
            p, q = (latent.shaped(features.enter(jnp.asarray(x))) for x in (logits, of_prior))
            p, q = latent.dist(p), latent.prior(q)
            drawn = p.mode()
            numbers = latent.kl(p, q), latent.entropy(q), latent.dyn(p, q, drawn), latent.rep(p, q)
            return features.leave((drawn, latent.flat(drawn), q.mode())), numbers if kind != "categorical" else ()

    with jax.enable_x64(True):
        one, other = (jax.jit(functools.partial(tell, last), compiler_options=CHEAP)() for last in (False, True))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), one, other)


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


def mixture(temperature: float = 1.0) -> tuple[Mixture, np.ndarray, Any, np.ndarray]:
    """A latent of 2 variables and 3 normals; 4 outputs of a network, the normals they mean, (4, 2, 3), their shares."""
    latent = Mixture(2, 3, temperature)
    logits = RNG.normal(0, 1, (4, 3, 2, 3))
    logits[:, 1] *= 3
    weights = scipy.special.softmax(logits[:, 0], -1)
    normals = scipy.stats.norm(logits[:, 1], np.log1p(np.exp(logits[:, 2])) + 0.1)
    return latent, logits.reshape(4, 18), normals, weights


def test_mixtures_against_scipy():
    """Density; entropy and KL by numerical integration; what trains prior and posterior."""
    latent, logits, normals, weights = mixture()
    density = lambda i, s, x: (weights[i, s] * scipy.stats.norm.pdf(x, normals.mean()[i, s], normals.std()[i, s])).sum()  # noqa: E731
    log = lambda i, s, x: np.log(density(i, s, x))  # noqa: E731

    def tell(numbers: jax.Array, of_prior: jax.Array) -> tuple:
        posterior, prior = latent.dist(numbers), latent.prior(of_prior)
        drawn = posterior.sample(jax.random.key(0))
        trained = latent.dyn(posterior, prior, drawn), latent.rep(posterior, prior)
        return posterior, drawn, *trained, latent.kl(posterior, prior), latent.entropy(prior)

    with jax.enable_x64(True):
        tell = jax.jit(tell, compiler_options=CHEAP)
        posterior, drawn, dyn, rep, kl, entropy = jax.device_get(tell(RNG.normal(0, 1, (4, 4)), logits))
    for i in range(4):
        own = [scipy.stats.norm(m, s) for m, s in zip(posterior.mean[i], posterior.std[i], strict=True)]
        np.testing.assert_allclose(dyn[i], -sum(log(i, s, drawn[i, s]) for s in range(2)), rtol=1e-9)
        apart = unit = known = 0.0
        for s, one in enumerate(own):
            ends, middles = one.interval(1 - 1e-12), normals.mean()[i, s]
            over = lambda f, one=one: lambda x: one.pdf(x) * (one.logpdf(x) - f(x))  # noqa: E731
            apart += scipy.integrate.quad(over(lambda x, s=s: log(i, s, x)), *ends)[0]  # noqa: B023
            unit += scipy.integrate.quad(over(scipy.stats.norm.logpdf), *ends)[0]
            of_prior = lambda x, s=s: -density(i, s, x) * log(i, s, x)  # noqa: B023, E731
            known += scipy.integrate.quad(of_prior, -25, 25, points=middles, limit=200)[0]
        np.testing.assert_allclose(rep[i], unit, rtol=1e-7)
        # The quadrature has five points for each normal.
        np.testing.assert_allclose(kl[i], apart, rtol=0.05, atol=0.05)
        np.testing.assert_allclose(entropy[i], known, rtol=0.05, atol=0.05)


def test_a_mixture_of_equal_normals_is_that_normal():
    """There the quadrature is exact, and KL and entropy are those of Gaussian latents."""
    latent, gaussian = Mixture(2, 3), Gaussian(2)
    with jax.enable_x64(True):
        one, other = RNG.normal(0, 1, (2, 4, 4))
        same = jnp.repeat(other.reshape(4, 2, 2, 1), 3, -1).reshape(4, 12)
        prior = latent.prior(jnp.concatenate([RNG.normal(0, 1, (4, 6)), same], -1))
        posterior, alone = latent.dist(one), gaussian.dist(other)
        np.testing.assert_allclose(latent.kl(posterior, prior), gaussian.kl(posterior, alone), rtol=1e-9)
        np.testing.assert_allclose(latent.entropy(prior), gaussian.entropy(alone), rtol=1e-9)


def test_the_prior_learns_from_the_draw_as_data_and_the_posterior_from_the_unit_normal():
    latent = Mixture(2, 3)
    numbers, of_prior = jnp.asarray(RNG.normal(0, 1, (5, 4))), jnp.asarray(RNG.normal(0, 1, (5, 18)))

    def total(which: str, numbers: jax.Array, of_prior: jax.Array) -> jax.Array:
        p, q = latent.dist(numbers), latent.prior(of_prior)
        drawn = p.sample(jax.random.key(0))
        return (latent.dyn(p, q, drawn) if which == "dyn" else latent.rep(p, q)).sum()

    slopes = functools.partial(jax.jit, static_argnums=0, compiler_options=CHEAP)(jax.grad(total, (1, 2)))
    taught = {name: [bool(x.any()) for x in slopes(name, numbers, of_prior)] for name in ("dyn", "rep")}
    assert taught == {"dyn": [False, True], "rep": [True, False]}


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_draws_of_a_mixture_follow_its_temperature(temperature):
    """Shares of the logits over the temperature, deviations times its root; densities are those of temperature 1."""
    latent, logits, normals, weights = mixture(temperature)
    many = jnp.broadcast_to(jnp.asarray(logits[0], jnp.float32), (4000, 18))
    drawn = np.asarray(latent.prior(many).sample(jax.random.key(1)))
    for s in range(2):
        shares = weights[0, s] ** (1 / temperature)
        spread = scipy.stats.norm(normals.mean()[0, s], normals.std()[0, s] * temperature**0.5)
        cdf = lambda x: (shares / shares.sum() * spread.cdf(np.asarray(x)[..., None])).sum(-1)  # noqa: B023, E731
        assert scipy.stats.kstest(drawn[:, s], cdf).pvalue > 1e-3
    expected = (weights[0] * normals.mean()[0]).sum(-1)
    np.testing.assert_allclose(latent.mean(latent.prior(many[:1]))[0], expected, rtol=1e-5)
    plain = Mixture(2, 3)
    np.testing.assert_array_equal(latent.prior(many[:3]).log_prob(drawn[:3]), plain.prior(many[:3]).log_prob(drawn[:3]))


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model.temperature": 1.15}, "expected model.temperature 1 with model.latent categorical, got 1.15"),
        ({"model.components": 3, "model.latent": "gaussian"}, "expected model.components 5 with model.latent gaussian"),
        ({"model.latent": "mixture"}, "expected loss.free_nats_of rep .* got step"),
        ({"model.dynamics": "lstm", "model.deter": 27, "model.blocks": 9}, "expected an even model.deter .* got 27"),
    ],
)
def test_options_that_nothing_would_read_or_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        load_config([], options)


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


def test_a_world_model_of_2018_filters_learns_and_is_looked_at():
    """An autoencoder, whose latents a memory predicts: which of the five losses are what; who reads what."""
    model = {"latent": "mixture", "dynamics": "lstm"}
    loss = {"objective": ["autoencoding"], "free_nats_of": "rep", "free_nats": 2.0}
    agent = Agent(VECTOR, DISCRETE, small_config(model, loss))
    state, batch = agent.init(0), random_batch(agent)
    params, other = perturb(state["params"]), {**batch, "deter": -batch["deter"], "stoch": -batch["stoch"]}

    def see(params: Any, batch: Any) -> tuple[Any, dict[str, jax.Array], Any]:
        model = agent.model(params)
        found = model.world_model.loss(*model.split_batch(batch), model.actor_critic, {}, jax.random.key(0))
        return found.seen, found.losses, model.world_model.objective.predict(found.seen.feature)["position"].mode()

    run = jax.jit(see, compiler_options=CHEAP)
    (seen, losses, drawn), (elsewhere, _, drawn_there) = (jax.device_get(run(params, one)) for one in (batch, other))
    latent = Mixture(4)
    posterior, prior = latent.dist(seen.posterior), latent.prior(seen.prior)
    np.testing.assert_allclose(losses["dyn"], -prior.log_prob(seen.states["stoch"]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(losses["rep"], np.maximum(latent.rep(posterior, prior), 2), rtol=1e-4)
    # What came before changes the memory and the prior, not what is seen, nor how it is drawn.
    assert (seen.states["deter"] != elsewhere.states["deter"])[:, 0].any() and (seen.prior != elsewhere.prior).any()
    np.testing.assert_array_equal(seen.posterior, elsewhere.posterior)
    np.testing.assert_array_equal(drawn, drawn_there)
    # The prior reads h, the first half, alone.
    rssm = agent.model(params).world_model.rssm
    cells = np.array(seen.states["deter"])
    cells[..., 8:] += 1
    np.testing.assert_array_equal(rssm.prior(jnp.asarray(cells)), rssm.prior(jnp.asarray(seen.states["deter"])))
    views = agent.report(params, batch, jax.random.key(0))
    assert "probs" not in views and views["kl"].shape == (B, T)
    history = []
    for _ in range(60):
        state, _, metrics = agent.train_step(state, batch)
        history.append(float(metrics["loss/dyn"] + metrics["loss/position"]))
    assert np.mean(history[-5:]) < np.mean(history[:5]) - 0.5
