"""Imagined batches as the losses need them: the policy acts in the world model's dreams, and the heads read them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dreamer.actor_critic import ActorCritic, Dream, sample_actions
from dreamer.distributions import Distribution, TwoHot
from dreamer.networks import ROWS, columns, rows
from dreamer.rssm import State, feature
from dreamer.world_model import WorldModel

sg = jax.lax.stop_gradient


def reads_inside(platform: str) -> bool:
    """Whether heads read each imagined state within the scan, see `Dreamer`."""
    return platform == "cpu"


class Dreamer:
    """Imagines `horizon` steps and reads each state.

    slow_critic: read beside the critic.
    masked: the dream predicts which actions there are, and the policy keeps to them.
    axis: how states lie while dreaming (see `networks`).
    read_inside: the heads read each state within the scan, while it is in the cache and another core dreams on, as
    suits a CPU; otherwise all states together after it, in few large products, as suits everything else. The numbers
    are the same.
    """

    def __init__(
        self,
        world_model: WorldModel,
        behaviour: ActorCritic,
        slow_critic: nnx.Module,
        *,
        masked: bool,
        axis: int,
        read_inside: bool,
    ) -> None:
        graph, state = nnx.split(world_model)
        self.world_model: WorldModel = nnx.merge(graph, jax.tree.map(sg, state))
        self.behaviour, self.slow_critic = behaviour, slow_critic
        self.masked, self.axis, self.read_inside = masked, axis, read_inside
        self.time = 1 if axis == ROWS else 0

    def dream(self, starts: State, horizon: int, key: jax.Array | None) -> Dream:
        """From `starts` (M, ...), without gradient to anything but the weights of policy and critic."""
        by_columns = self.axis != ROWS
        starts = jax.tree.map(columns, starts) if by_columns else starts
        states, actions, notes = self.world_model.rssm.imagine(starts, self._act, horizon, key, self.axis)
        last = jax.tree.map(lambda x: jnp.take(x, -1, self.time), states)
        if not self.read_inside:
            before = jax.tree.map(lambda start, after: self._append(start, after, first=True), starts, states)
            before = jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, horizon, axis=self.time), before)
            notes = self._notes(*self._decide(before), actions)
        numbers, judged, allowed = notes
        critic = TwoHot(judged.pop("critic"), self.axis)
        x = sg(feature(last, self.axis))
        numbers["value"], end = sg(critic.mode()), self._read(x)
        end["value"] = sg(self.behaviour.value(x, self.axis).mode())
        numbers = {name: self._append(end[name], value) for name, value in numbers.items()}
        found = {**numbers, **judged, "actions": actions, "allowed": allowed}
        return Dream(**jax.tree.map(rows, found) if by_columns else found, critic=critic)

    def _act(self, state: State, key: jax.Array | None) -> tuple[jax.Array, Any]:
        x, allowed, dists = self._decide(state)
        action = sample_actions(dists, key, self.axis).astype(state["deter"].dtype)
        if not self.read_inside:
            return action, None
        return action, self._notes(x, allowed, dists, action)

    def _decide(self, state: State) -> tuple[jax.Array, jax.Array | None, dict[str, Distribution]]:
        """Features of states (..., M) or (M, ...), the allowed actions, the policy's distributions."""
        x, allowed = sg(feature(state, self.axis)), None
        if self.masked:
            objective = self.world_model.objective
            plain = self.axis == ROWS
            allowed = objective.allowed(state) if plain else columns(objective.allowed(jax.tree.map(rows, state)))
        return x, allowed, self.behaviour.policy(x, allowed, self.axis)

    def _notes(
        self, x: jax.Array, allowed: jax.Array | None, dists: dict[str, Distribution], actions: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array | None]:
        """What training needs of features x where `actions` were taken."""
        return self._read(x), self.behaviour.judge(x, dists, actions, self.axis), allowed

    def _read(self, x: jax.Array) -> dict[str, jax.Array]:
        heads = {"reward": self.world_model.reward, "cont": self.world_model.cont, "slow_value": self.slow_critic}
        return {name: sg(head(x, self.axis).mode()) for name, head in heads.items()}

    def _append(self, one: jax.Array, many: jax.Array, first: bool = False) -> jax.Array:
        """One step after, or before, many."""
        one = jnp.expand_dims(one, self.time)
        return jnp.concatenate([one, many] if first else [many, one], self.time)
