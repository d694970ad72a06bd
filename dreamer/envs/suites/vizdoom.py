"""ViZDoom: task ``take_cover``, one of the two of the first World Models paper.

Fireballs come from the front; the player stands still or steps left or right, and gets 1 for every tic alive. One
agent step is one tic, 1/35 s. Death is terminal, 2100 tics (a minute) are the time limit; the paper calls a mean score
above 750 solved.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dreamer.env_config import EnvConfig, VizdoomConfig
from dreamer.envs.interface import Transition, transition
from dreamer.envs.options import resize
from dreamer.envs.suites.seeded import SeededEpisodes
from dreamer.types import Space

#: Starts the engine in a folder of its own, since it writes to its working folder, and lets it die with its parent.
LAUNCHER = """#!/bin/sh
cd {folder} || exit 1
if command -v setpriv >/dev/null; then exec setpriv --pdeathsig KILL -- {engine} "$@"; fi
exec {engine} "$@"
"""


class ViZDoom:
    """One game: an engine process of its own, and pictures through shared memory."""

    def __init__(self, name: str, config: VizdoomConfig) -> None:
        import vizdoom

        self._folder = tempfile.TemporaryDirectory(prefix="vizdoom-", ignore_cleanup_errors=True)
        game = vizdoom.DoomGame()
        game.load_config(str(Path(vizdoom.scenarios_path) / f"{name}.cfg"))
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_vizdoom_path(_launcher(Path(self._folder.name), Path(vizdoom.__file__).with_name("vizdoom")))
        game.init()
        _unlink_shared_memory()
        self._game = game
        self._config = config
        self._choices = [[False] * game.get_available_buttons_size()]
        self._choices += np.eye(game.get_available_buttons_size(), dtype=bool).tolist()
        self._screen = np.zeros((120, 160, 3), np.uint8)
        self._tics = 0
        self.observation_spaces = {"image": Space("image", (*config.size, 3))}
        self.action_spaces = {"action": Space("discrete", (), (len(self._choices),))}

    def begin(self, seed: int) -> Transition:
        self._game.set_seed(seed)
        self._game.new_episode()
        self._tics = 0
        return transition({"image": self._image()}, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        """The engine has no picture of the end: the last image is the one before it."""
        reward = self._game.make_action(self._choices[int(action["action"])])
        self._tics += 1
        dead = self._game.is_episode_finished()
        late = self._tics >= self._config.max_tics
        return transition({"image": self._image()}, reward, is_last=dead or late, is_terminal=dead)

    def render(self) -> np.ndarray:
        return self._screen.copy()

    def close(self) -> None:
        self._game.close()
        self._folder.cleanup()

    def _image(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        state = self._game.get_state()
        if state is not None:
            self._screen = np.array(state.screen_buffer)
        return resize(self._screen, self._config.size)


def _launcher(folder: Path, engine: Path) -> str:
    """Path of a script that starts the engine."""
    path = folder / "launcher"
    path.write_text(LAUNCHER.format(folder=shlex.quote(str(folder)), engine=shlex.quote(str(engine))))
    path.chmod(0o700)
    return str(path)


def _unlink_shared_memory() -> None:
    """Remove the names of this process's engines from /dev/shm: both sides have opened the memory by now.

    Otherwise it would stay there if this process were killed.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for path in {line.split()[-1] for line in lines if "/dev/shm/ViZDoom" in line}:
        if os.path.exists(path):
            os.unlink(path)


def make(name: str, config: EnvConfig, seed: int) -> SeededEpisodes:
    return SeededEpisodes(ViZDoom(name, config.vizdoom), seed)


def tasks() -> Sequence[str]:
    return ("take_cover",)
