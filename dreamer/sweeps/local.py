"""Runs as processes on this machine and its devices; those that a killed sweep left running; and one run on the machine
that a cluster chose."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dreamer.nvidia import DriverError, cards, visible
from dreamer.paths import PROGRAM
from dreamer.presets import save_config
from dreamer.process import STOP_SIGNALS
from dreamer.saves.lock import LogdirInUseError, LogdirLock
from dreamer.schema import ConfigError
from dreamer.sweeps.expand import PlannedRun
from dreamer.sweeps.progress import CONFIG_FILE, LOG_FILE

#: Share of a device's memory that several runs on it take together.
MEMORY_SHARE = 0.9
TRAIN = (*PROGRAM, "train")


def found_devices(environment: Mapping[str, str] = os.environ) -> list[str]:
    """NVIDIA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = visible(environment)
    if named is not None:
        return named
    try:
        return [str(number) for number in range(len(cards()))]
    except DriverError:
        return []


def slots(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environment variables for each of `jobs` concurrent runs; None: one per device, or one.

    devices: each "0", or "0,1" for runs on several. Runs are dealt to them one by one; where a device has several,
    each gets its share of the memory.
    """
    if not devices:
        return [{} for _ in range(jobs or 1)]
    count = jobs or len(devices)
    dealt = [{"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} for number in range(count)]
    for number, settings in enumerate(dealt):
        beside = len(range(number % len(devices), count, len(devices)))
        if beside > 1:
            settings["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{math.floor(100 * MEMORY_SHARE / beside) / 100:.2f}"
    return dealt


def command(run: PlannedRun, program: Sequence[str] = TRAIN) -> list[str]:
    """Writes the configuration of a run into its folder; returns the command that starts or resumes it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / CONFIG_FILE
    save_config(run.config, path)
    return [*program, "--configs", str(path.absolute()), "--logdir", str(run.folder)]


class LocalJob:
    """A process in its own session, so that Ctrl-C in the terminal reaches only the sweep."""

    def __init__(self, words: Sequence[str], settings: Mapping[str, str], log: Path) -> None:
        device = settings.get("CUDA_VISIBLE_DEVICES")
        self.where = "" if device is None else f"device {device}"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **settings},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


class LocalBackend:
    """Processes of this machine."""

    def __init__(self, settings: Sequence[Mapping[str, str]], program: Sequence[str] = TRAIN) -> None:
        """settings: environment variables, one mapping for each concurrent run."""
        if not settings:
            raise ConfigError("expected at least one run at once, got none; give --jobs 1 or more")
        self._settings, self._program = settings, program
        self.slots = len(settings)

    def start(self, run: PlannedRun, slot: int) -> LocalJob:
        return LocalJob(command(run, self._program), self._settings[slot], run.folder / LOG_FILE)

    def close(self) -> None:
        """Nothing is held between jobs."""


# --- Runs that outlived the sweep that started them ----------------------------------------------


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
    """A run whose sweep command is gone: watched by its lock, stopped by the process id in it."""

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


# --- On the machine that a cluster chose -----------------------------------------------------------


#: A file in a run's folder that asks it to stop. Folders are shared between machines; signals are not.
STOP_FILE = "stop"
GRACE_SECONDS = 60.0


def run_program(words: Sequence[str], folder: Path, settings: Mapping[str, str], poll_seconds: float = 1.0) -> int:
    """Runs a program to its end; returns its exit code. Signals to stop, and the file STOP_FILE, reach it as SIGTERM.

    Where the cluster ends this function itself, the program is asked to stop too, and has a minute to do so.
    """
    if (folder / STOP_FILE).exists():  # requested while it was waiting in the queue
        return 0
    job = LocalJob(words, settings, folder / LOG_FILE)

    def hand_on(number: int, frame: FrameType | None) -> None:
        job.stop()

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:  # not where the cluster's own program handles them
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
