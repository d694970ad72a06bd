"""What a worker process runs: one environment behind a pipe and a block of shared memory.

Per step the pipe carries one byte each way; observations and actions are in the shared block. This module imports
nothing heavy, because every worker starts with it.

A request is one byte: `STEP`, `RESET` and so on. So is the answer, which a pickle may follow::

    DONE     done, nothing to say
    HERE     done; the payload follows
    REFUSED  could not, but continues: an Excuse
    FAILED   could not, and exits: an Excuse
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, Literal, NamedTuple

import cloudpickle
import numpy as np

from dreamer.envs.faults import in_words, trace
from dreamer.envs.interface import TaskError, TransitionError, batch_fields
from dreamer.envs.workers.fence import Fence, close
from dreamer.envs.wrappers import AutoReset
from dreamer.paths import SAFE_PATH
from dreamer.process import STOP_SIGNALS, unfailing_output
from dreamer.types import Spaces

Fields = Mapping[str, tuple[tuple[int, ...], np.dtype]]
ALIGNMENT = 64  # bytes; a cache line, so that neighbours do not slow each other down
STEP, RESET, RENDER, CAN_RESTORE, SAVE, RESTORE, BLOCK, CLOSE = (bytes([code]) for code in b"steparbc")
DONE, HERE, REFUSED, FAILED = (bytes([code]) for code in b"dhrf")
#: Makes a worker write down where it is, whatever it is doing.
WHERE_SIGNAL = signal.SIGUSR1


ExcuseKind = Literal["raised", "garbage", "task"]


class Excuse(NamedTuple):
    """An exception as it travels. kind: raised, garbage, or task for a TaskError."""

    kind: ExcuseKind
    message: str
    traceback: str


class _ParentGoneError(Exception):
    """The parent process is gone."""


def block_fields(observations: Spaces, actions: Spaces) -> tuple[Fields, Fields]:
    """Shapes and dtypes, without the batch axis, of the transition and the action that lie in the shared block."""
    return batch_fields(observations), {key: (space.shape, space.dtype) for key, space in actions.items()}


def block_size(fields: Fields, num_envs: int) -> int:
    """Bytes of a block that holds `num_envs` of these fields."""
    return max(1, sum(_bytes(shape, dtype, num_envs) for shape, dtype in fields.values()))


def block_views(block: mmap.mmap, fields: Fields, num_envs: int) -> dict[str, np.ndarray]:
    """Arrays (num_envs, ...) into the block, one after another in the order of the fields."""
    views, offset = {}, 0
    for key, (shape, dtype) in fields.items():
        views[key] = np.ndarray((num_envs, *shape), dtype, block, offset)
        offset += _bytes(shape, dtype, num_envs)
    return views


def _bytes(shape: tuple[int, ...], dtype: np.dtype, num_envs: int) -> int:
    size = num_envs * int(np.prod(shape, dtype=int)) * dtype.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


@unfailing_output()
def run(
    conn: Connection,
    trace: Connection,
    maker: bytes,
    attempt: int,
    index: int,
    num_envs: int,
    environ: dict[str, str],
) -> None:
    """Serve one environment until told to close or until the parent is gone.

    trace    Takes the traceback of a worker that hangs or crashes.
    maker    Cloudpickled attempt -> Env.
    environ  The parent's current environment variables; the server that this process comes from may be older.
    """
    os.environ.pop(SAFE_PATH, None)  # how the server was started; it must not affect what environments start
    os.environ.update(environ)
    own_group()
    os.set_blocking(trace.fileno(), False)  # a long traceback that nobody reads must not block anything
    faulthandler.enable(trace.fileno())
    faulthandler.register(WHERE_SIGNAL, trace.fileno())
    fence, runner = Fence(), None
    try:
        runner = fence(lambda: AutoReset(cloudpickle.loads(maker)(attempt)))
        _serve(conn, fence, runner, attempt, index, num_envs)
    except _ParentGoneError:
        pass
    except Exception as error:
        with contextlib.suppress(_ParentGoneError):
            _say(conn, FAILED, _excuse(error))
    finally:
        if runner is not None:
            close(fence, runner.env.close)
        conn.close()


def own_group() -> None:
    """Leave the parent's process group, so that what the environment starts can be ended together with it.

    Signals to stop often reach whole trees of processes: the parent decides when its environments end.
    """
    os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _serve(conn: Connection, fence: Fence, runner: AutoReset, attempt: int, index: int, num_envs: int) -> None:
    _say(conn, HERE, (runner.observation_spaces, runner.action_spaces))
    if _hear(conn) == CLOSE:
        return
    # That was BLOCK: every environment has been made.
    block = mmap.mmap(recv_handle(conn), 0)
    transitions, actions = block_fields(runner.observation_spaces, runner.action_spaces)
    views = block_views(block, {**transitions, **actions}, num_envs)
    results = [(key, views[key][index : index + 1]) for key in transitions]
    inputs = [(key, views[key][index : index + 1]) for key in actions]

    def step() -> None:
        publish(runner.step({key: np.array(slot[0]) for key, slot in inputs}))

    def publish(result: Mapping[str, Any]) -> None:
        for key, slot in results:
            slot[0] = result[key]

    asked: Mapping[bytes, Callable[[], Any]] = {
        STEP: step,
        RESET: lambda: publish(runner.reset()),
        CAN_RESTORE: lambda: runner.restorable,
        RENDER: runner.render,
        SAVE: lambda: runner.get_state(attempt),
        RESTORE: lambda: runner.set_state(conn.recv_bytes()),
    }
    while (message := _hear(conn)) != CLOSE:
        answer = _answer(fence, message, asked[message])
        if answer is None:
            _say(conn, DONE)
        else:
            _say(conn, REFUSED if isinstance(answer, Excuse) else HERE, answer)


def _answer(fence: Fence, message: bytes, asked: Callable[[], Any]) -> Any:
    """The environment's answer; for all but steps and resets, the excuse if it could not."""
    if message == STEP:
        return fence.step(asked)
    if message == RESET:
        return fence(asked)
    try:
        return fence(asked)
    except Exception as error:
        return _excuse(error)


def _excuse(error: Exception) -> Excuse:
    kinds: Mapping[type, ExcuseKind] = {TaskError: "task", TransitionError: "garbage"}
    kind: ExcuseKind = next((kind for base, kind in kinds.items() if isinstance(error, base)), "raised")
    return Excuse(kind, str(error) if kind == "task" else in_words(error), trace(error))


def _hear(conn: Connection) -> bytes:
    """The next byte."""
    try:
        asked = os.read(conn.fileno(), 1)
    except OSError as error:
        raise _ParentGoneError from error
    if not asked:
        raise _ParentGoneError
    return asked


def _say(conn: Connection, status: bytes, payload: Any = None) -> None:
    """One byte, and for all but DONE the payload."""
    pickled = pickle.dumps(payload)
    try:
        os.write(conn.fileno(), status)
        if status != DONE:
            conn.send_bytes(pickled)
    except OSError as error:
        raise _ParentGoneError from error
