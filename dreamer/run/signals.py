"""Leaving cleanly when asked to."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dreamer.process import STOP_SIGNALS, unfailing_output

#: Seconds that threads have to end by themselves once everything else is done.
GRACE = 5.0
_FROM_THE_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)


class StopRequest:
    """While entered, each of `STOP_SIGNALS` only sets a flag; a second Ctrl-C raises KeyboardInterrupt.

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
            for number in STOP_SIGNALS:
                # Signals that are ignored (SIGHUP under nohup) or mean something else to the program around us stay so.
                if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) is signal.SIG_DFL:
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler)

    def _take_back(self) -> None:
        """Takes the signals back from handlers that an environment or a library has installed in place of ours."""
        for number in self._former:
            if signal.getsignal(number) != self._handle:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in _FROM_THE_KEYBOARD and self.signal in _FROM_THE_KEYBOARD:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def end_without(threads: Sequence[threading.Thread], code: int) -> None:
    """When the main thread has ended, wait at most `GRACE` seconds for these threads, which environments left running,
    then end the process with this exit code. Python itself would wait forever."""
    waited_for = [one for one in threads if not one.daemon]
    if waited_for:
        threading.Thread(target=_end, args=(waited_for, code), daemon=True).start()


def _end(threads: Sequence[threading.Thread], code: int) -> None:
    threading.main_thread().join()
    end = time.monotonic() + GRACE
    for one in threads:
        one.join(max(0.0, end - time.monotonic()))
    if left := [one.name for one in threads if one.is_alive()]:
        with unfailing_output():
            print(f"dreamer: ended without {', '.join(left)}, left running by an environment", file=sys.stderr)
        os._exit(code)
