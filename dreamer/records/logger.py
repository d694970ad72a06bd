"""What a run records: metrics and scores as JSON lines, videos and pages as files, and all of it to further sinks.

    metrics.jsonl    one object a line: step (environment frames), agent_steps, updates, then the metrics
    scores.jsonl     one object per training episode: step, episode/score, episode/length
    videos/          the newest video of each name
    reports/         the newest page of each name

The configuration chooses the further sinks.

A full disk does not stop training: it is reported once, and records are kept in memory and written later.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import Config
from dreamer.paths import whole_file
from dreamer.presets import value_of
from dreamer.records import video
from dreamer.records.pictures import Encoder, Pace, Picture, encode_png
from dreamer.records.sink import Appender, Sink, Steps
from dreamer.records.tensorboard import TensorBoardSink
from dreamer.records.trackers import MlflowSink, WandbSink
from dreamer.schema import options, show

_LONGEST_LINE = 1 << 20
#: Key in `Logger.offsets`: bytes of pictures that the sinks have received.
_PICTURES = "pictures"


class LogWarning(UserWarning):
    """Records could not be written; the message names the file."""


class Logger:
    """Hands every record to all sinks."""

    def __init__(
        self,
        logdir: Path | str,
        jsonl: bool = True,
        fps: int = 15,
        sinks: Sequence[Sink] = (),
        pictures: Pace | None = None,
    ) -> None:
        """fps: of videos. sinks: further ones, such as TensorBoard's. pictures: the space they may take; None: no
        limit. Existing files of an earlier part of the run are continued.
        """
        self.logdir = Path(logdir)
        self.logdir.mkdir(parents=True, exist_ok=True)
        self._fps = fps
        self._sinks: list[Sink] = [JsonSink(self.logdir)] if jsonl else []
        self._sinks += sinks
        self._failing: set[int] = set()
        self._pictures = pictures or Pace(None, 1)
        self._encoder = Encoder(self._deliver)

    def scalars(self, steps: Steps, values: Mapping[str, Any]) -> None:
        """Records metrics: Python, numpy or JAX numbers, or arrays of one element."""
        self._encoder.deliver()
        numbers = {name: _number(name, value) for name, value in values.items()}
        self._each(lambda sink: sink.scalars(steps, numbers))

    def episode(self, steps: Steps, score: float, length: int) -> None:
        """Records a finished training episode: sum of rewards, number of actions."""
        self._each(lambda sink: sink.episode(steps, float(score), int(length)))

    def video(self, steps: Steps, name: str, frames: np.ndarray | Callable[[], np.ndarray]) -> Path:
        """Records a video, uint8 (T, H, W, 3) or what draws it; returns the file that will hold the newest.

        It is drawn and encoded in a thread, and complete at the next flush at the latest.
        """

        def make() -> Picture:
            gif = video.encode_gif(frames() if callable(frames) else frames, self._fps)
            return Picture("gif", gif, *video.gif_size(gif))

        return self._add(steps, name, self.logdir / "videos" / f"{name.replace('/', '_')}.gif", make)

    def page(self, steps: Steps, name: str, image: Callable[[], np.ndarray]) -> Path:
        """Records what draws an image uint8 (H, W, 3), as `video` does."""
        path = self.logdir / "reports" / f"{name.replace('/', '_')}.png"
        return self._add(steps, name, path, lambda: encode_png(image()))

    def _add(self, steps: Steps, name: str, path: Path, make: Callable[[], Picture]) -> Path:
        self._encoder.add((steps, name, path), make)
        return path

    def _deliver(self, label: tuple[Steps, str, Path], picture: Picture) -> None:
        steps, name, path = label

        def write() -> None:
            with whole_file(path, sync=False) as file:
                file.write(picture.data)

        self._try(id(self), write, recovers=True)
        if self._pictures.takes(len(picture.data), steps.agent_steps):
            self._each(lambda sink: sink.picture(steps, name, picture))

    def offsets(self) -> dict[str, int]:
        """The current end of all records, for a checkpoint; `truncate` goes back there."""
        self.flush()
        found = {_PICTURES: self._pictures.spent}
        self._each(lambda sink: found.update(sink.offsets()))
        return found

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None = None) -> None:
        """Forgets what was recorded after a checkpoint: cuts JSON lines back to its `offsets`.

        With `steps`, those of the checkpoint, TensorBoard hides all earlier events of later steps.
        """
        self._pictures.spent = offsets.get(_PICTURES, 0)
        self._each(lambda sink: sink.truncate(offsets, steps))

    def flush(self) -> None:
        """Hands everything recorded so far to the file system; waits for pictures in progress."""
        self._encoder.deliver(0)
        self._each(lambda sink: sink.flush(), recovers=True)

    def close(self) -> None:
        try:
            self._encoder.close()
        finally:
            self._each(lambda sink: sink.close())

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each(self, action: Callable[[Sink], None], recovers: bool = False) -> None:
        for sink in self._sinks:
            self._try(id(sink), functools.partial(action, sink), recovers)

    def _try(self, who: int, action: Callable[[], None], recovers: bool = False) -> None:
        """Reports the first failure; later ones only after a success has shown that the disk is writable."""
        try:
            action()
        except OSError as error:
            if who not in self._failing:
                self._failing.add(who)
                where, why = error.filename or self.logdir, error.strerror or error
                text = f"records cannot be written to {where}: {why}; training goes on"
                warnings.warn(text, LogWarning, stacklevel=5)
        else:
            if recovers:
                self._failing.discard(who)


class JsonSink:
    """metrics.jsonl and scores.jsonl. What is not finite becomes null, which every JSON reader takes."""

    FILES = ("metrics.jsonl", "scores.jsonl")

    def __init__(self, logdir: Path) -> None:
        self._metrics, self._scores = (_JsonLines(logdir / name) for name in self.FILES)

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None:
        head = {"step": int(steps.env_frames), "agent_steps": int(steps.agent_steps), "updates": int(steps.updates)}
        if clash := head.keys() & values.keys():
            raise ValueError(f"expected metric names other than those of the counters, got {sorted(clash)}")
        self._metrics.write({**head, **values})

    def episode(self, steps: Steps, score: float, length: int) -> None:
        self._scores.write({"step": int(steps.env_frames), "episode/score": score, "episode/length": length})

    def picture(self, steps: Steps, name: str, picture: Picture) -> None:
        """Text files hold no pictures."""

    def offsets(self) -> dict[str, int]:
        """Sizes of the files, bytes."""
        paths = [lines.path for lines in (self._metrics, self._scores)]
        return {path.name: path.stat().st_size if path.exists() else 0 for path in paths}

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None:
        for lines in (self._metrics, self._scores):
            if lines.path.name in offsets:
                lines.truncate(offsets[lines.path.name])

    def flush(self) -> None:
        self._metrics.flush()
        self._scores.flush()

    def close(self) -> None:
        self.flush()


class _JsonLines:
    """Objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = Appender(path)
        if path.exists():
            self._drop_partial_line()

    def write(self, record: Mapping[str, Any]) -> None:
        safe = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        self._file.append(json.dumps(safe, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def truncate(self, size: int) -> None:
        self._file.drop()
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < size:
            text = f"{self.path} has {found} bytes, but the checkpoint was at {size}; the lines between are lost"
            warnings.warn(text, LogWarning, stacklevel=6)
        elif found > size:
            os.truncate(self.path, size)

    def _drop_partial_line(self) -> None:
        """Removes half a line, which a process killed while writing may have left."""
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _LONGEST_LINE))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


