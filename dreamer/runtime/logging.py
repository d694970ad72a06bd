"""What a run records: metrics and scores as JSON lines, scalars and videos for TensorBoard.

    metrics.jsonl    one object a line: step (environment frames), agent_steps, updates, then the metrics
    scores.jsonl     one object per training episode: step, episode/score, episode/length
    tensorboard/     the same scalars, and videos as animated images
    videos/          the newest video of each name

A disk that fills up stops no training: it is reported once, records are kept in memory and written later.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import json
import math
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from dreamer.runtime import video

#: Most bytes of records held in memory while the disk refuses them, per file.
_HELD_BYTES = 64 << 20
#: TensorBoard events are written at a flush, and when so many bytes have come together.
_FLUSHED_BYTES = 1 << 20
_LONGEST_LINE = 1 << 20


class LogWarning(UserWarning):
    """Records could not be written; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """Where a run is: policy decisions, environment frames (decisions times action repeat), gradient updates."""

    agent_steps: int
    env_frames: int
    updates: int


class Sink(Protocol):
    """One place records go to. An OSError from any method is reported and training goes on."""

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None: ...
    def episode(self, steps: Steps, score: float, length: int) -> None: ...
    def video(self, steps: Steps, name: str, gif: bytes, height: int, width: int) -> None: ...
    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Logger:
    """Hands every record to all sinks."""

    def __init__(
        self,
        logdir: Path | str,
        jsonl: bool = True,
        tensorboard: bool = True,
        fps: int = 15,
        sinks: tuple[Sink, ...] = (),
    ) -> None:
        """fps: of videos. sinks: further ones. Existing files of an earlier part of the run are continued."""
        self.logdir = Path(logdir)
        self.logdir.mkdir(parents=True, exist_ok=True)
        self._fps = fps
        self._sinks: list[Sink] = [JsonSink(self.logdir)] if jsonl else []
        self._sinks += [TensorBoardSink(self.logdir / "tensorboard")] if tensorboard else []
        self._sinks += sinks
        self._failing: set[int] = set()

    def scalars(self, steps: Steps, values: Mapping[str, Any]) -> None:
        """Records metrics: Python, numpy or jax numbers, or arrays of one element."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        self._each(lambda sink: sink.scalars(steps, numbers))

    def episode(self, steps: Steps, score: float, length: int) -> None:
        """Records a finished training episode: sum of rewards, number of actions."""
        self._each(lambda sink: sink.episode(steps, float(score), int(length)))

    def video(self, steps: Steps, name: str, frames: np.ndarray) -> Path:
        """Records a video, uint8 (T, H, W, 3); returns the file that holds the newest of this name."""
        gif = video.encode_gif(frames, self._fps)
        height, width = video.gif_size(gif)
        path = self.logdir / "videos" / f"{name.replace('/', '_')}.gif"
        self._each(lambda sink: sink.video(steps, name, gif, height, width))
        self._try(id(self), lambda: video.write_atomically(path, gif), recovers=True)
        return path

    def offsets(self) -> dict[str, int]:
        """Sizes of the JSON lines files, bytes, for a checkpoint; `truncate` cuts them back to these."""
        self.flush()
        paths = [self.logdir / name for name in JsonSink.FILES]
        return {path.name: path.stat().st_size if path.exists() else 0 for path in paths}

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None = None) -> None:
        """Forgets what was recorded after a checkpoint: cuts JSON lines back to its `offsets`.

        With `steps`, those of the checkpoint, TensorBoard hides all earlier events of later steps.
        """
        self._each(lambda sink: sink.truncate(offsets, steps))

    def flush(self) -> None:
        """Hands everything recorded so far to the file system."""
        self._each(lambda sink: sink.flush(), recovers=True)

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each(self, action: Callable[[Sink], None], recovers: bool = False) -> None:
        for sink in self._sinks:
            self._try(id(sink), functools.partial(action, sink), recovers)

    def _try(self, who: int, action: Callable[[], None], recovers: bool = False) -> None:
        """Reports the first failure; the next one is reported after a success that proves the disk writable."""
        try:
            action()
        except OSError as error:
            if who not in self._failing:
                self._failing.add(who)
                text = (
                    f"records cannot be written to {error.filename or self.logdir}: {error.strerror}; training goes on"
                )
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

    def video(self, steps: Steps, name: str, gif: bytes, height: int, width: int) -> None:
        """Text files hold no videos."""

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None:
        for lines in (self._metrics, self._scores):
            if lines.path.name in offsets:
                lines.truncate(offsets[lines.path.name])

    def flush(self) -> None:
        self._metrics.flush()
        self._scores.flush()

    def close(self) -> None:
        self.flush()


class _Appender:
    """Appends records to a file: whole ones only, and later those that came while the disk was full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: collections.deque[bytes] = collections.deque()
        self.held_bytes = 0

    def append(self, record: bytes) -> None:
        self._held.append(record)
        self.held_bytes += len(record)
        while self.held_bytes > _HELD_BYTES:
            self.held_bytes -= len(self._held.popleft())

    def flush(self) -> None:
        """Writes what is held; an OSError leaves the file as it was, and the records for the next call."""
        if not self._held:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(self._held)
        with self.path.open("ab", buffering=0) as file:
            good = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                file.truncate(good)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.drop()

    def drop(self) -> None:
        """Forgets what is held."""
        self._held.clear()
        self.held_bytes = 0


