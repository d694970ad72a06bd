"""Scores of different tasks on one scale, and aggregates over them: mean, median, interquartile mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dreamer.envs.suites.atari_scores import SCORES
from dreamer.plot.lines import Curve, Panel, Seeds
from dreamer.plot.published import Published
from dreamer.plot.statistics import AGGREGATES, band, mean, median

#: The highest possible score in every task of a suite: DeepMind Control has 1000 steps with rewards up to 1.
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


# --- Aggregates ----------------------------------------------------------------------------------

#: Aggregates that are drawn as curves; the optimality gap is only in the table.
DRAWN = ("mean", "median", "interquartile mean")
#: Aggregates that do not need single seeds, so that published means over seeds are enough.
_OF_MEANS = {"mean": mean, "median": median}


@dataclasses.dataclass(frozen=True)
class Total:
    """Aggregates of the final scores of several tasks, from `seeds` seeds each.

    values     by aggregate: (value, low, high), the 95 % interval
    published  by source that has all tasks, by aggregate: the value over the same spans; NaN where a task has none
    """

    scale: Scale
    label: str
    tasks: list[str]
    seeds: int
    values: dict[str, tuple[float, float, float]]
    published: dict[str, dict[str, float]]


def _published(
    tasks: Sequence[str], references: Mapping[str, Sequence[Published]], cuts: Sequence[np.ndarray], scale: Scale
) -> dict[str, dict[str, np.ndarray]]:
    """Aggregates of the published means, by source that has all tasks and by name: (bin,), NaN where a task has none.

    cuts  (bin + 1,) for each task
    """
    by_source = [{curve.source.name: curve for curve in references.get(task, [])} for task in tasks]
    found = {}
    for source in sorted(set.intersection(*map(set, by_source))):
        rows = []
        for task, curves, edges in zip(tasks, by_source, cuts, strict=True):
            means = [curves[source].at(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
            rows.append(scale.apply(task, np.array(means))[:, None])
        found[source] = {name: aggregate(rows) for name, aggregate in _OF_MEANS.items()}
    return found


def _curves(scale: Scale, groups: Sequence[Seeds]) -> dict[str, Curve]:
    """For one label, over tasks, where all of its runs have scores: a curve for each aggregate."""
    scores = [scale.apply(seeds.task, seeds.scores) for seeds in groups]
    common = min(each.shape[1] for each in scores)
    there = np.all([np.isfinite(each[:, :common]).all(0) for each in scores], 0)
    x = groups[0].edges[1 : common + 1][there]
    scores = [each[:, :common][:, there] for each in scores]
    count = np.full(len(x), min(len(each) for each in scores))
    curves = {}
    for name in DRAWN if len(x) else ():
        low, high = band(AGGREGATES[name], scores)
        curves[name] = Curve(groups[0].label, x, AGGREGATES[name]([each.T for each in scores]), low, high, count)
    return curves


def _published_curve(source: str, edges: np.ndarray, line: np.ndarray) -> Curve:
    """A curve without band and number of seeds, which published means do not give over tasks."""
    none = np.full(len(line), np.nan)
    return Curve(f"published {source}", edges[1:], line, none, none, np.zeros(len(line), int), published=True)


def _total(scale: Scale, groups: Sequence[Seeds], references: Mapping[str, Sequence[Published]]) -> Total:
    """Aggregates of one label's final scores."""
    tasks = [seeds.task for seeds in groups]
    scores = [scale.apply(seeds.task, seeds.scores[:, seeds.last()].mean(1)) for seeds in groups]
    values = {}
    for name in AGGREGATES if scale.normalised else DRAWN:
        low, high = band(AGGREGATES[name], scores)
        values[name] = (float(AGGREGATES[name](scores)), float(low), float(high))
    spans = [seeds.edges[[seeds.last().start, seeds.last().stop]] for seeds in groups]
    published = {
        source: {name: float(line[0]) for name, line in lines.items()}
        for source, lines in _published(tasks, references, spans, scale).items()
    }
    return Total(scale, groups[0].label, tasks, min(len(each) for each in scores), values, published)


def totals_of(
    scale: Scale, groups: Sequence[Seeds], references: Mapping[str, Sequence[Published]]
) -> tuple[list[Panel], list[Total], list[str]]:
    """Panels, final aggregates and notes over the tasks that all labels have; nothing for fewer than two tasks."""
    groups = [seeds for seeds in groups if seeds.complete.any()]
    labels = list(dict.fromkeys(seeds.label for seeds in groups))
    tasks = list(dict.fromkeys(seeds.task for seeds in groups))
    shared = [task for task in tasks if sum(seeds.task == task for seeds in groups) == len(labels)]
    if len(tasks) < 2:
        return [], [], []
    if len(shared) < 2:
        return [], [], [f"No {scale.name} over tasks: {', '.join(labels)} share fewer than two tasks."]
    left = [task for task in tasks if task not in shared]
    notes = [f"The {scale.name} over tasks leaves out {', '.join(left)}, which not all curves have."] if left else []
    lines = {label: [s for t in shared for s in groups if (s.task, s.label) == (t, label)] for label in labels}
    curves = [_curves(scale, line) for line in lines.values()]
    edges = max((seeds.edges for seeds in groups if seeds.task in shared), key=len)
    beside = _published(shared, references, [edges] * len(shared), scale)
    panels = []
    for name in DRAWN:
        drawn = [found[name] for found in curves if name in found]
        means = {source: found[name] for source, found in beside.items() if name in found}
        drawn += [_published_curve(source, edges, line) for source, line in means.items() if np.isfinite(line).any()]
        if any(not curve.published for curve in drawn):
            panels.append(Panel(f"{name}, {len(shared)} tasks", scale.name, drawn))
    return panels, [_total(scale, line, references) for line in lines.values()], notes
