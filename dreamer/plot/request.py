"""`dreamer plot`: learning curves of runs, beside published ones, as pictures and a table."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamer.paths import absolute, check_file
from dreamer.plot import published
from dreamer.plot.comparison import Comparison, compare, some
from dreamer.plot.curves import Run, read
from dreamer.plot.figure import draw, markdown
from dreamer.plot.variants import variant, variants
from dreamer.records.json_lines import SCORE, told
from dreamer.schema import ConfigError, show
from dreamer.values import suggestion

#: `--reference auto`: the published scores of the plotted tasks, where there are any.
AUTO = "auto"
#: Most warnings that are printed.
_WARNINGS = 5
#: Formats of the picture, and of the table, by suffix.
PICTURES, TABLE = ("png", "svg", "pdf"), "md"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plot; `dreamer plot --help` says it in words.

    runs       folders, files, patterns, each perhaps as NAME=...
    axis       env_frames, agent_steps, updates or hours
    bins       number of bins; window: their width in units of the axis; at most one of the two
    out        path of the files to write, with or without a suffix; for an existing folder: its `plot.*`
    formats    png, svg, pdf; the table is always written
    task       of runs that do not say theirs
    """

    runs: Sequence[str]
    reference: Sequence[str] = ()
    axis: str = "env_frames"
    bins: int | None = None
    window: float | None = None
    out: Path = Path("plot")
    formats: Sequence[str] = ("png", "svg")
    task: str | None = None


def _labelled(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Our runs labelled by the options that distinguish them, and notes on what else differs with those."""
    configs: dict[str, list] = {}
    for run in runs:
        if run.config is not None:
            configs.setdefault(run.task, []).append(run.config)
    differing = variants(configs)
    if not differing:
        return list(runs), []
    named = [r if r.config is None else dataclasses.replace(r, label=variant(r.config, differing)) for r in runs]
    notes = [f"Where {first} differs, so do {', '.join(others)}." for first, *others in differing if others]
    return named, notes


def _alike(source: published.Source, runs: Sequence[Run]) -> bool:
    """Whether runs may have observed the same as the published ones (pixels or not), as far as they say."""
    said = {show(run.config[source.option]) for run in runs if run.config and source.option in run.config}
    return not said or source.value in said


def _references(names: Sequence[str], runs: Sequence[Run], axis: str) -> dict[str, list[published.Published]]:
    """Published scores by the tasks of the runs, on this axis."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    found: dict[str, list[published.Published]] = {}
    for name in names:
        known = [c for c in published.published().values() if name == AUTO] or published.find(name)
        fitting = [(task, c) for task in tasks for c in known if c.task == published.plain_task(task)]
        if name not in published.published():
            fitting = [(task, c) for task, c in fitting if _alike(c.source, [r for r in runs if r.task == task])]
        if not fitting and name != AUTO:
            close = suggestion(name, tasks, f"; these are of {', '.join(tasks)}")
            raise ConfigError(f"--reference {name}: expected a task of the runs{close}")
        for task, curve in fitting:
            if curve.name not in [c.name for c in found.setdefault(task, [])]:
                found[task].append(curve.along(axis))
    return found


def make_comparison(request: Request) -> Comparison:
    """Reads runs and published scores. ConfigError for what is missing, or has nothing to plot."""
    if request.bins is not None and request.window is not None:
        raise ConfigError("expected --bins or --window, got both; leave one out")
    reading = read(request.runs, request.axis, request.task)
    empty = [str(run.path) for run in reading.runs if not run.xs.size]
    runs, notes = _labelled([run for run in reading.runs if run.xs.size])
    if not runs:
        raise ConfigError(
            f"no finished episodes in {some(empty, 3)}; expected lines with step and {SCORE}: wait for the first "
            f"episode to end{'. ' + told(reading.remarks, 'faults') if reading.remarks else ''}"
        )
    if empty:
        notes.append(f"Left out, as no episode has ended there: {some(empty)}.")
    references = _references(request.reference, runs, request.axis)
    if request.window is not None and request.window * 10_000 < max(run.xs.max() for run in runs):
        raise ConfigError(f"--window {request.window:g}: expected at most 10000 bins; give a wider window")
    found = compare(runs, references, request.bins, request.window)
    missing = [] if AUTO not in request.reference else [p.title for p in found.panels[: len({r.task for r in runs})]]
    unpublished = [task for task in missing if task not in references]
    notes += [f"Nothing is published of {', '.join(unpublished)}."] if unpublished else []
    return dataclasses.replace(found, notes=reading.remarks + notes + found.notes, warnings=reading.remarks)


def outputs(request: Request) -> list[Path]:
    """The files to write: the pictures, then the table. A picture's suffix on `out` asks for that format too."""
    out, formats = request.out, list(request.formats)
    if os.path.isdir(out):
        out = out / "plot"
    if (ending := out.suffix.removeprefix(".").lower()) in (*PICTURES, TABLE):
        out = out.with_suffix("")
        formats += [ending] if ending in PICTURES and ending not in formats else []
    return [out.with_name(f"{out.name}.{ending}") for ending in (*formats, TABLE)]


def write(found: Comparison, request: Request) -> list[Path]:
    """Writes the pictures and the table, and returns their paths."""
    *pictures, table = outputs(request)
    table.parent.mkdir(parents=True, exist_ok=True)
    draw(found, request.axis, pictures)
    table.write_text(markdown(found, request.axis), encoding="utf-8")
    return [*pictures, table]


def plot_runs(request: Request) -> int:
    """Plots, prints the table and the paths; on stderr, what could not be read. PathError if the files cannot be
    written."""
    for path in outputs(request):
        check_file(absolute(path))
    found = make_comparison(request)
    paths = write(found, request)
    print(markdown(found, request.axis))
    print("Written: " + ", ".join(map(str, paths)))
    for warning in found.warnings[:_WARNINGS]:
        print(f"dreamer: warning: {warning}", file=sys.stderr)
    if (more := len(found.warnings) - _WARNINGS) > 0:
        print(f"dreamer: warning: and {more:,} more; the notes below the table have all", file=sys.stderr)
    return 0
