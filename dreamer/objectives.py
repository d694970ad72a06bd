"""What the latents are trained to predict: one table, `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx

from dreamer import features
from dreamer.coders import Decoder, Observations
from dreamer.config import LossConfig, ModelConfig
from dreamer.distributions import Output
from dreamer.optimizer import Slow
from dreamer.rssm import State
from dreamer.types import ACTION_MASK, Spaces

sg = jax.lax.stop_gradient


class Seen(NamedTuple):
    """What the world model makes of a batch, with gradients, each (B, T, ...).

    actions: those that led to each step; feature: of the states; posterior, prior: logits.
    """

    tokens: jax.Array
    actions: jax.Array
    states: State
    feature: jax.Array
    posterior: jax.Array
    prior: jax.Array


class Objective(nnx.Module):
    """One or several losses, and what they teach the model to predict: nothing, unless a subclass says otherwise.

    scales: of every loss, by its name; slow: the weights that need a slow copy, by the copy's name.
    """

    def __init__(self, scales: Mapping[str, float], slow: Mapping[str, Slow] | None = None) -> None:
        self.scales, self.slow = nnx.static(dict(scales)), nnx.static(dict(slow or {}))

    def losses(
        self, seen: Seen, observations: Observations, slow: Mapping[str, nnx.Module], key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Losses (B, T) by name. slow: all slow copies, by name."""
        raise NotImplementedError

    def predict(self, x: jax.Array) -> dict[str, Output]:
        """The predicted observations by key, from features (..., F)."""
        return {}

    def targets(self, observations: Observations) -> dict[str, jax.Array]:
        """What `predict` should have returned: these observations in the form that its losses compare with."""
        return {}

    @property
    def predicts_masks(self) -> bool:
        """Whether dreams can tell which actions are allowed; if so, `allowed` says which."""
        return False

    def allowed(self, x: jax.Array) -> jax.Array:
        """The actions that a masked environment is predicted to allow, bool (..., A), from features (..., F)."""
        raise NotImplementedError


class Reconstruction(Objective):
    """DreamerV3's choice: predict every observation from the model state (paper v2, eq. 3, L_pred)."""

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.decoder = Decoder(width, spaces, config, rngs=rngs)
        super().__init__(dict.fromkeys(self.decoder.spaces, loss.reconstruction))

    def losses(
        self, seen: Seen, observations: Observations, slow: Mapping[str, nnx.Module], key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """One loss for each predicted observation."""
        targets = self.targets(observations)
        return {name: output.loss(targets[name]) for name, output in self.predict(seen.feature).items()}

    def predict(self, x: jax.Array) -> dict[str, Output]:
        return self.decoder(x)

    def targets(self, observations: Observations) -> dict[str, jax.Array]:
        return self.decoder.targets(observations)

    @property
    def predicts_masks(self) -> bool:
        return ACTION_MASK in self.decoder.spaces

    def allowed(self, x: jax.Array) -> jax.Array:
        """The actions that are more likely allowed than not."""
        entries = sg(self.decoder.vectors(x, [ACTION_MASK])[ACTION_MASK].mode())
        forbidden, allowed = features.split(features.group(entries, features.size(entries) // 2), 2)
        return features.single(allowed) > 0.5


#: Called with the widths of features and tokens, the observation spaces, the options of model and losses.
OBJECTIVES = {"reconstruction": Reconstruction}
