"""The components of a run: how they are built, saved and restored, and what happens when environments fail.

`loop.py` has the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.text import Text

from dreamer.agent import Agent, seed_key
from dreamer.config import Config
from dreamer.data.preload import Preload, check_place, check_trainable, find_preload
from dreamer.envs import EnvError, InlineVectorEnv, frames_per_step
from dreamer.envs.faults import FaultBudget
from dreamer.envs.interface import Fault
from dreamer.envs.vector import MakeEnv
from dreamer.presets import CONFIG_FILE, save_config
from dreamer.records.display import Display, start_summary
from dreamer.records.logger import make_logger
from dreamer.records.meters import Aggregator, StartupTimer, Stopwatch
from dreamer.records.sink import Steps
from dreamer.records.system import SystemMeter, versions
from dreamer.run.collector import Collector
from dreamer.run.devices import find_devices
from dreamer.run.evaluate import Evaluator
from dreamer.run.factories import (
    check_networks_fit,
    evaluation_envs,
    make_agent,
    make_replay,
    spaces_to_json,
    summary_rows,
    training_envs,
)
from dreamer.run.learner import Learner
from dreamer.run.resume import (
    ENVIRONMENTS,
    Progress,
    can_be_restored,
    changed_surroundings,
    pack_progress,
    read_progress,
)
from dreamer.run.schedule import SaveTimer, UpdateSchedule
from dreamer.run.shares import check_processes, from_first, own_key, share
from dreamer.saves.checkpoint import Checkpointer, CheckpointError
from dreamer.saves.weights import check_source, warm_start
from dreamer.terminal import Console


class RunComponents:
    """Everything a run has: environments, agent, replay, learner, records, checkpoints, and its counters."""

    def __init__(
        self,
        config: Config,
        make_env: MakeEnv | None,
        console: Console,
        *,
        agent: Agent | None = None,
        display: Display | None = None,
        startup: StartupTimer | None = None,
        step: int | None = None,
    ) -> None:
        """agent, display, startup: shared with the runs beside this one. step: of the checkpoint to continue from;
        None: the newest."""
        self.config, self.logdir, self.console, self._make_env = config, Path(config.logdir), console, make_env
        self.checkpointer = Checkpointer(self.logdir, config.run.checkpoint_keep, config.run.checkpoint_milestones)
        found = self.checkpointer.restore(step=step, parts=())[2] if self.checkpointer.latest() is not None else None
        self._found, self._from = found, step
        if found is not None:
            check_processes(found.get("processes", 1))
        else:
            check_source(config)
            check_place(config)
        # Environments that continue from their states need no new seeds.
        self.restarts = 0 if found is None else found["restarts"] + (not found["exact"])
        self.startup = startup or StartupTimer()
        self.envs = training_envs(config, self.restarts, make_env)
        self.startup.mark("environments")
        try:
            evaluates = config.run.final_eval or config.run.eval_every is not None
            if evaluates and isinstance(self.envs, InlineVectorEnv):
                # Raise now, not hours later, if evaluation could not have environments of its own beside these.
                evaluation_envs(config, make_env, 1).close()
            self._build(agent, display)
        except BaseException:
            self.envs.close()
            raise

    def _build(self, agent: Agent | None, display: Display | None) -> None:
        config, resuming = self.config, self._found is not None
        if agent is None:
            spaces = self.envs.observation_spaces, self.envs.action_spaces
            agent = make_agent(config, *spaces, devices=find_devices(config.run.platform))
            check_networks_fit(config, agent)
        self.agent = agent
        self.startup.mark("networks")
        preload = find_preload(config, self.agent.observations, self.agent.actions) if not resuming else None
        self.preloaded = preload.room(self.envs.num_envs) if preload else (self._found or {}).get("preloaded", 0)
        self.replay = make_replay(config, self.agent, self.preloaded)
        run = config.run
        self.schedule = UpdateSchedule(run.train_ratio, run.batch_size, run.batch_length, run.updates_per_dispatch)
        self.logger = make_logger(config)
        self.system = SystemMeter(self.logdir)
        self.agent_steps = self.updates = 0
        self.failed: str | None = None
        self._unsaved = False  # whether it was reported that the environments' states cannot be saved
        self.dream_video: Path | None = None
        self.metrics, self.watch = Aggregator(), Stopwatch()
        self.faults = FaultBudget(config.env)
        self.display = display or Display(config.task, run.agent_steps, live=run.display, console=self.console)
        state, meta, progress = self._restore() if resuming else self._begin(preload)
        check_trainable(config, self.replay)
        self.run_key = run_key = own_key(np.asarray(state["key"]))
        self.startup.mark("checkpoint" if resuming else "initial weights")
        self.learner = Learner(self.agent, state, self.replay, share(config.run.batch_size), self.watch)
        self.evaluator = Evaluator(config, self.agent, run_key, self._make_env, self._evaluation_fault)
        self.evaluator.rounds = meta.get("evaluations", 0)
        collecting = None if progress is None else self._continue_from(progress)
        self.collector: Collector | None = None
        if config.run.collect:
            self.collector = Collector(
                self.agent, self.envs, run_key, "policy", on_fault=self._training_fault, state=collecting
            )
            self.collector.counter = self.agent_steps // self.stride
            self.startup.mark("environments")
            if collecting is None and config.log.videos:
                self.collector.record()
        self.due_save = SaveTimer(self.agent_steps, config.run.checkpoint_every, config.run.checkpoint_minutes)
        save_config(config, self.logdir / CONFIG_FILE)
        title = f"Resuming at agent step {self.agent_steps:,}" if resuming else "Training"
        self.summary = start_summary(title, summary_rows(config, self.agent, state, self.replay, self.envs))

    @property
    def stride(self) -> int:
        """Agent steps in each step of the loop, over all processes."""
        return self.config.env.num_envs

    @property
    def steps(self) -> Steps:
        frames = self.agent_steps * frames_per_step(self.config.task, self.config.env)
        return Steps(self.agent_steps, frames, self.updates)

    def _training_fault(self, fault: Fault) -> None:
        """An environment failed and begins a new episode: the cut episode is stored as abandoned."""
        self.replay.abandon([fault.env])
        self._evaluation_fault(fault)

    def _evaluation_fault(self, fault: Fault) -> None:
        self.metrics.add({"env/failures_sum": 1})
        text = f"environment {fault.env} {fault.kind} and was restarted: {fault.message}\n{fault.traceback}"
        self.console.print(Text(self.config.task, "bold red"), text)
        try:
            self.faults.add(fault)
        except EnvError as error:
            self.failed = str(error)

    def save(self) -> None:
        """Save a checkpoint in the background. It changes no number: what is on its way stays so."""
        with self.watch.section("checkpoint"):
            files = pack_progress(
                self.learner, self.collector, self.metrics, self.envs, self.evaluator, self._tell_unsaved
            )
            meta = {
                "agent_steps": self.agent_steps,
                "updates": self.updates,
                "restarts": self.restarts,
                "processes": jax.process_count(),
                "exact": ENVIRONMENTS in files,
                "preloaded": self.preloaded,
                "schedule": self.schedule.state(),
                "train_ratio": self.config.run.train_ratio,
                "observations": spaces_to_json(self.agent.observations),
                "actions": spaces_to_json(self.agent.actions),
                "evaluations": self.evaluator.rounds,
                "episodes": self.display.state(),
                "offsets": self.logger.offsets(),
                "versions": versions(),
            }
            state = self.agent.devices.one_copy(self.learner.state) if jax.process_index() == 0 else {}
            replay = self.replay
            self.try_saving(lambda: self.checkpointer.save(self.agent_steps, state, meta, replay, files))

    def _tell_unsaved(self, error: EnvError) -> None:
        """Reports it, once in a run."""
        if not self._unsaved:
            text = f"a resume begins new episodes: the environments' states cannot be saved, {error}"
            self.console.print(Text(self.config.task, "bold red"), text)
        self._unsaved = True

    def try_saving(self, save: Callable[[], object]) -> None:
        """If the disk refuses, reports it; training goes on, and the checkpoint is tried again soon."""
        try:
            save()
        except CheckpointError as error:
            self.console.print(Text("checkpoint failed:", "bold red"), str(error))
            self.due_save.failed()

    def _begin(self, preload: Preload | None) -> tuple[Any, dict[str, Any], None]:
        """(fresh training state, no meta data, no progress); removes records of an attempt that left no checkpoint."""
        self.logger.truncate(dict.fromkeys(self.logger.offsets(), 0), self.steps)
        if preload is not None:
            self.console.print(f"preloaded data: {preload.fill(self.replay)}")
        state = warm_start(self.config, self.agent, self.agent.init(seed_key(self.config.seed)))
        return self.agent.devices.place_state(state), {}, None

    def _restore(self) -> tuple[Any, dict[str, Any], Progress]:
        """(training state, meta data, progress) of the newest checkpoint; counters, replay and log files continue from
        there."""
        template, first = jax.eval_shape(self.agent.init, 0), jax.process_index() == 0
        found: list[Progress] = []

        def load(meta: dict[str, Any], folder: Path) -> None:
            self.replay.load(self.checkpointer.replay_folder, meta["replay"])
            found[:] = [read_progress(folder)]

        _, state, meta = self.checkpointer.restore(template if first else {}, self._from, check=load)
        self.agent_steps, self.updates = meta["agent_steps"], meta["updates"]
        changed = meta["train_ratio"] != self.config.run.train_ratio
        self.schedule.restore(meta["schedule"], self.agent_steps, changed)
        self.display.restore(meta["episodes"])
        self.logger.truncate(meta["offsets"], self.steps)
        self.checkpointer.forget_best_after(self.agent_steps)
        if surroundings := changed_surroundings(meta["versions"]):
            told = Text("not the surroundings of the checkpoint", "yellow")
            self.console.print(told, f"(last digits may differ): {'; '.join(surroundings)}")
        return self.agent.devices.place_state(from_first(state, template)), meta, found[0]

    def _continue_from(self, progress: Progress) -> Mapping[str, Any] | None:
        """Learner, statistics and environments continue from a checkpoint. Returns the collector's state, or None where
        the environments start over: then the cut episodes are stored as abandoned."""
        self.learner.restore(progress.loop["learner"])
        self.metrics.restore(progress.loop["metrics"])
        saved = progress.environments
        if saved is not None and can_be_restored(self.envs) and self._restore_environments(saved["training"]):
            self.evaluator.restore(saved["evaluation"])
            return progress.loop["collector"]
        if saved is not None:  # They could be saved then, but not restored now: the same seeds would repeat themselves.
            self.envs.close()
            self.restarts += 1
            self.envs = training_envs(self.config, self.restarts, self._make_env)
        if self.config.run.collect:
            self.replay.close_open_episodes()
        return None

    def _restore_environments(self, states: list[bytes] | None) -> bool:
        """Whether the training environments, if there are any, continue from these states."""
        try:
            if states is not None:
                self.envs.set_state(states)
        except EnvError as error:
            text = f"the environments could not be restored, and begin new episodes: {error}"
            self.console.print(Text(self.config.task, "bold red"), text)
            return False
        return True

    def close(self) -> None:
        """Release everything."""
        self.try_saving(self.checkpointer.wait)
        self.logger.close()
        self.envs.close()
        self.evaluator.close()
