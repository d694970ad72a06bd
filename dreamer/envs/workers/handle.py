"""A worker process as its parent sees it: starting it, asking it, and ending it whatever happens."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import time
import types
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from typing import Any, Literal

from dreamer.envs.faults import never_began
from dreamer.envs.interface import EnvError, Fault, TaskError
from dreamer.envs.workers import guard, worker
from dreamer.paths import safe_path
from dreamer.process import STOP_SIGNALS
from dreamer.types import Spaces

#: Seconds that a worker has to close its environment.
CLOSING = 5.0
#: Seconds that a hanging worker has to say where it hangs.
SAYING_WHERE = 1.0
#: The longest time, in milliseconds, that poll() accepts.
LONGEST_POLL = 2**31 - 1


class FailedError(Exception):
    """A worker failed. It is of no further use, and has to be ended.

    fault  What happened.
    error  What to raise where nothing can be recreated.
    """

    def __init__(self, fault: Fault, error: EnvError | TaskError) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.error = error

    @property
    def before_the_first(self) -> EnvError | TaskError:
        """What to raise if it has not begun yet."""
        return self.error if isinstance(self.error, TaskError) else never_began(self.fault)


class RefusedError(Exception):
    """A worker could not do something, but continues."""


class Worker:
    """One worker process with its environment.

    name      The task and the environment, for messages.
    pickled   Cloudpickled attempt -> Env.
    timeout   Seconds that each answer may take; None: any time.
    """

    def __init__(
        self, name: str, index: int, pickled: bytes, attempt: int, num_envs: int, timeout: float | None
    ) -> None:
        context = _context()
        self.name = name
        self.index = index
        self._timeout = timeout
        self._deadline: float | None = None
        self._restorable: bool | None = None
        self.conn, theirs = context.Pipe()
        self._trace, trace = context.Pipe(duplex=False)
        args = (theirs, trace, pickled, attempt, index, num_envs, dict(os.environ))
        self.process: BaseProcess = context.Process(target=worker.run, args=args, name=name)
        try:
            with _stops_held(), _clean_start():
                self.process.start()
        except OSError as error:
            self.conn.close()
            self._trace.close()
            fault = Fault(index, "died", f"{name}: its worker process could not be started: {error}", "")
            raise FailedError(fault, EnvError(fault.message)) from error
        finally:
            theirs.close()
            trace.close()
        self._ready = select.poll()
        self._descriptor = self.conn.fileno()
        self._ready.register(self._descriptor, select.POLLIN)
        self._ready.register(self.process.sentinel, select.POLLIN)
        self._set_deadline()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def hello(self) -> tuple[Spaces, Spaces]:
        """Observation and action spaces, once the environment has been made."""
        return self.receive()

    def restorable(self) -> bool:
        """Whether its environment can be restored; finding out may take a while, once."""
        if self._restorable is None:
            self.send(worker.CAN_RESTORE)
            self._restorable = bool(self.receive())
        return self._restorable

    def share(self, file: int) -> None:
        """Give it the block of shared memory behind this descriptor."""
        with contextlib.suppress(OSError):
            os.write(self.conn.fileno(), worker.BLOCK)
            send_handle(self.conn, file, self.pid)

    def send(self, asked: bytes, payload: bytes | None = None) -> None:
        """Ask for something, in one byte; `receive` has the answer, or the reason why there is none."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, asked)
            if payload is not None:
                self.conn.send_bytes(payload)
        self._set_deadline()

    def receive(self) -> Any:
        """The answer. FailedError if there will be none, RefusedError if the worker could not comply but continues."""
        ready = self._ready.poll(self._milliseconds())
        if not ready:
            raise self._failed("hung", f"gave no answer for {self._timeout:g} seconds (env.timeout_seconds)")
        try:
            if all(descriptor != self._descriptor for descriptor, _ in ready):
                raise EOFError  # the process has ended; what it started may still hold its end of the pipe
            status = os.read(self._descriptor, 1)
            if status == worker.DONE:
                return None
            payload: Any = self.conn.recv()
        except (EOFError, OSError):
            self.process.join(CLOSING)
            code = self.process.exitcode
            raise self._failed(
                "died",
                f"its worker process ended unexpectedly with exit code {code} "
                "(negative: killed by that signal; -9 often means out of memory)",
            ) from None
        if status == worker.HERE:
            return payload
        kind, message, trace = payload
        if status == worker.REFUSED:
            raise RefusedError(f"{self.name} failed: {message}\nTraceback of its worker process:\n{trace}")
        fault = Fault(self.index, "raised" if kind == "task" else kind, f"{self.name} failed: {message}", trace)
        raise FailedError(fault, TaskError(message) if kind == "task" else _error(fault))

    def end(self, patience: float) -> None:
        """Wait `patience` seconds for it to exit, then end it, with everything that its environment has started."""
        self.process.join(patience)
        if self.process.is_alive():
            # It has its own group as soon as it runs; before that, it is in ours.
            guard.end_groups([self.pid])
            self.process.kill()
            self.process.join(CLOSING)
        guard.end_groups([self.pid])
        with contextlib.suppress(
            ValueError
        ):  # a process stuck in a driver or on a network disk cannot be ended by anybody
            self.process.close()
        self.conn.close()
        self._trace.close()

    def _set_deadline(self) -> None:
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def _milliseconds(self) -> int | None:
        if self._deadline is None:
            return None
        return max(0, min(LONGEST_POLL, int(1000 * (self._deadline - time.monotonic()))))

    def _failed(self, kind: Literal["died", "hung"], message: str) -> FailedError:
        fault = Fault(self.index, kind, f"{self.name}: {message}", self._where(ask=kind == "hung"))
        return FailedError(fault, _error(fault))

    def _where(self, ask: bool) -> str:
        """The traceback that a crashed worker left, or that a hanging worker writes when asked to."""
        if ask:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, worker.WHERE_SIGNAL)
        text = b""
        while self._trace.poll(SAYING_WHERE if ask and not text else 0.05):
            read = os.read(self._trace.fileno(), 2**16)
            if not read:
                break
            text += read
        return text.decode(errors="replace")


