"""What heads return: distributions, and losses that score a target.

Every output of a head has ``loss(target) -> (...)`` and ``mode()``; those that are sampled also have ``sample(key)``
(``key=None`` gives the mode), ``log_prob(value)`` and ``entropy()``. All arithmetic is at least float32.

The classes (or bins, or entries) are the features of what a distribution is made from, and it works `over` them. Every
distribution is a pytree of what it is made from: scans, slices and transformations of JAX take it whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dreamer import features
from dreamer.kernels import draw_class
from dreamer.networks import at_least_float32

sg = jax.lax.stop_gradient


def symlog(x: jax.Array) -> jax.Array:
    """symlog(x) = sign(x) ln(1 + |x|) (paper v2, eq. 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: jax.Array) -> jax.Array:
    """symexp(x) = sign(x) (exp(|x|) - 1), the inverse of symlog."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def draw_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Standard normal noise."""
    return jax.random.normal(key, shape, dtype)


def sum_of(terms: Sequence[jax.Array]) -> jax.Array:
    """The sum of at least one array, in order."""
    return functools.reduce(jnp.add, terms)


def tree_of(*arrays: str) -> Callable[[type], type]:
    """Registers a class as a pytree of these attributes; all others are constants."""

    def register(kind: type) -> type:
        def flatten(dist: Any) -> tuple[list[Any], tuple]:
            constants = {name: value for name, value in vars(dist).items() if name not in arrays}
            return [getattr(dist, name) for name in arrays], tuple(sorted(constants.items()))

        def unflatten(constants: tuple, values: Sequence[Any]) -> Any:
            dist: Any = object.__new__(kind)
            vars(dist).update(zip(arrays, values, strict=True), **dict(constants))
            return dist

        jax.tree_util.register_pytree_node(kind, flatten, unflatten)
        return kind

    return register


class Distribution(Protocol):
    """What the policy head returns."""

    def mode(self) -> jax.Array: ...
    def sample(self, key: jax.Array | None) -> jax.Array: ...
    def log_prob(self, value: jax.Array) -> jax.Array: ...
    def entropy(self) -> jax.Array: ...
    def kl(self, other: Any) -> jax.Array: ...


class Output(Protocol):
    """What every other head returns."""

    def mode(self) -> jax.Array: ...
    def loss(self, target: jax.Array) -> jax.Array: ...


