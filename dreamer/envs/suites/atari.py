"""Atari through ale-py: one emulator per environment.

The suites ``atari`` and ``atari100k`` are this same code; their protocols differ in ``env.atari.*`` (see the presets).
One agent step is `repeat` emulator frames with one action. The observation is the maximum of the last `pooling` raw RGB
frames, resized with Pillow (bilinear), then gray if asked. Rewards come from the emulator, summed, not clipped or
discounted.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dreamer.env_config import AtariConfig, EnvConfig
from dreamer.envs.interface import TaskError, Transition, as_rgb, transition
from dreamer.envs.suites.atari_scores import SCORES
from dreamer.types import Space
from dreamer.values import suggestion

#: Shares of red, green and blue in gray, in thousandths: whole numbers, so that every machine rounds the same way.
GRAY = np.array([299, 587, 114], np.int32)


class Atari:
    """One game. `name` is ALE's id of the ROM, such as ``ms_pacman``."""

    def __init__(self, name: str, config: AtariConfig, seed: int) -> None:
        import ale_py
        from ale_py import roms

        rom = roms.get_rom_path(name)
        if rom is None:
            raise TaskError(f"expected a game whose ROM is in ale-py, got {name!r}; `dreamer envs atari` lists them")
        self.config = config
        self.rng = np.random.default_rng(seed)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        # The emulator reads these when it loads a game.
        self._ale.setInt("random_seed", int(self.rng.integers(2**31)))
        self._ale.setFloat("repeat_action_probability", config.sticky)
        self._ale.loadROM(rom)
        minimal = config.actions == "minimal"
        self._actions = self._ale.getMinimalActionSet() if minimal else self._ale.getLegalActionSet()
        self.action_names = {"action": [action.name for action in self._actions]}
        self._noop = ale_py.Action.NOOP
        self._before: tuple[Any, Any] | None = None
        height, width = self._ale.getScreenDims()
        screens = (np.zeros((height, width, 3), np.uint8) for _ in range(config.pooling))
        self._screens = deque(screens, maxlen=config.pooling)
        self._frames = 0
        self._lives = 0
        self.observation_spaces = {"image": Space("image", (*config.size, 1 if config.gray else 3))}
        self.action_spaces = {"action": Space("discrete", (), (len(self._actions),))}

    def reset(self) -> Transition:
        self._ale.reset_game()
        self._before = None
        for _ in range(self.rng.integers(self.config.noops + 1)):
            self._remember(self._noop)
            self._ale.act(self._noop)
            if self._ale.game_over():
                self._ale.reset_game()
                self._before = None
        self._frames = 0
        self._lives = self._ale.lives()
        for _ in range(self.config.pooling):  # the first observation shows one frame, not what came before the reset
            self._grab()
        return transition({"image": self._image()}, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        choice = self._actions[int(action["action"])]
        reward, over, late = 0.0, False, False
        for frame in range(self.config.repeat):
            if frame == self.config.repeat - 1:
                self._remember(choice)
            reward += self._ale.act(choice)
            self._frames += 1
            self._grab()
            over = self._ale.game_over()
            late = self._frames >= self.config.max_frames
            if over or late:
                break
        lives = self._ale.lives()
        lost = self.config.terminal_on_life_loss and lives < self._lives
        self._lives = lives
        return transition({"image": self._image()}, reward, is_last=over or late, is_terminal=over or lost)

    def _remember(self, action: Any) -> None:
        """Note the state before the last frame and the action taken there.

        The pins of the console's sockets and switches are not part of the emulator's state, and for one more frame the
        game reads what the last frame left on them. To restore it exactly, that frame is played again.
        """
        self._before = self._ale.cloneState(include_rng=self.config.sticky > 0), action

    def get_state(self) -> dict[str, Any]:
        before = None if self._before is None else (self._before[0].serialize(), self._before[1].value)
        return {
            "before": before,
            "emulator": self._ale.cloneState(include_rng=True).serialize(),
            "rng": self.rng.bit_generator.state,
            "screens": np.stack(self._screens),
            "frames": self._frames,
            "lives": self._lives,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        import ale_py

        self._before = None
        if state["before"] is None:
            self._ale.reset_game()
        else:
            before, action = ale_py.ALEState(state["before"][0]), ale_py.Action(state["before"][1])
            self._before = before, action
            self._ale.restoreState(before)
            self._ale.act(action)
        self._ale.restoreState(ale_py.ALEState(state["emulator"]))
        self.rng.bit_generator.state = state["rng"]
        self._screens.extend(screen.copy() for screen in state["screens"])
        self._frames, self._lives = state["frames"], state["lives"]

    def render(self) -> np.ndarray:
        return as_rgb(self._image())

    def close(self) -> None:
        """The emulator is freed with the object."""

    def _grab(self) -> None:
        """The current raw screen replaces the oldest kept one."""
        screen = self._screens.popleft()
        self._ale.getScreenRGB(screen)
        self._screens.append(screen)

    def _image(self) -> np.ndarray:
        """uint8 (H, W, 1 or 3)."""
        height, width = self.config.size
        pooled = Image.fromarray(functools.reduce(np.maximum, self._screens))
        image = np.array(pooled.resize((width, height), Image.Resampling.BILINEAR))
        if not self.config.gray:
            return image
        red, green, blue = (image[..., channel] * share for channel, share in enumerate(GRAY))
        return ((red + green + blue) // 1000).astype(np.uint8)[..., None]


def make(name: str, config: EnvConfig, seed: int) -> Atari:
    return Atari(name, config.atari, seed)


def tasks() -> Sequence[str]:
    """The 57 benchmark games; any other ROM of ale-py works too."""
    return tuple(SCORES)


def check(name: str) -> None:
    """TaskError unless ale-py has the game's ROM."""
    from ale_py import roms

    known = roms.get_all_rom_ids()
    if name not in known:
        hint = suggestion(name, known)
        raise TaskError(f"expected an Atari game in ALE's spelling, got {name!r}{hint}; `dreamer envs` lists them")


def human_normalized(name: str, score: float) -> float | None:
    """(score - random) / (human - random), or None for a game without published scores."""
    if name not in SCORES:
        return None
    random, human = SCORES[name]
    return (score - random) / (human - random)
