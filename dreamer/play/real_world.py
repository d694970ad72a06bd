"""The real environment beside the dream: stepped with the same actions, taken back where it can be restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from dreamer.config import Config
from dreamer.envs import TaskError, make_env
from dreamer.envs.faults import in_words
from dreamer.envs.interface import Env, Restorable, Transition, action_names, picture, restorable
from dreamer.envs.workers.fence import Fence
from dreamer.records.video import reduced
from dreamer.types import Spaces, visible

#: Suites that run the environments that are built in or come from packages by name; a task of any other names code.
_NAMED = ("toy", "atari", "atari100k", "crafter", "dmc", "bsuite", "minigrid", "memorymaze", "vizdoom", "procgen")
#: Agent steps between saved states; what lies between is played again.
EVERY = 16


class Seen(NamedTuple):
    """A real step: the transition, and the environment's picture for people, uint8 (H, W, 3), where it draws one."""

    transition: Transition
    picture: np.ndarray | None


def runs_code(task: str) -> bool:
    """Whether a task names code to be imported: a Python path, a module of a Gymnasium id, a plugin's suite.

    A run's folder is data, and whoever opens someone else's to look at it has not agreed to run that.
    """
    suite, _, name = task.partition("_")
    return ":" in name or suite not in (*_NAMED, "gym", "minecraft", "dmlab")


class RealWorld:
    """One environment of a run's task. After it failed, `failure` says why and it returns nothing more."""

    def __init__(self, make: Callable[[], Env], observations: Spaces, actions: Spaces) -> None:
        """observations, actions: of training. TaskError if it cannot be made, or has others."""
        self._fence = Fence()
        try:
            self._env = self._fence(make)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(f"expected an environment that can be made, got {in_words(error)}") from error
        seen, acted = visible(self._env.observation_spaces), dict(self._env.action_spaces)
        if seen != visible(observations) or acted != dict(actions):
            self.close()
            raise TaskError(
                f"expected the spaces of training, {visible(observations)} and {dict(actions)}, got {seen} and {acted}"
            )
        self.names = action_names(self._env)
        self.restorable = restorable(self._env)
        self.failure: str | None = None
        self._states: dict[int, Any] = {}
        self._taken: list[Mapping[str, np.ndarray]] = []

    def reset(self) -> Seen | None:
        """Begin an episode."""
        self._taken, self._states = [], {}
        found = self._try(self._env.reset)
        if found is not None:
            self._save()
        return found

    def step(self, action: Mapping[str, np.ndarray]) -> Seen | None:
        found = self._try(lambda: self._env.step(action))
        if found is not None:
            self._taken.append(action)
            if len(self._taken) % EVERY == 0:
                self._save()
        return found

    def back(self, steps: int) -> bool:
        """Return to the moment after this many steps of the episode; False if it cannot."""
        if self.failure is not None or steps > len(self._taken):
            return False
        if steps == len(self._taken):
            return True
        if not self.restorable:
            return False
        saved = max(step for step in self._states if step <= steps)
        again, self._taken = self._taken[saved:steps], self._taken[:saved]
        self._states = {step: state for step, state in self._states.items() if step <= saved}
        try:
            self._fence(cast(Restorable, self._env).set_state, self._states[saved])
        except Exception as error:
            self.failure = in_words(error)
            return False
        return all(self.step(action) is not None for action in again)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._fence(self._env.close)

    def _save(self) -> None:
        if self.restorable:
            self._states[len(self._taken)] = self._fence(cast(Restorable, self._env).get_state)

    def _try(self, advance: Callable[[], Transition]) -> Seen | None:
        if self.failure is not None:
            return None
        try:
            return Seen(self._fence(advance), self._draw())
        except Exception as error:
            self.failure = in_words(error)
            return None

    def _draw(self) -> np.ndarray | None:
        """Pictures are optional, and drawing fails in many ways."""
        with contextlib.suppress(Exception):
            drawn = picture(self._fence(self._env.render))
            return None if drawn is None else reduced(drawn)
        return None


def make_real_world(config: Config, observations: Spaces, actions: Spaces, seed: int) -> RealWorld:
    """That of a run's task. TaskError as `RealWorld`."""
    return RealWorld(lambda: make_env(config.task, config.env, seed), observations, actions)
