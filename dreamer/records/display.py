"""What a person sees of a run: the start-up summary, live progress, the final evaluation table."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from dreamer.records.logger import Steps
from dreamer.terminal import Console, Table, can_redraw

_BLOCKS = "▁▂▃▄▅▆▇█"
#: Most points in the history of scores; when there are more, neighbours are averaged.
_POINTS = 256
#: Episodes over which the shown score is averaged.
_RECENT = 20
_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 10.0
_RATE_SECONDS = 60.0


class Display:
    """Live progress in a terminal; elsewhere, or with live=False, one plain line every ten seconds.

    A context manager. Redraws happen inside `update`; there is no thread that could interrupt the run.
    """

    def __init__(
        self,
        task: str,
        total: int,
        live: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total: agent steps of the whole run."""
        self.console = console or Console()
        self._task, self._total, self._clock = task, total, clock
        self._scores: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._history = _History()
        self._steps = Steps(0, 0, 0)
        self._status = ""
        self._shares = ""
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._begin = clock()
        self._shown = -float("inf")
        self._stale = False
        self._live: Live | None = None
        if live and can_redraw(self.console):
            self._live = Live(console=self.console, auto_refresh=False, transient=False)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def episode(self, score: float) -> None:
        """A training episode has ended with this score."""
        self._scores.append(score)
        self._history.add(score)

    @property
    def episodes(self) -> int:
        """Training episodes that have ended."""
        return self._history.count

    def state(self) -> dict[str, Any]:
        """Running statistics of the episodes, JSON-able."""
        return {"recent": list(self._scores), "history": self._history.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the statistics of `state`."""
        self._scores.extend(state["recent"])
        self._history.restore(state["history"])

    def update(self, steps: Steps, status: str = "") -> None:
        """Where the run is now; cheap enough for every step. status: a word or two, such as "evaluating"."""
        now = self._clock()
        changed = status != self._status
        self._steps, self._status, self._stale = steps, status, True
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, steps.agent_steps))
            while len(self._marks) > 2 and now - self._marks[1][0] > _RATE_SECONDS:
                self._marks.popleft()
        interval = _REFRESH_SECONDS if self._live is not None else _LINE_SECONDS
        if now - self._shown >= interval or (changed and self._live is not None):
            self.refresh()

    def times(self, values: Mapping[str, float]) -> None:
        """Shows where the time went: shares by section, as the stopwatch names them; those under 1 % are left out."""
        shares = {k.removeprefix("time/"): v for k, v in values.items() if k.startswith("time/") and v >= 0.01}
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        self._shares = "  ".join(f"{name} {100 * share:.0f} %" for name, share in ordered)

    def refresh(self) -> None:
        """Draws now."""
        self._shown, self._stale = self._clock(), False
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        else:
            self.console.print(self._line())

    def print(self, *renderables: RenderableType) -> None:
        """Prints something permanent above the live part."""
        self.console.print(*renderables)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._stale:
            self.refresh()
        if self._live is not None:
            self._live.stop()

    def _speed(self) -> float | None:
        """Agent steps per second over the last minute."""
        if len(self._marks) < 2:
            return None
        (first, start), (_, _) = self._marks[0], self._marks[-1]
        spent = self._clock() - first
        return (self._steps.agent_steps - start) / spent if spent > 0 else None

    def _facts(self) -> tuple[str, str, str, str]:
        """Speed, time left, score, number of episodes, as text."""
        speed, steps = self._speed(), self._steps.agent_steps
        left = format_duration((self._total - steps) / speed) if speed and steps < self._total else ""
        score = format_number(float(np.mean(self._scores))) if self._scores else "none yet"
        return (
            f"{format_number(speed)} steps/s" if speed else "",
            left and f"{left} left",
            score,
            f"{len(self._scores)}",
        )

    def _panel(self) -> RenderableType:
        speed, left, score, episodes = self._facts()
        steps, total = self._steps.agent_steps, self._total
        # Room for the ^C that a terminal echoes: on its own line it would upset the next redraw.
        width = min(120, self.console.width - 3)
        bar = ProgressBar(total=max(1, total), completed=min(steps, total), complete_style="cyan")
        share = Text(f"{100 * steps / max(1, total):.0f} %", "bold")
        share.append(f"  {left or self._status}", "cyan")
        line = Text.assemble("score ", (score, "bold green"))
        if self._scores:
            line.append(f"  mean of last {episodes}, {self._history.count:,} episodes", "dim")
        room = 0 if self.console.options.ascii_only else max(8, min(48, self.console.width - 54))
        curve = Text(sparkline(self._history.values(), room), "green")
        counts = Text.assemble((f"{steps:,}", "bold"), f" / {total:,} agent steps  ")
        counts.append_text(Text.assemble((f"{self._steps.updates:,}", "bold"), f" updates  {speed}"))
        elapsed = Text(format_duration(self._clock() - self._begin), "dim")
        rows = [_sides(line, curve), _sides(counts, elapsed), _sides(bar, share)]
        body = Group(*rows, *([Text(f"time  {self._shares}", "dim", no_wrap=True)] if self._shares else []))
        title = Text.assemble((self._task, "bold"), (f"  {self._status}" if self._status else "", "yellow"))
        return Panel(body, title=title, title_align="left", border_style="dim", box=box.ROUNDED, width=width)

    def _line(self) -> str:
        speed, left, score, _ = self._facts()
        steps, total = self._steps.agent_steps, self._total
        share = f"{steps:,}/{total:,} steps ({100 * steps / max(1, total):.0f} %)"
        facts = [f"score {score}", f"{self._history.count:,} episodes", f"{self._steps.updates:,} updates", speed, left]
        return "  ".join(fact for fact in [self._task, share, *facts, self._status] if fact)


def _sides(left: RenderableType, right: RenderableType) -> RenderableType:
    """One line, its first part on the left, the other on the right."""
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1, no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(left, right)
    return line


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the start-up summary. loud: it must not be overlooked."""

    name: str
    value: str
    loud: bool = False


def device_row(platform: str, name: str, asked: str) -> Row:
    """The device a run uses; loud when it is a CPU and none was asked for (`asked`: auto, cpu, gpu or tpu)."""
    if platform == "cpu" and asked != "cpu":
        return Row("device", f"CPU ({name}): no accelerator found. --run.platform cpu accepts this", loud=True)
    return Row("device", name if platform == "cpu" else f"{platform.upper()} ({name})")


def parameters_row(modules: Mapping[str, int]) -> Row:
    """Parameters in all and by module."""
    parts = ", ".join(f"{name} {format_count(count)}" for name, count in modules.items())
    return Row("parameters", f"{format_count(sum(modules.values()))} ({parts})")


def start_summary(title: str, rows: Iterable[Row]) -> RenderableType:
    """What will run, before it runs."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        value = Text(row.value, "bold black on yellow") if row.loud else Text(row.value)
        table.add_row(row.name, value)
    return table


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of evaluation episodes. best: the best possible score. normalized: human-normalised, 1 is human.

    further: the suite's own figures about the same episodes, by name.
    """

    task: str
    scores: Sequence[float]
    best: float | None = None
    normalized: float | None = None
    further: Mapping[str, float] = dataclasses.field(default_factory=dict)


def evaluation_table(results: Sequence[Evaluation], title: str = "Evaluation") -> Table:
    """Mean, standard deviation, least and largest score of each task, against what is known about it."""
    with_best = any(r.best is not None for r in results)
    with_human = any(r.normalized is not None for r in results)
    table = Table(title=title, box=box.ROUNDED)
    table.add_column("task", no_wrap=True)
    columns = ["episodes", "mean", "std", "min", "max"]
    columns += [*(["best possible", "of best"] if with_best else []), *(["of human"] if with_human else [])]
    further = list(dict.fromkeys(name for result in results for name in result.further))
    columns += [name.replace("_", " ") for name in further]
    for column in columns:
        table.add_column(column, justify="right", style="bold green" if column == "mean" else "")
    for result in results:
        scores = np.asarray(result.scores, np.float64)
        numbers = (scores.mean(), scores.std(), scores.min(), scores.max()) if scores.size else (float("nan"),) * 4
        cells = [f"{scores.size}", *(format_number(float(x)) for x in numbers)]
        if with_best:
            share = f"{100 * float(numbers[0]) / result.best:.0f} %" if result.best else ""
            cells += [format_number(result.best) if result.best is not None else "", share]
        if with_human:
            cells += [f"{100 * result.normalized:.0f} %" if result.normalized is not None else ""]
        cells += [format_number(result.further[name]) if name in result.further else "" for name in further]
        table.add_row(result.task, *cells)
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as at most `width` bars, neighbours averaged; what is not finite is left out."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    if not array.size or width < 1:
        return ""
    points = np.array([chunk.mean() for chunk in np.array_split(array, min(width, array.size))])
    low, high = points.min(), points.max()
    if high == low:
        return _BLOCKS[3] * len(points)
    levels = np.round((points - low) / (high - low) * (len(_BLOCKS) - 1)).astype(int)
    return "".join(_BLOCKS[level] for level in levels)


def format_number(value: float) -> str:
    """A score or rate in few digits: 0.0125, 2.50, 481.2, 12,340, 3e+38; whole numbers as such."""
    if not np.isfinite(value):
        return str(value)
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def format_count(value: float) -> str:
    """A number of things: 950, 12.3K, 4.5M, 1.2B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:,.0f}"


def format_bytes(value: float) -> str:
    """Decimal units, as disks are sold: 512 B, 29.1 kB, 61.4 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """0:42, 12:03, 3:05:00, 2d 3h."""
    whole = int(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600}h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class _History:
    """All scores of a run, in a bounded number of averages, each over the same number of episodes."""

    def __init__(self) -> None:
        self.count = 0
        self._size = 1
        self._means: list[float] = []
        self._open: list[float] = []

    def add(self, score: float) -> None:
        self.count += 1
        self._open.append(score)
        if len(self._open) == self._size:
            self._means.append(float(np.mean(self._open)))
            self._open.clear()
        if len(self._means) == _POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._size *= 2

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "size": self._size, "means": list(self._means), "open": list(self._open)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count, self._size = int(state["count"]), int(state["size"])
        self._means, self._open = list(state["means"]), list(state["open"])

    def values(self) -> list[float]:
        return self._means + ([float(np.mean(self._open))] if self._open else [])
