"""Learning curves as a picture: one panel per task, then one per aggregate over tasks; final scores as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.plot.comparison import FEW_SEEDS, Comparison, Final
from dreamer.plot.lines import Curve, Panel, short
from dreamer.plot.totals import Total
from dreamer.schema import ConfigError

AXES = {
    "env_frames": "environment frames",
    "agent_steps": "agent steps",
    "updates": "gradient updates",
    "hours": "hours of training",
}
#: Okabe and Ito's colours without black and yellow: distinct with any kind of colour vision, and in this order also by
#: lightness. Markers distinguish what the colours no longer do.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
#: Published curves are dark, and distinguished by their dashes.
_DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_DARK = "#333333"
_COLUMNS = 4
#: Most panels of a picture, and entries of its legend: what is too high or too wide can be neither drawn nor read.
_PANELS, _ENTRIES = 60, 40
#: Most entries of a legend inside a panel; letters of a legend per inch; the longest name.
_INSIDE, _LETTERS, _LONGEST = 16, 15.0, 80
#: Size of a panel alone, and of one among others, inches.
_ALONE, _AMONG = (7.0, 4.4), (3.9, 3.0)
_DPI = 150


@contextlib.contextmanager
def _matplotlib() -> Iterator[Any]:
    """Yields matplotlib's figure class under matplotlib's own defaults: a matplotlibrc of the user, or in the working
    folder, may ask for LaTeX or other sizes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        text = f"pictures need matplotlib ({error}); install it with `pip install 'dreamer[plot]'`"
        raise ConfigError(text) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "dreamer"
        # A name in a script that the font does not have is drawn as boxes; the table has it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield Figure


def _name(curve: Curve) -> str:
    """The name of a curve with its number of seeds, `dreamer, 2 seeds`."""
    fewest, most = int(curve.count.min()), int(curve.count.max())
    count = str(most) if fewest == most or not curve.published else f"{fewest}-{most}"
    return f"{curve.label}, {count} seed{'s' if most > 1 else ''}" if most else curve.label


def _draw_curve(axes: Any, curve: Curve, style: dict[str, Any]) -> Any:
    """Returns the line, for the legend."""
    whole = curve.count == np.max(curve.count, initial=0)
    if curve.published:
        (line,) = axes.plot(curve.x, curve.mean, **style, lw=1.6, label=curve.label, zorder=3)
    else:
        marks = {**style, "markevery": max(1, len(curve.x) // 12), "ms": 4}
        (line,) = axes.plot(curve.x, np.where(whole, curve.mean, np.nan), **marks, lw=1.8, label=curve.label, zorder=4)
        if not whole.all():
            axes.plot(curve.x, curve.mean, color=style["color"], ls=":", lw=1.2, zorder=2)
    axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.15, lw=0, zorder=1)
    return line


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """One style for each name of a curve, the same in all panels."""
    curves = [curve for panel in panels for curve in panel.curves]
    ours = list(dict.fromkeys(curve.label for curve in curves if not curve.published))
    theirs = list(dict.fromkeys(curve.label for curve in curves if curve.published))
    styles: dict[str, dict[str, Any]] = {
        label: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]}
        for i, label in enumerate(ours)
    }
    return styles | {name: {"color": _DARK, "ls": _DASHES[i % len(_DASHES)]} for i, name in enumerate(theirs)}


def _draw_panel(axes: Any, panel: Panel, axis: str, styles: dict[str, dict[str, Any]], alone: bool) -> dict[str, Any]:
    """Returns the lines by their name in the legend, which includes the number of seeds if there is only one panel."""
    lines = {}
    for curve in panel.curves:
        lines[_name(curve) if alone else curve.label] = _draw_curve(axes, curve, styles[curve.label])
    axes.set_title(shortened(panel.title), fontsize=10, parse_math=False)
    axes.set_xlabel(AXES[axis], fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9 if alone else 8, parse_math=False)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


