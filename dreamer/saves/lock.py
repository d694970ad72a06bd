"""One live run per logdir."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from pathlib import Path

from dreamer.paths import PathError, absolute, make_folder


class LogdirInUseError(RuntimeError):
    """Another live process writes to the logdir."""


class LogdirLock:
    """Holds LOGDIR/.lock, which names the holder; the kernel releases it when the process ends, however it ends.

    A context manager. The file itself stays: deleting it could free a lock that another process has just taken.
    """

    def __init__(self, logdir: Path | str) -> None:
        self._path = absolute(logdir) / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock or raises LogdirInUseError; never waits. PathError if the folder cannot be written to."""
        if self._descriptor is not None:
            raise LogdirInUseError(f"{self._path.parent} is already locked by this very process")
        make_folder(self._path.parent)
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            text = f"expected a logdir in which you may write every file, got {str(self._path)!r}: {error.strerror}"
            raise PathError(f"{text}; name another, or change the owner of its files") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "unknown process"
                os.close(descriptor)
                raise LogdirInUseError(
                    f"{self._path.parent} is in use by a live run ({holder}); stop that run or choose another --logdir"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                raise
            text = f"the file system of {self._path} has no locks; make sure that only one run uses this logdir"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # A full disk: the lock holds, only its description is lost.
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)

    def release(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # A file system without locks has none to release.
                os.truncate(self._descriptor, 0)
                # Closing alone would leave the lock with copies of the descriptor in a process that is just starting.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> LogdirLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
