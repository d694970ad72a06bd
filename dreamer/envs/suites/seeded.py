"""Exact state for worlds that cannot save theirs: an episode is given by its seed and the actions taken since.

Going back means playing the episode again, at the cost of its steps; it is only as exact as the world is reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from dreamer.envs.interface import Transition
from dreamer.types import Spaces


class World(Protocol):
    """What `SeededEpisodes` plays in: like an `Env`, with episodes that depend only on their seed and the actions."""

    @property
    def observation_spaces(self) -> Spaces: ...

    @property
    def action_spaces(self) -> Spaces: ...

    def begin(self, seed: int) -> Transition:
        """The first transition of the episode of this seed (below 2**31), whatever was played before."""
        ...

    def step(self, action: Mapping[str, np.ndarray]) -> Transition: ...

    def render(self) -> np.ndarray | None: ...

    def close(self) -> None: ...


class SeededEpisodes:
    """A world as an `Env`: draws a seed for each episode, and can be restored by playing the running one again."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.observation_spaces = world.observation_spaces
        self.action_spaces = world.action_spaces
        self.rng = np.random.default_rng(seed)
        self.episode: int | None = None  # seed of the running episode
        self.actions: list[dict[str, np.ndarray]] = []

    def reset(self) -> Transition:
        self.episode = int(self.rng.integers(2**31))
        self.actions = []
        return self.world.begin(self.episode)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        self.actions.append({key: np.array(value) for key, value in action.items()})
        return self.world.step(action)

    def render(self) -> np.ndarray | None:
        return self.world.render()

    def close(self) -> None:
        self.world.close()

    def get_state(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "episode": self.episode, "actions": list(self.actions)}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.episode, self.actions = state["episode"], list(state["actions"])
        if self.episode is not None:
            self.world.begin(self.episode)
            for action in self.actions:
                self.world.step(action)
