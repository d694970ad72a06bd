"""An ensemble of priors: how far its members disagree says what the model has not learned.

Plan2Explore (Sekar et al., 2020, section 3.1): several small networks, alike but for their first weights, learn the
same prediction. Where there was data they come to agree, however much chance is in it; elsewhere they do not. Here each
predicts what the prior predicts, the next latent's distribution from the deterministic state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dreamer import features
from dreamer.config import ModelConfig
from dreamer.distributions import sum_of
from dreamer.latents import Latent
from dreamer.networks import MLP, Linear
from dreamer.objectives import Seen

sg = jax.lax.stop_gradient


class Alone(nnx.Module):
    """No ensemble: nothing is learned beside the prior, and nothing says what it does not know.

    scales: of every loss, by its name; apart: where parameters lie that no other gradient's norm may count.
    """

    def __init__(self) -> None:
        self.scales: dict[str, float] = nnx.static({})
        self.apart: tuple[str, ...] = ()

    def learn(self, seen: Seen) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Losses (B, T) and metrics (), by name."""
        return {}, {}

    def shown(self, x: jax.Array) -> dict[str, jax.Array]:
        """What reports show of states with features x (..., F), by name."""
        return {}

    def disagreement(self, x: jax.Array) -> jax.Array:
        """How far the members disagree on the latent (...) of states with features x (..., F)."""
        raise NotImplementedError("there is no ensemble to ask: model.ensemble is null")


class Member(nnx.Module):
    """Deterministic state (..., D) -> what a latent's distribution is made from."""

    def __init__(self, deter: int, latent: Latent, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.latent = latent
        self.mlp = MLP(deter, config.hidden, 1, rngs=rngs)
        self.out = Linear(config.hidden, latent.prior_numbers, rngs=rngs)

    def __call__(self, deter: jax.Array) -> jax.Array:
        return self.latent.shaped(self.out(self.mlp(deter)))


class Ensemble(Alone):
    """As many members as `model.ensemble` says. The states they learn from are data: no other weight notices them."""

    def __init__(self, latent: Latent, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.latent, self.deter = latent, config.deter
        self.members = nnx.List([Member(config.deter, latent, config, rngs=rngs) for _ in range(config.ensemble or 0)])
        self.scales = nnx.static({"ensemble": 1.0})
        self.apart = ("world_model.ensemble",)

    def learn(self, seen: Seen) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """KL(posterior || member), summed over variables and members; the mean disagreement."""
        x, posterior = sg(seen.feature), self.latent.dist(sg(seen.posterior))
        found = self._predict(x)
        losses = [self.latent.kl(posterior, self.latent.prior(logits)) for logits in found]
        return {"ensemble": sum_of(losses)}, {"disagreement": sg(self._spread(found)).mean()}

    def shown(self, x: jax.Array) -> dict[str, jax.Array]:
        """``disagreement`` (...)."""
        return {"disagreement": self.disagreement(x)}

    def disagreement(self, x: jax.Array) -> jax.Array:
        """The variance over the members of what they expect of each variable, mean over the variables.

        Of classes, the probabilities' variances are summed: at most 1. It is differentiable by x.
        """
        return self._spread(self._predict(x))

    def _predict(self, x: jax.Array) -> list[jax.Array]:
        deter, _ = features.split(x, [self.deter])
        return [member(deter) for member in self.members]

    def _spread(self, found: list[jax.Array]) -> jax.Array:
        expected = [self.latent.flat(self.latent.mean(self.latent.prior(logits))) for logits in found]
        middle = sum_of(expected) / len(expected)
        variance = sum_of([jnp.square(one - middle) for one in expected]) / len(expected)
        return variance.sum(features.axis()) / self.latent.variables


def make_ensemble(latent: Latent, config: ModelConfig, *, rngs: nnx.Rngs) -> Alone:
    """What `model.ensemble` asks for."""
    return Alone() if config.ensemble is None else Ensemble(latent, config, rngs=rngs)
