"""Early stopping: which runs are hopeless beside the others of their task."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dreamer.sweeps.progress import Progress
from dreamer.sweeps.spec import EarlyStop

#: A run is looked at whenever it has done another such share of its length.
RUNGS = 20


def rung(done: float, rule: EarlyStop) -> int | None:
    """Which look a run is at that has done this share of its length; None before the first."""
    return int(done * RUNGS) if done >= rule.after and done > 0 else None


def hopeless(rule: EarlyStop, run: Progress, others: Iterable[Progress], frames: int) -> str:
    """Why a run should be stopped, empty if it should not.

    frames: where runs are compared; others that are not there yet do not count. The median rule where rule.below is
    0.5: stopped is what has a lower score than the median of the others had at this point.
    """
    score = run.score(frames)
    beside = [found for other in others if other.env_frames >= frames and (found := other.score(frames)) is not None]
    if score is None or len(beside) < rule.runs:
        return ""
    bound = float(np.quantile(beside, rule.below))
    if score >= bound:
        return ""
    return (
        f"score {score:.4g} at {frames:,} frames, below {bound:.4g}, the {rule.below:g} quantile of {len(beside)} runs"
    )
