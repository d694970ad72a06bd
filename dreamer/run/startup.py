"""Where the time from the start of the program to its first update goes."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

#: Parts that take less are left out, seconds.
_SHOWN = 0.05


def process_start() -> float:
    """When this process was started, by `time.time`."""
    return psutil.Process().create_time()


class Startup:
    """Parts one after another: `mark` books the time since the mark before."""

    def __init__(self, begun: float | None = None, clock: Callable[[], float] = time.time) -> None:
        """begun: when the program started; None: now."""
        self._clock = clock
        self._begun = self._last = clock() if begun is None else begun
        self._parts: dict[str, float] | None = {}

    def mark(self, part: str, once: bool = False) -> None:
        """The time since the last mark went to this part. once: nothing is booked if the part has been marked."""
        if self._parts is None or (once and part in self._parts):
            return
        now = self._clock()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def finish(self, part: str) -> str | None:
        """Marks the last part. Returns a line: seconds in all and of each part; None from the second time on."""
        self.mark(part)
        parts, self._parts = self._parts, None
        if parts is None:
            return None
        told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items() if seconds >= _SHOWN)
        return f"{self._last - self._begun:.1f} s to the first update: {told}"
