"""Small Gymnasium environments whose every number is known, for the tests of `dreamer.envs`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import numpy as np

#: One episode: (reward, terminated, truncated) of each step.
Script = Sequence[tuple[float, bool, bool]]


class Scripted(gymnasium.Env):
    """Plays scripts one after another, again and again. The observation is [episode, step, last action]."""

    observation_space = gs.Box(-np.inf, np.inf, (3,))
    action_space = gs.Discrete(5)

    def __init__(self, *scripts: Script) -> None:
        self.scripts = scripts
        self.episode = -1
        self.position = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.episode += 1
        self.position = 0
        return self._observation(-1), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, terminated, truncated = self.scripts[self.episode % len(self.scripts)][self.position]
        self.position += 1
        return self._observation(action), reward, terminated, truncated, {}

    def _observation(self, action: int) -> np.ndarray:
        return np.array([self.episode, self.position, action], np.float32)


class Nested(gymnasium.Env):
    """Every kind of space, nested; observations are sampled, and every action must be in the action space."""

    observation_space = gs.Dict(
        {
            "camera": gs.Box(0, 255, (12, 10, 3), np.uint8),
            "gray": gs.Box(0, 255, (9, 7), np.uint8),
            "grid": gs.Box(-3, 3, (2, 2), np.int64),
            "number": gs.Box(-1, 1, ()),
            "mode": gs.Discrete(4, start=2),
            "parts": gs.Tuple((gs.MultiDiscrete([[2, 3], [4, 5]]), gs.Dict({"bits": gs.MultiBinary(3)}))),
        }
    )
    action_space = gs.Dict(
        {
            "gear": gs.Discrete(3, start=-1),
            "hands": gs.Tuple(
                (gs.Box(np.array([0.0, -2.0], np.float32), np.array([1.0, 6.0], np.float32)), gs.MultiBinary((2, 2)))
            ),
            "keys": gs.MultiDiscrete([2, 5], start=[1, 0]),
            "whole": gs.Box(0, 10, (1,), np.int32),
        }
    )

    def __init__(self) -> None:
        # A space carries its random stream: environments must not share one.
        self.observation_space = copy.deepcopy(type(self).observation_space)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: dict) -> tuple[dict, float, bool, bool, dict]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action} is not in the action space")
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.1), False, {}


class Spaced(gymnasium.Env):
    """Any two spaces; does nothing."""

    def __init__(self, observation: gs.Space, action: gs.Space) -> None:
        self.observation_space = observation
        self.action_space = action

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {}


class Imports(Scripted):
    """Observes which modules its process has imported: [jax, dm_control, the main script's name is __main__]."""

    def _observation(self, action: int) -> np.ndarray:
        loaded = ["jax" in sys.modules, "dm_control" in sys.modules, hasattr(sys.modules["__main__"], "__file__")]
        return np.array(loaded, np.float32)


gymnasium.register("Nested-v0", entry_point=Nested)
