"""One run over several processes, each with its own devices, environments and share of the replay.

`jax.distributed` connects them. All run the same loop and make the same updates together; they agree once per step on
what may differ between them (a request to stop, a failed environment, the clock). Process 0 records, evaluates and
saves the weights; the others save their share in DIR/process_1, DIR/process_2, ...
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dreamer.config import Config, LogConfig, RunConfig
from dreamer.envs.vector import MakeEnv
from dreamer.presets import ConfigError
from dreamer.records.display import Display
from dreamer.records.meters import StartupTimer
from dreamer.run.devices import DeviceError
from dreamer.run.loop import Run
from dreamer.run.nonfinite import NonFiniteActionError, NonFiniteError
from dreamer.run.signals import StopRequest
from dreamer.saves.checkpoint import Checkpointer, CheckpointError
from dreamer.terminal import Console

#: `run.coordinator` of a cluster that tells its processes about each other: SLURM, Open MPI, Kubernetes, TPU pods.
AUTO = "auto"
#: Number of newest checkpoints that processes compare.
_COMPARED = 64


def join(run: RunConfig) -> None:
    """Become one of the processes that the options describe; does nothing if they describe none.

    Call it before JAX's first computation. ConfigError if the options are incomplete, DeviceError if peers are missing.
    """
    named = run.processes, run.process_id
    if run.coordinator is None:
        if named != (None, None):
            raise ConfigError("expected --run.coordinator HOST:PORT beside run.processes and run.process_id, got none")
        return
    if run.coordinator != AUTO and None in named:
        raise ConfigError(
            f"expected --run.processes and --run.process_id beside --run.coordinator {run.coordinator}; where SLURM or "
            f"another cluster knows them: --run.coordinator {AUTO}"
        )
    if jax.distributed.is_initialized():
        return
    # Signals to stop are for the loop, see `StopRequest`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(None if run.coordinator == AUTO else run.coordinator, *named)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(
            f"expected {run.processes or 'all'} processes to meet at run.coordinator {run.coordinator}, got: {error}; "
            "docs/distributed.md shows how to start them"
        ) from error


def own_part(config: Config) -> Config:
    """The configuration of this process: for all but process 0 one that records nothing, in a folder of its own.

    ConfigError if the processes cannot share the run equally.
    """
    count, process, run = jax.process_count(), jax.process_index(), config.run
    if count == 1:
        return config
    for name, total in (("env.num_envs", config.env.num_envs), ("run.batch_size", run.batch_size)):
        if total % count:
            raise ConfigError(f"expected {name} to be a multiple of the {count} processes, got {total}; change it")
    if not config.logdir:
        raise ConfigError("expected --logdir with several processes: they save in one place, or each in its own")
    if run.checkpoint_keep < 2:
        raise ConfigError("expected run.checkpoint_keep 2 or more with several processes, got 1: one may be incomplete")
    if run.seeds is not None:
        raise ConfigError("expected run.seeds null with several processes; start one run for each seed")
    if process == 0:
        return config
    off: dict[str, Any] = {"eval_every": None, "report_every": None, "final_eval": False}
    return dataclasses.replace(
        config,
        logdir=str(Path(config.logdir) / f"process_{process}"),
        run=dataclasses.replace(run, **off),
        log=LogConfig(jsonl=False, tensorboard=False, videos=False),
    )


def everyone(values: np.ndarray) -> np.ndarray:
    """What each process passes, int32 (...), as (P, ...). All must call it in the same step."""
    return np.asarray(multihost_utils.process_allgather(values.astype(np.int32))).reshape(-1, *values.shape)


def common_step(logdir: str) -> int | None:
    """The newest agent step for which every process has an intact checkpoint; None: nothing was saved yet."""
    checkpoints = Checkpointer(logdir, read_only=True)
    own = np.full(_COMPARED, -1)
    newest = checkpoints.steps()[-_COMPARED:]
    own[: len(newest)] = newest
    found = everyone(own)
    if (found < 0).all():
        return None
    for step in sorted(set.intersection(*[set(steps[steps >= 0].tolist()) for steps in found]), reverse=True):
        try:
            intact = bool(checkpoints.restore(step=step, parts=()))
        except CheckpointError:
            intact = False
        if everyone(np.array([intact])).all():
            return step
    raise CheckpointError(
        f"expected an intact checkpoint of the same step in every process, {logdir} has {newest or 'none'}; begin a "
        "new run from the weights of process 0: --from_checkpoint"
    )


class NonFiniteElsewhereError(NonFiniteError):
    """A number in another process was not finite."""

    def __init__(self, process: int) -> None:
        super().__init__(f"process {process} met numbers that are not finite; its output says which", "elsewhere", {})


class Agreement(StopRequest):
    """What the processes of a run have agreed on, including a request to stop."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__()
        self._request = request
        self.stop = self.failed = self.save = False
        self.broken: int | None = None

    @property
    def requested(self) -> bool:
        return self.stop

    def reach(self, failed: bool, broken: bool, save: bool) -> None:
        """Tell the others about this process and hear about them. save: process 0 decides."""
        told = everyone(np.array([bool(self._request), failed, broken, save and jax.process_index() == 0]))
        self.stop, self.failed, _, self.save = np.any(told, axis=0).tolist()
        self.broken = int(told[:, 2].argmax()) if told[:, 2].any() else None


class SharedRun(Run):
    """This process's part of a run; config: see `own_part`."""

    def __init__(
        self, config: Config, make_env: MakeEnv | None, console: Console, startup: StartupTimer | None = None
    ) -> None:
        quiet = None if jax.process_index() == 0 else Display(config.task, 0, False, Console(quiet=True))
        step = common_step(config.logdir)
        super().__init__(config, make_env, console, display=quiet, startup=startup, step=step)

    def begin(self, stop: StopRequest) -> None:
        self._agreed = Agreement(stop)
        self._trouble: NonFiniteActionError | None = None
        if jax.process_index() == 0:
            self.console.print(self.summary)
        self.heed(self._agreed)

    def agree(self) -> bool:
        if self.agent_steps >= self.config.run.agent_steps:
            return False
        agreed, trouble = self._agreed, self._trouble
        agreed.reach(self.failed is not None, trouble is not None, self.due_save(self.agent_steps))
        if agreed.broken is not None:
            raise trouble or NonFiniteElsewhereError(agreed.broken)
        if agreed.failed and self.failed is None:
            self.failed = "an environment of another process failed too often; its output says which"
        return self.going

    def act(self) -> None:
        try:
            super().act()
        except NonFiniteActionError as error:  # The others continue with an update, which needs all processes.
            self._trouble = error
            self.agent_steps += self.stride

    def wait(self) -> None:
        if self._trouble is None:
            super().wait()

    def saves(self) -> bool:
        return self._agreed.save

    def record(self, save: bool) -> None:
        if save:
            self._written()
        super().record(save)

    def settle(self) -> None:
        self._written()
        super().settle()

    def _written(self) -> None:
        """Waits until the newest checkpoint is on every disk: only then may the next one replace older ones."""
        self.try_saving(self.checkpointer.wait)
        everyone(np.zeros(1))
