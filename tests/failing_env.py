"""An environment that fails at its tenth step, and a healthy one; light, because worker processes import it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from faulty_env import TROUBLE

from dreamer.envs import Transition, transition
from dreamer.types import Space

#: Actions of an episode; an episode has one stored step more.
LENGTH = 7


class Rounds:
    """Episodes of seven steps with reward 1 each. The observation is [episode, step]."""

    def __init__(self) -> None:
        self.observation_spaces = {"vector": Space("vector", (2,))}
        self.action_spaces = {"action": Space("discrete", (), (2,))}
        self.episode = self.position = 0

    def reset(self) -> Transition:
        self.episode, self.position = self.episode + 1, 0
        return transition(self._observation(), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        self.position += 1
        over = self.position == LENGTH
        return transition(self._observation(), 1.0, is_last=over, is_terminal=over)

    def render(self) -> None:
        return None

    def close(self) -> None:
        """Nothing is held."""

    def _observation(self) -> dict[str, np.ndarray]:
        return {"vector": np.array([self.episode, self.position], np.float32)}


class Failing(Rounds):
    """Fails at its tenth step, the third of its second episode; if there is a file `once`, only if it is not there."""

    def __init__(self, trouble: str, once: Path | None) -> None:
        super().__init__()
        self.trouble, self.once, self.steps = trouble, once, 0

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        result = super().step(action)
        self.steps += 1
        if self.steps != 10 or (self.once and self.once.exists()):
            return result
        if self.once:
            self.once.touch()
        if self.trouble == "shape":
            return {**result, "vector": np.zeros(3, np.float32)}
        return TROUBLE[self.trouble](result)
