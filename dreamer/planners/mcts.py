"""Tree search as MuZero has it (Schrittwieser et al., 2020), with Gumbel's choice of actions (Danihelka et al., 2022),
by the library `mctx`.

An edge of the tree leads to the most likely (or the expected) next state, never to a drawn one: a tree visits an edge
many times but steps the model once, so a drawn outcome would stay, and the search would run after the lucky ones.

Where there are several actions or continuous ones, a node has a few draws of the policy for its actions, all equally
likely (Hubert et al., 2021, "Learning and planning in complex action spaces").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx

from dreamer.actor_critic import sample_actions
from dreamer.planner_config import Settings
from dreamer.planners.protocol import State, World
from dreamer.planners.sequences import NEVER, spread

#: How much a difference of values counts beside the prior's log-probabilities: between the 0.1 and 1 of the paper. With
#: 0.1, a search in the slippery grid of `gridworld` goes on to prefer its prior where two actions are nearly equal.
VALUE_SCALE = 0.5
#: The values of a node's actions are scaled to span 1, unless they differ by less than this: then only what a critic is
#: unsure of tells them apart, which is not to be blown up (as returns are not, in DreamerV3).
LEAST_SPAN = 1.0


class Choices(NamedTuple):
    """The actions of N nodes: actions (N, C, A), their log-probabilities (N, C) and which are allowed, bool (N, C)."""

    actions: jax.Array
    log_probs: jax.Array
    allowed: jax.Array


def mcts(
    settings: Settings, model: World, state: State, key: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Plan as `protocol.Plan` says; what is planned is the mean return of the chosen action's simulations.

    Without the critic, nothing follows a leaf. With `settings.gumbel` 1, actions are draws of the improved policy.
    """
    choices, found = search(settings, model, state, key)
    summary = found.search_tree.summary()
    at = found.action[:, None]
    planned, visits = (jnp.take_along_axis(x, at, 1)[:, 0] for x in (summary.qvalues, summary.visit_counts))
    planned = jnp.where(visits > 0, planned, summary.value)
    return _taken(choices, found.action).astype(jnp.float32), {"planned": planned}


def improved(settings: Settings, model: World, state: State, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a search makes of N states where one discrete action is chosen: the policy's probabilities (N, A), improved
    by what it found (Danihelka et al., 2022, eq. 11), and the value (N,) of acting so.

    The value is the mean return of each action's simulations under these probabilities, over the actions that had any.
    """
    _, found = search(settings, model, state, key)
    summary, weights = found.search_tree.summary(), found.action_weights
    tried = jnp.where(summary.visit_counts > 0, weights, 0)
    value = (tried * summary.qvalues).sum(1) / jnp.maximum(tried.sum(1), 1e-9)
    return weights, jnp.where(tried.sum(1) > 0, value, summary.value)


def search(settings: Settings, model: World, state: State, key: jax.Array) -> tuple[Choices, mctx.PolicyOutput]:
    """A tree for each state: its actions, and what `mctx` found about them."""
    choices_of = _every_class if _is_single_choice(model) else _draws(settings.candidates)
    root_key, key = jax.random.split(key)
    choices = choices_of(model, state, root_key)

    def value(state: State) -> jax.Array:
        found = model.value(state)
        return found if settings.critic else jnp.zeros_like(found)

    def expand(_: Any, key: jax.Array, index: jax.Array, node: Any) -> tuple[mctx.RecurrentFnOutput, Any]:
        state, choices = node
        state, reward, cont = model.step(state, _taken(choices, index), None)
        choices = choices_of(model, state, key)
        return mctx.RecurrentFnOutput(
            reward=reward, discount=cont, prior_logits=choices.log_probs, value=value(state)
        ), (state, choices)

    root = mctx.RootFnOutput(prior_logits=choices.log_probs, value=value(state), embedding=(state, choices))
    found: mctx.PolicyOutput = mctx.gumbel_muzero_policy(
        (),
        key,
        root,
        expand,
        settings.simulations,
        invalid_actions=~choices.allowed,
        max_depth=settings.horizon,
        max_num_considered_actions=choices.log_probs.shape[1],
        gumbel_scale=settings.gumbel,
        qtransform=functools.partial(
            mctx.qtransform_completed_by_mix_value, value_scale=VALUE_SCALE, epsilon=LEAST_SPAN
        ),
    )
    return choices, found


def _taken(choices: Choices, index: jax.Array) -> jax.Array:
    """The actions (N, A) with these numbers (N,)."""
    return jnp.take_along_axis(choices.actions, index[:, None, None], 1)[:, 0]


def _is_single_choice(world: World) -> bool:
    """Whether the classes of one discrete action are all that can be done."""
    return [len(space.classes or ()) for space in world.actions.values()] == [1]


def _every_class(world: World, state: State, key: jax.Array) -> Choices:
    (dist,) = world.policy(state).values()
    log_probs = dist.log_probs  # type: ignore[attr-defined]
    envs, classes = log_probs.shape
    actions = jnp.broadcast_to(jnp.eye(classes), (envs, classes, classes))
    allowed = world.allowed(state)
    allowed = jnp.ones((envs, classes), bool) if allowed is None else allowed
    return Choices(actions, jnp.where(allowed, log_probs, NEVER), allowed)


def _draws(count: int) -> Callable[[World, State, jax.Array], Choices]:
    """Draws of the policy as the actions of a node."""

    def choices(world: World, state: State, key: jax.Array) -> Choices:
        drawn = jnp.clip(sample_actions(world.policy(spread(state, count)), key), -1, 1)
        actions = drawn.reshape(-1, count, drawn.shape[-1])
        same = actions.shape[:2]
        return Choices(actions, jnp.zeros(same), jnp.ones(same, bool))

    return choices
