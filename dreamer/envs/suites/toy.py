"""The built-in games. Catch is small enough to learn in minutes on a laptop and easy to look at.

A ball falls one row per step on a board of 8 x 8 cells; the paddle, two cells wide, moves one cell left, right or
not at all along the bottom row. Reaching the bottom row, a ball gives +1 if the paddle is under it and -1 if not;
the next ball starts at the top one step later. The column it falls in is lit, which makes the small ball easy to
see for people and networks alike. Every ball can be caught from everywhere. After `balls` balls the
episode ends (terminal)::

    step      0   1   2  ...  6   7   8   9  ...
    ball row  0   1   2       6   7   0   1          (ball after ball)
    reward    0   0   0       0  +-1  0   0

An episode has 8 * balls - 1 agent steps. The best score is `balls` (3 by default). Uniformly random play scores
-1.50 +- 0.01 with 3 balls (measured over 20,000 episodes; a quarter of the balls is caught).

The background is plain, or waves of color that drift beneath the game and mean nothing: a large part of the picture
for a model to predict or to leave out. Each episode has its own, from a generator of its own, so the same seed plays
the same game before either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dreamer.env_config import EnvConfig
from dreamer.envs.interface import Env, Transition, transition
from dreamer.envs.suites.gridworld import Gridworld
from dreamer.types import Space

CELLS = 8
PADDLE = 2
BACKGROUND = (24, 26, 48)
BALL = (255, 204, 64)
BEAM = (88, 84, 112)
MARK = (64, 200, 120)


class Background(Protocol):
    """What the game is painted on."""

    def begin(self) -> None:
        """A new episode."""

    def move(self) -> None:
        """One step further."""

    def paint(self, image: np.ndarray) -> None:
        """Fill uint8 (size, size, 3)."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Plain:
    """One color."""

    def __init__(self, seed: int) -> None:
        """Nothing is drawn."""

    def begin(self) -> None:
        """As before."""

    def move(self) -> None:
        """It stays."""

    def paint(self, image: np.ndarray) -> None:
        image[:] = BACKGROUND

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """It has none."""


class Waves:
    """The sum of three plane waves, each with its own color, direction and speed: constant within an episode."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 1])
        self.scene, self.age = 0, 0

    def begin(self) -> None:
        self.scene, self.age = int(self.rng.integers(2**32)), 0

    def move(self) -> None:
        self.age += 1

    def paint(self, image: np.ndarray) -> None:
        rng = np.random.default_rng(self.scene)
        # Waves across the picture, radians in a step; no color is as bright as the ball or as green as the paddle.
        across, down = rng.uniform(-3, 3, (2, 3))
        speed, phase, colors = rng.uniform(-1, 1, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(-1, 1, (3, 3))
        place = np.arange(len(image)) / len(image)
        angle = 2 * np.pi * (down * place[:, None, None] + across * place[:, None]) + speed * self.age + phase
        image[:] = np.clip(75 + 50 * np.sin(angle) @ colors, 0, 150)

    def get_state(self) -> dict[str, Any]:
        return {"background": {"rng": self.rng.bit_generator.state, "scene": self.scene, "age": self.age}}

    def set_state(self, state: dict[str, Any]) -> None:
        own = state["background"]
        self.rng.bit_generator.state, self.scene, self.age = own["rng"], own["scene"], own["age"]


#: By `env.toy.background`; each is made from the environment's seed.
BACKGROUNDS: Mapping[str, Callable[[int], Background]] = {"plain": Plain, "moving": Waves}


class Catch:
    """The game. Its whole state is in plain attributes, one numpy generator and its background."""

    action_names = {"action": ("left", "stay", "right")}

    def __init__(self, size: int, balls: int, seed: int, background: str = "plain") -> None:
        self.observation_spaces = {"image": Space("image", (size, size, 3))}
        self.action_spaces = {"action": Space("discrete", (), (3,))}
        self.size = size
        self.balls = balls
        self.rng = np.random.default_rng(seed)
        self.background = BACKGROUNDS[background](seed)
        self.left = balls
        self.paddle = 0
        self.row = 0
        self.column = 0
        self._edges = np.round(np.arange(CELLS + 1) * size / CELLS).astype(int)

    def reset(self) -> Transition:
        self.left = self.balls
        self.background.begin()
        self.paddle = int(self.rng.integers(CELLS - PADDLE + 1))
        self._new_ball()
        return transition({"image": self._image()}, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        self.background.move()
        move = int(action["action"]) - 1
        self.paddle = min(max(self.paddle + move, 0), CELLS - PADDLE)
        if self.row == CELLS - 1:
            self._new_ball()
            return transition({"image": self._image()})
        self.row += 1
        if self.row < CELLS - 1:
            return transition({"image": self._image()})
        self.left -= 1
        reward = 1.0 if self.paddle <= self.column < self.paddle + PADDLE else -1.0
        over = self.left == 0
        return transition({"image": self._image()}, reward, is_last=over, is_terminal=over)

    def get_state(self) -> dict[str, Any]:
        return {
            "rng": self.rng.bit_generator.state,
            "left": self.left,
            "paddle": self.paddle,
            "row": self.row,
            "column": self.column,
            **self.background.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.left, self.paddle = state["left"], state["paddle"]
        self.row, self.column = state["row"], state["column"]
        self.background.set_state(state)

    def render(self) -> np.ndarray:
        return self._image()

    def close(self) -> None:
        """Nothing is held."""

    def _new_ball(self) -> None:
        self.row = 0
        self.column = int(self.rng.integers(CELLS))

    def _image(self) -> np.ndarray:
        """uint8 (size, size, 3)."""
        edge = self._edges
        image = np.empty((self.size, self.size, 3), np.uint8)
        self.background.paint(image)
        image[:, edge[self.column] : edge[self.column + 1]] = BEAM
        image[edge[-2] :, edge[self.paddle] : edge[self.paddle + PADDLE]] = MARK
        image[edge[self.row] : edge[self.row + 1], edge[self.column] : edge[self.column + 1]] = BALL
        return image


def make(name: str, config: EnvConfig, seed: int) -> Env:
    """The game of this name."""
    if name == "gridworld":
        return Gridworld(config.toy.grid, config.toy.size, seed)
    return Catch(config.toy.size, config.toy.balls, seed, config.toy.background)


def tasks() -> Sequence[str]:
    return ("catch", "gridworld")


def best_score(name: str, config: EnvConfig) -> float | None:
    """The score of perfect play; of the grid it depends on the map (`planners.tabular.value_iteration`)."""
    return float(config.toy.balls) if name == "catch" else None
