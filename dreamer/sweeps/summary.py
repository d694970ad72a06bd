"""The report of a sweep: what became of each run, final scores, learning curves."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dreamer.plot import request
from dreamer.plot.score_table import as_table, markdown, number
from dreamer.records.display import format_duration
from dreamer.schema import ConfigError
from dreamer.sweeps.live_table import counts
from dreamer.sweeps.scheduler import Entry

REPORT = "report"
#: The last tenth of a run is what its final score is the mean of.
LAST = 0.1


def runs_table(entries: Sequence[Entry]) -> str:
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
    except ConfigError as error:  # nothing of the runs can be read, which must not hide what became of them
        return "", [f"No curves: {error}."], []
    text = markdown(found, asked.axis)
    if importlib.util.find_spec("matplotlib") is None:
        return text, ["No picture: it needs matplotlib, `pip install 'dreamer[plot]'`."], []
    return text, [f"![Learning curves]({REPORT}.png)"], request.write(found, asked)


def write_report(name: str, folder: Path, entries: list[Entry]) -> tuple[str, list[Path]]:
    """Writes report.md, and report.png and report.svg where matplotlib is installed; returns the text and the paths.

    Runs without an episode are in the first table only.
    """
    runs = [str(entry.run.folder) for entry in entries if entry.progress.episodes]
    text, notes, files = comparison(folder, runs) if runs else ("", ["No episode has ended yet."], [])
    path = folder / f"{REPORT}.md"
    whole = "\n\n".join([f"# {name}", f"{counts(entries)}.", runs_table(entries), *notes, text]).rstrip() + "\n"
    path.write_text(whole, encoding="utf-8")
    return whole, list(dict.fromkeys([path, *files]))
