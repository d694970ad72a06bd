"""From runs and published scores to what is drawn and tabulated: curves, final scores, aggregates over tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dreamer.plot.curves import Run
from dreamer.plot.lines import Panel, Seeds, binned, curve_of, published_curve, short, window_of
from dreamer.plot.published import Published
from dreamer.plot.statistics import band, mean
from dreamer.plot.totals import Scale, Total, scale_of, totals_of

#: Below this many seeds a band deserves a warning.
_ENOUGH_SEEDS = 5
FEW_SEEDS = (
    f"With fewer than {_ENOUGH_SEEDS} seeds a bootstrap band is too narrow: it cannot leave the range of the seeds "
    "that were run."
)


@dataclasses.dataclass(frozen=True)
class Final:
    """The score over the last tenth of what all runs of a curve have reached, with its 95 % interval.

    span       (low, high] on the x axis; None: the runs have no x in common
    published  (published scores, their mean over the same span)
    """

    task: str
    label: str
    seeds: int
    span: tuple[float, float] | None
    mean: float
    low: float
    high: float
    published: list[tuple[Published, float]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """notes: what a reader has to know; warnings: the notes about runs that could not be read, or not completely."""

    panels: list[Panel]
    finals: list[Final]
    totals: list[Total]
    notes: list[str]
    warnings: list[str] = dataclasses.field(default_factory=list)


def some(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c`, and if there are many, how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _final(seeds: Seeds, published: Sequence[Published]) -> Final:
    last = seeds.last()
    if last.start == last.stop:
        nothing = (math.nan,) * 3
        return Final(seeds.task, seeds.label, len(seeds.names), None, *nothing, [(p, math.nan) for p in published])
    scores = seeds.scores[:, last].mean(1)
    low, high = band(mean, [scores])
    span = (float(seeds.edges[last.start]), float(seeds.edges[last.stop]))
    beside = [(curve, curve.at(*span)) for curve in published]
    return Final(seeds.task, seeds.label, len(scores), span, float(scores.mean()), float(low), float(high), beside)


def _notes(groups: Sequence[Seeds], used: Sequence[Published]) -> list[str]:
    """What a reader has to know before believing the picture."""
    notes = []
    for seeds in groups:
        who = f"{seeds.task}, {seeds.label}"
        ends = [seeds.edges[1:][np.isfinite(row)].max() for row in seeds.scores]
        last = max(ends)
        early = [f"seed {name} ends at {short(end)}" for name, end in zip(seeds.names, ends, strict=True) if end < last]
        if early:
            notes.append(f"{who}: {some(early)}; the line beyond (dotted) is the mean of the others.")
        if repeated := sorted({name for name in seeds.names if seeds.names.count(name) > 1}):
            notes.append(f"{who}: several runs have seed {some(repeated)}; they count as different seeds.")
        if not seeds.complete.any():
            notes.append(f"{who}: its runs have no x in common, so there is no final score.")
    if any(1 < len(seeds.names) < _ENOUGH_SEEDS for seeds in groups):
        notes.append(FEW_SEEDS)
    sources = {curve.source.name: curve.source for curve in used}
    return notes + [f"published {name}: {source.caveat}" for name, source in sources.items()]


def compare(
    runs: Sequence[Run],
    references: Mapping[str, Sequence[Published]],
    bins: int | None = None,
    window: float | None = None,
) -> Comparison:
    """Everything that is drawn and tabulated.

    runs        with at least one episode each, in units of the x axis
    references  published scores by task of a run, on the same axis
    bins        bins from 0 to the end of the longest run; window: width of a bin in units of the x axis. None: those
                of the published curves, or about 40 of a round width
    """
    by_scale: dict[Scale, list[Run]] = {}
    for run in runs:
        by_scale.setdefault(scale_of(run.task), []).append(run)
    whole, over_tasks, every = Comparison([], [], [], []), [], []
    for scale, members in by_scale.items():
        tasks = list(dict.fromkeys(run.task for run in members))
        beside = [curve for task in tasks for curve in references.get(task, [])]
        groups = binned(members, window_of(members, beside, bins, window))
        for task in tasks:
            own = [seeds for seeds in groups if seeds.task == task]
            published = [published_curve(curve, float(own[0].edges[-1])) for curve in references.get(task, [])]
            drawn = [curve_of(seeds) for seeds in own] + [curve for curve in published if curve is not None]
            whole.panels.append(Panel(task, "episode score (undiscounted return)", drawn))
            whole.finals.extend(_final(seeds, references.get(task, [])) for seeds in own)
        panels, totals, notes = totals_of(scale, groups, references)
        over_tasks += panels
        every += groups
        whole.totals.extend(totals)
        whole.notes.extend(notes)
    whole.panels.extend(over_tasks)
    whole.notes.extend(_notes(every, [curve for curves in references.values() for curve in curves]))
    return whole
