"""Dream-MPC: a few of the policy's own sequences, improved by a step or two along the gradient of their return."""

from __future__ import annotations

import jax

from dreamer.planner_config import Settings
from dreamer.planners.gradient import climb
from dreamer.planners.protocol import State, World
from dreamer.planners.sequences import answer, best, discrete_entries, follow_policy


def dream_mpc(
    settings: Settings, model: World, state: State, key: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Plan as `protocol.Plan` says. ValueError unless every action is continuous."""
    if discrete_entries(model.actions).any():
        raise ValueError(
            f"expected continuous actions for the planner dream_mpc, got {dict(model.actions)}; take "
            "--planner.name gradient, which moves discrete ones too"
        )
    policy_key, key = jax.random.split(key)
    theirs = follow_policy(model, state, settings.candidates, settings, policy_key)
    return answer(best(climb(settings, model, state, theirs.actions, key)))
