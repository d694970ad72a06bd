"""Environments in worker processes."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import util
from typing import Any, BinaryIO

import cloudpickle
import numpy as np

from dreamer.envs.faults import TRIES, Recovery, fault_of, give_up
from dreamer.envs.interface import Batch, EnvError, Fault, TaskError
from dreamer.envs.workers import worker
from dreamer.envs.workers.fence import fenced
from dreamer.envs.workers.handle import CLOSING, FailedError, Guard, RefusedError, Worker, end_all
from dreamer.envs.workers.inline import Maker, check_actions, check_same, check_states
from dreamer.types import Spaces


class ProcessVectorEnv:
    """One worker process per environment, with shared memory for the data and a pipe for the turns.

    Workers are made by a clean server process, never by forking this one (which deadlocks with JAX), and import neither
    JAX nor the user's main script. They end when this object is closed or collected, and when this process dies. A
    worker that dies, hangs, raises or returns garbage is replaced.
    """

    def __init__(
        self, makers: Sequence[Maker], task: str, restart_seconds: float, timeout_seconds: float | None
    ) -> None:
        self.task = task
        self.num_envs = len(makers)
        self._timeout = timeout_seconds
        self._recovery = Recovery(self.num_envs, restart_seconds)
        self._pickled = [_pickled(maker, task) for maker in makers]
        #: The live workers, by environment; a failed one is missing until it is recreated.
        self._workers: dict[int, Worker] = {}
        self._cleanup = contextlib.ExitStack()
        # Runs at garbage collection and, before multiprocessing joins its children, at exit.
        self._finalizer = util.Finalize(self, _shut_down, (self._workers, self._cleanup), exitpriority=10)
        self._waiting = self._begun = self._open = False
        try:
            self._start()
        except FailedError as failed:
            self.close()
            raise failed.before_the_first from failed.error
        except BaseException:
            self.close()
            raise

    @property
    def restorable(self) -> bool:
        """Call it between two steps only: workers are asked one after another, and only once."""
        self._between_steps("restorable")
        if self._missing():
            return False
        for index, one in list(self._workers.items()):
            try:
                if not one.restorable():
                    return False
            except RefusedError:
                return False
            except FailedError as failed:
                self._drop(index, failed.fault)
                return False
        return True

    def reset(self) -> Batch:
        if self._waiting:
            self.step_wait()
        self._send(worker.RESET)
        batch = self._collect()
        self._begun = True
        return batch

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        if self._waiting:
            raise EnvError("expected step_wait after step_async, got another step_async; call them in turn")
        check_actions(actions, self.action_spaces, self.num_envs)
        for key, view in self._inputs.items():
            view[...] = actions[key]
        self._send(worker.STEP)
        self._waiting = True

    def step_wait(self) -> Batch:
        if not self._waiting:
            raise EnvError("expected step_async before step_wait, got none; call them in turn")
        self._waiting = False
        return self._collect()

    def render(self) -> np.ndarray | None:
        self._between_steps("render")
        first = self._workers.get(0)
        if first is None:
            return None
        first.send(worker.RENDER)
        try:
            return first.receive()
        except RefusedError:  # a picture for people is not worth a run
            return None
        except FailedError as failed:
            self._drop(0, failed.fault)
            return None

    def get_state(self) -> list[bytes]:
        return self._exchange("get_state", worker.SAVE)

    def set_state(self, states: list[bytes]) -> None:
        check_states(states, self.num_envs)
        self._recovery.attempts = self._exchange("set_state", worker.RESTORE, states)
        self._begun = True

    def take_faults(self) -> list[Fault]:
        return self._recovery.take()

    def close(self) -> None:
        self._open = False
        self._finalizer()

    def _start(self) -> None:
        self._guard = Guard()
        self._cleanup.callback(self._guard.end)
        every = range(self.num_envs)
        for index in every:
            self._launch(index)
        spaces = [self._workers[index].hello() for index in every]
        self.observation_spaces: Spaces = spaces[0][0]
        self.action_spaces: Spaces = spaces[0][1]
        for index, (observations, actions) in enumerate(spaces):
            check_same(self, observations, actions, index)
        seen, done = worker.block_fields(self.observation_spaces, self.action_spaces)
        fields = {**seen, **done}
        size = worker.block_size(fields, self.num_envs)
        self._block = self._cleanup.enter_context(_nameless_file(size))
        views = worker.block_views(mmap.mmap(self._block.fileno(), 0), fields, self.num_envs)
        self._results = {key: views[key] for key in seen}
        self._inputs = {key: views[key] for key in done}
        for index in every:
            self._workers[index].share(self._block.fileno())
        self._open = True

    def _launch(self, index: int) -> None:
        name = f"{self.task}, environment {index}"
        attempt = self._recovery.attempts[index]
        self._workers[index] = Worker(name, index, self._pickled[index], attempt, self.num_envs, self._timeout)
        self._guard.watch(self._workers.values())

    def _send(self, asked: bytes) -> None:
        if not self._open:
            raise EnvError(f"expected open environments of {self.task}, got closed ones; make new ones")
        for one in self._workers.values():
            one.send(asked)

    def _collect(self) -> Batch:
        """What every environment put into the shared memory; those that fail start over."""
        for index in list(self._workers):
            self._receive(index)
        if len(self._workers) < self.num_envs:
            self._recreate()
        batch = {key: view.copy() for key, view in self._results.items()}
        self._recovery.finished(batch["is_last"])
        return batch

    def _receive(self, index: int) -> Any:
        """The answer of one worker; if it failed, it is ended and, before the first reset, an error is raised."""
        try:
            return self._workers[index].receive()
        except FailedError as failed:
            # An environment that is not what it declares would fail in the same way if it were recreated.
            if not self._begun or (isinstance(failed.error, TaskError) and not self._recovery.attempts[index]):
                self.close()
                raise failed.before_the_first from failed.error
            self._drop(index, failed.fault)
            return None

    def _drop(self, index: int, fault: Fault) -> None:
        """End a worker that failed."""
        self._recovery.note(fault)
        if index in self._workers:
            # A worker that raised is closing its environment.
            self._workers.pop(index).end(CLOSING if fault.kind in ("raised", "garbage") else 0.0)
            self._guard.watch(self._workers.values())

    def _recreate(self) -> None:
        """New workers for the missing ones, up to their first transition, all at once."""
        missing = self._missing()
        for _ in range(TRIES):
            self._recovery.pause(missing)
            new = missing
            for stage in (self._launch, self._introduce, lambda index: self._workers[index].receive()):
                new = [index for index in new if self._survives(stage, index)]
            missing = self._missing()
            if not missing:
                return
        self.close()
        raise give_up(self._recovery.last_fault())

    def _survives(self, stage: Callable[[int], object], index: int) -> bool:
        try:
            stage(index)
        except FailedError as failed:
            self._drop(index, failed.fault)
            return False
        return True

    def _introduce(self, index: int) -> None:
        """Receive the spaces of a new worker, and start its first episode."""
        new = self._workers[index]
        try:
            check_same(self, *new.hello(), index)
        except TaskError as error:
            raise FailedError(fault_of(self.task, index, error), error) from error
        new.share(self._block.fileno())
        new.send(worker.RESET)

    def _exchange(self, what: str, asked: bytes, payloads: Sequence[bytes] | None = None) -> list[Any]:
        """Ask every worker the same thing between two steps. EnvError, after all have answered, if one could not."""
        self._between_steps(what)
        missing = self._missing()
        if missing:
            raise EnvError(f"expected {what} while all environments live, got it after {missing} failed; step first")
        for index in range(self.num_envs):
            self._workers[index].send(asked, None if payloads is None else payloads[index])
        answers, error = [], None
        for index in range(self.num_envs):
            try:
                answers.append(self._workers[index].receive())
            except RefusedError as refused:
                error = EnvError(str(refused))
            except FailedError as failed:
                self._drop(index, failed.fault)
                error = EnvError(str(failed.error))
        if error is not None:
            raise error
        return answers

    def _missing(self) -> list[int]:
        return [index for index in range(self.num_envs) if index not in self._workers]

    def _between_steps(self, what: str) -> None:
        if self._waiting:
            raise EnvError(f"expected {what} between step_wait and step_async, got it while a step is under way")
        if not self._open:
            raise EnvError(f"expected open environments of {self.task}, got closed ones; make new ones")


def _pickled(maker: Maker, task: str) -> bytes:
    try:
        return fenced(cloudpickle.dumps, maker)
    except Exception as error:  # pickling runs the user's own code
        raise TaskError(
            f"could not send the environment function of {task} to a worker process ({error}); let it capture only "
            "what can be pickled, or run environments in this process: --env.workers inline"
        ) from error


def _shut_down(workers: dict[int, Worker], cleanup: contextlib.ExitStack) -> None:
    end_all(workers)
    cleanup.close()


@contextlib.contextmanager
def _nameless_file(size: int) -> Iterator[BinaryIO]:
    """A file, in memory if possible, that vanishes however the processes end."""
    with tempfile.TemporaryFile(dir=_memory_folder(size)) as file:
        file.truncate(size)
        yield file


def _memory_folder(size: int) -> str | None:
    """A folder kept in memory with room for `size` bytes, if there is one; None: the default for temporary files."""
    folder = "/dev/shm"
    usable = os.path.isdir(folder) and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * size
    return folder if usable else None
