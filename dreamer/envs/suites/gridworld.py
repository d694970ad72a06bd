"""A slippery grid whose true answer is known: every probability stands in a table.

The agent moves left, down, right or up. With the chance `slip` it goes to one of the two sides instead, each as likely
as the other. Walls and the border stop it: it stays. The goal gives +1 and ends the episode, a pit ends it with
nothing; so the mean score is the chance to reach the goal. Nothing else ends an episode but `env.time_limit`.

The layout ``lake`` is the 4 x 4 map of Gymnasium's FrozenLake. With its slip of 2/3 the best policy reaches the goal
with probability 0.8235, and random play with 0.0139. The layout ``random`` is drawn from a seed, and always has a way
from the start to the goal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from dreamer.env_config import GridworldConfig
from dreamer.envs.interface import Transition, transition
from dreamer.types import Space, Spaces

LAKE = ("SFFF", "FHFH", "FFFH", "HFFG")
#: Down and right of each action.
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
NAMES = ("left", "down", "right", "up")
#: Shares of walls and pits in a random layout.
WALLS, PITS = 0.15, 0.1
COLORS = {"F": (236, 238, 244), "S": (214, 224, 244), "W": (70, 76, 92), "H": (40, 60, 120), "G": (64, 176, 100)}
LINE, AGENT = (205, 208, 218), (230, 96, 60)


class Probabilities(NamedTuple):
    """The whole truth about a grid with C cells and A actions.

    transition (C, A, C) float64: chance of the next cell; reward (C, A, C) float64: on the way there; terminal (C,)
    bool: cells that end the episode, from which nothing leads away.
    """

    transition: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray


class Grid:
    """A map, as rows of letters: F free, S start, W wall, H pit, G goal. Cells count row by row from the upper left."""

    def __init__(self, rows: tuple[str, ...], slip: float) -> None:
        self.rows, self.slip = rows, slip
        self.height, self.width = len(rows), len(rows[0])
        self.letters = "".join(rows)
        self.start = self.letters.index("S")

    @classmethod
    def of(cls, config: GridworldConfig) -> Grid:
        return cls(LAKE if config.layout == "lake" else _random_rows(config.side, config.seed), config.slip)

    @property
    def cells(self) -> int:
        return len(self.letters)

    def next(self, cell: int, move: int) -> int:
        """The cell that this move leads to, without slip."""
        row, column = divmod(cell, self.width)
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        inside = 0 <= row < self.height and 0 <= column < self.width
        return row * self.width + column if inside and self.rows[row][column] != "W" else cell

    def chances(self, action: int) -> list[tuple[int, float]]:
        """What an action may turn into: moves, and how likely each is."""
        sides = [((action + turn) % 4, self.slip / 2) for turn in (-1, 1)]
        return [(action, 1 - self.slip), *sides]

    def probabilities(self) -> Probabilities:
        shape = (self.cells, len(MOVES), self.cells)
        transition, reward = np.zeros(shape), np.zeros(shape)
        terminal = np.array([letter in "HG" for letter in self.letters])
        for cell, letter in enumerate(self.letters):
            for action in range(len(MOVES)):
                if terminal[cell] or letter == "W":
                    transition[cell, action, cell] = 1
                    continue
                for move, chance in self.chances(action):
                    transition[cell, action, self.next(cell, move)] += chance
        ways = ~terminal[:, None, None]
        reward[:] = ways * np.array([letter == "G" for letter in self.letters])
        return Probabilities(transition, reward, terminal)

    def picture(self, size: int, agent: int | None = None) -> np.ndarray:
        """uint8 (size, size, 3): the map, and the agent in its cell."""
        down, across = (np.round(np.arange(n + 1) * size / n).astype(int) for n in (self.height, self.width))
        image = np.empty((size, size, 3), np.uint8)
        image[:] = LINE
        for cell, letter in enumerate(self.letters):
            row, column = divmod(cell, self.width)
            top, bottom, left, right = down[row], down[row + 1], across[column], across[column + 1]
            image[top : bottom - 1, left : right - 1] = COLORS[letter]
            if cell == agent:
                edge = max((bottom - top) // 4, 1)
                image[top + edge : bottom - edge, left + edge : right - edge] = AGENT
        return image


def _random_rows(side: int, seed: int) -> tuple[str, ...]:
    """A square map with the start at the upper left, the goal at the lower right, and a way between them."""
    for attempt in range(10_000):
        rng = np.random.default_rng([seed, attempt])
        letters = rng.choice(list("FWH"), side * side, p=(1 - WALLS - PITS, WALLS, PITS))
        letters[0], letters[-1] = "S", "G"
        rows = tuple("".join(row) for row in letters.reshape(side, side))
        if _has_way(Grid(rows, 0.0)):
            return rows
    raise ValueError(f"expected a map with a way to the goal within 10,000 tries, got none for side {side}")


def _has_way(grid: Grid) -> bool:
    seen, left = {grid.start}, [grid.start]
    while left:
        for move in range(len(MOVES)):
            cell = grid.next(left[0], move)
            if cell not in seen and grid.letters[cell] != "H":
                seen.add(cell)
                left.append(cell)
        left.pop(0)
    return grid.letters.index("G") in seen


class Gridworld:
    """The grid as an environment of this project. Its state is the cell and one numpy generator."""

    def __init__(self, config: GridworldConfig, size: int, seed: int) -> None:
        """size: of the image, pixels."""
        self.grid, self._size, self._observe = Grid.of(config), size, config.observe
        spaces = {"image": Space("image", (size, size, 3)), "cell": Space("discrete", (), (self.grid.cells,))}
        self.observation_spaces: Spaces = {self._observe: spaces[self._observe]}
        self.action_spaces = {"action": Space("discrete", (), (len(MOVES),))}
        free = [cell for cell, letter in enumerate(self.grid.letters) if letter in "SF"]
        self._starts = free if config.starts == "anywhere" else [self.grid.start]
        self.rng = np.random.default_rng(seed)
        self.cell = self.grid.start
        self._pictures: dict[int, np.ndarray] = {}

    def reset(self) -> Transition:
        self.cell = self._starts[int(self.rng.integers(len(self._starts)))]
        return transition(self._seen(), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        moves, chances = zip(*self.grid.chances(int(action["action"])), strict=True)
        self.cell = self.grid.next(self.cell, moves[int(self.rng.choice(len(moves), p=chances))])
        letter = self.grid.letters[self.cell]
        over = letter in "HG"
        return transition(self._seen(), float(letter == "G"), is_last=over, is_terminal=over)

    def get_state(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "cell": self.cell}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state, self.cell = state["rng"], state["cell"]

    def render(self) -> np.ndarray:
        if self.cell not in self._pictures:
            self._pictures[self.cell] = self.grid.picture(self._size, self.cell)
        return self._pictures[self.cell].copy()

    def close(self) -> None:
        """Nothing is held."""

    def _seen(self) -> dict[str, np.ndarray]:
        return {"image": self.render()} if self._observe == "image" else {"cell": np.asarray(self.cell, np.int32)}


class GridworldEnv(gymnasium.Env):
    """The same for Gymnasium: ``GridworldEnv(side=6, layout="random", slip=0.2)``. Options as in `env.toy.grid`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's form)

    def __init__(self, render_mode: str | None = None, size: int = 32, **options: Any) -> None:
        self.render_mode, self._size, self._config = render_mode, size, GridworldConfig(**options)
        self._env = Gridworld(self._config, size, 0)
        if self._config.observe == "cell":
            self.observation_space: Any = gymnasium.spaces.Discrete(self._env.grid.cells)
        else:
            self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))

    @property
    def grid(self) -> Grid:
        return self._env.grid

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._env.rng = self.np_random
        return self._told(self._env.reset()), {"cell": self._env.cell}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        told = self._env.step({"action": np.asarray(action)})
        return self._told(told), float(told["reward"]), bool(told["is_terminal"]), False, {"cell": self._env.cell}

    def render(self) -> Any:
        return self._env.render() if self.render_mode == "rgb_array" else None

    def _told(self, told: Transition) -> Any:
        return int(told["cell"]) if self._config.observe == "cell" else told["image"]
