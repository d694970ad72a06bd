"""Environments in worker processes."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from typing import Any

import cloudpickle
import numpy as np

from dreamer.envs import worker
from dreamer.envs.inline import Maker, check_actions, check_same
from dreamer.envs.interface import Batch, EnvError, TaskError
from dreamer.types import Spaces


class ProcessVectorEnv:
    """One worker process per environment, with shared memory for the data and a pipe each for the turns.

    Workers are made by a clean server process, never by forking this one (which deadlocks with JAX), and import neither
    JAX nor the user's main script. They end when this object is closed or collected, and when this process dies.
    """

    def __init__(self, makers: Sequence[Maker], task: str = "environment") -> None:
        self.task = task
        self.num_envs = len(makers)
        self._conns: list[Connection] = []
        self._processes: list[BaseProcess] = []
        # Runs at garbage collection and, before multiprocessing joins its children, at exit.
        self._finalizer = util.Finalize(self, _shut_down, (self._conns, self._processes), exitpriority=10)
        self._waiting = False
        try:
            self._start(makers)
            spaces = [self._receive(index) for index in range(self.num_envs)]
            self.observation_spaces: Spaces = spaces[0][0]
            self.action_spaces: Spaces = spaces[0][1]
            for index, (observations, actions) in enumerate(spaces):
                check_same(self, observations, actions, index)
            transitions, actions = worker.block_fields(self.observation_spaces, self.action_spaces)
            views = self._share({**transitions, **actions})
        except BaseException:
            self.close()
            raise
        self._results = {key: views[key] for key in transitions}
        self._inputs = {key: views[key] for key in actions}

    def reset(self) -> Batch:
        if self._waiting:
            self.step_wait()
        self._send(b"reset")
        return self._collect()

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        if self._waiting:
            raise EnvError("expected step_wait after step_async, got another step_async; call them in turn")
        check_actions(actions, self.action_spaces, self.num_envs)
        for key, view in self._inputs.items():
            view[...] = actions[key]
        self._send(b"step")
        self._waiting = True

    def step_wait(self) -> Batch:
        if not self._waiting:
            raise EnvError("expected step_async before step_wait, got none; call them in turn")
        self._waiting = False
        return self._collect()

    def render(self) -> np.ndarray | None:
        if self._waiting:
            raise EnvError("expected render between step_wait and step_async, got it while a step is under way")
        self._send(b"render", first_only=True)
        return self._receive(0)

    def close(self) -> None:
        self._finalizer()

    def _start(self, makers: Sequence[Maker]) -> None:
        context = _context()
        for index, maker in enumerate(makers):
            try:
                pickled = cloudpickle.dumps(maker)
            except Exception as error:  # pickling runs the user's own code
                raise TaskError(
                    f"could not send the environment function of {self.task} to a worker process ({error}); let it "
                    "capture only what can be pickled, or run environments in this process: --env.workers inline"
                ) from error
            ours, theirs = context.Pipe()
            args = (theirs, pickled, index, self.num_envs, dict(os.environ))
            process = context.Process(target=worker.run, args=args, name=f"{self.task}-{index}")
            self._conns.append(ours)
            with _no_main_module():
                process.start()
            theirs.close()
            self._processes.append(process)

    def _share(self, fields: worker.Fields) -> dict[str, np.ndarray]:
        """Give every worker the same nameless block of memory: nothing remains of it, however processes end."""
        size = worker.block_size(fields, self.num_envs)
        with tempfile.TemporaryFile(dir=_memory_folder(size)) as file:
            file.truncate(size)
            for conn, process in zip(self._conns, self._processes, strict=True):
                conn.send_bytes(b"block")
                send_handle(conn, file.fileno(), process.pid)
            block = mmap.mmap(file.fileno(), 0)
        return worker.block_views(block, fields, self.num_envs)

    def _send(self, message: bytes, first_only: bool = False) -> None:
        if not self._conns:
            raise EnvError(f"expected open environments of {self.task}, got closed ones; make new ones")
        for conn in self._conns[:1] if first_only else self._conns:
            with contextlib.suppress(ConnectionError):  # a dead worker is reported when its answer is missing
                conn.send_bytes(message)

    def _collect(self) -> Batch:
        for index in range(self.num_envs):
            self._receive(index)
        return {key: view.copy() for key, view in self._results.items()}

    def _receive(self, index: int) -> Any:
        """The answer of one worker. EnvError, naming the environment, if it failed or died."""
        try:
            status, *payload = self._conns[index].recv()
        except (EOFError, ConnectionError):
            process = self._processes[index]
            process.join(timeout=1)
            code = process.exitcode
            self.close()
            raise EnvError(
                f"{self.task}, environment {index}: its worker process ended unexpectedly with exit code "
                f"{code} (negative: killed by that signal; -9 often means out of memory)"
            ) from None
        if status == "ok":
            return payload[0]
        self.close()
        message, trace = payload
        if status == "task":
            raise TaskError(message.partition(": ")[2])
        raise EnvError(f"{self.task}, environment {index} failed: {message}\nTraceback of its worker process:\n{trace}")


def _shut_down(conns: list[Connection], processes: list[BaseProcess]) -> None:
    """Ask workers to close, wait a little, then end the ones that do not answer. Empties both lists."""
    for conn in conns:
        with contextlib.suppress(OSError):
            conn.send_bytes(b"close")
        conn.close()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
    conns.clear()
    processes.clear()


def _context() -> Any:
    """forkserver where there is one (workers start in milliseconds from a warm server), else spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dreamer.envs"])
    return context


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep multiprocessing from importing the main script in workers.

    It would cost every worker the imports of that script (JAX among them) and start a script without a
    ``__name__ == "__main__"`` guard again. Functions of the script reach workers by value (cloudpickle).
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _memory_folder(size: int) -> str | None:
    """A folder kept in memory with room for `size` bytes, if there is one; None: the default for temporary files."""
    folder = "/dev/shm"
    usable = os.path.isdir(folder) and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * size
    return folder if usable else None
