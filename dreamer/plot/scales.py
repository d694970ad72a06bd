"""Scores of different tasks on one scale, so that they can be averaged."""

from __future__ import annotations

import dataclasses

import numpy as np

from dreamer.envs.suites.atari_scores import SCORES

#: The most an episode can give in every task of a suite: DeepMind Control has 1000 steps with rewards up to 1.
BEST = {"dmc": 1000.0}


@dataclasses.dataclass(frozen=True)
class Scale:
    """name: in words, for axes and tables. normalised: whether 1 is a good score in every task."""

    name: str
    normalised: bool

    def apply(self, task: str, scores: np.ndarray) -> np.ndarray:
        """Scores of a task on this scale, any shape."""
        suite, _, name = task.partition("_")
        if not self.normalised:
            return scores
        low, high = SCORES[name] if self is HUMAN else (0.0, BEST[suite])
        return (scores - low) / (high - low)


HUMAN = Scale("human-normalised score", True)
OF_BEST = Scale("share of the best possible score", True)


def scale_of(task: str) -> Scale:
    """The scale of a task: human-normalised on Atari, the share of the best score where that is known, else raw."""
    suite, _, name = task.partition("_")
    if suite in ("atari", "atari100k") and name in SCORES:
        return HUMAN
    return OF_BEST if suite in BEST else Scale(f"raw score of {suite}", False)
