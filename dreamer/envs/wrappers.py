"""Wrappers around one environment."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, cast

import cloudpickle
import numpy as np

from dreamer.envs.checks import TransitionCheck
from dreamer.envs.interface import (
    Env,
    EnvError,
    Restorable,
    TaskError,
    Transition,
    TransitionError,
    action_names,
    picture,
    restorable,
)


class Wrapper:
    """An environment that behaves like the one inside; subclasses override what they change."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self.observation_spaces = dict(env.observation_spaces)
        self.action_spaces = dict(env.action_spaces)

    def reset(self) -> Transition:
        return self.seen(self.env.reset())

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        return self.seen(self.env.step(action))

    def seen(self, result: Transition) -> Transition:
        """The transition as it leaves the wrapper."""
        return result

    def render(self) -> np.ndarray | None:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    @property
    def action_names(self) -> dict[str, list[str]]:
        return action_names(self.env)

    @property
    def restorable(self) -> bool:
        return restorable(self.env)

    def get_state(self) -> Any:
        return cast(Restorable, self.env).get_state()

    def set_state(self, state: Any) -> None:
        cast(Restorable, self.env).set_state(state)


class TimeLimit(Wrapper):
    """Ends an episode after `limit` agent steps: last, but not terminal."""

    def __init__(self, env: Env, limit: int) -> None:
        super().__init__(env)
        self.limit = limit
        self.steps = 0

    def reset(self) -> Transition:
        self.steps = 0
        return super().reset()

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        result = super().step(action)
        self.steps += 1
        return {**result, "is_last": np.bool_(result["is_last"] or self.steps >= self.limit)}

    def get_state(self) -> tuple[int, Any]:
        return self.steps, super().get_state()

    def set_state(self, state: tuple[int, Any]) -> None:
        self.steps, inner = state
        super().set_state(inner)


class AutoReset:
    """Resets by itself on the step after the last one, and checks every transition: TransitionError for garbage.

    Until an environment has taken one valid step, this is a TaskError: it is not what it declares, and would fail in
    the same way if it were recreated.
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.observation_spaces, self.action_spaces = dict(env.observation_spaces), dict(env.action_spaces)
        self.over = True
        self._known = False
        self._check = TransitionCheck(self.observation_spaces)

    def reset(self) -> Transition:
        return self._checked(self.env.reset, first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        return self.reset() if self.over else self._checked(lambda: self.env.step(action), first=False)

    def render(self) -> np.ndarray | None:
        """The environment's picture, uint8 (H, W, 3); EnvError if it is not one."""
        return picture(self.env.render())

    @property
    def restorable(self) -> bool:
        return restorable(self.env)

    def get_state(self, attempt: int) -> bytes:
        """A pickle of the environment's state, of where it is in its episode, and of `attempt`.

        EnvError if it cannot be restored.
        """
        if not self.restorable:
            raise EnvError(
                f"expected an environment that can be restored, got a {type(self.env).__name__} that cannot; "
                "ask `restorable` first"
            )
        # By value where pickle would go by name: it may come from the main script, which workers do not import.
        return cloudpickle.dumps((attempt, self.over, cast(Restorable, self.env).get_state()))

    def set_state(self, pickled: bytes) -> int:
        """Go back to what `get_state` returned; returns its `attempt`."""
        attempt, self.over, state = pickle.loads(pickled)
        cast(Restorable, self.env).set_state(state)
        self._known = True
        return attempt

    def _checked(self, advance: Callable[[], Transition], first: bool) -> Transition:
        try:
            result = advance()
            self._check(result, first)
        except TransitionError as error:
            if self._known:
                raise
            raise TaskError(str(error)) from error
        self._known = self._known or not first
        self.over = bool(result["is_last"])
        return result


def share(one: Any, two: Any) -> bool:
    """Whether two environments, foreign or ours, are the same or wrap the same one."""
    return any(outer is inner for outer in _nested(one) for inner in _nested(two))


def _nested(env: Any) -> list[Any]:
    """The environment, then what it wraps, as far as its attributes show; none of its code is called."""
    found = [env]
    while True:
        held = getattr(found[-1], "__dict__", {})
        inner = next((held[name] for name in ("env", "_env") if name in held), None)
        if not hasattr(type(inner), "step") or any(inner is one for one in found):
            return found
        found.append(inner)
