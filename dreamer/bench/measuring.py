"""What all parts of `dreamer bench` share: taking turns, medians and spread, the machine, the table, the comparison."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import psutil
from rich import box
from rich.text import Text

from dreamer.records.display import format_number
from dreamer.records.system import versions
from dreamer.schema import ConfigError
from dreamer.terminal import Console, Table

T = TypeVar("T")

#: Figures by the name of what was measured. Names carry the unit (ms, compile_s); NAME_quartiles is [low, high].
Rows = dict[str, dict[str, Any]]

_QUARTILES = "_quartiles"
#: How figures are shown, by the suffix of their names; all others in few digits.
_FORMATS = {"share": "{:.0%}", "ratio": "{:.2f}x", "speedup": "{:.2f}x"}
#: Width of tables where there is no terminal to fit into.
_WIDTH = 200


@dataclasses.dataclass(frozen=True)
class Report:
    """What one benchmark found.

    part: of `dreamer bench`; request: what was asked for; columns: the figures that the table shows, in order; note:
    how to read them.
    """

    part: str
    request: Mapping[str, Any]
    columns: Sequence[str]
    rows: Rows
    note: str = ""
    machine: Mapping[str, str] = dataclasses.field(default_factory=lambda: machine())


def machine() -> dict[str, str]:
    """The machine that the figures were measured on: processor, device, system, versions."""
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return {"processor": _processor(), "device": device, "system": platform.platform(), **versions()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- Measuring ---------------------------------------------------------------------------------


def take_turns(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each returns in each round. They take turns, so that other work on the machine slows all of them equally."""
    turns = [{name: one() for name, one in contenders.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in contenders}


def milliseconds(function: Callable[[], object], calls: int = 1) -> float:
    """Wall time of one of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) * 1e3 / calls


def clocks() -> np.ndarray:
    """Seconds by the wall clock, and seconds of processor time used by this process and its workers: (2,)."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    workers = sum(child.user + child.system for child in children)
    return np.array([time.perf_counter(), time.process_time() + workers])


def spent(function: Callable[[], object], calls: int = 1) -> np.ndarray:
    """Milliseconds of one of `calls` calls in a row by both `clocks`, (2,)."""
    start = clocks()
    for _ in range(calls):
        function()
    return (clocks() - start) * 1e3 / calls


def figure(name: str, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """The median under this name, and the quartiles beside it; nothing if there are no values."""
    if not len(values):
        return {}
    low, middle, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    return {name: middle, name + _QUARTILES: [low, high]}


# --- Files -------------------------------------------------------------------------------------


def save_report(path: Path, report: Report) -> None:
    path.write_text(json.dumps(dataclasses.asdict(report), indent=2, default=str) + "\n")


def read_report(path: Path, part: str) -> Report:
    """A saved report; ConfigError if there is none, or if it is of another part."""
    try:
        found = Report(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--compare: expected a file that --json wrote, got {path} ({error})") from None
    if found.part != part:
        raise ConfigError(
            f"--compare: expected figures of `dreamer bench {part}`, got those of `{found.part}` ({path})"
        )
    return found


# --- The table ---------------------------------------------------------------------------------


def show(report: Report, other: Report | None = None, console: Console | None = None) -> None:
    """The machine, the table and, beside its figures, their ratios to those of another report."""
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDTH
    found = report.machine
    packages = ", ".join(f"{name} {found[name]}" for name in ("python", "jax", "jaxlib", "dreamer"))
    console.print(f"{found['processor']}, {found['cores']} cores; {found['device']}; {packages}")
    console.print(_table(report, {} if other is None else other.rows))
    if report.note:
        console.print(report.note)
    if other is not None:
        console.print("n x: here over there", style="dim")
        for what in ("machine", "request"):
            for line in _differences(getattr(report, what), getattr(other, what)):
                console.print(Text(f"not the same {what}:", "yellow"), line)


def _table(report: Report, others: Rows) -> Table:
    table = Table(title=f"dreamer bench {report.part}", box=box.ROUNDED)
    table.add_column("")
    for column in report.columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in report.rows.items():
        table.add_row(name, *(_cell(column, row, others.get(name, {})) for column in report.columns))
    return table


def _cell(column: str, row: Mapping[str, Any], other: Mapping[str, Any]) -> Text:
    """A figure, with its quartiles below it, and its ratio to that of the other report."""
    if (value := row.get(column)) is None:
        return Text()
    if isinstance(value, str):
        return Text(value)
    shape = next((shape for end, shape in _FORMATS.items() if column.endswith(end)), None)
    write = format_number if shape is None else shape.format
    cell = Text(write(value))
    if (spread := row.get(column + _QUARTILES)) is not None:
        cell.append(f"\n{write(spread[0])}..{write(spread[1])}", "dim")
    if other.get(column):
        cell.append(f"\n{value / other[column]:.2f} x", "cyan")
    return cell


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*ours, *theirs])
    pairs = [(name, str(theirs.get(name)), str(ours.get(name))) for name in names]
    return [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
