"""What the latents are trained to predict. One table, `OBJECTIVES`; an objective is a module with two methods.

``losses(states, observations) -> {name: (B, T)}`` and ``predict(states) -> {key: output}`` for reports. One that can
also dream of masked actions has ``allowed(states) -> (..., A)``.
"""

from __future__ import annotations

import jax
from flax import nnx

from dreamer import features
from dreamer.coders import Decoder, Observations
from dreamer.config import ModelConfig
from dreamer.distributions import Output
from dreamer.rssm import State
from dreamer.types import ACTION_MASK, Spaces

sg = jax.lax.stop_gradient


class Reconstruction(nnx.Module):
    """DreamerV3's choice: predict every observation from the model state (paper v2, eq. 3, L_pred)."""

    def __init__(self, spaces: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.decoder = Decoder(spaces, config, rngs=rngs)

    def losses(self, states: State, observations: Observations) -> dict[str, jax.Array]:
        """One reconstruction loss (B, T) per predicted observation key."""
        targets = self.decoder.targets(observations)
        return {key: output.loss(targets[key]) for key, output in self.predict(states).items()}

    def predict(self, states: State) -> dict[str, Output]:
        return self.decoder(states["deter"], states["stoch"])

    def allowed(self, states: State) -> jax.Array:
        """Which actions a masked environment is thought to allow, bool (..., A): those more likely so than not."""
        entries = sg(self.decoder.vectors(states["deter"], states["stoch"], [ACTION_MASK])[ACTION_MASK].mode())
        forbidden, allowed = features.split(features.group(entries, features.size(entries) // 2), 2)
        return features.single(allowed) > 0.5


OBJECTIVES = {"reconstruction": Reconstruction}
