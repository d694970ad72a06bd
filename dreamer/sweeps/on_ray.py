"""Runs as tasks of a Ray cluster: an existing one, or one on this machine alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamer.paths import working_folder
from dreamer.schema import ConfigError
from dreamer.sweeps.expand import PlannedRun
from dreamer.sweeps.local import MEMORY_SHARE, STOP_FILE, command
from dreamer.sweeps.spec import RayTask

#: Stands for the exit code of a task that ended without one: its machine was lost, for example.
LOST = 1


def on_a_machine(working_folder: str) -> Callable[[Sequence[str], Path, Mapping[str, str]], int]:
    """What a task does: `run_program`, imported there. Ray puts the working folder first on the path of its processes,
    where a dreamer.py would be taken for this program."""

    def task(words: Sequence[str], folder: Path, settings: Mapping[str, str]) -> int:
        sys.path[:] = [place for place in sys.path if place != working_folder] + [working_folder]
        from dreamer.sweeps.local import run_program

        return run_program(words, folder, settings)

    return task


class RayJob:
    """A task of the cluster."""

    where = "ray"

    def __init__(self, ray: Any, task: Any, folder: Path) -> None:
        self._ray, self._task, self._folder = ray, task, folder

    def poll(self) -> int | None:
        done, _ = self._ray.wait([self._task], timeout=0)
        if not done:
            return None
        try:
            return int(self._ray.get(self._task))
        except self._ray.exceptions.RayError:
            return LOST

    def stop(self) -> None:
        (self._folder / STOP_FILE).touch()

    def kill(self) -> None:
        self._ray.cancel(self._task, force=True)


class RayBackend:
    """Sends runs to Ray. Folders must be shared by its machines, and dreamer installed on each."""

    def __init__(self, jobs: int, asked: RayTask, program: Sequence[str]) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"--backend ray needs Ray ({error}); `pip install 'dreamer[ray]'`") from None
        gpus = asked.num_gpus
        # Runs that share a GPU take their shares of its memory.
        shared = 0 < gpus < 1
        self._settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE * gpus:.2f}"} if shared else {}
        ray.init(address=asked.address, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
        self._ray, self._program, self.slots = ray, program, jobs
        task = on_a_machine(str(working_folder()))
        self._task = ray.remote(num_cpus=asked.num_cpus, num_gpus=gpus, max_retries=0)(task)

    def start(self, run: PlannedRun, slot: int) -> RayJob:
        words, folder = command(run, self._program), run.folder.absolute()
        (folder / STOP_FILE).unlink(missing_ok=True)
        return RayJob(self._ray, self._task.remote(words, folder, self._settings), folder)

    def close(self) -> None:
        self._ray.shutdown()