@dataclasses.dataclass(frozen=True)
class _Legend:
    """One legend for all panels: inside the panel if there is only one and it has room, else above them."""

    names: list[str]
    more: int
    inside: bool
    columns: int

    @property
    def height(self) -> float:
        """Inches above the panels."""
        lines = math.ceil(len(self.names) / self.columns) + (self.more > 0)
        return 0.0 if self.inside else 0.2 + 0.2 * lines

    def draw(self, place: Any, lines: dict[str, Any]) -> None:
        """place: the figure, or a panel. Names are never taken for formulas."""
        options: dict[str, Any] = {"fontsize": 8.5, "frameon": True, "edgecolor": "#cccccc", "framealpha": 0.9}
        options |= {"loc": "best" if self.inside else "outside upper center", "ncols": self.columns}
        if self.more:
            options |= {"title": f"and {self.more:,} more, in the table", "title_fontsize": 8.5}
        # Matplotlib leaves out names that begin with an underscore, so they come afterwards.
        places = list(map(str, range(len(self.names))))
        legend = place.legend([lines[name] for name in self.names], places, **options)
        for text, name in zip(legend.get_texts(), self.names, strict=True):
            text.set_text(shortened(name))
            text.set_parse_math(False)


def _legend(names: Sequence[str], alone: bool, width: float) -> _Legend:
    """width: of the figure, inches."""
    shown = list(names)[:_ENTRIES]
    longest = max(len(shortened(name)) for name in shown)
    columns = max(1, min(4, len(shown), int(width * _LETTERS / (longest + 7))))
    inside = alone and len(shown) <= _INSIDE and longest <= 40
    return _Legend(shown, len(names) - len(shown), inside, 1 if inside else columns)


def shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _caption(found: Comparison, width: float) -> str:
    seeds = sorted({final.seeds for final in found.finals})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    band = f"Lines: mean over {count} seed{'s' if seeds[-1] > 1 else ''}. Bands: 95 % bootstrap interval over seeds"
    published = {curve.label for panel in found.panels for curve in panel.curves if curve.published}
    more = len(found.panels) - _PANELS
    text = [band + (" (published: Student's t)." if published else ".")]
    text += [note for note in found.notes if note == FEW_SEEDS or note.partition(":")[0] in published]
    text += [f"{more:,} more panels are not drawn; the table has their scores."] if more > 0 else []
    return "\n".join(line for part in text for line in textwrap.wrap(part, int(width * 17.5)))


def draw(found: Comparison, axis: str, paths: Sequence[Path]) -> None:
    """Writes the picture to every path, in the format of its suffix: png, svg, pdf. Equal data give equal bytes."""
    panels = found.panels[:_PANELS]
    alone = len(panels) == 1
    columns = min(_COLUMNS, len(panels)) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    width, height = _ALONE if alone else _AMONG
    whole = max(width * columns, _ALONE[0])
    names = dict.fromkeys(_name(curve) if alone else curve.label for panel in panels for curve in panel.curves)
    legend, caption = _legend(list(names), alone, whole), _caption(found, whole)
    size = (whole, height * rows + 0.16 * (caption.count("\n") + 1) + legend.height)
    with _matplotlib() as make_figure:
        figure = make_figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        styles = _styles(panels)
        lines: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            for name, line in _draw_panel(axes, panel, axis, styles, alone).items():
                lines.setdefault(name, line)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        legend.draw(grid[0] if legend.inside else figure, lines)
        figure.supxlabel(caption, fontsize=7.5, color="#444444", x=0.01, ha="left", parse_math=False)
        _save(figure, paths)


def _save(figure: Any, paths: Sequence[Path]) -> None:
    nameless: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    for path in paths:
        figure.savefig(path, dpi=_DPI, metadata=nameless.get(path.suffix))


# --- The table -------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, and all digits before the point unless there are too many."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 3)}f}"


def interval(value: float, low: float, high: float) -> str:
    return number(value) if math.isnan(low) else f"{number(value)} [{number(low)}, {number(high)}]"


def as_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, whatever the cells hold."""
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
