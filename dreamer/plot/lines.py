"""Runs in bins, and the lines drawn from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dreamer.plot.curves import Run
from dreamer.plot.published import FINAL_SHARE, Published
from dreamer.plot.statistics import band, bin_means, mean

#: Default number of bins of a curve; the bins of published curves are used if they give a curve this many.
BINS = 40
FEWEST_BINS, MOST_BINS = 5, 200
#: A run that is shorter, in units of the axis, cannot be divided.
_SHORTEST = 1e-9


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line with its band: (X,) each; NaN where there is nothing to draw.

    x      right edges of bins
    count  runs behind each point
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray
    published: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: list[Curve]


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The binned runs of one task and label: `scores` (seed, bin), bin i being (edges[i], edges[i + 1]]."""

    task: str
    label: str
    names: list[str]
    edges: np.ndarray
    scores: np.ndarray

    @property
    def complete(self) -> np.ndarray:
        """(bin,) whether all runs are there."""
        return np.isfinite(self.scores).all(0)

    def last(self) -> slice:
        """The bins of the final score; empty if the runs have no bin in common."""
        common = np.flatnonzero(self.complete)
        if not common.size:
            return slice(0, 0)
        end = int(common[-1]) + 1
        return slice(max(int(common[0]), end - max(1, round(FINAL_SHARE * end))), end)


def short(value: float) -> str:
    """A number of steps as it is written on an axis: 0, 500, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.4g}{unit}"
    return f"{value:.3g}"


def nice(width: float) -> float:
    """The next larger of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9))


def window_of(runs: Sequence[Run], published: Sequence[Published], bins: int | None, window: float | None) -> float:
    """The width of a bin, in units of the x axis."""
    longest = max(float(run.xs.max()) for run in runs)
    if window is not None or bins is not None or longest < _SHORTEST:
        return window or (longest / bins if bins and longest >= _SHORTEST else 1.0)
    widths = {float(curve.x[1] - curve.x[0]) for curve in published if curve.whole}
    width = max(widths, default=math.inf)
    return width if FEWEST_BINS <= longest / width <= MOST_BINS else nice(longest / BINS)


def binned(runs: Sequence[Run], window: float) -> list[Seeds]:
    """Runs in bins by task and label, in the order in which they came."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.label), []).append(run)
    longest = {task: max(float(run.xs.max()) for run in runs if run.task == task) for task, _ in groups}
    found = []
    for (task, label), group in groups.items():
        edges = window * np.arange(max(1, math.ceil(longest[task] / window - 1e-9)) + 1)
        edges[0] = min(0.0, -1e-9)  # an episode at 0 belongs to the first bin
        scores = np.stack([bin_means(run.xs, run.ys, edges) for run in group])
        found.append(Seeds(task, label, [run.seed for run in group], np.maximum(edges, 0.0), scores))
    return found


def curve_of(seeds: Seeds) -> Curve:
    """Mean and band over the runs that have reached each bin."""
    there = np.isfinite(seeds.scores)
    lines = np.full((3, there.shape[1]), np.nan)
    for mask in np.unique(there, axis=1).T:
        columns = (there == mask[:, None]).all(0)
        if mask.any():
            scores = seeds.scores[mask][:, columns]
            lines[:, columns] = [scores.mean(0), *band(mean, [scores])]
    middle, low, high = lines
    return Curve(seeds.label, seeds.edges[1:], middle, low, high, there.sum(0))


def published_curve(curve: Published, end: float) -> Curve | None:
    """The published curve as far as the runs went, or None if it begins later."""
    near = curve.x <= end * (1 + 1e-9)
    if not near.any():
        return None
    x, middle, low, high, count = (line[near] for line in (curve.x, curve.mean, curve.low, curve.high, curve.seeds))
    return Curve(curve.label, x, middle, low, high, count, published=True)
