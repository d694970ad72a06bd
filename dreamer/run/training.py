"""Training from a configuration: one run or several seeds, under a lock, from its start to an exit code."""

from __future__ import annotations

import shlex
from pathlib import Path

import jax
from rich.text import Text

from dreamer.config import Config
from dreamer.envs.vector import MakeEnv
from dreamer.paths import brief
from dreamer.presets import check_resume, stored_config
from dreamer.process import unfailing_output
from dreamer.records.meters import StartupTimer
from dreamer.run.devices import find_devices, keep_compiled_programs, reuse_freed_memory
from dreamer.run.distributed import SharedRun, join, own_part
from dreamer.run.factories import name_own_task, prepare_logdir, resolve_logdir
from dreamer.run.loop import Run
from dreamer.run.nonfinite import NonFiniteError
from dreamer.run.seeds import SeedRuns
from dreamer.run.signals import StopRequest
from dreamer.saves.lock import LogdirLock
from dreamer.terminal import Console

#: Exit code of a run whose numbers were not finite.
NON_FINITE = 3
#: Exit code of a run whose environments failed too often.
ENVIRONMENTS_FAILED = 4
STOPPED = Text("stopped:", "bold red")


@unfailing_output()
def train(config: Config, make_env: MakeEnv | None = None, begun: float | None = None) -> int:
    """Run, or resume, the training that `config` describes; returns the exit code.

    make_env: ``(index, seed) -> environment``, of Gymnasium or a `dreamer.envs.Env`, instead of `config.task`.
    begun: when the program was started, by `time.time`, to report the time to the first update; None: now.
    0: reached the end or was asked to stop (a checkpoint is saved); 3: a loss or an action was not finite; 4:
    environments failed too often (a checkpoint is saved). PathError if the logdir cannot be used.
    """
    startup = StartupTimer(begun)
    startup.mark("imports")
    if config.logdir:
        prepare_logdir(Path(config.logdir))
    reuse_freed_memory()
    keep_compiled_programs()
    join(config.run)
    find_devices(config.run.platform)  # before an environment's code changes variables that JAX looks at only now
    config = resolve_logdir(own_part(config if make_env is None else name_own_task(config)))
    logdir = Path(config.logdir)
    stored = stored_config(logdir)
    if stored is not None:
        check_resume(stored, config)
    prepare_logdir(logdir)
    console = Console()
    kind = SharedRun if jax.process_count() > 1 else Run if config.run.seeds is None else SeedRuns
    with LogdirLock(logdir), StopRequest() as stop:
        run: Run | SeedRuns = kind(config, make_env, console, startup=startup)
        try:
            run.loop(stop)
        except NonFiniteError as error:
            console.print(STOPPED, f"{error} (after {run.updates} updates).")
            try:
                where = f"are in {error.dump(logdir)}"
            except OSError as refused:
                where = f"could not be written ({refused})"
            console.print(f"Its numbers {where}; checkpoints are as they were.")
            return NON_FINITE
        finally:
            run.close()
        if run.failed:
            console.print(STOPPED, run.failed)
            return ENVIRONMENTS_FAILED
        if stop:
            again = f"dreamer train --logdir {shlex.quote(brief(logdir))}"
            alone = make_env is None and jax.process_count() == 1
            console.print(f"\nstopped; resume with: {again if alone else 'the same call'}")
    return 0
