"""The report of `dreamer envs check` as a table in the terminal."""

from __future__ import annotations

from rich import box
from rich.text import Text

from dreamer.envs.audit import Report
from dreamer.terminal import Console, Table
from dreamer.types import Space, Spaces

MEGABYTE = 1e6


def show(task: str, report: Report, console: Console | None = None) -> None:
    """Prints it."""
    console = console or Console()
    table = Table(box=box.SIMPLE, show_header=False, title=f"{task}, {report.steps:,} agent steps of random actions")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in rows(report):
        table.add_row(name, Text(words))
    console.print(table)
    if not report.violations:
        console.print(Text("No violation found.", "green"))
        return
    console.print(Text(f"{len(report.violations)} violations of the contract:", "bold red"))
    for line in report.violations:
        console.print(Text(f"  - {line}"))


def rows(report: Report) -> list[tuple[str, str]]:
    """(name, value) of every line of the table."""
    return [
        ("observations", _spaces(report.observations)),
        ("actions", _spaces(report.actions)),
        ("episodes", _episodes(report)),
        ("steps per second", f"{report.wall_rate:,.0f} by the clock, {report.cpu_rate:,.0f} per CPU second"),
        ("memory growth", f"{report.growth / MEGABYTE:+.2f} MB per 1000 steps"),
        ("same under a seed", f"no: {report.repeats}" if report.repeats else "yes"),
        ("state can be saved", f"no: {report.state}" if report.state else "yes, proven by restoring it"),
    ]


def _spaces(spaces: Spaces) -> str:
    logged = sum(key.startswith("log/") for key in spaces)
    shown = [f"{key}: {_space(space)}" for key, space in spaces.items() if not key.startswith("log/")]
    return "\n".join(shown + ([f"and {logged} that are only logged (log/...)"] if logged else []))


def _space(space: Space) -> str:
    if space.classes is None:
        return f"{space.kind} {space.shape} {space.dtype}"
    counts = sorted(set(space.classes))
    return f"{space.kind} {space.shape}, {' or '.join(map(str, counts))} classes"


def _episodes(report: Report) -> str:
    if not report.scores:
        return "none ended"
    count = len(report.scores)
    mean, length = sum(report.scores) / count, sum(report.lengths) / count
    return f"{count} ended, mean score {mean:.4g}, mean length {length:.4g} steps"
