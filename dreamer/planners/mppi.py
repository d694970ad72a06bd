"""Model predictive path integral control, as TD-MPC plans (Hansen et al., 2022, algorithm 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dreamer.planner_config import Settings
from dreamer.planners.protocol import State, World
from dreamer.planners.sequences import (
    class_sums,
    discrete_entries,
    first_proposal,
    nothing_planned,
    refine,
)

#: How much of the last plan's probabilities of discrete actions the first proposal keeps; the rest is uniform.
KEPT = 0.5


def mppi(
    settings: Settings, model: World, state: State, key: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Plan as `protocol.Plan` says: elites weigh exp(return / temperature), a share of the candidates is the policy's,
    and the first proposal is the last plan, one step on.

    TD-MPC's temperature is for returns of a known scale. Here it counts in standard deviations of the elites' returns,
    so that it serves rewards of any scale.
    """

    def weigh(returns: jax.Array) -> jax.Array:
        deviation = returns.std(1, keepdims=True)
        return jax.nn.softmax((returns - returns.max(1, keepdims=True)) / (settings.temperature * deviation + 1e-9))

    mean = nothing_planned(model, state, settings) if before is None else _one_step_on(before, model)
    return refine(model, state, first_proposal(mean, settings.std, model.actions), settings, weigh, key)


def _one_step_on(plan: jax.Array, model: World) -> jax.Array:
    """What is left of a plan (N, H, A), with a new last step."""
    left = jnp.concatenate([plan[:, 1:], jnp.zeros_like(plan[:, :1])], 1)
    uniform = 1 / class_sums(jnp.ones_like(left), model.actions)
    return jnp.where(discrete_entries(model.actions), KEPT * left + (1 - KEPT) * uniform, left)
