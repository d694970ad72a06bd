"""Distributions and losses against slow, spelled-out float64 oracles (numpy, scipy)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dreamer import distributions
from dreamer.distributions import (
    Bernoulli,
    MultiOneHot,
    Normal,
    OneHot,
    SquaredError,
    TwoHot,
    draw_class,
    symexp,
    symlog,
    twohot_bins,
)

RNG = np.random.default_rng(0)


def softmax(x: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(np.float64(x), -1)


def mixed(logits: np.ndarray, unimix: float) -> np.ndarray:
    """Probabilities with the uniform share, float64."""
    return (1 - unimix) * softmax(logits) + unimix / logits.shape[-1]


# Symlog


def test_symlog_is_odd_monotone_and_inverted_by_symexp():
    x = np.concatenate([-np.logspace(6, -6, 40), [0.0], np.logspace(-6, 6, 40)]).astype(np.float32)
    y = np.asarray(symlog(jnp.asarray(x)))
    np.testing.assert_array_equal(y, -np.asarray(symlog(jnp.asarray(-x))))
    assert (np.diff(y) > 0).all()
    np.testing.assert_allclose(symexp(jnp.asarray(y)), x, rtol=3e-6)
    np.testing.assert_allclose(y, np.sign(x) * np.log1p(np.abs(np.float64(x))), rtol=1e-6)


def test_symlog_gradient_at_zero_is_one():
    # d/dx symlog(x) = 1 / (1 + |x|)
    np.testing.assert_allclose(jax.vmap(jax.grad(symlog))(jnp.array([-3.0, 1e-4, 1.0])), [0.25, 1, 0.5], rtol=2e-4)


# Categorical


def test_draw_class_frequencies():
    probs = np.array([[0.02, 0.5, 0.0, 0.48], [0.25, 0.25, 0.25, 0.25], [0.0, 0.1, 0.9, 0.0]], np.float32)
    draws = 20_000
    index = np.asarray(draw_class(jax.random.key(1), jnp.broadcast_to(probs, (draws, *probs.shape))))
    assert index.shape == (draws, 3)
    for row, drawn in zip(probs, index.T, strict=True):
        counts = np.bincount(drawn, minlength=4)
        possible = row > 0
        assert counts[~possible].sum() == 0
        expected = np.float64(row[possible]) / np.float64(row[possible]).sum() * draws
        assert scipy.stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_draw_class_inverts_the_cumulative_distribution(monkeypatch):
    """Each uniform picks the class whose interval [F(k-1), F(k)) holds it; none falls off the end."""
    probs = np.array([0.0, 0.25, 0.5, 0.0, 0.25], np.float32)
    uniforms = np.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999999], np.float32)
    monkeypatch.setattr(distributions.jax.random, "uniform", lambda key, shape, dtype: jnp.asarray(uniforms, dtype))
    index = draw_class(jax.random.key(0), jnp.broadcast_to(probs, (6, 5)))
    np.testing.assert_array_equal(index, [1, 1, 2, 2, 4, 4])
    # Probabilities that add up to a little less than 1, as rounding makes them.
    index = draw_class(jax.random.key(0), jnp.broadcast_to(probs * np.float32(0.999999), (6, 5)))
    assert index.max() == 4


def test_draw_class_draws_variables_independently():
    index = np.asarray(draw_class(jax.random.key(2), jnp.full((4000, 2, 2), 0.5)))
    table = np.histogram2d(*index.T, bins=2)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("unimix", [0.0, 0.01, 1.0])
def test_onehot_against_scipy(unimix):
    p, q = RNG.normal(0, 3, (2, 5, 4, 6)).astype(np.float32)
    event = np.eye(6, dtype=np.float32)[RNG.integers(0, 6, (5, 4))]
    ours, other = OneHot(jnp.asarray(p), unimix), OneHot(jnp.asarray(q), unimix)
    pp, qq = mixed(p, unimix), mixed(q, unimix)
    np.testing.assert_allclose(ours.probs, pp, rtol=2e-5)
    np.testing.assert_allclose(ours.entropy(), scipy.stats.entropy(pp, axis=-1), rtol=2e-5)
    np.testing.assert_allclose(ours.kl(other), scipy.stats.entropy(pp, qq, axis=-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.log_prob(event), np.log((pp * event).sum(-1)), rtol=2e-5)
    np.testing.assert_allclose(ours.loss(event), -np.log((pp * event).sum(-1)), rtol=2e-5)


def test_unimix_bounds_the_probabilities():
    probs = OneHot(jnp.array([[100.0, 0.0, -100.0]]), 0.01).probs
    np.testing.assert_allclose(probs, [[0.99 + 0.01 / 3, 0.01 / 3, 0.01 / 3]], rtol=1e-5)


def test_onehot_mode_and_sample():
    logits = jnp.asarray(RNG.normal(0, 1, (50, 4)), jnp.float32)
    dist = OneHot(logits)
    np.testing.assert_array_equal(dist.mode(), np.eye(4)[np.argmax(logits, -1)])
    np.testing.assert_array_equal(dist.sample(None), dist.mode())
    sample = np.asarray(dist.sample(jax.random.key(0)))
    np.testing.assert_array_equal(np.unique(sample), [0, 1])
    np.testing.assert_array_equal(sample.sum(-1), 1)
    assert (sample != np.asarray(dist.mode())).any()


@pytest.mark.parametrize("key", [None, 7])
def test_straight_through_gradient_is_that_of_the_mixed_probabilities(key):
    logits = RNG.normal(0, 2, (3, 5)).astype(np.float32)
    weights = RNG.normal(0, 1, (3, 5)).astype(np.float32)
    key = None if key is None else jax.random.key(key)
    grad = jax.grad(lambda x: (OneHot(x, 0.01).sample(key) * weights).sum())(jnp.asarray(logits))
    # d/dl sum_k w_k (0.99 p_k + const) = 0.99 (p w - p (p . w))
    p = softmax(logits)
    oracle = 0.99 * (p * weights - p * (p * weights).sum(-1, keepdims=True))
    np.testing.assert_allclose(grad, oracle, rtol=1e-4, atol=1e-6)


def test_loss_target_gets_no_gradient():
    logits, target = jnp.array([0.3, -0.2]), jnp.array([0.5, 0.5])
    assert not jax.grad(lambda t: OneHot(logits).loss(t))(target).any()
    assert not jax.grad(lambda t: MultiOneHot(logits, (2,)).loss(t))(target).any()
    assert jax.grad(lambda t: Bernoulli(jnp.float32(0.3)).loss(t))(jnp.float32(0.4)) == 0
    assert jax.grad(lambda t: TwoHot(jnp.arange(5.0)).loss(t))(jnp.float32(0.4)) == 0
    assert not jax.grad(lambda t: SquaredError(logits, rank=1).loss(t))(target).any()


def test_multi_onehot_is_the_sum_of_its_parts():
    classes = (3, 1, 4)
    logits = jnp.asarray(RNG.normal(0, 2, (6, 8)), jnp.float32)
    whole = MultiOneHot(logits, classes)
    parts = [OneHot(logits[:, :3]), OneHot(logits[:, 3:4]), OneHot(logits[:, 4:])]
    value = np.asarray(whole.sample(jax.random.key(0)))
    values = [value[:, :3], value[:, 3:4], value[:, 4:]]
    for v in values:
        np.testing.assert_array_equal(v.sum(-1), 1)
    total = sum(np.asarray(p.log_prob(v)) for p, v in zip(parts, values, strict=True))
    np.testing.assert_allclose(whole.log_prob(value), total, rtol=1e-6)
    np.testing.assert_allclose(whole.loss(value), -total, rtol=1e-6)
    np.testing.assert_allclose(whole.entropy(), sum(np.asarray(p.entropy()) for p in parts), rtol=1e-6)
    np.testing.assert_array_equal(whole.mode(), np.concatenate([p.mode() for p in parts], -1))
    np.testing.assert_array_equal(whole.sample(None), whole.mode())


# Normal


def test_bounded_normal_against_scipy():
    raw_mean, raw_std, action = RNG.normal(0, 2, (3, 9, 2)).astype(np.float32)
    dist = Normal.bounded(jnp.asarray(raw_mean), jnp.asarray(raw_std), 0.1, 1.0)
    mean, std = np.tanh(np.float64(raw_mean)), 0.9 * scipy.special.expit(np.float64(raw_std) + 2) + 0.1
    oracle = scipy.stats.norm(mean, std)
    np.testing.assert_allclose(dist.log_prob(action), oracle.logpdf(action).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dist.entropy(), oracle.entropy().sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dist.sample(None), dist.mode())
    np.testing.assert_allclose(dist.mode(), mean, rtol=1e-5)


def test_bounded_normal_std_stays_within_its_limits():
    std = Normal.bounded(jnp.zeros(3), jnp.array([-1e9, 0.0, 1e9]), 0.1, 1.0).std
    np.testing.assert_allclose(std, [0.1, 0.9 / (1 + math.exp(-2)) + 0.1, 1.0], rtol=1e-6)


def test_normal_samples_follow_the_distribution():
    dist = Normal(jnp.full((20_000,), -0.7), jnp.full((20_000,), 0.3))
    sample = np.asarray(dist.sample(jax.random.key(0)))
    assert scipy.stats.kstest(sample, scipy.stats.norm(-0.7, 0.3).cdf).pvalue > 1e-3


# Binary


def test_bernoulli_against_the_definition():
    logit = np.array([-30.0, -2.0, 0.0, 0.5, 30.0], np.float32)
    target = np.array([0.0, 0.3, 1.0, 1 - 1 / 333, 1.0], np.float32)
    dist = Bernoulli(jnp.asarray(logit))
    t, z = np.float64(target), np.float64(logit)
    oracle = t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)
    np.testing.assert_allclose(dist.loss(target), oracle, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(dist.mode(), scipy.special.expit(z), rtol=1e-6)


def test_bernoulli_loss_is_least_at_the_soft_target():
    target = 1 - 1 / 333
    best = math.log(target / (1 - target))
    assert abs(jax.grad(lambda z: Bernoulli(z).loss(jnp.float32(target)))(best)) < 1e-6


# Two-hot


def spelled_out_twohot(target: float, bins: np.ndarray) -> np.ndarray:
    """The label: walk along the bins until the next one is above the target."""
    label = np.zeros(len(bins))
    if target <= bins[0]:
        label[0] = 1
    elif target >= bins[-1]:
        label[-1] = 1
    else:
        k = 0
        while bins[k + 1] <= target:
            k += 1
        share = (target - bins[k]) / (bins[k + 1] - bins[k])
        label[k], label[k + 1] = 1 - share, share
    return label


def test_twohot_bins_are_symmetric_exponential_and_hold_zero():
    for count in (3, 31, 255):
        bins = twohot_bins(count)
        assert bins.shape == (count,) and bins.dtype == np.float32
        np.testing.assert_array_equal(bins, -bins[::-1])
        assert bins[count // 2] == 0 and (np.diff(bins) > 0).all()
        half = np.linspace(-20, 0, count // 2 + 1)
        np.testing.assert_allclose(bins[: count // 2 + 1], -np.expm1(-half), rtol=2e-5)


def test_twohot_loss_on_between_and_outside_the_bins():
    bins = np.float64(twohot_bins(31))
    targets = [*bins, *(bins[1:] * 0.4 + bins[:-1] * 0.6), -1e12, 1e12, 0.0, -0.0, 1e-6, -7.3, 123.4]
    targets = np.array(targets, np.float32)
    logits = RNG.normal(0, 2, (len(targets), 31)).astype(np.float32)
    logs = np.float64(logits) - scipy.special.logsumexp(np.float64(logits), -1, keepdims=True)
    oracle = [-(spelled_out_twohot(np.float64(t), bins) * row).sum() for t, row in zip(targets, logs, strict=True)]
    np.testing.assert_allclose(TwoHot(jnp.asarray(logits)).loss(jnp.asarray(targets)), oracle, rtol=1e-4)


def test_twohot_best_logits_predict_the_target():
    """Label and prediction are inverse: the logits whose softmax is the label give the target back."""
    bins = np.float64(twohot_bins(255))
    targets = np.array([-1e5, -12.0, -0.3, 0.0, 0.01, 1.0, 77.0, 1e6], np.float32)
    labels = np.stack([spelled_out_twohot(np.float64(t), bins) for t in targets])
    dist = TwoHot(jnp.log(jnp.asarray(labels, jnp.float32) + 1e-30))
    np.testing.assert_allclose(dist.mode(), targets, rtol=1e-4, atol=1e-6)
    entropy = scipy.stats.entropy(labels, axis=-1)
    np.testing.assert_allclose(dist.loss(jnp.asarray(targets)), entropy, rtol=1e-2, atol=1e-4)


def test_twohot_gradient_is_softmax_minus_label():
    bins = np.float64(twohot_bins(31))
    logits = RNG.normal(0, 2, (4, 31)).astype(np.float32)
    targets = np.array([-3.3, 0.0, 5e9, 40.0], np.float32)
    grad = jax.grad(lambda x: TwoHot(x).loss(jnp.asarray(targets)).sum())(jnp.asarray(logits))
    oracle = softmax(logits) - np.stack([spelled_out_twohot(np.float64(t), bins) for t in targets])
    np.testing.assert_allclose(grad, oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [3, 31, 255])
def test_twohot_symmetric_logits_predict_exactly_zero(count):
    half = RNG.normal(0, 1, (7, count // 2)).astype(np.float32)
    logits = np.concatenate([half, np.ones((7, 1), np.float32), half[:, ::-1]], -1)
    for predict in (lambda x: TwoHot(x).mode(), jax.jit(lambda x: TwoHot(x).mode())):
        np.testing.assert_array_equal(predict(jnp.asarray(logits)), 0)


def test_a_broken_target_shows_in_every_loss():
    nan = jnp.float32(np.nan)
    assert jnp.isnan(TwoHot(jnp.zeros(5)).loss(nan))
    assert jnp.isnan(Bernoulli(jnp.float32(0)).loss(nan))
    assert jnp.isnan(SquaredError(jnp.zeros(2), rank=1, symlog_space=True).loss(jnp.array([0, nan])))
    assert jnp.isnan(OneHot(jnp.zeros(2)).loss(jnp.array([0, nan])))


# Squared errors


def test_squared_error_sums_over_the_event_without_a_half():
    prediction, target = RNG.normal(0, 3, (2, 2, 5, 3, 4)).astype(np.float32)
    plain = SquaredError(jnp.asarray(prediction), rank=2)
    np.testing.assert_allclose(plain.loss(target), ((prediction - target) ** 2).sum((-1, -2)), rtol=1e-5)
    np.testing.assert_array_equal(plain.mode(), prediction)
    squashed = SquaredError(jnp.asarray(prediction), rank=2, symlog_space=True)
    goal = np.sign(target) * np.log1p(np.abs(np.float64(target)))
    np.testing.assert_allclose(squashed.loss(target), ((prediction - goal) ** 2).sum((-1, -2)), rtol=1e-5)
    np.testing.assert_allclose(squashed.mode(), np.sign(prediction) * np.expm1(np.abs(prediction)), rtol=1e-5)


def test_squared_error_of_a_scalar_event():
    np.testing.assert_allclose(SquaredError(jnp.array([1.0, 2.0]), rank=0).loss(jnp.array([0.0, 5.0])), [1, 9])


# Precision


def test_losses_of_bfloat16_outputs_are_float32():
    x = jnp.ones((2, 3), jnp.bfloat16)
    losses = {
        "onehot": OneHot(x).loss(x),
        "kl": OneHot(x, 0.01).kl(OneHot(x, 0.01)),
        "multi": MultiOneHot(x, (2, 1)).entropy(),
        "twohot": TwoHot(x).loss(x[:, 0]),
        "mode": TwoHot(x).mode(),
        "normal": Normal.bounded(x, x, 0.1, 1.0).log_prob(x),
        "bernoulli": Bernoulli(x).loss(x),
        "squared": SquaredError(x, rank=1, symlog_space=True).loss(x),
    }
    assert {k: v.dtype for k, v in losses.items()} == {k: jnp.dtype(jnp.float32) for k in losses}


def test_float64_passes_through_all_losses():
    """In float64 the losses agree with the oracles to 12 digits: nothing inside rounds to float32."""
    with jax.enable_x64(True):
        p, q = (jnp.asarray(RNG.normal(0, 2, (4, 5))) for _ in range(2))
        pp, qq = mixed(np.asarray(p), 0.01), mixed(np.asarray(q), 0.01)
        kl = OneHot(p, 0.01).kl(OneHot(q, 0.01))
        np.testing.assert_allclose(kl, scipy.stats.entropy(pp, qq, axis=-1), rtol=1e-12)
        normal = Normal.bounded(p, q, 0.1, 1.0)
        oracle = scipy.stats.norm(np.tanh(p), 0.9 * scipy.special.expit(np.asarray(q) + 2) + 0.1).logpdf(np.asarray(p))
        np.testing.assert_allclose(normal.log_prob(p), oracle.sum(-1), rtol=1e-12)
        target = jnp.asarray([0.1, -2.0, 33.3, 4e4])
        bins = np.float64(twohot_bins(5))
        logs = np.asarray(p) - scipy.special.logsumexp(p, -1, keepdims=True)
        label = np.stack([spelled_out_twohot(float(t), bins) for t in target])
        np.testing.assert_allclose(TwoHot(p).loss(target), -(label * logs).sum(-1), rtol=1e-12)
        squared = SquaredError(p, rank=1, symlog_space=True).loss(q)
        goal = np.sign(q) * np.log1p(np.abs(q))
        np.testing.assert_allclose(squared, ((p - goal) ** 2).sum(-1), rtol=1e-12)
        soft = jnp.asarray([0.2, 1 - 1 / 333, 0.0, 1.0])
        z, t = np.asarray(p[:, 0]), np.asarray(soft)
        oracle = t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)
        np.testing.assert_allclose(Bernoulli(p[:, 0]).loss(soft), oracle, rtol=1e-12)
