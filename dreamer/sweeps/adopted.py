"""Runs that are still going on when a sweep begins, because the sweep before was killed and they were not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from pathlib import Path

from dreamer.saves.lock import LogdirInUseError, LogdirLock


def in_use(folder: Path) -> bool:
    """Whether a live run writes there."""
    if not folder.is_dir():
        return False
    try:
        with LogdirLock(folder):
            pass
    except LogdirInUseError:
        return True
    return False


class AdoptedJob:
    """A run whose sweep command is gone: watched by its lock, stopped by the process number in it."""

    where = "already running"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def poll(self) -> int | None:
        return None if in_use(self._folder) else 0

    def stop(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        holder = re.match(r"pid (\d+) on (\S+)", (self._folder / ".lock").read_text())
        if holder and holder[2] == socket.gethostname() and in_use(self._folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(holder[1]), number)
