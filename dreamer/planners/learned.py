"""The agent's world model, with its heads, policy and critic, as a world to plan in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dreamer.actor_critic import ActorCritic
from dreamer.distributions import Distribution
from dreamer.planners.protocol import State
from dreamer.types import Spaces
from dreamer.world_model import WorldModel

#: What a state of a masked world has beside the latents: bool (M, A).
ALLOWED = "allowed"


class LearnedWorld:
    """A world whose states are the RSSM's, and for masked actions ``allowed`` beside them.

    dreams_masks: whether the world model predicts the masks of states that nobody has seen; if not, every action is
    allowed there. Reward and continuation are what the heads predict in the state reached, as in `imagination`; the
    discount is in what the continue head learned, or the behaviour multiplies it in (`loss.discount_in_cont`).
    """

    def __init__(self, world_model: WorldModel, behaviour: ActorCritic, actions: Spaces, *, dreams_masks: bool) -> None:
        self.actions = actions
        self._model, self._behaviour, self._dreams_masks = world_model, behaviour, dreams_masks

    def begin(self, state: State, allowed: jax.Array | None) -> State:
        """The world's state from the filtered one (N, ...), where the environment allows these actions: bool (N, A),
        None if it always allows all."""
        return state if allowed is None else {**state, ALLOWED: _some(allowed)}

    def step(self, state: State, action: jax.Array, key: jax.Array | None) -> tuple[State, jax.Array, jax.Array]:
        latents = {name: x for name, x in state.items() if name != ALLOWED}
        new = self._model.rssm.imagine_step(latents, action.astype(latents["deter"].dtype), key)
        x = self._model.rssm.feature(new)
        reward, cont = self._model.reward(x).mode(), self._behaviour.discount * self._model.cont(x).mode()
        if ALLOWED in state:
            new[ALLOWED] = self._allowed(x, state[ALLOWED])
        return new, reward, cont

    def value(self, state: State) -> jax.Array:
        return self._behaviour.value(self._model.rssm.feature(state)).mode()

    def policy(self, state: State) -> dict[str, Distribution]:
        return self._behaviour.policy(self._model.rssm.feature(state), self.allowed(state))

    def allowed(self, state: State) -> jax.Array | None:
        return state.get(ALLOWED)

    def _allowed(self, x: jax.Array, before: jax.Array) -> jax.Array:
        """The mask (M, A) in states with these features."""
        if not self._dreams_masks:
            return jnp.ones_like(before)
        return _some(self._model.objective.allowed(x))


class CautiousWorld(LearnedWorld):
    """A world that charges for steps into the unknown: `penalty` times the disagreement of the model's ensemble on the
    state reached is taken from each reward."""

    def __init__(
        self,
        world_model: WorldModel,
        behaviour: ActorCritic,
        actions: Spaces,
        *,
        dreams_masks: bool,
        penalty: float,
    ) -> None:
        super().__init__(world_model, behaviour, actions, dreams_masks=dreams_masks)
        self._penalty = penalty

    def step(self, state: State, action: jax.Array, key: jax.Array | None) -> tuple[State, jax.Array, jax.Array]:
        new, reward, cont = super().step(state, action, key)
        unknown = self._model.ensemble.disagreement(self._model.rssm.feature(new))
        return new, reward - self._penalty * unknown, cont


def _some(allowed: jax.Array) -> jax.Array:
    """The mask (M, A); where it forbids everything, as in a final observation, it allows everything."""
    return allowed | ~allowed.any(-1, keepdims=True)
