"""`dreamer sweep --dry-run`: the runs and what they will need, each figure with how it was obtained."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

from rich import box
from rich.text import Text

from dreamer.config import Config
from dreamer.records.display import format_bytes, format_count, format_duration
from dreamer.sweeps.expand import PlannedRun
from dreamer.sweeps.scheduler import RunEntry
from dreamer.sweeps.spec import Sweep
from dreamer.terminal import Console, Table

#: Most runs that are printed one by one; of more, the first.
_PRINTED = 200


@dataclasses.dataclass(frozen=True)
class Need:
    """What one run of a kind needs. hours and bytes: None where not known. host: memory for its replay; disk: what it
    leaves there."""

    hours: float | None
    hours_how: str
    host: float | None
    disk: float | None
    bytes_how: str


@dataclasses.dataclass(frozen=True)
class Kind:
    """Runs with the same needs: they differ only in seed, in task within a suite, and in what costs nothing."""

    runs: Sequence[RunEntry]
    need: Need


def kind_of(config: Config) -> tuple[object, ...]:
    """What determines how much a run needs."""
    behaviour, suite = config.actor_critic, config.task.partition("_")[0]
    dreams = (behaviour.gradient, behaviour.horizon, behaviour.imagine_last)
    predicted = config.loss.objective
    return (suite, config.run, config.env, config.replay, config.model, predicted, config.planner, dreams)


def measured_hours(runs: Sequence[RunEntry]) -> tuple[float, str] | None:
    """Hours of a whole run, from what runs of this kind have already done."""
    seconds = sum(entry.state.seconds for entry in runs)
    steps = sum(entry.progress.agent_steps for entry in runs)
    if not seconds or not steps:
        return None
    begun = sum(entry.progress.agent_steps > 0 for entry in runs)
    return seconds / steps * runs[0].length / 3600, f"measured: {begun} runs of this kind, {steps:,} agent steps"


def planned_need(config: Config) -> Need:
    """The need according to `bench.plan`, without a trial of the update."""
    from dreamer.bench.plan import make_plan

    try:
        figures = {figure.name: figure for figure in make_plan(config, None)}
    except Exception as error:  # an environment that does not start here may well start where the runs go
        text = f"not known: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Need(None, text, None, None, text)
    replay = figures["replay, full"].values
    disk = replay.get("disk_bytes", 0.0) + figures["checkpoints"].values["disk_bytes"]
    how = "sizes of what is stored; checkpoints counted"
    hours = figures["time to the end"].values["hours"]
    return Need(hours, "at least: FLOPs at this device's fastest rate", replay.get("memory_bytes", 0.0), disk, how)


def needs(sweep: Sweep, runs: Sequence[RunEntry], plan: Callable[[Config], Need] = planned_need) -> list[Kind]:
    """The kinds of runs and what one of each needs: hours as the file says, else measured, else planned."""
    groups: dict[str, list[RunEntry]] = {}
    for entry in runs:
        groups.setdefault(repr(kind_of(entry.run.config)), []).append(entry)
    found = []
    for group in groups.values():
        need = plan(group[0].run.config)
        known = measured_hours(group)
        if sweep.hours is not None:
            known = (sweep.hours, f"said by {sweep.path.name}")
        if known is not None:
            need = dataclasses.replace(need, hours=known[0], hours_how=known[1])
        found.append(Kind(group, need))
    return found


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def totals(kinds: Sequence[Kind], jobs: int) -> list[tuple[str, str, str]]:
    """(what, text, how) over all runs that are not over."""
    rest = [(kind.need, entry) for kind in kinds for entry in kind.runs if not entry.over]
    if not rest:
        return [("all runs are over", "", "")]
    todo = [max(0.0, 1 - entry.progress.agent_steps / entry.length) for _, entry in rest]
    hours = _total([None if n.hours is None else n.hours * share for (n, _), share in zip(rest, todo, strict=True)])
    longest = max((n.hours or 0.0) * share for (n, _), share in zip(rest, todo, strict=True))
    disk = _total([need.disk for need, _ in rest])
    largest = sorted((need.host or 0.0 for need, _ in rest), reverse=True)[:jobs]
    least = "at least " if any(need.hours_how.startswith("at least") for need, _ in rest) else ""
    lines = [("hours", "not known", "those of some runs are not known")]
    if hours is not None:
        wall = max(hours / jobs, longest)
        text = f"{least}{hours:,.2f} of runs; {least}{wall:,.2f} ({format_duration(wall * 3600)}) with {jobs} at once"
        lines = [("hours", text, "as if runs at once did not slow each other down, which they do on shared cores")]
    beside = max(_pictures(entry.run.config) for _, entry in rest)
    return [
        *lines,
        ("memory", format_bytes(sum(largest)), f"replay of the {len(largest)} largest; the programs are not counted"),
        (
            "disk",
            "not known" if disk is None else format_bytes(disk),
            f"replay and weights in checkpoints; TensorBoard's records may add {format_bytes(beside)} a run",
        ),
    ]


def _pictures(config: Config) -> float:
    """Bytes that records of a run may take in TensorBoard, as far as they are limited."""
    log = config.log
    sizes = (log.picture_megabytes, log.tensorboard_megabytes)
    return 1e6 * sum(size or 0.0 for size in sizes) if log.tensorboard else 0.0


def print_dry_run(sweep: Sweep, runs: Sequence[PlannedRun], jobs: int, console: Console) -> int:
    """Prints the runs and the estimate."""
    if sweep.search:
        trials, seeds = sweep.search.count, len(sweep.seeds)
        console.print(f"{sweep.name}: {trials} trials, each with {seeds} seeds; their options are chosen as they go")
        return 0
    entries = [RunEntry(run) for run in runs]
    console.print(f"{sweep.name}: {len(entries)} runs, {jobs} at once\n")
    for entry in entries[:_PRINTED]:
        at = f", {entry.state.status} at {entry.progress.agent_steps:,}" if entry.state.starts else ""
        length = f"{entry.run.config.task}, {format_count(entry.length)} agent steps"
        console.print(f"  {entry.run.name}: {length}{at}")
    if len(entries) > _PRINTED:
        console.print(f"  and {len(entries) - _PRINTED} more")
    quiet = console.status("planning") if console.is_terminal else contextlib.nullcontext()
    with quiet:
        kinds = needs(sweep, entries)
    console.print(kinds_table(kinds))
    for what, text, how in totals(kinds, jobs):
        console.print(Text.assemble((what, "bold"), f": {text}" if text else "", (f" ({how})" if how else "", "dim")))
    return 0


def kinds_table(kinds: Sequence[Kind]) -> Table:
    """One row for each kind of run: what one of them needs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("like", "number", "hours", "memory", "disk", "how it was obtained"):
        table.add_column(column, overflow="fold")
    for kind in kinds:
        need = kind.need
        hours = "?" if need.hours is None or math.isnan(need.hours) else f"{need.hours:,.2f}"
        sizes = ["?" if size is None else format_bytes(size) for size in (need.host, need.disk)]
        how = need.hours_how if need.hours_how == need.bytes_how else f"hours {need.hours_how}; bytes: {need.bytes_how}"
        table.add_row(kind.runs[0].run.name, str(len(kind.runs)), hours, *sizes, how)
    return table
