"""Atari through ale-py's own vector environment: all emulators in threads of this process, written in C++.

Faster than one worker process per emulator, but not the pixels of the published protocol, which `atari.py` follows:

- Images are gray before the maximum is taken, not after, and resized by area (OpenCV), not bilinearly (Pillow).
- The frame that ends an episode is not drawn: the last observation shows what came before it.
- The state of an emulator cannot be read or saved.

Everything else is the same: frames per step, rewards, sticky actions, no-ops, action sets, time limits and lost lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dreamer.env_config import EnvConfig
from dreamer.envs.interface import Batch, EnvError, Fault, TaskError, as_rgb
from dreamer.envs.options import chosen
from dreamer.envs.workers.inline import check_actions
from dreamer.types import Space, Spaces

if TYPE_CHECKING:
    from ale_py.vector_env import AtariVectorEnv


class NativeAtariVectorEnv:
    """N emulators of one game, stepped by C++ threads while this process does something else.

    `name` is ALE's id of the ROM; `seeds` has one seed per environment. Raises TaskError for options that ale-py's
    vector environment does not have.
    """

    restorable = False

    def __init__(self, name: str, config: EnvConfig, seeds: Sequence[int]) -> None:
        from ale_py.vector_env import AtariVectorEnv

        atari = config.atari
        _check_options(config)
        self.task = name
        self.num_envs = len(seeds)
        self._life_loss = atari.terminal_on_life_loss
        height, width = atari.size
        limit = atari.max_frames if config.time_limit is None else config.time_limit * atari.repeat
        self._env: AtariVectorEnv | None = AtariVectorEnv(
            name,
            self.num_envs,
            max_num_frames_per_episode=min(atari.max_frames, limit),
            repeat_action_probability=atari.sticky,
            full_action_space=atari.actions == "all",
            img_height=height,
            img_width=width,
            grayscale=atari.gray,
            stack_num=1,
            frameskip=atari.repeat,
            maxpool=atari.pooling == 2,
            noop_max=atari.noops + 1,  # ale-py draws from 0 to one less
            reward_clipping=False,
            use_fire_reset=False,
        )
        self._shape = (self.num_envs, height, width, 1 if atari.gray else 3)
        # The emulator's seeds are int32, and negative ones mean none.
        self._seeds: np.ndarray | None = np.array(seeds, np.int64) % 2**31
        self._last = np.zeros(self.num_envs, bool)
        self._lives = np.zeros(self.num_envs, np.int32)
        self._image: np.ndarray | None = None
        self._waiting = False
        self._count = len(self._env.ale.get_action_set())
        self.observation_spaces: Spaces = {"image": Space("image", self._shape[1:])}
        self.action_spaces: Spaces = {"action": Space("discrete", (), (self._count,))}

    def reset(self) -> Batch:
        if self._waiting:
            self.step_wait()
        observation, info = self._open().reset(seed=self._seeds)
        self._seeds = None  # later resets continue the same random stream
        zeros = np.zeros(self.num_envs, bool)
        return self._batch(observation, info, zeros, zeros, zeros, first=~zeros)

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        if self._waiting:
            raise EnvError("expected step_wait after step_async, got another step_async; call them in turn")
        check_actions(actions, self.action_spaces, self.num_envs)
        choice, count = np.asarray(actions["action"], np.int32), self._count
        if ((choice < 0) | (choice >= count)).any():  # ale-py would never return
            raise EnvError(f"expected actions from 0 to {count - 1}, got {choice.tolist()}; one index per environment")
        self._open().send(choice)
        self._waiting = True

    def step_wait(self) -> Batch:
        if not self._waiting:
            raise EnvError("expected step_async before step_wait, got none; call them in turn")
        self._waiting = False
        observation, reward, terminated, truncated, info = self._open().recv()
        return self._batch(observation, info, reward, terminated, truncated, first=self._last)

    def render(self) -> np.ndarray | None:
        """The first environment's latest observation."""
        return None if self._image is None else as_rgb(self._image)

    def get_state(self) -> list[bytes]:
        raise _no_state()

    def set_state(self, states: list[bytes]) -> None:
        raise _no_state()

    def take_faults(self) -> list[Fault]:
        """No faults: what fails in here fails for good."""
        return []

    def close(self) -> None:
        """Ends the threads together with the emulators."""
        if self._env is not None and self._waiting:
            self.step_wait()
        self._env = None

    def _open(self) -> AtariVectorEnv:
        if self._env is None:
            raise EnvError(f"expected open environments of {self.task}, got closed ones; make new ones")
        return self._env

    def _batch(
        self,
        observation: np.ndarray,
        info: Mapping[str, np.ndarray],
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        first: np.ndarray,
    ) -> Batch:
        """One batch; ale-py allocates new memory for every observation, in the order of the environments."""
        lives = np.array(info["lives"])
        lost = (lives < self._lives) & ~first if self._life_loss else np.zeros(self.num_envs, bool)
        self._lives = lives
        self._last = np.logical_or(terminated, truncated)
        image = observation.reshape(self._shape)
        self._image = image[0]
        return {
            "image": image,
            "reward": np.array(reward, np.float32),
            "is_first": first,
            "is_last": self._last.copy(),
            "is_terminal": np.logical_or(terminated, lost),
        }


def make(name: str, config: EnvConfig, seeds: Sequence[int]) -> NativeAtariVectorEnv | None:
    """All environments of a game at once if the configuration asks for it, else None."""
    return NativeAtariVectorEnv(name, config, seeds) if config.atari.native else None


def _no_state() -> EnvError:
    return EnvError(
        "expected environments that can be restored, got ale-py's own, which cannot; "
        "pass --env.atari.native false for runs that resume exactly"
    )


def _check_options(env: EnvConfig) -> None:
    wrappers = [f"env.{name}" for name in chosen(env) if name != "time_limit"]
    if wrappers:
        raise TaskError(
            f"expected no wrappers with env.atari.native, got {', '.join(wrappers)}; use env.atari.repeat, "
            "env.atari.size and env.atari.gray, or pass --env.atari.native false"
        )
    config = env.atari
    most = 2 if config.repeat > 1 else 1
    if config.pooling > most:
        raise TaskError(
            f"expected env.atari.pooling of at most {most} with env.atari.native and env.atari.repeat {config.repeat}, "
            f"got {config.pooling}; pass --env.atari.pooling {most} or --env.atari.native false"
        )
