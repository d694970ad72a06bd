"""Environments in this process, and the checks of every `VectorEnv`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dreamer.envs.faults import TRIES, Recovery, describe, fault_of, give_up, never_began
from dreamer.envs.interface import Batch, Env, EnvError, Fault, TaskError, Transition, VectorEnv, batch_fields
from dreamer.envs.workers.fence import Fence, close, jax_options_kept
from dreamer.envs.wrappers import AutoReset, share
from dreamer.types import Spaces

#: attempt -> environment, with its own seed for every attempt; 0 is the first.
Maker = Callable[[int], Env]
#: All of this process, to notice when one environment is used in two places.
_open: weakref.WeakSet[InlineVectorEnv] = weakref.WeakSet()


class InlineVectorEnv:
    """All environments in this process: best when a step costs less than a message to a worker (about 50 us).

    An environment that raises, exits or returns garbage is recreated. All of its code is called through a `Fence`. One
    that hangs cannot be interrupted here, and one that crashes takes this process along.
    """

    def __init__(self, makers: Sequence[Maker], task: str, restart_seconds: float) -> None:
        self.task = task
        self.num_envs = len(makers)
        self._makers = makers
        self._recovery = Recovery(self.num_envs, restart_seconds)
        self._fences = [Fence() for _ in makers]
        self._runners: list[AutoReset] = []
        self._actions: Mapping[str, np.ndarray] | None = None
        self._begun = False
        _open.add(self)
        try:
            for index in range(self.num_envs):
                self._runners.append(self._make(index))
        except BaseException:
            self.close()
            raise
        self.observation_spaces: Spaces = self._runners[0].observation_spaces
        self.action_spaces: Spaces = self._runners[0].action_spaces
        for index, runner in enumerate(self._runners):
            check_same(self, runner.observation_spaces, runner.action_spaces, index)

    @property
    def restorable(self) -> bool:
        try:
            return bool(self._runners) and all(map(self._restorable, range(self.num_envs)))
        except Exception:  # an environment that fails when asked is not one that can be restored
            return False

    def _restorable(self, index: int) -> bool:
        runner = self._runners[index]
        return self._fences[index](lambda: runner.restorable)

    def reset(self) -> Batch:
        self._actions = None
        batch = self._collect(lambda runner, index: runner.reset())
        self._begun = True
        return batch

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        check_actions(actions, self.action_spaces, self.num_envs)
        self._actions = actions

    def step_wait(self) -> Batch:
        if self._actions is None:
            raise EnvError("expected step_async before step_wait, got none; call them in turn")
        actions, self._actions = self._actions, None
        return self._collect(lambda runner, i: runner.step({key: value[i] for key, value in actions.items()}))

    def render(self) -> np.ndarray | None:
        try:
            return self._fences[0](self._runners[0].render)
        except Exception:  # a picture for people is not worth a run
            return None

    def get_state(self) -> list[bytes]:
        states = []
        for index, runner in enumerate(self._runners):
            try:
                states.append(self._fences[index](runner.get_state, self._recovery.attempts[index]))
            except Exception as error:
                raise EnvError(describe(fault_of(self.task, index, error))) from error
        return states

    def set_state(self, states: list[bytes]) -> None:
        check_states(states, self.num_envs)
        self._actions = None
        for index, (runner, state) in enumerate(zip(self._runners, states, strict=True)):
            try:
                self._recovery.attempts[index] = self._fences[index](runner.set_state, state)
            except Exception as error:
                raise EnvError(describe(fault_of(self.task, index, error))) from error
        self._begun = True

    def take_faults(self) -> list[Fault]:
        return self._recovery.take()

    def close(self) -> None:
        while self._runners:
            runner = self._runners.pop()
            close(self._fences[len(self._runners)], runner.env.close)

    def _make(self, index: int) -> AutoReset:
        try:
            return self._fences[index](self._made, index)
        except TaskError:
            raise  # the message is complete
        except Exception as error:
            raise never_began(fault_of(self.task, index, error)) from error

    def _made(self, index: int) -> AutoReset:
        with jax_options_kept():
            made = AutoReset(self._makers[index](self._recovery.attempts[index]))
        for envs in _open:
            for other, runner in enumerate(envs._runners):
                if (envs, other) != (self, index) and share(made.env, runner.env):
                    raise TaskError(
                        f"expected an environment of its own for each index, training and evaluation, got one object "
                        f"twice (environment {index} of {self.task}); make a new one in every call, or run each in a "
                        "process: --env.workers process"
                    )
        return made

    def _collect(self, advance: Callable[[AutoReset, int], Transition]) -> Batch:
        """Fresh arrays (N, ...) of what every environment returns; those that fail start over."""
        if not self._runners:
            raise EnvError(f"expected open environments of {self.task}, got closed ones; make new ones")
        fields = batch_fields(self.observation_spaces)
        batch = {key: np.empty((self.num_envs, *shape), dtype) for key, (shape, dtype) in fields.items()}
        failed = [index for index in range(self.num_envs) if not self._try(index, advance, batch)]
        if failed:
            self._recreate(failed, batch)
        self._recovery.finished(batch["is_last"])
        return batch

    def _try(
        self, index: int, advance: Callable[[AutoReset, int], Transition], batch: Batch, making: bool = False
    ) -> bool:
        """Put the environment's next transition into the batch; False if it failed, and is closed now."""
        runner, fence = self._runners[index], self._fences[index]
        # The step after the last one is a reset.
        call = fence if making else fence.reset if runner.over else fence.step
        try:
            call(_play, advance, runner, index, batch)
        except Exception as error:
            fault = fault_of(self.task, index, error)
            # An environment that is not what it declares would fail in the same way if it were recreated.
            if isinstance(error, TaskError) and not self._recovery.attempts[index]:
                raise
            if not self._begun:
                raise never_began(fault) from error
            self._recovery.note(fault)
            close(fence, self._runners[index].env.close)
            return False
        return True

    def _recreate(self, failed: list[int], batch: Batch) -> None:
        def renewed(runner: AutoReset, index: int) -> Transition:
            new = self._runners[index] = self._made(index)
            check_same(self, new.observation_spaces, new.action_spaces, index)
            return new.reset()

        for _ in range(TRIES):
            self._recovery.pause(failed)
            for index in failed:
                self._fences[index] = Fence()
            failed = [index for index in failed if not self._try(index, renewed, batch, making=True)]
            if not failed:
                return
        self.close()
        raise give_up(self._recovery.last_fault())


