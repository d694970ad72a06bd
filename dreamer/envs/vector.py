"""N environments stepped together, in this process or one worker process each."""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from typing import Any

import cloudpickle
import gymnasium
import numpy as np

from dreamer.config import EnvConfig
from dreamer.envs import worker
from dreamer.envs.gym import GymEnv
from dreamer.envs.interface import Batch, Env, EnvError, TaskError, Transition, VectorEnv, batch_fields, check_spaces
from dreamer.envs.registry import check_task, limited, make_env, split_task
from dreamer.envs.wrappers import AutoReset
from dreamer.types import Spaces

#: Streams of seeds, so that evaluation never repeats a training environment.
STREAMS = {"training": 0, "evaluation": 1}

Maker = Callable[[], Env]
#: A user's own environment function: (index, seed) -> environment.
MakeEnv = Callable[[int, int], "gymnasium.Env | Env"]


def env_seed(seed: int, training: bool, index: int) -> int:
    """Seed of environment `index` of a run: below 2**32, different in training and evaluation."""
    stream = STREAMS["training" if training else "evaluation"]
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1)[0])


def make_vector_env(
    task: str, config: EnvConfig, num_envs: int, seed: int, training: bool, make: MakeEnv | None = None
) -> VectorEnv:
    """N environments of a task, or of a user's own function (then `task` is only a name for messages).

    `config.workers` says where they run; ``auto`` takes processes for slow suites with more than one environment and
    runs everything else, a user's own function included, in this process.
    """
    seeds = [env_seed(seed, training, index) for index in range(num_envs)]
    makers: list[Maker]
    if make is None:
        check_task(task)
        makers = [functools.partial(make_env, task, config, one) for one in seeds]
        slow = split_task(task)[0].process(config)
    else:
        makers = [functools.partial(adopt, make, config, index, one) for index, one in enumerate(seeds)]
        slow = False
    where = config.workers if config.workers != "auto" else "process" if slow and num_envs > 1 else "inline"
    return ProcessVectorEnv(makers, task) if where == "process" else InlineVectorEnv(makers, task)


def adopt(make: MakeEnv, config: EnvConfig, index: int, seed: int) -> Env:
    """A user's environment behind our interface."""
    made = make(index, seed)
    env = GymEnv(made, config.gym, seed) if isinstance(made, gymnasium.Env) else made
    if not isinstance(env, Env):
        raise TaskError(
            "expected make_env(index, seed) to return a gymnasium.Env or an object with observation_spaces, "
            f"action_spaces, reset, step, render and close, got {type(env).__name__}"
        )
    check_spaces(env.observation_spaces, env.action_spaces)
    return limited(env, config)


class InlineVectorEnv:
    """All environments in this process: best when a step costs less than a message to a worker (about 50 us)."""

    def __init__(self, makers: Sequence[Maker], task: str = "environment") -> None:
        self.task = task
        self.num_envs = len(makers)
        self._runners: list[AutoReset] = []
        self._actions: Mapping[str, np.ndarray] | None = None
        try:
            for maker in makers:
                self._runners.append(AutoReset(maker()))
        except BaseException:
            self.close()
            raise
        first = self._runners[0].env
        self.observation_spaces: Spaces = dict(first.observation_spaces)
        self.action_spaces: Spaces = dict(first.action_spaces)
        for index, runner in enumerate(self._runners):
            _check_same(self, runner.env.observation_spaces, runner.env.action_spaces, index)

    def reset(self) -> Batch:
        self._actions = None
        return self._collect(lambda runner, index: runner.reset())

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        _check_actions(actions, self.action_spaces, self.num_envs)
        self._actions = actions

    def step_wait(self) -> Batch:
        if self._actions is None:
            raise EnvError("expected step_async before step_wait, got none; call them in turn")
        actions, self._actions = self._actions, None
        return self._collect(lambda runner, i: runner.step({key: value[i] for key, value in actions.items()}))

    def render(self) -> np.ndarray | None:
        return self._runners[0].env.render()

    def close(self) -> None:
        while self._runners:
            self._runners.pop().env.close()

    def _collect(self, advance: Callable[[AutoReset, int], Transition]) -> Batch:
        """Fresh arrays (N, ...) of what every environment returns."""
        fields = batch_fields(self.observation_spaces)
        batch = {key: np.empty((self.num_envs, *shape), dtype) for key, (shape, dtype) in fields.items()}
        for index, runner in enumerate(self._runners):
            try:
                result = advance(runner, index)
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                raise EnvError(f"{self.task}, environment {index} failed: {cause}") from error
            for key, array in batch.items():
                array[index] = result[key]
        return batch


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
                _check_same(self, observations, actions, index)
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
        _check_actions(actions, self.action_spaces, self.num_envs)
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
        with tempfile.TemporaryFile(dir=_memory_folder()) as file:
            file.truncate(worker.block_size(fields, self.num_envs))
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
            self.close()
            raise EnvError(
                f"{self.task}, environment {index}: its worker process ended unexpectedly with exit code "
                f"{process.exitcode} (negative: killed by that signal; -9 often means out of memory)"
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


def _memory_folder() -> str | None:
    """A folder kept in memory, if there is one with room; None: the default for temporary files."""
    folder = "/dev/shm"
    return folder if os.path.isdir(folder) and os.access(folder, os.W_OK) else None


def _check_actions(actions: Mapping[str, np.ndarray], spaces: Spaces, num_envs: int) -> None:
    shapes = {key: np.shape(value) for key, value in actions.items()}
    expected = {key: (num_envs, *space.shape) for key, space in spaces.items()}
    if shapes != expected:
        raise EnvError(f"expected actions of shapes {expected}, got {shapes}; one row per environment and key")


def _check_same(owner: VectorEnv, observations: Spaces, actions: Spaces, index: int) -> None:
    if dict(observations) != dict(owner.observation_spaces) or dict(actions) != dict(owner.action_spaces):
        raise TaskError(
            f"expected equal spaces in all environments, got {dict(observations)} and {dict(actions)} in environment "
            f"{index}, {dict(owner.observation_spaces)} and {dict(owner.action_spaces)} in environment 0"
        )
