"""Waiting for what happens in other processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import psutil


def until(
    condition: Callable[[], object], seconds: float = 30.0, what: str = "", process: subprocess.Popen | None = None
) -> None:
    """Returns when the condition holds; AssertionError when the time is up, or the process has ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < end, f"waited in vain for {seconds:g} seconds: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
