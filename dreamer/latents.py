"""The stochastic part of a model state: how it is distributed, drawn, compared, stored, and read by heads.

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
from dreamer.distributions import Normal, OneHot, Point
from dreamer.networks import at_least_float32
from dreamer.types import Field


class Latent(Protocol):
    """What the world model knows about its latent. Frozen and hashable: it has no weights of its own.

    variables: S; numbers: how many a network outputs for one distribution; width: of the latent as heads read it;
    least_entropy: what no distribution's entropy is below, nats.
    """

    @property
    def variables(self) -> int: ...
    @property
    def numbers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def least_entropy(self) -> float: ...

    def init(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        """The latent before an episode's first observation."""

    def shaped(self, x: jax.Array) -> jax.Array:
        """A network's output (..., numbers) as `dist` takes it: logits, say."""

    def dist(self, logits: jax.Array) -> Any:
        """The distribution: something with ``sample(key)``, the mode where the key is None."""

    def kl(self, p: Any, q: Any) -> jax.Array:
        """KL(p || q) of two such distributions (...), summed over the variables."""

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


@dataclasses.dataclass(frozen=True)
class Categorical:
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

    def kl(self, p: OneHot, q: OneHot) -> jax.Array:
        return p.kl(q).sum(-1)

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
class _Numbers:
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

    def kl(self, p: Normal, q: Normal) -> jax.Array:
        return p.kl(q)

    def entropy(self, p: Normal) -> jax.Array:
        return p.entropy()

    def mean(self, p: Normal) -> jax.Array:
        return p.mean


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

    def kl(self, p: Point, q: Point) -> jax.Array:
        return 0.5 * jnp.square(p.value - q.value).sum(p.over)

    def entropy(self, p: Point) -> jax.Array:
        return jnp.zeros_like(p.value).sum(p.over)

    def mean(self, p: Point) -> jax.Array:
        return p.value


#: Kind of latent -> that which the options describe.
LATENTS: Mapping[str, Callable[[ModelConfig], Latent]] = {
    "categorical": lambda config: Categorical(config.stoch, config.classes, config.unimix),
    "gaussian": lambda config: Gaussian(config.stoch),
    "deterministic": lambda config: Deterministic(config.stoch),
}
