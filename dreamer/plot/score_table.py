"""Final scores as a Markdown table."""

from __future__ import annotations

import math

from dreamer.plot.comparison import Comparison, Final
from dreamer.plot.figure import AXES
from dreamer.plot.lines import short
from dreamer.plot.totals import Total


def number(value: float) -> str:
    """Three significant digits, and all digits before the point of whatever has not too many."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 3)}f}"


def interval(value: float, low: float, high: float) -> str:
    return number(value) if math.isnan(low) else f"{number(value)} [{number(low)}, {number(high)}]"


def as_table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, whatever the cells hold."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in line)} |" for line in lines)


def _final_row(final: Final, references: bool) -> list[str]:
    span = "-" if final.span is None else f"{short(final.span[0])}-{short(final.span[1])}"
    row = [final.task, final.label, str(final.seeds), span, interval(final.mean, final.low, final.high)]
    if not references:
        return row
    same = [f"{curve.source.name}: {number(value)}" for curve, value in final.published]
    end = [
        f"{curve.source.name}: {number(curve.final)} (std {number(curve.final_std)}, {int(curve.seeds.max())} seeds, "
        f"at {short(curve.x[-1])})"
        for curve, _ in final.published
    ]
    return [*row, "; ".join(same) or "-", "; ".join(end) or "-"]


def _total_rows(total: Total) -> list[list[str]]:
    head = [total.scale.name, str(len(total.tasks)), total.label]
    return [
        [
            *head,
            name,
            interval(*values),
            "; ".join(f"{source}: {number(found[name])}" for source, found in total.published.items() if name in found)
            or "-",
        ]
        for name, values in total.values.items()
    ]


def markdown(found: Comparison, axis: str) -> str:
    """The final scores of every task and curve, the aggregates over tasks, and the notes."""
    references = any(final.published for final in found.finals)
    head = ["task", "curve", "seeds", AXES[axis], "score [95 %]"]
    head += ["published, same span", "published, end"] if references else []
    parts = [
        f"Scores: means over the last tenth of what every run of a curve has reached (the column {AXES[axis]}), then "
        "over seeds; in brackets the 95 % interval by a bootstrap over seeds, within tasks. Of one seed there is none.",
        as_table(head, [_final_row(final, references) for final in found.finals]),
    ]
    if found.totals:
        rows = [row for total in found.totals for row in _total_rows(total)]
        head = ["over tasks", "tasks", "curve", "aggregate", "score [95 %]", "published, same spans"]
        parts.append(as_table(head, rows))
    if found.notes:
        parts.append("\n".join(f"- {note}" for note in found.notes))
    return "\n\n".join(parts) + "\n"