def _play(advance: Callable[[AutoReset, int], Transition], runner: AutoReset, index: int, batch: Batch) -> None:
    """Let the environment advance, and copy its transition into the batch."""
    result = advance(runner, index)
    for key, array in batch.items():
        array[index] = result[key]


def check_actions(actions: Mapping[str, np.ndarray], spaces: Spaces, num_envs: int) -> None:
    shapes = {key: np.shape(value) for key, value in actions.items()}
    expected = {key: (num_envs, *space.shape) for key, space in spaces.items()}
    if shapes != expected:
        raise EnvError(f"expected actions of shapes {expected}, got {shapes}; one row per environment and key")


def check_states(states: list[bytes], num_envs: int) -> None:
    if len(states) != num_envs:
        raise EnvError(
            f"expected a state for each of {num_envs} environments, got {len(states)}; make as many as were saved"
        )


def check_same(owner: VectorEnv, observations: Spaces, actions: Spaces, index: int) -> None:
    if dict(observations) != dict(owner.observation_spaces) or dict(actions) != dict(owner.action_spaces):
        raise TaskError(
            f"expected equal spaces in all environments, got {dict(observations)} and {dict(actions)} in environment "
            f"{index}, {dict(owner.observation_spaces)} and {dict(owner.action_spaces)} in environment 0"
        )
