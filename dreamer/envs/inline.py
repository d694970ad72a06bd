"""Environments in this process, and what every `VectorEnv` checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dreamer.envs.interface import Batch, Env, EnvError, TaskError, Transition, VectorEnv, batch_fields
from dreamer.envs.wrappers import AutoReset
from dreamer.types import Spaces

Maker = Callable[[], Env]


class InlineVectorEnv:
    """All environments in this process: best when a step costs less than a message to a worker (about 50 us)."""

    def __init__(self, makers: Sequence[Maker], task: str = "environment") -> None:
        self.task = task
        self.num_envs = len(makers)
        self._runners: list[AutoReset] = []
        self._actions: Mapping[str, np.ndarray] | None = None
        try:
            for index, maker in enumerate(makers):
                with named(task, index):
                    self._runners.append(AutoReset(maker()))
        except BaseException:
            self.close()
            raise
        first = self._runners[0].env
        self.observation_spaces: Spaces = dict(first.observation_spaces)
        self.action_spaces: Spaces = dict(first.action_spaces)
        for index, runner in enumerate(self._runners):
            check_same(self, runner.env.observation_spaces, runner.env.action_spaces, index)

    def reset(self) -> Batch:
        self._actions = None
        return self._collect(lambda runner, index: runner.reset())

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        check_actions(actions, self.action_spaces, self.num_envs)
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
            with named(self.task, index):
                result = advance(runner, index)
            for key, array in batch.items():
                array[index] = result[key]
        return batch


@contextlib.contextmanager
def named(task: str, index: int) -> Iterator[None]:
    """Errors of one environment become an EnvError that says whose they are; a TaskError speaks for itself."""
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        raise EnvError(f"{task}, environment {index} failed: {type(error).__name__}: {error}") from error


def check_actions(actions: Mapping[str, np.ndarray], spaces: Spaces, num_envs: int) -> None:
    shapes = {key: np.shape(value) for key, value in actions.items()}
    expected = {key: (num_envs, *space.shape) for key, space in spaces.items()}
    if shapes != expected:
        raise EnvError(f"expected actions of shapes {expected}, got {shapes}; one row per environment and key")


def check_same(owner: VectorEnv, observations: Spaces, actions: Spaces, index: int) -> None:
    if dict(observations) != dict(owner.observation_spaces) or dict(actions) != dict(owner.action_spaces):
        raise TaskError(
            f"expected equal spaces in all environments, got {dict(observations)} and {dict(actions)} in environment "
            f"{index}, {dict(owner.observation_spaces)} and {dict(owner.action_spaces)} in environment 0"
        )
