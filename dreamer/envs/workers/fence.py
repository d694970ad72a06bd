"""Calls into the code of environments: whatever it does, this process continues unchanged.

What would end the program becomes an `EscapeError`, as harmless as any other exception. What the environment changes in
the process is restored when the call returns: the working folder and the alarm timer (the environment gets its own back
at its next call), signal handlers, the standard streams, filters that turn warnings into errors, a recursion limit that
is too low, and how numpy treats errors.

A process cannot guard itself against code that hangs, crashes or calls ``os._exit``: worker processes are for that.
"""

from __future__ import annotations

import contextlib
import contextvars
import opcode
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from dreamer.envs.interface import EnvError, TaskError
from dreamer.process import STOP_SIGNALS, UnfailingStream

T = TypeVar("T")

#: Signals that end a process or ask it to end.
SIGNALS = (*STOP_SIGNALS, signal.SIGPIPE)
#: Seconds that an environment has for closing.
CLOSING = 5.0
_RAISE = opcode.opmap["RAISE_VARARGS"]


class EscapeError(EnvError):
    """An environment raised what ends programs, such as SystemExit."""


class _LateError(BaseException):
    """The time for closing is over. Not an Exception, because environments catch those."""


#: Counts up in every process that is forked from this one.
_generation = 0


def _count_generation() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_generation)


class Fence:
    """Surrounds one environment. Each call returns what the function returns, or raises an Exception.

    step   For steps: takes a microsecond, because it checks little.
    reset  For what happens once in an episode: checks the working folder, the alarm and descriptors too.

    For everything else call the object, which checks signal handlers as well. Between two steps a run restores those
    that matter to it (`run.signals`).
    """

    def __init__(self) -> None:
        self._home = _folder()
        #: The environment's own folder, if it differs; seconds to its alarm and between later ones, if it has set one.
        self._folder: str | None = None
        self._alarm: tuple[float, float] | None = None
        self._recursion_limit, self._filters = sys.getrecursionlimit(), warnings.filters[:]
        self._context = contextvars.copy_context()  # where numpy keeps its error settings
        _keep_spares()

    def step(self, function: Callable[..., T], *args: Any) -> T:
        if self._folder is not None or self._alarm is not None:
            return self.reset(function, *args)
        stdout, stderr, generation = sys.stdout, sys.stderr, _generation
        try:
            return self._context.run(function, *args)
        except Exception:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and _by_signal(error):
                raise
            raise EscapeError(f"it raised {type(error).__name__}") from error
        finally:
            if generation != _generation:
                os._exit(1)  # a child that the environment forked and let return as if it were this process
            sys.stdout, sys.stderr = stdout, stderr
            if getattr(stdout, "closed", False) or getattr(stderr, "closed", False):
                _open_again()
            if sys.getrecursionlimit() < self._recursion_limit:
                sys.setrecursionlimit(self._recursion_limit)
            if warnings.filters != self._filters:
                self._drop_new_errors()

    def reset(self, function: Callable[..., T], *args: Any) -> T:
        our_alarm = signal.getitimer(signal.ITIMER_REAL)[0] > 0
        folder, self._folder = self._folder, None
        alarm, self._alarm = self._alarm, None
        _enter(folder)
        try:
            if alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, *alarm)
            return self.step(function, *args)
        finally:
            if not our_alarm:
                left = signal.setitimer(signal.ITIMER_REAL, 0)
                self._alarm = left if left[0] > 0 else None
            _fill_descriptors()
            folder = _folder()
            if folder != self._home:
                self._folder = folder
                _enter(self._home)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        handlers = _handlers()
        try:
            return self.reset(function, *args)
        finally:
            _restore_handlers(handlers)

    def _drop_new_errors(self) -> None:
        """Filters that ignore or show warnings do no harm here, and may be meant for the environment's later calls."""
        left = [row for row in warnings.filters if row[0] != "error" or row in self._filters]
        if left != warnings.filters:
            warnings.resetwarnings()  # also tells the module that filters have changed
            warnings.filters[:] = left  # type: ignore[index]
        self._filters = left


@contextlib.contextmanager
def jax_options_kept() -> Iterator[None]:
    """JAX options (if JAX is loaded) that change within are restored, which is a TaskError."""
    before, changed = _jax_options(), list[str]()
    try:
        yield
    finally:
        after = _jax_options()
        for name, value in before.items():
            if after[name] != value:
                changed.append(f"{name} {after[name]!r} in place of {value!r}")
                sys.modules["jax"].config.update(name, value)
    if changed:
        raise TaskError(
            f"expected an environment that leaves JAX's options as they are, got {', '.join(changed)}; let it have a "
            "process of its own: --env.workers process"
        )


def _jax_options() -> dict[str, Any]:
    jax = sys.modules.get("jax")
    return {} if jax is None else dict(jax.config.values)


def fenced(function: Callable[..., T], *args: Any) -> T:
    """A single call."""
    return Fence()(function, *args)


def close(fence: Fence, function: Callable[[], object]) -> None:
    """Close an environment: what that raises is ignored, and if it takes longer than `CLOSING` seconds it is abandoned.

    Only Python code can be interrupted so, and only in the main thread.
    """
    with contextlib.suppress(Exception):
        fence(_in_time, function)


def _in_time(function: Callable[[], object]) -> None:
    if not _in_main_thread():
        function()
        return
    former = signal.signal(signal.SIGALRM, _late)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, CLOSING)
    try:
        function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, former)


def _late(number: int, frame: FrameType | None) -> None:
    raise _LateError


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def _restore_handlers(handlers: list[Any]) -> None:
    if handlers == _handlers() or not _in_main_thread():
        return
    for number, handler in zip(SIGNALS, handlers, strict=True):
        if handler is not None:  # a handler that Python has not installed and cannot install
            signal.signal(number, handler)


#: Copies of the descriptors 1 and 2, for environments that close them: the next opened file would get their numbers,
#: and with them everything that is printed.
_spares: dict[int, int] = {}


def _keep_spares() -> None:
    for descriptor in {1, 2} - _spares.keys():
        with contextlib.suppress(OSError):  # it was closed before
            _spares[descriptor] = os.dup(descriptor)


def _fill_descriptors() -> None:
    for descriptor, spare in _spares.items():
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(spare, descriptor)


def _open_again() -> None:
    """Reopens the standard streams that an environment has closed."""
    _fill_descriptors()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        closed = getattr(sys, name)
        if getattr(closed, "closed", False):
            encoding, errors = getattr(closed, "encoding", None), getattr(closed, "errors", None)
            again = open(descriptor, "w", 1, encoding, errors, closefd=False)  # noqa: SIM115
            setattr(sys, name, UnfailingStream(again) if isinstance(closed, UnfailingStream) else again)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _enter(folder: str | None) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):
            os.chdir(folder)


def _by_signal(error: KeyboardInterrupt) -> bool:
    """Whether a person's Ctrl-C raised it, not a statement in the environment."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    handler, code = signal.getsignal(signal.SIGINT), last.tb_frame.f_code
    if code is getattr(getattr(handler, "__func__", handler), "__code__", None):
        return True
    return code.co_code[last.tb_lasti] != _RAISE  # Python's own handler leaves no frame
