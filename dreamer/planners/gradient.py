"""Planning by gradient: back-propagation of the return through the dynamics, from several starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dreamer.planner_config import Settings
from dreamer.planners.protocol import State, World
from dreamer.planners.sequences import (
    Tried,
    answer,
    best,
    discrete_entries,
    draw,
    first_proposal,
    follow_policy,
    join,
    nothing_planned,
    of_policy,
    try_out,
)

#: The score of a class that a start chose, above the others', where a gradient is to move it.
CHOSEN = 2.0


def gradient(
    settings: Settings, model: World, state: State, key: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Plan as `protocol.Plan` says: a share of the starts is the policy's, the others are drawn.

    Discrete actions are one-hot going forward, and have the gradient of the softmax of their scores.
    """
    draw_key, policy_key, key = jax.random.split(key, 3)
    ours = of_policy(settings)
    proposal = first_proposal(nothing_planned(model, state, settings), settings.std, model.actions)
    starts = [draw(proposal, settings.candidates - ours, model.actions, draw_key)]
    if ours:
        theirs = follow_policy(model, state, ours, settings, policy_key)
        starts.append(jnp.where(discrete_entries(model.actions), CHOSEN, 1.0) * theirs.actions)
    return answer(best(climb(settings, model, state, jnp.concatenate(starts, 1), key)))


def climb(settings: Settings, model: World, state: State, scores: jax.Array, key: jax.Array) -> Tried:
    """Candidates, scores (N, C, H, A), each after every one of `rounds` steps of Adam up its return, and before.

    (N, (rounds + 1) * C) of them. Outcomes are drawn with the same key in each round, so that a return changes by the
    actions alone.
    """
    optimizer, discrete = optax.adam(settings.step_size), discrete_entries(model.actions)

    def total(scores: jax.Array) -> tuple[jax.Array, Tried]:
        tried = try_out(model, state, scores, settings, key, soft=True)
        return -tried.returns.sum(), tried

    def step(carry: tuple, _: None) -> tuple[tuple, Tried]:
        scores, memory = carry
        slope, tried = jax.grad(total, has_aux=True)(scores)
        change, memory = optimizer.update(slope, memory)
        scores = scores + change
        return (jnp.where(discrete, scores, jnp.clip(scores, -1, 1)), memory), tried

    scores = jnp.where(discrete, scores, jnp.clip(scores, -1, 1))
    (scores, _), seen = jax.lax.scan(step, (scores, optimizer.init(scores)), None, settings.rounds)
    seen = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), seen)
    return join(seen, try_out(model, state, scores, settings, key))
