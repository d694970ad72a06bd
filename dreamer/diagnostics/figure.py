"""Learning curves as a picture: one panel per task, then one per aggregate over tasks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.diagnostics.comparison import FEW_SEEDS, Comparison
from dreamer.diagnostics.lines import Curve, Panel, short
from dreamer.schema import ConfigError

AXES = {
    "env_frames": "environment frames",
    "agent_steps": "agent steps",
    "updates": "gradient updates",
    "hours": "hours of training",
}
#: Okabe and Ito's colours without black and yellow: told apart with any kind of colour vision, and in this order also
#: by their lightness. Markers tell apart what the colours no longer do.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
#: Published curves are dark, and told apart by their dashes.
_DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_DARK = "#333333"
_COLUMNS = 4
#: Size of a panel alone, and of one among others, inches.
_ALONE, _AMONG = (7.0, 4.4), (3.9, 3.0)
_DPI = 150


def _figure(*arguments: Any, **options: Any) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        text = f"pictures need matplotlib ({error}); install it with `pip install 'dreamer[plot]'`"
        raise ConfigError(text) from None
    figure = Figure(*arguments, **options)
    FigureCanvasAgg(figure)
    return figure


def _name(curve: Curve) -> str:
    """Its name with the number of seeds, `dreamer, 2 seeds`."""
    fewest, most = int(curve.count.min()), int(curve.count.max())
    count = str(most) if fewest == most or not curve.published else f"{fewest}-{most}"
    return f"{curve.label}, {count} seed{'s' if most > 1 else ''}" if most else curve.label


def _draw_curve(axes: Any, curve: Curve, style: dict[str, Any], seeds: bool) -> None:
    whole = curve.count == np.max(curve.count, initial=0)
    label = _name(curve) if seeds else curve.label
    if curve.published:
        axes.plot(curve.x, curve.mean, **style, lw=1.6, label=label, zorder=3)
    else:
        marks = {**style, "markevery": max(1, len(curve.x) // 12), "ms": 4}
        axes.plot(curve.x, np.where(whole, curve.mean, np.nan), **marks, lw=1.8, label=label, zorder=4)
        if not whole.all():
            axes.plot(curve.x, curve.mean, color=style["color"], ls=":", lw=1.2, zorder=2)
    axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.15, lw=0, zorder=1)


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


def _draw_panel(axes: Any, panel: Panel, axis: str, styles: dict[str, dict[str, Any]], seeds: bool) -> None:
    """seeds: whether the legend says how many there are."""
    for curve in panel.curves:
        _draw_curve(axes, curve, styles[curve.label], seeds)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(AXES[axis], fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9 if seeds else 8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: Sequence[Any], alone: bool) -> None:
    """One legend for all: inside a panel alone, above several."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    options: dict[str, Any] = {"fontsize": 8.5, "frameon": True, "edgecolor": "#cccccc", "framealpha": 0.9}
    if alone:
        panels[0].legend(entries.values(), entries, loc="best", **options)
    else:
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=min(4, len(entries)), **options)


def _caption(found: Comparison, width: float) -> str:
    seeds = sorted({final.seeds for final in found.finals})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    band = f"Lines: mean over {count} seed{'s' if seeds[-1] > 1 else ''}. Bands: 95 % bootstrap interval over seeds"
    published = {curve.label for panel in found.panels for curve in panel.curves if curve.published}
    text = [band + (" (published: Student's t)." if published else ".")]
    text += [note for note in found.notes if note == FEW_SEEDS or note.partition(":")[0] in published]
    return "\n".join(line for part in text for line in textwrap.wrap(part, int(width * 17.5)))


def draw(found: Comparison, axis: str, paths: Sequence[Path]) -> None:
    """Writes the picture to every path, in the format of its ending: png, svg, pdf. The same data, the same bytes."""
    alone = len(found.panels) == 1
    columns = min(_COLUMNS, len(found.panels)) if len(found.panels) != 4 else 2
    rows = math.ceil(len(found.panels) / columns)
    width, height = _ALONE if alone else _AMONG
    caption = _caption(found, max(width * columns, _ALONE[0]))
    lines = caption.count("\n") + 1
    size = (max(width * columns, _ALONE[0]), height * rows + 0.16 * lines + (0.0 if alone else 0.4))
    figure = _figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = _styles(found.panels)
    for axes, panel in zip(grid, found.panels, strict=False):
        _draw_panel(axes, panel, axis, styles, alone)
    for axes in grid[len(found.panels) :]:
        axes.set_visible(False)
    _legend(figure, grid[: len(found.panels)], alone)
    figure.supxlabel(caption, fontsize=7.5, color="#444444", x=0.01, ha="left")
    _save(figure, paths)


def _save(figure: Any, paths: Sequence[Path]) -> None:
    import matplotlib

    nameless: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "dreamer"}):
        for path in paths:
            figure.savefig(path, dpi=_DPI, metadata=nameless.get(path.suffix))
