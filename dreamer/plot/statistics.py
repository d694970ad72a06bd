"""Scores of several seeds and tasks: bins, aggregates, bootstrap bands.

A "group" is the scores of one task, an array (seed, ...). An aggregate takes a list of groups with the seeds on the
last axis, (..., seed), one group per task; tasks may have different numbers of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

#: Resampled sets of seeds behind a band, and the share of them inside it.
RESAMPLES = 2000
LEVEL = 0.95

#: t such that a Student-t variable with n - 1 degrees of freedom lies within +-t with probability 0.95, for n = 2, 3...
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Aggregate = Callable[[Sequence[np.ndarray]], np.ndarray]


def bin_means(xs: np.ndarray, ys: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of `ys` over the bins (edges[i], edges[i + 1]], float64.

    Bins without a value between two that have some are bridged by a straight line; before the first and after the
    last they are NaN.
    """
    place = np.searchsorted(edges, xs, side="left") - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    count = np.bincount(place[inside], minlength=len(edges) - 1)
    total = np.bincount(place[inside], weights=ys[inside], minlength=len(edges) - 1)
    known = np.flatnonzero(count)
    if not known.size:
        return np.full(len(edges) - 1, np.nan)
    everywhere = np.arange(len(edges) - 1)
    return np.interp(everywhere, known, total[known] / count[known], left=np.nan, right=np.nan)


def mean(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over tasks of each task's mean over seeds."""
    return np.mean([group.mean(-1) for group in groups], 0)


def median(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Median over tasks of each task's mean over seeds."""
    return np.median([group.mean(-1) for group in groups], 0)


def interquartile_mean(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of the middle half of the scores of all tasks and seeds: a quarter, rounded down, is cut at each end."""
    scores = np.sort(np.concatenate(groups, -1), -1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def optimality_gap(groups: Sequence[np.ndarray]) -> np.ndarray:
    """How far the scores fall short of 1 on average, counting those above 1 as 1; over all tasks and seeds."""
    return np.maximum(0.0, 1.0 - np.concatenate(groups, -1)).mean(-1)


AGGREGATES: dict[str, Aggregate] = {
    "mean": mean,
    "median": median,
    "interquartile mean": interquartile_mean,
    "optimality gap": optimality_gap,
}


def band(aggregate: Aggregate, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Stratified percentile bootstrap of an aggregate: (2, ...), the lower and the upper end of its 95 % interval.

    groups  One array (seed, ...) per task. Seeds are drawn with replacement within each task, whole curves at a time.
    The draws are always the same, so the same scores have the same band. NaN where no task has two seeds, since nothing
    shows how much seeds differ there.
    """
    shape = groups[0].shape[1:]
    if max(len(group) for group in groups) < 2:
        return np.full((2, *shape), np.nan)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(group), size=(RESAMPLES, len(group))) for group in groups]
    flat = [group.reshape(len(group), -1) for group in groups]
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    columns = [
        np.quantile(aggregate([group[index, column] for group, index in zip(flat, drawn, strict=True)]), ends)
        for column in range(flat[0].shape[1])
    ]
    return np.stack(columns, -1).reshape(2, *shape)


def mean_interval(std: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Half the width of the 95 % interval of a mean by Student's t, from the spread alone.

    std    (...) population standard deviation over the seeds
    seeds  (...) their number, up to 10; NaN for fewer than 2
    """
    count = np.asarray(seeds, int)
    t = np.array([np.nan, np.nan, *_STUDENT_T])[count]
    return t * np.asarray(std) / np.sqrt(np.maximum(count - 1, 1))
