"""Calls into the code of environments: whatever it does, this process goes on as it was.

What would end the program becomes an `EscapeError`, as harmless as any other exception. What the environment changes of
the process is put back when the call returns: the working folder (its own is there again at its next call), handlers of
signals, the standard streams, filters that turn warnings into errors, a recursion limit that is too low, and how numpy
treats errors.

A process cannot be guarded against code that hangs, crashes or calls ``os._exit`` in it: worker processes are for that.
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
from typing import Any, ParamSpec, TypeVar

from dreamer.envs.interface import EnvError, TaskError

P = ParamSpec("P")
T = TypeVar("T")

#: Signals that end a process or ask it to end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
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
    """Stands around one environment. Each call gives what the function returns, or raises an Exception.

    step  For steps: a microsecond, because it does not look at the working folder and the handlers of signals.

    Everything else is done by calling the object.
    """

    def __init__(self) -> None:
        self._home = _folder()
        self._folder: str | None = None  # the environment's own, if that is another
        self._recursion_limit, self._filters = sys.getrecursionlimit(), warnings.filters[:]
        self._context = contextvars.copy_context()  # where numpy keeps how it treats errors

    def step(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._folder is not None:
            return self(function, *args, **kwargs)
        stdout, stderr, generation = sys.stdout, sys.stderr, _generation
        try:
            return self._context.run(function, *args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and _by_signal(error):
                raise
            raise EscapeError(f"{type(error).__name__}: {error}") from error
        finally:
            if generation != _generation:
                os._exit(1)  # a child that the environment forked, and let return as if it were this process
            sys.stdout, sys.stderr = stdout, stderr
            if sys.getrecursionlimit() < self._recursion_limit:
                sys.setrecursionlimit(self._recursion_limit)
            if warnings.filters != self._filters:
                self._drop_new_errors()

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        handlers, folder = _handlers(), self._folder
        _enter(folder)
        self._folder = None
        try:
            return self.step(function, *args, **kwargs)
        finally:
            _put_back_handlers(handlers)
            folder = _folder()
            if folder != self._home:
                self._folder = folder
                _enter(self._home)

    def _drop_new_errors(self) -> None:
        """Filters that ignore or show warnings do no harm here, and may be meant for the environment's later calls."""
        left = [row for row in warnings.filters if row[0] != "error" or row in self._filters]
        if left != warnings.filters:
            warnings.resetwarnings()  # says as well that filters have changed
            warnings.filters[:] = left  # type: ignore[index]
        self._filters = left


@contextlib.contextmanager
def jax_options_kept() -> Iterator[None]:
    """Options of JAX, if that is loaded, that change within are put back, which is a TaskError."""
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


def fenced(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A single call."""
    return Fence()(function, *args, **kwargs)


def close(fence: Fence, function: Callable[[], object]) -> None:
    """Close an environment: what that raises costs nothing, and if it takes longer than `CLOSING` seconds it is left.

    Only Python's own code can be left, and only by the main thread.
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


def _put_back_handlers(handlers: list[Any]) -> None:
    if handlers == _handlers() or not _in_main_thread():
        return
    for number, handler in zip(SIGNALS, handlers, strict=True):
        if handler is not None:  # one that Python has not installed and cannot install
            signal.signal(number, handler)


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
    """Whether a person's Ctrl-C has raised it, not a statement of the environment's."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    handler, code = signal.getsignal(signal.SIGINT), last.tb_frame.f_code
    if code is getattr(getattr(handler, "__func__", handler), "__code__", None):
        return True
    return code.co_code[last.tb_lasti] != _RAISE  # Python's own handler leaves no frame
