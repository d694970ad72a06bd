"""What a worker process runs: one environment behind a pipe and a block of shared memory.

The pipe carries one short message each way per step; observations and actions lie in the shared block. This module
imports nothing heavy, because every worker starts with it.
"""

from __future__ import annotations

import mmap
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import cloudpickle
import numpy as np

from dreamer.envs.interface import Env, TaskError, batch_fields
from dreamer.envs.wrappers import AutoReset
from dreamer.types import Spaces

Fields = Mapping[str, tuple[tuple[int, ...], np.dtype]]
ALIGNMENT = 64  # bytes; a cache line, so that neighbours do not slow each other


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


def run(conn: Connection, maker: bytes, index: int, num_envs: int, environ: dict[str, str]) -> None:
    """Serve one environment until told to close or until the parent is gone.

    maker    Cloudpickled () -> Env.
    environ  The parent's environment variables now; the server that this process comes from may be older.
    """
    os.environ.update(environ)
    # Ctrl-C and SIGTERM reach the whole process group: the parent decides when its environments end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _serve(conn, cloudpickle.loads(maker), index, num_envs)
    except (EOFError, ConnectionError):
        return  # the parent is gone: so is this worker's purpose
    except Exception as error:
        kind = "task" if isinstance(error, TaskError) else "error"
        _tell(conn, (kind, f"{type(error).__name__}: {error}", traceback.format_exc()))
    finally:
        conn.close()


def _serve(conn: Connection, make: Callable[[], Env], index: int, num_envs: int) -> None:
    env = make()
    try:
        conn.send(("ok", (dict(env.observation_spaces), dict(env.action_spaces))))
        conn.recv_bytes()  # b"block": every environment was made
        block = mmap.mmap(recv_handle(conn), 0)
        transitions, actions = block_fields(env.observation_spaces, env.action_spaces)
        views = block_views(block, {**transitions, **actions}, num_envs)
        results = {key: views[key][index : index + 1] for key in transitions}
        inputs = {key: views[key][index : index + 1] for key in actions}
        runner = AutoReset(env)
        while (message := conn.recv_bytes()) != b"close":
            if message == b"render":
                conn.send(("ok", env.render()))
                continue
            action = {key: np.array(slot[0]) for key, slot in inputs.items()}
            result = runner.reset() if message == b"reset" else runner.step(action)
            for key, slot in results.items():
                slot[0] = result[key]
            conn.send(("ok", None))
    finally:
        env.close()


def _tell(conn: Connection, message: tuple[str, str, str]) -> None:
    try:
        conn.send(message)
    except OSError:
        return  # nobody is left to hear it