class _JsonLines:
    """Objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _Appender(path)
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
            text = f"{self.path} has {found} bytes where the checkpoint knows {size}; the lines between are lost"
            warnings.warn(text, LogWarning, stacklevel=6)
        elif found > size:
            os.truncate(self.path, size)

    def _drop_partial_line(self) -> None:
        """Whoever was killed while writing may have left half a line."""
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _LONGEST_LINE))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


class TensorBoardSink:
    """Event files, written in the caller's thread: no queue that could block when the disk is full.

    tensorboardX's own video summary silently needs moviepy, so videos are image summaries that hold a GIF.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: _Appender | None = None
        self._purge_step: int | None = None

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None:
        summaries = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(steps, summaries)

    def episode(self, steps: Steps, score: float, length: int) -> None:
        self.scalars(steps, {"episode/score": score, "episode/length": length})

    def video(self, steps: Steps, name: str, gif: bytes, height: int, width: int) -> None:
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._write(steps, [summary_pb2.Summary.Value(tag=name, image=image)])

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None:
        if steps is not None:
            self.close()
            self._purge_step = steps.env_frames + 1

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file = None

    def _write(self, steps: Steps, values: list[summary_pb2.Summary.Value]) -> None:
        if self._file is None:
            self._file = self._open()
        self._put(self._file, steps.env_frames, summary=summary_pb2.Summary(value=values))
        if self._file.held_bytes > _FLUSHED_BYTES:
            self._file.flush()

    def _open(self) -> _Appender:
        # The viewer reads files in the order of their names, and two may be opened within one second.
        number = len(list(self._folder.glob("events.out.tfevents.*")))
        file = _Appender(self._folder / f"events.out.tfevents.{time.time():.0f}.{number:04d}.{socket.gethostname()}")
        self._put(file, 0, file_version="brain.Event:2")
        if self._purge_step is not None:
            self._put(file, self._purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        return file

    @staticmethod
    def _put(file: _Appender, step: int, **contents: Any) -> None:
        """One record: length, its checksum, event, its checksum (little endian)."""
        event = event_pb2.Event(wall_time=time.time(), step=int(step), **contents).SerializeToString()
        length = struct.pack("<Q", len(event))
        checks = (struct.pack("<I", masked_crc32c(data)) for data in (length, event))
        file.append(length + next(checks) + event + next(checks))


def _number(name: str, value: Any) -> float | int:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"expected one number for metric {name}, got {array.dtype} of shape {array.shape}")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())
