"""The cross-entropy method, as PlaNet plans (Hafner et al., 2019, algorithm 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dreamer.planner_config import Settings
from dreamer.planners.protocol import State, World
from dreamer.planners.sequences import first_proposal, nothing_planned, refine


def cem(
    settings: Settings, model: World, state: State, key: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Plan as `protocol.Plan` says: in each round the proposal becomes the elites' mean and deviation, and for discrete
    actions their frequencies."""
    proposal = first_proposal(nothing_planned(model, state, settings), settings.std, model.actions)
    return refine(model, state, proposal, settings, lambda returns: jnp.full_like(returns, 1 / returns.shape[1]), key)
