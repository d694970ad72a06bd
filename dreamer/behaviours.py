"""Other ways for a behaviour to learn in dreams than DreamerV3's REINFORCE: one table, `BEHAVIOURS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dreamer.actor_critic import ActorCritic, Dream, Learned, ReturnScale
from dreamer.config import LossConfig
from dreamer.distributions import Distribution
from dreamer.networks import frozen
from dreamer.rssm import State
from dreamer.world_model import Head

sg = jax.lax.stop_gradient


class Dynamics(ActorCritic):
    """The return is differentiated through critic, reward and dynamics, whose weights are frozen, into the actions
    (DreamerV1, Hafner et al., 2020, eq. 7): reparametrised where continuous, straight-through where one-hot.

    The policy reads a dream's features as data: no gradient goes from a later action to an earlier one.
    """

    through_dreams = staticmethod(lambda x: x)

    def frozen_heads(self) -> dict[str, Head]:
        """The critic: its values carry the gradient of the return, but a policy does not train it."""
        return {"value": frozen(self.value)}

    def judge(self, x: jax.Array, dists: Mapping[str, Distribution], actions: jax.Array) -> dict[str, Any]:
        return super().judge(sg(x), dists, sg(actions))

    def objective(self, log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
        """The return: subtracting a constant from it changes no gradient."""
        return advantage


class Mixed(Dynamics):
    """A share of REINFORCE, the rest through the dynamics (DreamerV2, Hafner et al., 2021, eq. 6)."""

    def objective(self, log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
        share = self.config.reinforce_share
        return share * log_prob * sg(advantage) + (1 - share) * advantage


class Untrained(ActorCritic):
    """No policy: a planner acts (PlaNet). Policy and critic stay at their initial weights, where a value is 0."""

    @staticmethod
    def scales(loss: LossConfig) -> dict[str, float]:
        return {}

    def learn(
        self,
        dream: Callable[[State], Dream],
        states: State,
        x: jax.Array,
        batch: Mapping[str, jax.Array],
        slow: Mapping[str, Any],
        scale: ReturnScale,
        factor: jax.Array | None = None,
    ) -> Learned:
        """Nothing, without a dream."""
        nothing = jnp.zeros((0, x.shape[0] * x.shape[1]))
        return Learned({}, nothing, nothing, scale, {})


#: How the policy learns.
BEHAVIOURS: Mapping[str, type[ActorCritic]] = {
    "reinforce": ActorCritic,
    "dynamics": Dynamics,
    "mixed": Mixed,
    "none": Untrained,
}
