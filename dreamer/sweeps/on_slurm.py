"""Runs as jobs of a SLURM cluster, through submitit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamer.paths import safe_path
from dreamer.schema import ConfigError
from dreamer.sweeps.expand import PlannedRun
from dreamer.sweeps.local import STOP_FILE, command, run_program

#: Stands for the exit code of a job that ended without one: it was cancelled, or its machine was lost.
LOST = 1


class SlurmJob:
    """A job in the queue, or on this machine where `slurm: {cluster: local}` asks for that."""

    def __init__(self, job: Any, folder: Path) -> None:
        self._job, self._folder = job, folder
        self.where = f"job {job.job_id}"

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        # Errors of submitit, each of which says that there is no result.
        error = self._job.exception()
        return LOST if error is not None else int(self._job.result())

    def stop(self) -> None:
        (self._folder / STOP_FILE).touch()
        if self._job.state.upper().startswith("PENDING"):
            self._job.cancel()

    def kill(self) -> None:
        self._job.cancel()


class SlurmBackend:
    """Submits runs. Folders must be shared by the machines, and dreamer installed on each."""

    def __init__(self, jobs: int, settings: Mapping[str, Any], folder: Path, program: Sequence[str]) -> None:
        """settings: `slurm:` of the file, submitit's parameters and `cluster`. folder: for submitit's own files."""
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(f"--backend slurm needs submitit ({error}); `pip install 'dreamer[slurm]'`") from None
        if "%" in str(folder):
            raise ConfigError(f"expected a --logdir without %, which stands for job numbers there, got {folder}")
        asked = dict(settings)
        safe = f"{shlex.quote(sys.executable)} -P"  # a job starts in the working folder, whatever modules are there
        pythons = {"slurm_python": safe, "local_python": safe}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=asked.pop("cluster", "slurm"), **pythons)
            self._executor.update_parameters(**asked)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"slurm: {error}") from None
        self._program, self.slots = program, jobs

    def start(self, run: PlannedRun, slot: int) -> SlurmJob:
        words, folder = command(run, self._program), run.folder.absolute()
        (folder / STOP_FILE).unlink(missing_ok=True)
        with safe_path():  # for what submitit starts here
            return SlurmJob(self._executor.submit(run_program, words, folder, {}), folder)

    def close(self) -> None:
        """Nothing is held between jobs."""
