"""Wrappers around one environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from dreamer.envs.interface import Env, EnvError, Restorable, Transition, batch_fields, restorable


class TimeLimit:
    """Ends an episode after `limit` agent steps: last, but not terminal."""

    def __init__(self, env: Env, limit: int) -> None:
        self.observation_spaces = env.observation_spaces
        self.action_spaces = env.action_spaces
        self.env = env
        self.limit = limit
        self.steps = 0

    def reset(self) -> Transition:
        self.steps = 0
        return self.env.reset()

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        result = self.env.step(action)
        self.steps += 1
        if self.steps >= self.limit:
            result["is_last"] = np.bool_(True)
        return result

    @property
    def restorable(self) -> bool:
        return restorable(self.env)

    def get_state(self) -> tuple[int, Any]:
        return self.steps, cast(Restorable, self.env).get_state()

    def set_state(self, state: tuple[int, Any]) -> None:
        self.steps, inner = state
        cast(Restorable, self.env).set_state(inner)

    def render(self) -> np.ndarray | None:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class AutoReset:
    """Resets by itself on the step after the last one, and checks the first transition against the spaces."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self.over = True
        self.checked = False

    def reset(self) -> Transition:
        result = self.env.reset()
        if not self.checked:
            _check(result, batch_fields(self.env.observation_spaces))
            self.checked = True
        self.over = bool(result["is_last"])
        return result

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        if self.over:
            return self.reset()
        result = self.env.step(action)
        self.over = bool(result["is_last"])
        return result


def _check(result: Transition, fields: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    if set(result) != set(fields):
        raise EnvError(
            f"expected the transition keys {sorted(fields)}, got {sorted(result)}; "
            "correct the environment's observation_spaces or its transitions"
        )
    for key, (shape, dtype) in fields.items():
        value = np.asarray(result[key])
        if value.shape != shape or value.dtype != dtype:
            raise EnvError(
                f"expected {key!r} of shape {shape} and dtype {dtype}, got {value.shape} and {value.dtype}; "
                "correct the environment's observation_spaces or its transitions"
            )
