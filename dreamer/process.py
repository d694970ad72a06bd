"""How a process deals with its surroundings: signals that ask it to stop, and output that cannot fail.

What a program prints must never decide how it ends. A pipe that nobody reads any longer, a full disk, a closed
terminal, an encoding that lacks a character, no standard output at all: each would raise where something is printed,
hours into a run, or again when Python exits, with an exit code of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

#: Signals with which people and schedulers end a process: `kill`, Ctrl-C, Ctrl-\\, a closed terminal, and what clusters
#: send before the time, or the processor time, of a job is over.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


class UnfailingStream:
    """A text stream that drops what it cannot write. Everything but writing is left to the stream.

    Characters that its encoding lacks are written as Python's escapes, `\\u2192`.
    """

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        """name: used to say once, on standard error, that it cannot be written to; None: never say so."""
        self._stream, self._name = stream, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        with self._spared():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._spared():
            self._stream.flush()

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # a pipe that is full for now: the next flush writes what the stream holds
            pass
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._drop_held()
            if self._name is not None and isinstance(error, OSError) and error.errno != errno.EPIPE:
                name, self._name = self._name, None
                print(f"dreamer: {name} is lost: {error.strerror or error}", file=sys.stderr)

    def _drop_held(self) -> None:
        """Empties the stream's buffer, which it would try to write again at each flush, even the last one."""
        with contextlib.suppress(OSError, ValueError, AttributeError), contextlib.ExitStack() as undo:
            descriptor = self._stream.fileno()
            kept, inheritable = os.dup(descriptor), os.get_inheritable(descriptor)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, descriptor, inheritable)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            undo.callback(os.close, nowhere)
            os.dup2(nowhere, descriptor, inheritable)
            self._stream.flush()


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Makes standard output and standard error unfailing within the block, whoever writes to them.

    Also a decorator. Nested, it changes nothing.
    """
    _open_descriptors()
    former = sys.stdout, sys.stderr
    with contextlib.ExitStack() as undo:

        def unfailing(stream: TextIO | None, name: str | None) -> Any:
            if isinstance(stream, UnfailingStream):
                return stream
            if stream is None:
                stream = undo.enter_context(open(os.devnull, "w"))
            return UnfailingStream(stream, name)

        streams = unfailing(sys.stdout, "standard output"), unfailing(sys.stderr, None)
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = former


def _open_descriptors() -> None:
    """Let no file of a run become descriptor 0, 1 or 2, where libraries print: closed ones are opened to nowhere."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the system assigns the lowest free number: this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
