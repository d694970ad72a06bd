"""A small environment that misbehaves when an action tells it to."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dreamer.envs import Transition, transition
from dreamer.types import Space

#: Actions that are played.
HARMLESS = 2


def _raise(result: Transition) -> Transition:
    raise ZeroDivisionError("as told")


def _kill(result: Transition) -> Transition:
    os.kill(os.getpid(), signal.SIGKILL)
    return result


def _crash(result: Transition) -> Transition:
    os.kill(os.getpid(), signal.SIGSEGV)
    return result


def _exit(result: Transition) -> Transition:
    os._exit(7)


def _leave(result: Transition) -> Transition:
    raise SystemExit(8)


def _disconnect(result: Transition) -> Transition:
    raise EOFError("the game's server hung up")


def _sleep(result: Transition) -> Transition:
    time.sleep(1000)
    return result


def _block(result: Transition) -> Transition:
    """Sleeps in C while it holds Python's lock, as a native library that hangs does."""
    ctypes.PyDLL(None).sleep(1000)
    return result


def changed(**values: Any) -> Callable[[Transition], Transition]:
    return lambda result: {**result, **values}


#: By name: what happens to the transition, in the order of the actions from `HARMLESS` on.
TROUBLE: Mapping[str, Callable[[Transition], Transition]] = {
    "raise": _raise,
    "kill": _kill,
    "crash": _crash,
    "exit": _exit,
    "leave": _leave,
    "disconnect": _disconnect,
    "sleep": _sleep,
    "block": _block,
    "missing key": lambda result: {key: value for key, value in result.items() if key != "class"},
    "unknown key": changed(extra=np.float32(0)),
    "shape": changed(vector=np.zeros((4, 1), np.float32)),
    "dtype": changed(vector=np.zeros(4, np.float64)),
    "text": changed(reward="much"),
    "nan reward": changed(reward=np.float32(np.nan)),
    "infinite reward": changed(reward=np.float32(-np.inf)),
    "nan vector": changed(vector=np.array([0, 0, np.nan, 0], np.float32)),
    "infinite vector": changed(vector=np.array([0, 0, 0, np.inf], np.float32)),
    "class too large": changed(**{"class": np.int32(3)}),
    "class negative": changed(**{"class": np.int32(-1)}),
    "one of several classes": changed(classes=np.array([1, 5], np.int32)),
    "first in the middle": changed(is_first=np.bool_(True)),
}
GARBAGE = list(TROUBLE)[list(TROUBLE).index("missing key") :]


def action(trouble: str) -> int:
    return HARMLESS + list(TROUBLE).index(trouble)


def faulty(index: int, seed: int) -> Faulty:
    """One that only actions make fail."""
    return Faulty(seed)


class Faulty:
    """The vector is [seed, episode, step, noise]; episodes have random lengths from 3 to 9 steps.

    bad_reset    The second reset fails.
    spawns       Starts a process of its own, which it never ends.
    bad_picture  Name of the trouble that drawing makes.
    """

    def __init__(
        self, seed: int, bad_reset: bool = False, spawns: bool = False, bad_picture: str | None = None
    ) -> None:
        self.observation_spaces = {
            "vector": Space("vector", (4,)),
            "class": Space("discrete", (), (3,)),
            "classes": Space("discrete", (2,), (2, 4)),
            "image": Space("image", (4, 5, 1)),
        }
        self.action_spaces = {"action": Space("discrete", (), (HARMLESS + len(TROUBLE),))}
        self.seed = np.float32(seed)
        self.bad_reset = bad_reset
        self.bad_picture = bad_picture
        self.rng = np.random.default_rng(seed)
        self.episode = self.steps = self.length = 0
        if spawns:
            self.child = subprocess.Popen(["sleep", "1000"])

    def reset(self) -> Transition:
        if self.bad_reset and self.episode == 1:
            raise FileNotFoundError("the second level")
        self.episode += 1
        self.steps, self.length = 0, int(self.rng.integers(3, 10))
        return transition(self._observation(), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        self.steps += 1
        over = self.steps == self.length
        choice = int(action["action"])
        reward = choice + self.rng.random()
        result = transition(self._observation(), reward, is_last=over, is_terminal=over)
        return result if choice < HARMLESS else list(TROUBLE.values())[choice - HARMLESS](result)

    def get_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rng": self.rng.bit_generator.state,
            "counts": (self.episode, self.steps, self.length),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.seed, self.rng.bit_generator.state = state["seed"], state["rng"]
        self.episode, self.steps, self.length = state["counts"]

    def render(self) -> np.ndarray:
        if self.bad_picture is not None:
            TROUBLE[self.bad_picture]({})
        return np.full((4, 5, 3), self.steps, np.uint8)

    def close(self) -> None:
        """Its child, if any, is left behind."""

    def _observation(self) -> dict[str, np.ndarray | np.generic]:
        noise = np.float32(self.rng.random())
        return {
            "vector": np.array([self.seed, self.episode, self.steps, noise], np.float32),
            "class": np.int32(self.rng.integers(3)),
            "classes": self.rng.integers(0, (2, 4)).astype(np.int32),
            "image": self.rng.integers(0, 256, (4, 5, 1), dtype=np.uint8),
        }
