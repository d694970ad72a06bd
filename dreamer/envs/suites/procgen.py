"""Procgen: 16 games whose levels are newly drawn each episode, through the package's own C++ library.

The package ends an episode and shows the next one's first picture in the same step, so the last image of an episode is
the one before its end. An end is a time limit, not terminal, where the game's clock ran out before the level was
complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dreamer.env_config import EnvConfig, ProcgenConfig
from dreamer.envs.interface import Transition, transition
from dreamer.envs.options import resize
from dreamer.envs.suites.packages import part
from dreamer.types import Space

#: game: steps after which it cuts an episode off
TIME_LIMITS: dict[str, int] = {
    "bigfish": 6000,
    "bossfight": 4000,
    "caveflyer": 1000,
    "chaser": 1000,
    "climber": 1000,
    "coinrun": 1000,
    "dodgeball": 1000,
    "fruitbot": 1000,
    "heist": 1000,
    "jumper": 1000,
    "leaper": 500,
    "maze": 500,
    "miner": 1000,
    "ninja": 1000,
    "plunder": 4000,
    "starpilot": 1000,
}
NATIVE = (64, 64)
#: Ends the running episode.
RESET = np.array([-1], np.int32)


class Procgen:
    """One game."""

    def __init__(self, name: str, config: ProcgenConfig, seed: int) -> None:
        levels = {} if config.levels is None else {"num_levels": config.levels, "start_level": config.start_level}
        self._native = config.size == NATIVE
        self._env = part("procgen", "env").ProcgenGym3Env(
            1,
            name,
            distribution_mode=config.mode,
            rand_seed=seed % 2**31,
            num_threads=0,
            render_mode=None if self._native else "rgb_array",
            **levels,
        )
        self._limit = TIME_LIMITS[name]
        self._config = config
        self._steps = 0
        self._image = np.zeros((*config.size, 3), np.uint8)
        self.observation_spaces = {"image": Space("image", self._image.shape)}
        self.action_spaces = {"action": Space("discrete", (), (int(self._env.ac_space.eltype.n),))}

    def reset(self) -> Transition:
        if not self._env.observe()[2][0]:
            self._env.act(RESET)
        self._steps = 0
        self._image = self._picture()
        return transition({"image": self._image.copy()}, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        self._env.act(np.array([action["action"]], np.int32))
        reward, _, first = self._env.observe()
        over = bool(first[0])
        self._steps += 1
        if not over:
            self._image = self._picture()
        late = over and self._steps >= self._limit and not self._env.get_info()[0]["prev_level_complete"]
        return transition({"image": self._image.copy()}, reward[0], is_last=over, is_terminal=over and not late)

    def render(self) -> np.ndarray:
        return self._image.copy()

    def close(self) -> None:
        self._env.close()

    def get_state(self) -> dict[str, Any]:
        return {"game": self._env.get_state(), "steps": self._steps, "image": self._image.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._env.set_state(state["game"])
        self._steps, self._image = state["steps"], state["image"].copy()

    def _picture(self) -> np.ndarray:
        """uint8 (H, W, 3): the game's own 64x64, or another size from its large picture."""
        if self._native:
            return self._env.observe()[1]["rgb"][0]
        return resize(self._env.get_info()[0]["rgb"], self._config.size)


def make(name: str, config: EnvConfig, seed: int) -> Procgen:
    return Procgen(name, config.procgen, seed)


def tasks() -> Sequence[str]:
    return tuple(TIME_LIMITS)
