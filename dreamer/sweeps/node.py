"""What runs on the machine that a cluster chose: `dreamer train` as a process, stopped by a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dreamer.process import STOP_SIGNALS
from dreamer.sweeps.local import LocalJob
from dreamer.sweeps.state import LOG_FILE

#: In a run's folder: asks it to leave. Folders are shared between machines; signals are not.
STOP_FILE = "stop"
GRACE_SECONDS = 60.0


def run_program(words: Sequence[str], folder: Path, settings: Mapping[str, str], poll_seconds: float = 1.0) -> int:
    """Runs a program to its end; returns its exit code. Signals to stop, and the file STOP_FILE, reach it as SIGTERM.

    Where the cluster ends this function itself, the program is asked to leave too, and has a minute to do so.
    """
    if (folder / STOP_FILE).exists():  # asked for while it was waiting in the queue
        return 0
    job = LocalJob(words, settings, folder / LOG_FILE)

    def hand_on(number: int, frame: FrameType | None) -> None:
        job.stop()

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:  # but not where the cluster's own program hears them
            if number == signal.SIGTERM or signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, hand_on)
    asked = False
    try:
        while (code := job.poll()) is None:
            if not asked and (folder / STOP_FILE).exists():
                asked = True
                job.stop()
            time.sleep(poll_seconds)
        return code
    finally:
        job.stop()
        end = time.monotonic() + GRACE_SECONDS
        while job.poll() is None and time.monotonic() < end:
            time.sleep(poll_seconds)
