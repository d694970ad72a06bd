"""Dreams as the losses need them: the policy acts in the world model's imagination, and the heads read every state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dreamer import features, kernels
from dreamer.actor_critic import ActorCritic, Dream, sample_actions
from dreamer.behaviours import Motive
from dreamer.distributions import Distribution
from dreamer.networks import frozen
from dreamer.rssm import State
from dreamer.world_model import WorldModel

sg = jax.lax.stop_gradient


def imagine(
    world_model: WorldModel,
    behaviour: ActorCritic,
    slow: Mapping[str, nnx.Module],
    starts: State,
    horizon: int,
    key: jax.Array | None,
    *,
    masked: bool,
    motive: Motive,
) -> Dream:
    """Imagine `horizon` steps from `starts` (M, ...), without gradient to the world model's weights.

    Whether anything in it is differentiated is the behaviour's choice, `through_dreams`: DreamerV3 trains its weights
    on dreams as on data. What the policy reads of a state is data in any case. slow: slow copies; that of the critic is
    read beside the critic. masked: the dream predicts which actions are allowed, and the policy keeps to them. motive:
    what the dream's rewards are.
    """
    world: WorldModel = frozen(world_model)
    stop = behaviour.through_dreams
    heads: dict[str, Callable[[jax.Array], Any]] = {"reward": motive.dreamt(world), "cont": world.cont}
    heads |= {"slow_value": slow["value"], **behaviour.frozen_heads()}

    def look(state: State) -> tuple[jax.Array, jax.Array | None, dict[str, Distribution]]:
        """The features of a state, the allowed actions, the policy's distributions."""
        x = stop(world.rssm.feature(state))
        allowed = world.objective.allowed(x) if masked else None
        return x, allowed, behaviour.policy(sg(x), allowed)

    def read(x: jax.Array) -> dict[str, jax.Array]:
        return {name: stop(head(x).mode()) for name, head in heads.items()}

    def note(x: jax.Array, allowed: jax.Array | None, dists: dict[str, Distribution], action: jax.Array) -> tuple:
        """What training needs to know about a state where `action` was taken."""
        return read(x), behaviour.judge(x, dists, action), allowed

    def act(state: State, key: jax.Array | None) -> tuple[jax.Array, Any]:
        x, allowed, dists = look(state)
        action = stop(sample_actions(dists, key)).astype(state["deter"].dtype)
        return action, note(x, allowed, dists, action) if inside else None

    inside = kernels.heads_read_in_scan()
    with features.in_scans():
        starts = features.enter(starts)
        states, actions, notes = world.rssm.imagine(starts, act, horizon, key)
        if not inside:
            before = jax.tree.map(lambda start, after: jnp.concatenate([start[None], after[:-1]]), starts, states)
            notes = note(*look(before), actions)
        numbers, judged, allowed = notes
        x = stop(world.rssm.feature(jax.tree.map(lambda x: x[-1], states)))
        end = {"value": stop(behaviour.value(x).mode()), **read(x)}
        numbers = {"value": stop(judged["critic"].mode()), **numbers}
        numbers = {name: jnp.concatenate([value, end[name][None]]) for name, value in numbers.items()}
        actions, allowed = jax.vmap(features.leave)((actions, allowed))
    return Dream(**numbers, **judged, actions=actions, allowed=allowed)
