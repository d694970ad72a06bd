"""`dreamer sweep`: from a file to the end of its runs and the report."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from dreamer.paths import absolute, brief, check_folder, make_folder
from dreamer.presets import check_resume, stored_config
from dreamer.run.signals import StopRequest
from dreamer.saves.lock import LogdirLock
from dreamer.schema import ConfigError
from dreamer.sweeps.expand import PlannedRun, expand
from dreamer.sweeps.local import TRAIN, LocalBackend, found_devices, slots
from dreamer.sweeps.progress import FAILED
from dreamer.sweeps.scheduler import Backend, RunEntry, Scheduler
from dreamer.sweeps.spec import Sweep
from dreamer.sweeps.spec_file import find_sweep, load_sweep
from dreamer.sweeps.views import SweepDisplay, counts, write_report
from dreamer.terminal import Console

#: Exit code of a sweep in which runs failed.
RUNS_FAILED = 5


@dataclasses.dataclass(frozen=True)
class Request:
    """What to do; `dreamer sweep --help` says it in words.

    file     a name under configs/sweeps/ or a path
    logdir   folder of the sweep; None: runs/NAME
    jobs     runs at once
    devices  as CUDA_VISIBLE_DEVICES names them; None: all there are
    """

    file: str
    logdir: Path | None = None
    jobs: int | None = None
    devices: Sequence[str] | None = None
    backend: str = "local"
    dry_run: bool = False
    report: bool = False


def run_sweep(request: Request, program: Sequence[str] = TRAIN, poll_seconds: float = 1.0) -> int:
    """Runs or resumes a sweep. 0: all its runs are over, or it was asked to stop; 5: some runs failed.

    program: what trains, instead of `dreamer train`, with its arguments.
    """
    sweep = load_sweep(find_sweep(request.file))
    folder = absolute(request.logdir or Path("runs") / sweep.name)
    console = Console()
    runs = [] if sweep.search else expand(sweep, folder)
    source = None
    if sweep.search:
        from dreamer.sweeps.search import Search

        source = Search(sweep, folder)
    for run in runs:
        check_stored(run)
    if request.dry_run:
        from dreamer.sweeps.dry_run import print_dry_run

        check_folder(folder)
        return print_dry_run(sweep, runs, at_once(request, runs), console)
    make_folder(folder)
    with LogdirLock(folder), StopRequest() as stop:
        entries = [RunEntry(run) for run in runs] if source is None else source.begun()
        if request.report:
            return tell(sweep, folder, entries, console)
        backend = make_backend(sweep, folder, request, runs, program)
        try:
            with SweepDisplay(sweep.name, backend.slots, console) as display:
                scheduler = Scheduler(sweep, entries, backend, display, source, poll_seconds=poll_seconds)
                scheduler.run(stop)
        finally:
            backend.close()
        if stop:
            again = f"dreamer sweep {shlex.quote(request.file)} --logdir {shlex.quote(brief(folder))}"
            console.print(f"stopped: {counts(scheduler.entries)}; resume with: {again}")
            return 0
        return tell(sweep, folder, scheduler.entries, console)


def check_stored(run: PlannedRun) -> None:
    """ConfigError if the folder holds a run with other options."""
    stored = stored_config(run.folder)
    if stored is not None:
        check_resume(stored, run.config)


def local_slots(request: Request, runs: list[PlannedRun]) -> list[dict[str, str]]:
    """The environment variables of each concurrent run."""
    platforms = {run.config.run.platform for run in runs}
    devices = [] if platforms == {"cpu"} else found_devices() if request.devices is None else request.devices
    return slots(request.jobs, devices)


def at_once(request: Request, runs: list[PlannedRun]) -> int:
    """Number of concurrent runs: as many as there are devices on this machine; on a cluster, all runs."""
    return len(local_slots(request, runs)) if request.backend == "local" else request.jobs or max(1, len(runs))


def make_backend(
    sweep: Sweep, folder: Path, request: Request, runs: list[PlannedRun], program: Sequence[str]
) -> Backend:
    """The backend that the request names."""
    if request.backend == "local":
        return LocalBackend(local_slots(request, runs), program)
    if request.devices is not None:
        raise ConfigError(f"--devices: expected the local backend; {request.backend} assigns devices itself")
    wanted = request.jobs or (len(runs) if sweep.search is None else sweep.search.count) or 1
    if request.backend == "ray":
        from dreamer.sweeps.on_ray import RayBackend

        return RayBackend(wanted, sweep.ray, program)
    from dreamer.sweeps.on_slurm import SlurmBackend

    return SlurmBackend(wanted, sweep.slurm, folder / "slurm", program)


def tell(sweep: Sweep, folder: Path, entries: list[RunEntry], console: Console) -> int:
    """Writes and prints the report; returns the exit code."""
    text, paths = write_report(sweep.name, folder, entries)
    console.print(Text(text))
    console.print(f"Written: {', '.join(map(str, paths))}")
    return RUNS_FAILED if any(entry.state.status == FAILED for entry in entries) else 0
