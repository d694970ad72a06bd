"""Published DreamerV3 scores that ship with the package; `published_scores/README.md` says where they are from."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dreamer.plot.statistics import mean_interval
from dreamer.schema import ConfigError
from dreamer.values import suggestion

FOLDER = Path(__file__).resolve().parent / "published_scores"

#: The last part of training, over which a final score is averaged.
FINAL_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of published scores.

    option, value      what a comparable run of the same tasks must have set; "" if nothing
    repeat             environment frames per agent step of the runs
    updates_per_frame  gradient updates per environment frame that the runs are believed to have made
    frames             their length, environment frames
    caveat             what to know before comparing with them
    """

    name: str
    option: str
    value: str
    repeat: float
    updates_per_frame: float
    frames: float
    caveat: str

    def scale(self, axis: str) -> float | None:
        """The factor from environment frames to units of an axis; None: the published scores do not say."""
        known = {"env_frames": 1.0, "agent_steps": 1 / self.repeat, "updates": self.updates_per_frame}
        return known.get(axis)


@dataclasses.dataclass(frozen=True)
class Published:
    """Published scores of one task, over seeds.

    x      (P,) right edges of bins, in units of the axis
    mean, low, high  (P,) over the bin's seeds, with the 95 % interval of the mean by Student's t
    seeds  (P,) how many
    final  mean over the last tenth of training; `final_std`: population standard deviation over seeds
    whole  False where only the final score is published: the curve is then the last tenth, flat
    """

    source: Source
    task: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: np.ndarray
    final: float
    final_std: float
    whole: bool

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.task.partition('_')[2]}"

    @property
    def label(self) -> str:
        return f"published {self.source.name}"

    def along(self, axis: str) -> Published:
        """The same with another x axis; ConfigError if the scores do not have it."""
        factor = self.source.scale(axis)
        if factor is None:
            raise ConfigError(f"--reference: the published scores have no {axis}; use --x env_frames or leave it out")
        return dataclasses.replace(self, x=self.x * factor)

    def at(self, low: float, high: float) -> float:
        """Mean over the published bins that end in (low, high], else interpolated; NaN beyond the ends."""
        inside = (self.x > low * (1 + 1e-9)) & (self.x <= high * (1 + 1e-9))
        if inside.any():
            return float(self.mean[inside].mean())
        return float(np.interp(high, self.x, self.mean, left=np.nan, right=np.nan))


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def sources() -> dict[str, Source]:
    """Where the scores come from, by name: `dmc_proprio`, `dmc_vision`, `atari100k`."""
    return {
        row["name"]: Source(
            row["name"],
            row["option"],
            row["value"],
            float(row["repeat"]),
            float(row["updates_per_frame"]),
            float(row["frames"]),
            row["caveat"],
        )
        for row in _rows("sources")
    }


def _curve(source: Source, final: dict[str, str], rows: list[dict[str, str]]) -> Published:
    if not rows:
        ends = ((1 - FINAL_SHARE) * source.frames, source.frames)
        rows = [{**final, "step": str(end)} for end in ends]
    step, mean, std = (np.array([float(row[key]) for row in rows]) for key in ("step", "mean", "std"))
    seeds = np.array([int(row["n_seeds"]) for row in rows])
    half = mean_interval(std, seeds)
    whole = len(rows) > 2
    end, spread = float(final["mean"]), float(final["std"])
    return Published(source, final["task"], step, mean, mean - half, mean + half, seeds, end, spread, whole)


@functools.cache
def published() -> dict[str, Published]:
    """All published scores, by names such as `dmc_vision-walker_walk`; x in environment frames."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for name in sources():
        for row in _rows(name):
            rows.setdefault((name, row["task"]), []).append(row)
    found = [
        _curve(sources()[row["source"]], row, rows.get((row["source"], row["task"]), [])) for row in _rows("final")
    ]
    return {curve.name: curve for curve in found}


def plain_task(task: str) -> str:
    """The task's name in the published scores: `atari100k_pong` is `atari_pong` there."""
    suite, _, game = task.partition("_")
    return f"atari_{game}" if suite == "atari100k" else task


def find(name: str) -> list[Published]:
    """The published scores of a task, or of a full name. ConfigError for a name without published scores."""
    known = published()
    if name in known:
        return [known[name]]
    found = [curve for curve in known.values() if curve.task == plain_task(name)]
    if not found:
        names = sorted({*known, *(curve.task for curve in known.values())})
        close = suggestion(name, names, f"; there are {', '.join(sorted({c.task for c in known.values()}))}")
        raise ConfigError(f"--reference: no published scores of {name!r}{close}")
    return found