class Guard:
    """The process that ends the workers if this one is killed."""

    def __init__(self) -> None:
        context = _context()
        self._conn, theirs = context.Pipe()
        self._process = context.Process(target=guard.run, args=(theirs,), name="guard")
        with _stops_held(), _clean_start():
            self._process.start()
        theirs.close()

    def watch(self, workers: Iterable[Worker]) -> None:
        with contextlib.suppress(OSError):
            self._conn.send([one.pid for one in workers])

    def end(self) -> None:
        self.watch([])
        self._conn.close()
        self._process.join()
        self._process.close()


def end_all(workers: dict[int, Worker]) -> None:
    """Ask all to close, wait a little for all together, then end those that have not. Empties the dict."""
    for one in workers.values():
        one.send(worker.CLOSE)
    end = time.monotonic() + CLOSING
    while workers:
        workers.popitem()[1].end(max(0.0, end - time.monotonic()))


def _error(fault: Fault) -> EnvError:
    trace = f"\nTraceback of its worker process:\n{fault.traceback}" if fault.traceback else ""
    return EnvError(fault.message + trace)


def _context() -> Any:
    """forkserver where there is one (workers start in milliseconds from a warm server), else spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dreamer.envs"])
    return context


@contextlib.contextmanager
def _stops_held() -> Iterator[None]:
    """Blocks stop signals in processes started within, and in this thread until the block is over.

    The server that workers come from has no handlers for them: a signal to the whole process tree would end it, and
    with it all word of its workers. A worker unblocks them once it ignores them.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # starting the server unblocks some of them again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def _clean_start() -> Iterator[None]:
    """Keep multiprocessing from importing in workers the main script, and anything in the working folder.

    The script would cost every worker its imports (JAX among them) and, without a ``__name__ == "__main__"`` guard,
    would run again. Its functions reach workers by value (cloudpickle).
    """
    try:
        os.getcwd()
    except FileNotFoundError:  # workers start in it, and multiprocessing cannot do without it
        os.chdir("/")
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        with safe_path():
            yield
    finally:
        sys.modules["__main__"] = main
