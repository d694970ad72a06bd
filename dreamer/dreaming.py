"""A trained world model as a thing to step: it watches what happened, then dreams on from there, action by action."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dreamer.agent import Agent
from dreamer.coders import join_actions, split_actions
from dreamer.distributions import Output
from dreamer.model import DreamerModel
from dreamer.replay.memory import latents_of
from dreamer.rssm import State
from dreamer.types import Space


class Glimpse(NamedTuple):
    """What the model tells of N states: arrays on the device, or on the host once they were read.

    observation: by key (N, *shape), decoded, in the dtypes of the environment.
    reward: (N,) float32, received on arriving there.
    cont: (N,) float32, the probability that the episode goes on.
    ended: (N,) bool, drawn with it; never where a dream begins.
    value: (N,) float32, the critic's.
    entropy: (N,) float32, nats: of the prior that the latent was drawn from, above the least that it can be.
    """

    observation: dict[str, Any]
    reward: Any
    cont: Any
    ended: Any
    value: Any
    entropy: Any


class Dreams:
    """The dreams of a trained agent, N at a time. Whoever dreams keeps the states: these are pure functions of them.

    observations: the spaces that the model predicts, by key. ValueError if it predicts none.
    """

    def __init__(self, agent: Agent, params: Any) -> None:
        self.agent, self.params = agent, params
        self._latents = latents_of(agent.extras)
        state = jax.eval_shape(lambda: self.blank(1))
        found = jax.eval_shape(lambda params, state: self._predicted(agent.model(params), state), params, state)
        self.observations = {key: space for key, space in agent.observations.items() if key in found}
        if not self.observations:
            raise ValueError(
                "expected a model that predicts observations, got one without a decoder; take a run that was trained "
                "with reconstruction or probe in loss.objective"
            )
        self._step, self._watch = agent.compiled(self._advance), agent.compiled(self._filter)

    def blank(self, count: int) -> State:
        """States (N, ...) that know nothing: those before an episode's first observation."""
        carry = self.agent.init_policy(count)
        return {name: carry[name] for name in self._latents}

    def watch(self, episodes: Mapping[str, np.ndarray]) -> State:
        """The states (B, L, ...) after each step of B stretches of L steps, the most likely latents.

        episodes: observations, actions (each the one taken *after* its step) and is_first, each (B, L, ...).
        """
        names = (*self.agent.observations, *self.agent.actions, "is_first")
        return self._watch(self.params, {name: episodes[name] for name in names if name in episodes})

    def step(
        self,
        starts: State,
        states: State,
        actions: Mapping[str, np.ndarray],
        begins: np.ndarray,
        index: np.ndarray,
        seeds: np.ndarray,
        counts: np.ndarray,
    ) -> tuple[State, Glimpse]:
        """N dreams, each one step on or at its beginning: the new states (N, ...) and what they tell. One program.

        starts: (M, ...), where dreams may begin; states: (N, ...); actions: (N, ...) by name; begins: bool (N,), the
        dreams that begin, at the start number `index` (N,) int32. A dream's random numbers come from its own seed and
        count, uint32 (N,), so equal ones give equal steps, whatever the others do.
        """
        return self._step(self.params, starts, states, dict(actions), begins, index, seeds, counts)

    def _filter(self, params: Any, episodes: Mapping[str, jax.Array]) -> State:
        model, agent = self.agent.model(params), self.agent
        taken = join_actions({name: episodes[name] for name in agent.actions}, agent.actions, agent.dtype)
        led = jnp.concatenate([jnp.zeros_like(taken[:, :1]), taken[:, :-1]], 1)
        return model.world_model.see(self.blank(len(led)), led, episodes, None).states

    def _advance(
        self,
        params: Any,
        starts: State,
        states: State,
        actions: dict[str, jax.Array],
        begins: jax.Array,
        index: jax.Array,
        seeds: jax.Array,
        counts: jax.Array,
    ) -> tuple[State, Glimpse]:
        model = self.agent.model(params)
        taken = join_actions(actions, self.agent.actions, self.agent.dtype)

        def one(state: State, action: jax.Array, begin: jax.Array, start: jax.Array, seed: jax.Array, count: jax.Array):
            """A single dream, so that its draws are its own."""
            latent_key, end_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), count))
            alone = jax.tree.map(lambda x: x[None], state)
            dreamed = model.world_model.rssm.imagine_step(alone, action[None], latent_key)
            state = jax.tree.map(lambda at, x: jnp.where(begin, at[start], x[0]), starts, dreamed)
            return state, jax.random.uniform(end_key)

        states, chance = jax.vmap(one)(states, taken, begins, index, seeds, counts)
        return states, self._read(model, states, begins, chance)

    def _read(self, model: DreamerModel, states: State, begins: jax.Array, chance: jax.Array) -> Glimpse:
        world = model.world_model
        x = world.rssm.feature(states)
        # The head may have learned the discount too, which says nothing about where episodes end.
        cont = jnp.clip(world.cont(x).mode() / world.discount, 0, 1)
        latent = world.rssm.latent
        entropy = latent.entropy(latent.prior(world.rssm.prior(states["deter"]))) - latent.least_entropy
        return Glimpse(
            self._predicted(model, states),
            jnp.where(begins, 0, world.reward(x).mode()),
            cont,
            (chance >= cont) & ~begins,
            model.actor_critic.value(x).mode(),
            entropy,
        )

    def _predicted(self, model: DreamerModel, states: State) -> dict[str, jax.Array]:
        outputs = model.world_model.objective.predict(model.world_model.rssm.feature(states))
        return {
            key: _as_observed(outputs[key], space) for key, space in self.agent.observations.items() if key in outputs
        }


def _as_observed(output: Output, space: Space) -> jax.Array:
    """The most likely observation (N, *shape), in the dtype of the environment."""
    value = output.mode()
    if space.kind == "image":
        return jnp.clip(jnp.round(value * 255), 0, 255).astype(jnp.uint8)
    if space.kind == "discrete":
        return split_actions(value, {"": space})[""]
    limit = jnp.finfo(jnp.float32).max
    return jnp.clip(value, -limit, limit).astype(jnp.float32)