@tree_of("log_probs")
class OneHot:
    """Independent categorical variables as one-hot vectors: logits (..., K), optionally mixed with uniform.

    ``probs = (1 - unimix) softmax(logits) + unimix / K`` (paper v2, "World model learning").
    Samples carry straight-through gradients: the value is one-hot, the gradient is that of the mixed probabilities.
    """

    def __init__(self, logits: jax.Array, unimix: float = 0.0) -> None:
        logits, self.over = at_least_float32(logits), features.axis()
        self.log_probs = jax.nn.log_softmax(logits, self.over)
        if unimix:
            probs = (1 - unimix) * jnp.exp(self.log_probs) + unimix / logits.shape[self.over]
            self.log_probs = jnp.log(probs)

    @property
    def probs(self) -> jax.Array:
        return jnp.exp(self.log_probs)

    def mode(self) -> jax.Array:
        """Most likely class as a one-hot (..., K), with straight-through gradient."""
        return self._straight_through(self.log_probs.argmax(self.over))

    def sample(self, key: jax.Array | None) -> jax.Array:
        """A one-hot sample (..., K) with straight-through gradient; the mode where key is None."""
        return self.mode() if key is None else self._straight_through(self._draw(key))

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-probability (...) of a one-hot value (..., K)."""
        return (self.log_probs * value.astype(self.log_probs.dtype)).sum(self.over)

    def loss(self, target: jax.Array) -> jax.Array:
        """Cross entropy (...) with a one-hot target (..., K)."""
        return -self.log_prob(sg(target))

    def entropy(self) -> jax.Array:
        return -(self.probs * self.log_probs).sum(self.over)

    def kl(self, other: OneHot) -> jax.Array:
        """KL(self || other), (...): one value per variable."""
        return (self.probs * (self.log_probs - other.log_probs)).sum(self.over)

    def _draw(self, key: jax.Array) -> jax.Array:
        return draw_class(key, jnp.moveaxis(sg(self.probs), self.over, -1))

    def _straight_through(self, index: jax.Array) -> jax.Array:
        probs = self.probs
        hot = jax.nn.one_hot(index, probs.shape[self.over], dtype=probs.dtype, axis=self.over)
        return sg(hot) + (probs - sg(probs))


@tree_of("log_probs", "allowed")
class MaskedOneHot(OneHot):
    """A categorical variable renormalised over its allowed classes: logits (..., K), allowed (..., K) bool.

    ``p = softmax(logits)`` over the allowed classes and exactly 0 elsewhere; forbidden logits get no gradient. Where
    nothing is allowed (which a predicted mask may say), everything is.
    """

    #: ln of "never": its exponential is 0 in every float dtype, and 0 times it is 0, which -inf would make NaN.
    NEVER = -1e9

    def __init__(self, logits: jax.Array, allowed: jax.Array) -> None:
        self.allowed = allowed | ~allowed.any(features.axis(), keepdims=True)
        super().__init__(jnp.where(self.allowed, at_least_float32(logits), self.NEVER))

    def _draw(self, key: jax.Array) -> jax.Array:
        drawn = super()._draw(key)
        # Rounding of the cumulative sum lets one draw in millions land on a class of probability 0.
        fits = jnp.take_along_axis(self.allowed, jnp.expand_dims(drawn, self.over), self.over).squeeze(self.over)
        return jnp.where(fits, drawn, self.log_probs.argmax(self.over))


@tree_of("parts")
class MultiOneHot:
    """Several independent categoricals of different sizes side by side: logits (..., sum(classes)).

    Log-probabilities, losses and entropies are summed over the variables.
    """

    def __init__(self, logits: jax.Array, classes: Sequence[int]) -> None:
        self.cuts, self.over = tuple(np.cumsum(classes)[:-1].tolist()), features.axis()
        self.parts = [OneHot(part) for part in jnp.split(logits, self.cuts, self.over)]

    def mode(self) -> jax.Array:
        return jnp.concatenate([part.mode() for part in self.parts], self.over)

    def sample(self, key: jax.Array | None) -> jax.Array:
        keys = [None] * len(self.parts) if key is None else jax.random.split(key, len(self.parts))
        return jnp.concatenate([part.sample(k) for part, k in zip(self.parts, keys, strict=True)], self.over)

    def log_prob(self, value: jax.Array) -> jax.Array:
        values = jnp.split(value, self.cuts, self.over)
        return sum_of([part.log_prob(v) for part, v in zip(self.parts, values, strict=True)])

    def loss(self, target: jax.Array) -> jax.Array:
        return -self.log_prob(sg(target))

    def entropy(self) -> jax.Array:
        return sum_of([part.entropy() for part in self.parts])

    def kl(self, other: MultiOneHot) -> jax.Array:
        """KL(self || other), (...), summed over the variables."""
        return sum_of([ours.kl(theirs) for ours, theirs in zip(self.parts, other.parts, strict=True)])


@tree_of("mean", "std")
class Normal:
    """Independent normals, mean and std (..., A); log-probabilities and entropies summed over A."""

    def __init__(self, mean: jax.Array, std: jax.Array) -> None:
        self.mean, self.std, self.over = at_least_float32(mean), at_least_float32(std), features.axis()

    @classmethod
    def bounded(cls, raw_mean: jax.Array, raw_std: jax.Array, low: float, high: float) -> Normal:
        """Normal(tanh(m), (high - low) sigmoid(s + 2) + low): the policy of continuous actions."""
        raw_mean, raw_std = at_least_float32(raw_mean), at_least_float32(raw_std)
        return cls(jnp.tanh(raw_mean), (high - low) * jax.nn.sigmoid(raw_std + 2.0) + low)

    def mode(self) -> jax.Array:
        return self.mean

    def sample(self, key: jax.Array | None) -> jax.Array:
        return self.mean if key is None else self.mean + self.std * draw_normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, value: jax.Array) -> jax.Array:
        z = (value.astype(self.mean.dtype) - self.mean) / self.std
        return (-0.5 * jnp.square(z) - jnp.log(self.std) - 0.5 * jnp.log(2 * jnp.pi)).sum(self.over)

    def entropy(self) -> jax.Array:
        return (jnp.log(self.std) + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum(self.over)

    def kl(self, other: Normal) -> jax.Array:
        """KL(self || other), (...): ln(σ₂/σ₁) + (σ₁² + (μ₁ - μ₂)²) / 2σ₂² - 1/2, summed over A."""
        ratio, apart = self.std / other.std, (self.mean - other.mean) / other.std
        return (0.5 * (jnp.square(ratio) + jnp.square(apart) - 1) - jnp.log(ratio)).sum(self.over)


@tree_of("log_weights", "mean", "std")
class NormalMixture:
    """Independent variables, each a mixture of K normals: logits, mean and std (..., S, K); a value is (..., S).

    temperature τ: of samples alone, whose weights are those of logits / τ, and whose deviations √τ std (World Models,
    Ha & Schmidhuber, 2018; the mixtures of Ha & Eck, 2018). Expected log-densities are by Gauss-Hermite quadrature
    over each normal, with `NODES` points: no draw, and the same number every time.
    """

    NODES = 5

    def __init__(self, logits: jax.Array, mean: jax.Array, std: jax.Array, temperature: float = 1.0) -> None:
        logits, self.mean, self.std = map(at_least_float32, (logits, mean, std))
        self.over, self.temperature = features.axis(), temperature
        self.log_weights = jax.nn.log_softmax(logits, self.over)

    def mode(self) -> jax.Array:
        """The mean of the heaviest normal (..., S)."""
        return self._of(self.mean, self.log_weights.argmax(self.over))

    def expectation(self) -> jax.Array:
        """(..., S)."""
        return (jnp.exp(self.log_weights) * self.mean).sum(self.over)

    def sample(self, key: jax.Array | None) -> jax.Array:
        """(..., S), reparametrised within the normal that was drawn; the mode where key is None."""
        if key is None:
            return self.mode()
        class_key, noise_key = jax.random.split(key)
        weights = jax.nn.softmax(sg(self.log_weights) / self.temperature, self.over)
        drawn = draw_class(class_key, jnp.moveaxis(weights, self.over, -1))
        mean, std = self._of(self.mean, drawn), self._of(self.std, drawn)
        return mean + self.temperature**0.5 * std * draw_normal(noise_key, mean.shape, mean.dtype)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density (...), summed over S."""
        return self._log_density(value.astype(self.mean.dtype)).sum(self.over)

    def cross_entropy(self, other: Normal) -> jax.Array:
        """-E[ln p(x)] (...) for x of independent normals (..., S), summed over S."""
        return self._expected(other.mean, other.std).sum(self.over)

    def entropy(self) -> jax.Array:
        """(...), summed over S."""
        first = lambda x: jnp.moveaxis(x, self.over, 0)  # noqa: E731
        each = self._expected(first(self.mean), first(self.std))
        return (jnp.exp(first(self.log_weights)) * each).sum(0).sum(self.over)

    def _of(self, numbers: jax.Array, index: jax.Array) -> jax.Array:
        """Of numbers (..., S, K), those of one normal each: index (..., S) -> (..., S)."""
        hot = jax.nn.one_hot(index, numbers.shape[self.over], dtype=numbers.dtype, axis=self.over)
        return (numbers * hot).sum(self.over)

    def _log_density(self, x: jax.Array) -> jax.Array:
        """ln Σ_k w_k N(x; μ_k, σ_k) of each variable, (..., S); x may have axes in front."""
        z = (jnp.expand_dims(x, self.over) - self.mean) / self.std
        each = self.log_weights - 0.5 * jnp.square(z) - jnp.log(self.std) - 0.5 * jnp.log(2 * jnp.pi)
        return jax.nn.logsumexp(each, self.over)

    def _expected(self, mean: jax.Array, std: jax.Array) -> jax.Array:
        """-E[ln p(x)] for x of each of these normals, which may have axes in front: as their shape."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.NODES)
        along = lambda x: jnp.asarray(x, mean.dtype).reshape(-1, *[1] * mean.ndim)  # noqa: E731
        return -(along(weights / weights.sum()) * self._log_density(mean + along(nodes) * std)).sum(0)


@tree_of("value")
class Point:
    """Numbers (..., A) without chance."""

    def __init__(self, value: jax.Array) -> None:
        self.value, self.over = at_least_float32(value), features.axis()

    def mode(self) -> jax.Array:
        return self.value

    def sample(self, key: jax.Array | None) -> jax.Array:
        return self.value


@tree_of("mean")
class UnitNormal:
    """A number (...) that is normal around a mean with standard deviation 1; its loss leaves out the constant."""

    def __init__(self, mean: jax.Array) -> None:
        self.mean = at_least_float32(mean)

    def mode(self) -> jax.Array:
        return self.mean

    def loss(self, target: jax.Array) -> jax.Array:
        """(target - mean)² / 2."""
        return 0.5 * jnp.square(sg(target).astype(self.mean.dtype) - self.mean)


@tree_of("logit")
class Bernoulli:
    """A binary variable with logit (...); the target of the loss may be soft."""

    def __init__(self, logit: jax.Array) -> None:
        self.logit = at_least_float32(logit)

    def mode(self) -> jax.Array:
        """Probability of 1, (...)."""
        return jax.nn.sigmoid(self.logit)

    def loss(self, target: jax.Array) -> jax.Array:
        """Cross entropy: -t ln p - (1 - t) ln(1 - p)."""
        target = sg(target).astype(self.logit.dtype)
        return -(target * jax.nn.log_sigmoid(self.logit) + (1 - target) * jax.nn.log_sigmoid(-self.logit))


def twohot_bins(count: int) -> np.ndarray:
    """Bins symexp(linspace(-20, 0)) mirrored: (count,) float32, symmetric, the middle one exactly 0."""
    half = np.linspace(-20.0, 0.0, count // 2 + 1, dtype=np.float32)
    half = np.sign(half) * np.expm1(np.abs(half))
    return np.concatenate([half, -half[:-1][::-1]]).astype(np.float32)


@tree_of("logits")
class TwoHot:
    """A scalar predicted as a categorical over exponentially spaced bins: logits (..., bins).

    Paper v2, eq. 10-11, with bins and distances in the raw space, not in symlog space.
    """

    def __init__(self, logits: jax.Array) -> None:
        self.logits, self.over = at_least_float32(logits), features.axis()

    @property
    def bins(self) -> jax.Array:
        return jnp.asarray(twohot_bins(self.logits.shape[self.over]), self.logits.dtype)

    def mode(self) -> jax.Array:
        """Expected value (...); symmetric logits give exactly 0.

        Bins reach 5e8, so the odds of b and -b are subtracted *before* they are multiplied by anything: a compiler may
        round only one of the two products (fused multiply-add), and its rounding error at 5e8 is as large as a reward.
        """
        over, bins = self.over, self.bins
        middle = bins.shape[0] // 2
        odds = jnp.exp(self.logits - sg(self.logits.max(over, keepdims=True)))
        below, _, above = jnp.split(odds, (middle, middle + 1), over)
        balance = above - jnp.flip(below, over)
        return (balance * self._along(bins[middle + 1 :])).sum(over) / odds.sum(over)

    def loss(self, target: jax.Array) -> jax.Array:
        """Cross entropy (...) with the target (...) spread linearly over its two neighbouring bins.

        The weight of a bin is a hat over its neighbours, ``max(0, min(rise, fall))``; the last bin has all beyond it.
        """
        bins = self.bins
        target = jnp.expand_dims(jnp.clip(sg(target).astype(bins.dtype), bins[0], bins[-1]), self.over)
        # Dense on purpose: gathering two logits would make the gradient a scatter, which is slow on every device.
        before, after = jnp.append(2 * bins[0], bins[:-1]), jnp.append(bins[1:], 2 * bins[-1])
        bins, before, after = map(self._along, (bins, before, after))
        rise, fall = (target - before) / (bins - before), (after - target) / (after - bins)
        weights = jnp.clip(jnp.minimum(rise, fall), 0, 1)
        return -(weights * jax.nn.log_softmax(self.logits, self.over)).sum(self.over)

    def _along(self, vector: jax.Array) -> jax.Array:
        """One number for each bin, shaped to broadcast with the logits."""
        return vector if self.over == -1 else vector[:, None]


@tree_of("prediction")
class SquaredError:
    """A point prediction (..., *event) scored by the sum of squares, without 1/2, over the last `rank` axes.

    With `symlog_space` the prediction lives in symlog space: the loss takes symlog of the target, the mode symexp.
    """

    def __init__(self, prediction: jax.Array, rank: int, symlog_space: bool = False) -> None:
        self.prediction, self.rank, self.symlog_space = at_least_float32(prediction), rank, symlog_space

    def mode(self) -> jax.Array:
        return symexp(self.prediction) if self.symlog_space else self.prediction

    def loss(self, target: jax.Array) -> jax.Array:
        target = sg(target).astype(self.prediction.dtype)
        if self.symlog_space:
            target = symlog(target)
        return jnp.square(self.prediction - target).sum(tuple(range(-self.rank, 0)))
