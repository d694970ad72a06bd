"""Leaving cleanly when asked to."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, SIGTERM and the first Ctrl-C only set a flag; a second Ctrl-C raises KeyboardInterrupt.

    The loop looks at `requested` (or at the truth of the object) between two steps, saves a checkpoint and
    leaves. Signal handlers belong to the main thread; in any other, signals keep the handlers they have.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __bool__(self) -> bool:
        self._take_back()
        return self.requested

    def __enter__(self) -> StopRequest:
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler)

    def _take_back(self) -> None:
        """The signals from handlers that an environment or a library has put in place of ours meanwhile."""
        for number in self._former:
            if signal.getsignal(number) != self._handle:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
