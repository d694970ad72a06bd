"""The stochastic part of a model state: how it is distributed, drawn, compared, trained, stored, and read by heads.

The RSSM asks a latent for everything that depends on its kind, and replay stores what it `pack`s. `LATENTS` has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dreamer import features
from dreamer.config import ModelConfig
from dreamer.distributions import Normal, NormalMixture, OneHot, Point
from dreamer.networks import at_least_float32
from dreamer.types import Field

sg = jax.lax.stop_gradient


class Latent(Protocol):
    """What the world model knows about its latent. Frozen and hashable: it has no weights of its own.

    variables: S; numbers, prior_numbers: how many a network outputs for one posterior, one prior; width: of the latent
    as heads read it; least_entropy: what no distribution's entropy is below, nats.
    """

    @property
    def variables(self) -> int: ...
    @property
    def numbers(self) -> int: ...
    @property
    def prior_numbers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def least_entropy(self) -> float: ...

    def init(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        """The latent before an episode's first observation."""

    def shaped(self, x: jax.Array) -> jax.Array:
        """A network's output (..., numbers) as `dist` takes it: logits, say."""

    def dist(self, logits: jax.Array) -> Any:
        """A posterior: something with ``sample(key)``, the mode where the key is None."""

    def prior(self, logits: jax.Array) -> Any:
        """A prior, likewise."""

    def kl(self, posterior: Any, prior: Any) -> jax.Array:
        """KL(posterior || prior) (...), summed over the variables."""

    def dyn(self, posterior: Any, prior: Any, stoch: jax.Array) -> jax.Array:
        """What the prior makes small (...), where the posterior is data; stoch: what was drawn from it."""

    def rep(self, posterior: Any, prior: Any) -> jax.Array:
        """What the posterior makes small (...), where the prior is data."""

    def entropy(self, p: Any) -> jax.Array:
        """(...), summed over the variables."""

    def mean(self, p: Any) -> jax.Array:
        """The expected latent, shaped as one that is drawn."""

    def shown(self, p: Any) -> dict[str, jax.Array]:
        """What reports show about a distribution, by name."""

    def flat(self, stoch: jax.Array) -> jax.Array:
        """A latent as heads read it, (..., width)."""

    def stored(self) -> Field:
        """How replay stores one."""

    def pack(self, stoch: jax.Array) -> jax.Array:
        """To the stored form."""

    def unpack(self, stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """From the stored form."""


class _Alike:
    """Posterior and prior are of one kind, and train each other by their KL."""

    @property
    def prior_numbers(self: Latent) -> int:
        return self.numbers

    def prior(self: Latent, logits: jax.Array) -> Any:
        return self.dist(logits)

    def dyn(self: Latent, posterior: Any, prior: Any, stoch: jax.Array) -> jax.Array:
        return self.kl(posterior, prior)

    def rep(self: Latent, posterior: Any, prior: Any) -> jax.Array:
        return self.kl(posterior, prior)


@dataclasses.dataclass(frozen=True)
class Categorical(_Alike):
    """S independent variables of K classes, one-hot (..., S, K) with straight-through gradients (paper v2, eq. 1).

    unimix: share of a uniform distribution in each of them, on both sides of the KL too.
    """

    variables: int
    classes: int
    unimix: float
    least_entropy = 0.0

    @property
    def numbers(self) -> int:
        return self.variables * self.classes

    width = numbers

    def init(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, self.variables, self.classes), dtype)

    def shaped(self, x: jax.Array) -> jax.Array:
        return features.group(x, self.variables)

    def dist(self, logits: jax.Array) -> OneHot:
        return OneHot(logits, self.unimix)

    def kl(self, posterior: OneHot, prior: OneHot) -> jax.Array:
        return posterior.kl(prior).sum(-1)

    def entropy(self, p: OneHot) -> jax.Array:
        return p.entropy().sum(-1)

    def mean(self, p: OneHot) -> jax.Array:
        return p.probs

    def shown(self, p: OneHot) -> dict[str, jax.Array]:
        """``probs`` (..., S, K)."""
        return {"probs": p.probs}

    def flat(self, stoch: jax.Array) -> jax.Array:
        return features.ungroup(stoch)

    def stored(self) -> Field:
        """Class indices (S,)."""
        return Field((self.variables,), np.dtype(np.uint8 if self.classes <= 256 else np.uint16), latent=True)

    def pack(self, stoch: jax.Array) -> jax.Array:
        return stoch.argmax(-1).astype(self.stored().dtype)

    def unpack(self, stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The zeros stored before an episode become class 0; `is_first` resets what follows, so nobody reads it."""
        return jax.nn.one_hot(stored, self.classes, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Numbers(_Alike):
    """A latent of S numbers (..., S), which heads read as they are and replay stores as bfloat16."""

    variables: int

    @property
    def width(self) -> int:
        return self.variables

    def init(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, self.variables), dtype)

    def shaped(self, x: jax.Array) -> jax.Array:
        return x

    def shown(self, p: Any) -> dict[str, jax.Array]:
        """Nothing: what reports know to show are classes."""
        return {}

    def flat(self, stoch: jax.Array) -> jax.Array:
        return stoch

    def stored(self) -> Field:
        return Field((self.variables,), np.dtype(ml_dtypes.bfloat16), latent=True)

    def pack(self, stoch: jax.Array) -> jax.Array:
        return stoch.astype(jnp.bfloat16)

    def unpack(self, stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return stored.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Gaussian(_Numbers):
    """S independent normals, reparametrised, as in PlaNet (Hafner et al., 2019) and DreamerV1.

    A network outputs the means, and what becomes standard deviations: softplus + `LEAST`.
    """

    LEAST = 0.1

    @property
    def numbers(self) -> int:
        return 2 * self.variables

    @property
    def least_entropy(self) -> float:
        return self.variables * (math.log(self.LEAST) + 0.5 * math.log(2 * math.pi * math.e))

    def dist(self, logits: jax.Array) -> Normal:
        mean, raw = features.split(at_least_float32(logits), 2)
        return Normal(mean, jax.nn.softplus(raw) + self.LEAST)

    def kl(self, posterior: Normal, prior: Normal) -> jax.Array:
        return posterior.kl(prior)

    def entropy(self, p: Normal) -> jax.Array:
        return p.entropy()

    def mean(self, p: Normal) -> jax.Array:
        return p.mean


@dataclasses.dataclass(frozen=True)
class Mixture(Gaussian):
    """S independent numbers: a normal each in the posterior, a mixture of K normals each in the prior (World Models,
    Ha & Schmidhuber, 2018, sections 2.2 and 2.3).

    The posterior is a variational autoencoder's, held to the unit normal by `rep`; the prior learns the density of what
    was drawn from it by `dyn`, as a mixture density network does. temperature: of draws from the prior.
    """

    components: int = 5
    temperature: float = 1.0

    @property
    def prior_numbers(self) -> int:
        return 3 * self.variables * self.components

    def prior(self, logits: jax.Array) -> NormalMixture:
        logits, mean, raw = (features.group(x, self.variables) for x in features.split(at_least_float32(logits), 3))
        return NormalMixture(logits, mean, jax.nn.softplus(raw) + self.LEAST, self.temperature)

    def kl(self, posterior: Normal, prior: Any) -> jax.Array:
        """By quadrature, see `NormalMixture`."""
        return prior.cross_entropy(posterior) - posterior.entropy()

    def dyn(self, posterior: Normal, prior: NormalMixture, stoch: jax.Array) -> jax.Array:
        """-ln p(stoch) of what was drawn, which is data. A density may exceed 1: then this is below 0."""
        return -prior.log_prob(sg(stoch))

    def rep(self, posterior: Normal, prior: NormalMixture) -> jax.Array:
        """KL(posterior || N(0, 1))."""
        return posterior.kl(Normal(jnp.zeros_like(posterior.mean), jnp.ones_like(posterior.std)))

    def entropy(self, p: Normal | NormalMixture) -> jax.Array:
        return p.entropy()

    def mean(self, p: Normal | NormalMixture) -> jax.Array:
        return p.expectation() if isinstance(p, NormalMixture) else p.mean


@dataclasses.dataclass(frozen=True)
class Deterministic(_Numbers):
    """S numbers without chance, as in MuZero and TD-MPC.

    Points have no KL. In its place is half the squared distance, the KL of unit normals around them: then `dyn` teaches
    the prior to predict the posterior's point.
    """

    least_entropy = 0.0

    @property
    def numbers(self) -> int:
        return self.variables

    def dist(self, logits: jax.Array) -> Point:
        return Point(logits)

    def kl(self, posterior: Point, prior: Point) -> jax.Array:
        return 0.5 * jnp.square(posterior.value - prior.value).sum(posterior.over)

    def entropy(self, p: Point) -> jax.Array:
        return jnp.zeros_like(p.value).sum(p.over)

    def mean(self, p: Point) -> jax.Array:
        return p.value


#: Kind of latent -> that which the options describe.
LATENTS: Mapping[str, Callable[[ModelConfig], Latent]] = {
    "categorical": lambda config: Categorical(config.stoch, config.classes, config.unimix),
    "gaussian": lambda config: Gaussian(config.stoch),
    "deterministic": lambda config: Deterministic(config.stoch),
    "mixture": lambda config: Mixture(config.stoch, config.components, config.temperature),
}
