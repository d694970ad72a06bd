"""Memory Maze: find the ball of the colour that the picture's border shows, in a new maze each episode.

Tasks are the sizes: ``9x9`` (3 balls, 1000 steps), ``11x11`` (4, 2000), ``13x13`` (5, 3000), ``15x15`` (6, 4000). An
episode ends at its time limit, which is not terminal. Pictures need OpenGL, as in dmc.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.random import RandomState

from dreamer.env_config import EnvConfig, MemoryMazeConfig
from dreamer.envs.interface import TaskError, Transition, transition
from dreamer.envs.suites.dmc import _load_suite
from dreamer.envs.suites.packages import part
from dreamer.envs.suites.seeded import SeededEpisodes
from dreamer.types import Space

SIZES = ("9x9", "11x11", "13x13", "15x15")
#: What defines a maze beside its seed, by labmaze's names.
KEPT = (
    "height",
    "width",
    "max_rooms",
    "room_min_size",
    "room_max_size",
    "max_variations",
    "spawns_per_room",
    "objects_per_room",
)
NO_RENDERER = (
    "could not draw Memory Maze ({cause}). Install a headless OpenGL, on Debian and Ubuntu "
    "`apt-get install libegl1 libgl1 libgl1-mesa-dri` (MUJOCO_GL=egl) or `apt-get install libosmesa6` "
    "(MUJOCO_GL=osmesa)"
)


class MemoryMaze:
    """Mazes of one size."""

    def __init__(self, name: str, config: MemoryMazeConfig) -> None:
        _load_suite(pixels=True)  # chooses the renderer before anything imports MuJoCo
        _quieten()
        make_task = getattr(part("memory_maze", "tasks"), f"memory_maze_{name}")
        try:
            self._env = make_task(image_only_obs=True, camera_resolution=config.size, seed=0)
        except Exception as error:  # graphics drivers raise many kinds
            raise TaskError(NO_RENDERER.format(cause=error)) from error
        self._inner = self._env
        while hasattr(self._inner, "env"):
            self._inner = self._inner.env
        self._picture = np.zeros((config.size, config.size, 3), np.uint8)
        self.observation_spaces = {"image": Space("image", self._picture.shape)}
        self.action_spaces = {"action": Space("discrete", (), (self._env.action_spec().num_values,))}

    def begin(self, seed: int) -> Transition:
        """A new maze from a new generator: the old one's random stream cannot be set."""
        rng: RandomState = self._inner.random_state
        rng.seed(seed)
        arena = self._inner.task.root_entity
        old = arena.maze
        arena._maze = type(old)(
            **{name: getattr(old, name) for name in KEPT},
            simplify=True,
            random_seed=int(rng.randint(1, 2**31 - 1)),
        )
        return transition(self._observation(self._env.reset()), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        result = self._env.step(int(action["action"]))
        terminal = result.last() and result.discount == 0
        return transition(self._observation(result), result.reward, is_last=result.last(), is_terminal=terminal)

    def render(self) -> np.ndarray:
        return self._picture.copy()

    def close(self) -> None:
        self._env.close()

    def _observation(self, result: Any) -> dict[str, np.ndarray]:
        self._picture = np.array(result.observation)
        return {"image": self._picture.copy()}


def _quieten() -> None:
    """Silences two messages of every reset, neither of which means anything here.

    dm_control warns of a walker without a free joint; MuJoCo reports a deprecated attribute in MUJOCO_LOG.TXT in the
    working folder, so it no longer writes that file.
    """
    import mujoco

    logging.getLogger("absl").addFilter(_worth_saying)
    config = mujoco.MjLogConfig.get()
    config.logto_file = False
    config.set()


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Cannot set velocity")


def make(name: str, config: EnvConfig, seed: int) -> SeededEpisodes:
    return SeededEpisodes(MemoryMaze(name, config.memorymaze), seed)


def tasks() -> Sequence[str]:
    return SIZES
