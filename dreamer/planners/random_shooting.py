"""Random shooting: draw sequences once, take the best. The textbook's planner, and the yardstick for the others."""

from __future__ import annotations

import jax

from dreamer.planner_config import Settings
from dreamer.planners.protocol import State, World
from dreamer.planners.sequences import (
    answer,
    best,
    draw,
    first_proposal,
    follow_policy,
    join,
    nothing_planned,
    of_policy,
    try_out,
)


def random_shooting(
    settings: Settings, model: World, state: State, key: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Plan as `protocol.Plan` says: the best of candidates from a wide proposal and from the policy."""
    draw_key, try_key, policy_key = jax.random.split(key, 3)
    ours = of_policy(settings)
    proposal = first_proposal(nothing_planned(model, state, settings), settings.std, model.actions)
    tried = try_out(
        model, state, draw(proposal, settings.candidates - ours, model.actions, draw_key), settings, try_key
    )
    if ours:
        tried = join(tried, follow_policy(model, state, ours, settings, policy_key))
    return answer(best(tried))
