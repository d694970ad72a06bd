"""What all destinations of records have in common."""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dreamer.records.pictures import Picture

#: Most bytes of records held in memory while the disk refuses them, per file.
_HELD_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Steps:
    """How far a run is: policy decisions, environment frames (decisions times action repeat), gradient updates."""

    agent_steps: int
    env_frames: int
    updates: int


class Sink(Protocol):
    """One destination of records. An OSError from any method is reported and training goes on.

    offsets: its current end, by names of its own, for a checkpoint; `truncate` goes back there.
    """

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None: ...
    def episode(self, steps: Steps, score: float, length: int) -> None: ...
    def picture(self, steps: Steps, name: str, picture: Picture) -> None: ...
    def offsets(self) -> dict[str, int]: ...
    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Appender:
    """Appends records to a file: whole ones only; those that come while the disk is full are written later."""

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
        """Writes the held records; an OSError leaves the file as it was, and the records for the next call."""
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
        """Forgets the held records."""
        self._held.clear()
        self.held_bytes = 0
