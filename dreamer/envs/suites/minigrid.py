"""MiniGrid: small grid worlds seen as pictures. A task is its Gymnasium id without ``MiniGrid-``: ``DoorKey-8x8-v0``.

The agent sees a picture only. The mission, a text, is left out, so the few worlds whose mission changes from episode
to episode (Fetch, GoToDoor, GoToObject, PutNear) must be played by trial and error.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium
import numpy as np

from dreamer.env_config import EnvConfig, MinigridConfig
from dreamer.envs.interface import TaskError, Transition, transition
from dreamer.envs.options import resize
from dreamer.envs.suites.seeded import SeededEpisodes
from dreamer.types import Space
from dreamer.values import suggestion

PREFIX = "MiniGrid-"
#: These need pictures that the package does not include.
BROKEN = re.compile("MiniGrid-WFC-")


class MiniGrid:
    """One world. ``terminated`` is terminal, ``truncated`` a time limit."""

    def __init__(self, name: str, config: MinigridConfig) -> None:
        importlib.import_module("minigrid")
        self._env = gymnasium.make(PREFIX + name, disable_env_checker=True)
        self._grid = cast(Any, self._env.unwrapped)
        self._config = config
        self.observation_spaces = {"image": Space("image", (*config.size, 3))}
        self.action_names = {"action": [action.name for action in self._grid.actions]}
        self.action_spaces = {"action": Space("discrete", (), (int(self._grid.action_space.n),))}

    def begin(self, seed: int) -> Transition:
        self._env.reset(seed=seed)
        return transition({"image": self._image()}, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        _, reward, terminated, truncated, _ = self._env.step(int(action["action"]))
        over = bool(terminated or truncated)
        return transition({"image": self._image()}, float(reward), is_last=over, is_terminal=bool(terminated))

    def render(self) -> np.ndarray:
        """The whole grid with the agent's view highlighted, whatever the agent observes."""
        return self._grid.get_frame(highlight=True, tile_size=16)

    def close(self) -> None:
        self._env.close()

    def _image(self) -> np.ndarray:
        """uint8 (H, W, 3). Drawn at the smallest size that is not below the one asked for, then scaled down."""
        partial = self._config.view == "partial"
        height, width = self._config.size
        rows, columns = (self._grid.agent_view_size,) * 2 if partial else (self._grid.height, self._grid.width)
        tile = max(-(-height // rows), -(-width // columns))
        frame = self._grid.get_frame(highlight=False, tile_size=tile, agent_pov=partial)
        return resize(frame, self._config.size)


def make(name: str, config: EnvConfig, seed: int) -> SeededEpisodes:
    return SeededEpisodes(MiniGrid(name, config.minigrid), seed)


def tasks() -> Sequence[str]:
    """The newest version of every world that the package can make; none without the package."""
    if importlib.util.find_spec("minigrid") is None:
        return ()
    importlib.import_module("minigrid")
    newest: dict[str, int] = {}
    for env_id in gymnasium.registry:
        if env_id.startswith(PREFIX) and not BROKEN.match(env_id):
            name, _, version = env_id.removeprefix(PREFIX).rpartition("-v")
            newest[name] = max(int(version), newest.get(name, 0))
    return tuple(f"{name}-v{version}" for name, version in newest.items())


def check(name: str) -> None:
    """TaskError unless the package has the world. The package must be installed."""
    known = tasks()
    if name not in known:
        raise TaskError(
            f"expected a MiniGrid id without {PREFIX}, such as DoorKey-8x8-v0, got {name!r}"
            f"{suggestion(name, known, prefix='minigrid_')}; `dreamer envs minigrid` lists them"
        )
