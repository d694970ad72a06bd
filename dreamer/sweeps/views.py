"""What a person sees of a sweep: a live table of its runs, or plain lines where there is no terminal; the report."""

from __future__ import annotations

import collections
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.live import Live
from rich.text import Text

from dreamer.plot import request
from dreamer.plot.figure import as_table, markdown, number
from dreamer.records.display import format_count, format_duration, format_number
from dreamer.schema import ConfigError
from dreamer.sweeps.progress import FAILED, FINISHED, HOPELESS, RUNNING, WAITING
from dreamer.sweeps.scheduler import RunEntry
from dreamer.terminal import Console, Table, can_redraw

_LINE_SECONDS = 60.0
_STYLES = {RUNNING: "cyan", FINISHED: "green", FAILED: "bold red", HOPELESS: "yellow", WAITING: "dim"}
#: Statuses in the order in which runs are shown where not all have room.
_ORDER = {RUNNING: 0, FAILED: 1, FINISHED: 2, HOPELESS: 3, WAITING: 4}
#: Lines of a terminal that are not for runs.
_BESIDE = 8


def counts(entries: list[RunEntry]) -> str:
    """`3 finished, 2 running, 5 waiting`."""
    found = collections.Counter(entry.state.status for entry in entries)
    return ", ".join(
        f"{found[status]} {status}" for status in (FINISHED, RUNNING, WAITING, HOPELESS, FAILED) if found[status]
    )


def time_left(entries: list[RunEntry], slots: int) -> float | None:
    """Seconds until all runs are over, estimated from the seconds per agent step of present and past runs, `slots` at
    once. None: nothing to go by."""
    running = [(entry, left) for entry in entries if (left := entry.left()) is not None]
    paces = [1 / entry.progress.rate for entry in entries if entry.progress.rate]
    if not paces:
        return None
    pace = sum(paces) / len(paces)
    known = sum(left for _, left in running)
    started = {id(entry) for entry, _ in running}
    rest = [e for e in entries if not e.over and id(e) not in started]
    unknown = sum(max(0, e.length - e.progress.agent_steps) * pace for e in rest)
    longest = max([left for _, left in running], default=0.0)
    return max(longest, (known + unknown) / slots)


class SweepDisplay:
    """A context manager. In a terminal a live table; elsewhere a line for each event and one a minute for the whole."""

    def __init__(self, name: str, slots: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._name, self._slots = name, slots
        self._shown = -float("inf")
        self._live = Live(console=self.console, auto_refresh=False) if can_redraw(self.console) else None

    def __enter__(self) -> SweepDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, entry: RunEntry, text: str) -> None:
        """Print what happened to a run; it stays above the table."""
        self.console.print(Text(f"{time.strftime('%H:%M:%S')}  {entry.run.name}: {text}"))

    def update(self, entries: list[RunEntry], now: float) -> None:
        if self._live is not None:
            room = max(4, self.console.height - _BESIDE)
            self._live.update(self._table(entries, now, room), refresh=True)
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            self.console.print(Text(f"{self._name}: {self._summary(entries)}"))

    def _summary(self, entries: list[RunEntry]) -> str:
        left = time_left(entries, self._slots)
        return counts(entries) + (f"; about {format_duration(left)} left" if left else "")

    def _table(self, entries: list[RunEntry], now: float, room: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=self._name)
        table.add_column("run", overflow="ellipsis", no_wrap=True, ratio=1)
        table.add_column("state", no_wrap=True)
        for column in ("steps", "", "score", "steps/s", "time", "left"):
            table.add_column(column, justify="right", no_wrap=True)
        ordered = sorted(entries, key=lambda entry: _ORDER[entry.state.status])
        for entry in ordered[:room]:
            table.add_row(*self._cells(entry, now))
        hidden = len(entries) - room
        summary = self._summary(entries) + (f"; {hidden} runs not shown" if hidden > 0 else "")
        table.caption = Text(summary, "table.caption")
        table.caption_justify = "left"
        return table

    def _cells(self, entry: RunEntry, now: float) -> list[Text | str]:
        progress, status = entry.progress, entry.state.status
        state = Text(status, _STYLES[status])
        if entry.job is not None:
            state = Text("stopping" if entry.asked else status, "yellow" if entry.asked else "cyan")
            state.append(f" {entry.job.where}".rstrip(), "dim")
        score, left = progress.score(), entry.left()
        seconds, rate = entry.seconds(now), progress.rate if entry.job else None
        return [
            entry.run.name,
            state,
            f"{format_count(progress.agent_steps)}/{format_count(entry.length)}",
            f"{100 * min(1.0, progress.agent_steps / entry.length):.0f} %",
            "" if score is None else format_number(score),
            "" if not rate else format_number(rate),
            format_duration(seconds) if seconds else "",
            "" if left is None else format_duration(left),
        ]


# --- The report ------------------------------------------------------------------------------------


REPORT = "report"
#: A final score is the mean over this last share of a run.
LAST = 0.1


def runs_table(entries: Sequence[RunEntry]) -> str:
    """Markdown: one row per run."""
    rows = []
    for entry in entries:
        score, state = entry.progress.score(share=LAST), entry.state
        row = [
            entry.run.name,
            state.status,
            f"{entry.progress.agent_steps:,} of {entry.length:,}",
            "-" if score is None else number(score),
            format_duration(state.seconds),
            str(state.starts),
            state.reason,
        ]
        rows.append(row)
    return as_table(["run", "state", "agent steps", "score, last tenth", "time", "starts", ""], rows)


def comparison(folder: Path, runs: Sequence[str]) -> tuple[str, list[str], list[Path]]:
    """Final scores and learning curves: (Markdown, notes on the picture, files that were written)."""
    asked = request.Request(runs=runs, reference=(request.AUTO,), out=folder / REPORT)
    try:
        found = request.make_comparison(asked)
    except ConfigError as error:  # unreadable runs must not hide how they ended
        return "", [f"No curves: {error}."], []
    text = markdown(found, asked.axis)
    if importlib.util.find_spec("matplotlib") is None:
        return text, ["No picture: it needs matplotlib, `pip install 'dreamer[plot]'`."], []
    return text, [f"![Learning curves]({REPORT}.png)"], request.write(found, asked)


def write_report(name: str, folder: Path, entries: list[RunEntry]) -> tuple[str, list[Path]]:
    """Writes report.md, and report.png and report.svg where matplotlib is installed; returns the text and the paths.

    Runs without an episode are in the first table only.
    """
    runs = [str(entry.run.folder) for entry in entries if entry.progress.episodes]
    text, notes, files = comparison(folder, runs) if runs else ("", ["No episode has ended yet."], [])
    path = folder / f"{REPORT}.md"
    whole = "\n\n".join([f"# {name}", f"{counts(entries)}.", runs_table(entries), *notes, text]).rstrip() + "\n"
    path.write_text(whole, encoding="utf-8")
    return whole, list(dict.fromkeys([path, *files]))