def _number(name: str, value: Any) -> float | int:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"expected one number for metric {name}, got {array.dtype} of shape {array.shape}")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


# --- From the configuration ------------------------------------------------------------------------


#: Options that say nothing about how a run learns.
_BESIDE = ("log.", "logdir", "run.display")


def make_logger(config: Config) -> Logger:
    """The logger of a run, with all sinks that the options ask for."""
    log, folder, steps = config.log, Path(config.logdir), config.run.agent_steps
    sinks: list[Sink] = []
    if log.tensorboard:
        pace = Pace(log.tensorboard_megabytes, steps)
        sinks.append(TensorBoardSink(folder / "tensorboard", changed(config), as_text(config), pace))
    if log.wandb is not None:
        sinks.append(WandbSink(folder, log.wandb, table(config)))
    if log.mlflow is not None:
        sinks.append(MlflowSink(folder, log.mlflow, table(config)))
    return Logger(folder, log.jsonl, log.video_fps, sinks, Pace(log.picture_megabytes, steps))


def table(config: Config) -> dict[str, float | str]:
    """Options by name, as numbers where they are numbers, for comparing runs."""

    def plain(value: Any) -> float | str:
        return value if isinstance(value, int | float) else show(value)

    return {name: plain(value_of(config, name)) for name in options() if not name.startswith(_BESIDE)}


def changed(config: Config) -> dict[str, float | str]:
    """The options in the table that are not at their defaults, and the name of the run."""
    default = {option.name: option.default for option in options().values()}
    told = ("task", "seed")
    return {name: v for name, v in table(config).items() if name in told or value_of(config, name) != default[name]}


def as_text(config: Config) -> str:
    """All options, Markdown: those that differ from their defaults first."""
    given = {name: (show(value_of(config, name)), show(option.default)) for name, option in options().items()}
    changed = [f"| `{name}` | {_code(now)} | `{default}` |" for name, (now, default) in given.items() if now != default]
    rest = [f"| `{name}` | {_code(now)} |" for name, (now, default) in given.items() if now == default]
    return "\n".join(
        ["| changed option | value | default |", "| --- | --- | --- |", *changed, ""]
        + ["| option at its default | value |", "| --- | --- |", *rest]
    )


def _code(text: str) -> str:
    """A code span for a table cell: neither backticks nor line breaks in the text end it."""
    line = " ".join(text.splitlines())
    return f"`` {line} ``" if "`" in line else f"`{line}`"
