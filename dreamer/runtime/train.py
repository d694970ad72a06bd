"""The training loop: act, dispatch the updates that are due, step the environments while the device works."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from dreamer.config import Config
from dreamer.envs import EnvError
from dreamer.envs.faults import FaultBudget
from dreamer.envs.interface import Fault
from dreamer.envs.vector import MakeEnv
from dreamer.presets import CONFIG_FILE, check_resume, save_config, stored_config
from dreamer.runtime.checkpoint import Checkpointer, CheckpointError
from dreamer.runtime.collect import Collector, Episode
from dreamer.runtime.devices import keep_compiled_programs, reuse_freed_memory
from dreamer.runtime.display import Display, evaluation_table, start_summary
from dreamer.runtime.evaluate import Evaluator, as_evaluation
from dreamer.runtime.learner import Learner
from dreamer.runtime.lock import LogdirLock
from dreamer.runtime.logging import Logger, Steps
from dreamer.runtime.meters import Aggregator, Stopwatch
from dreamer.runtime.nonfinite import NonFiniteActionError, NonFiniteError
from dreamer.runtime.preload import Preload, check_trainable, find_preload
from dreamer.runtime.provenance import versions
from dreamer.runtime.report import open_loop_report
from dreamer.runtime.resume import (
    ENVIRONMENTS,
    Progress,
    can_be_put_back,
    changed_surroundings,
    pack_progress,
    read_progress,
)
from dreamer.runtime.schedule import Every, SaveTimer, UpdateSchedule
from dreamer.runtime.setup import (
    make_agent,
    make_replay,
    name_own_task,
    resolve_logdir,
    spaces_to_json,
    summary_rows,
    training_envs,
)
from dreamer.runtime.signals import StopRequest
from dreamer.runtime.weights import warm_start

#: Exit code of a run whose numbers were not finite.
NON_FINITE = 3
#: Exit code of a run whose environments failed too often.
ENVIRONMENTS_FAILED = 4


def train(config: Config, make_env: MakeEnv | None = None) -> int:
    """Run, or resume, the training that `config` describes; returns the exit code.

    make_env: ``(index, seed) -> environment``, a Gymnasium or `dreamer.envs.Env` one, instead of `config.task`.
    0: reached the end or was asked to stop (a checkpoint is saved); 3: a loss or an action was not finite; 4:
    environments failed too often (a checkpoint is saved).
    """
    config = resolve_logdir(config if make_env is None else name_own_task(config))
    logdir = Path(config.logdir)
    stored = stored_config(logdir)
    if stored is not None:
        check_resume(stored, config)
    logdir.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    reuse_freed_memory()
    keep_compiled_programs()
    with LogdirLock(logdir), StopRequest() as stop:
        run = Run(config, make_env, console)
        try:
            run.loop(stop)
        except NonFiniteError as error:
            console.print(f"[bold red]stopped:[/] {error} (after {run.updates} updates).", soft_wrap=True)
            console.print(f"Its numbers are in {error.dump(logdir)}; checkpoints are as they were.", soft_wrap=True)
            return NON_FINITE
        finally:
            run.close()
        if run.failed:
            console.print(f"[bold red]stopped:[/] {escape(run.failed)}", soft_wrap=True)
            return ENVIRONMENTS_FAILED
        if stop:
            again = f"dreamer train --logdir {shlex.quote(str(logdir))}"
            console.print(f"\nstopped; go on with: {again if make_env is None else 'the same call'}", soft_wrap=True)
    return 0


class Run:
    """One run: its parts, its counters, and the loop."""

    def __init__(self, config: Config, make_env: MakeEnv | None, console: Console) -> None:
        self.config, self.logdir, self.console, self._make_env = config, Path(config.logdir), console, make_env
        self.checkpointer = Checkpointer(self.logdir, config.run.checkpoint_keep, config.run.checkpoint_milestones)
        found = self.checkpointer.restore(parts=())[2] if self.checkpointer.latest() is not None else None
        self._found = found
        # Environments that go on from their states need no new seeds.
        self.restarts = 0 if found is None else found["restarts"] + (not found["exact"])
        self.envs = training_envs(config, self.restarts, make_env)
        try:
            self._build()
        except BaseException:
            self.envs.close()
            raise

    def _build(self) -> None:
        config, resuming = self.config, self._found is not None
        self.agent = make_agent(config, self.envs.observation_spaces, self.envs.action_spaces)
        preload = find_preload(config, self.agent.observations, self.agent.actions) if not resuming else None
        self.preloaded = preload.room(self.envs.num_envs) if preload else (self._found or {}).get("preloaded", 0)
        self.replay = make_replay(config, self.agent, self.preloaded)
        self.schedule = UpdateSchedule(config.run.train_ratio, config.run.batch_size, config.run.batch_length)
        self.logger = Logger(self.logdir, config.log.jsonl, config.log.tensorboard, config.log.video_fps)
        self.agent_steps = self.updates = 0
        self.failed: str | None = None
        self.dream_video: Path | None = None
        self.metrics, self.watch = Aggregator(), Stopwatch()
        self.faults = FaultBudget(config.env)
        self.display = Display(config.task, config.run.agent_steps, live=config.run.display, console=self.console)
        state, meta, progress = self._restore() if resuming else self._begin(preload)
        check_trainable(config, self.replay)
        run_key = np.asarray(state["key"])
        self.learner = Learner(self.agent, state, self.replay, config.run.batch_size, self.watch)
        self.evaluator = Evaluator(config, self.agent, run_key, self._make_env, self._evaluation_fault)
        self.evaluator.rounds = meta.get("evaluations", 0)
        collecting = None if progress is None else self._go_on(progress)
        self.collector: Collector | None = None
        if config.run.collect:
            self.collector = Collector(
                self.agent, self.envs, run_key, "policy", on_fault=self._training_fault, state=collecting
            )
            self.collector.counter = self.agent_steps // self.envs.num_envs
            if collecting is None and config.log.videos:
                self.collector.record()
        save_config(config, self.logdir / CONFIG_FILE)
        title = f"Resuming at agent step {self.agent_steps:,}" if resuming else "Training"
        self.console.print(start_summary(title, summary_rows(config, self.agent, state, self.replay, self.envs)))

    @property
    def steps(self) -> Steps:
        return Steps(self.agent_steps, self.agent_steps * self.config.repeat, self.updates)

    def loop(self, stop: StopRequest) -> None:
        """Until `run.agent_steps`, a request to stop, or too many failures of environments."""
        self.stop = stop
        run, watch, start = self.config.run, self.watch, self.agent_steps
        due_log, due_report = Every(run.log_every, start), Every(run.report_every, start)
        due_eval, due_video = Every(run.eval_every, start), Every(self.config.log.video_every, start)
        self.due_save = SaveTimer(start, run.checkpoint_every, run.checkpoint_minutes)
        with self.display:
            while self.agent_steps < run.agent_steps and not stop and not self.failed:
                if self.collector is not None:
                    self._act(self.collector)
                self.agent_steps += self.envs.num_envs
                self._update()
                if self.collector is not None:
                    self._wait(self.collector, due_video)
                with watch.section("log"):
                    if due_log(self.agent_steps):
                        self._log_metrics()
                    self.display.update(self.steps, "" if self.schedule.started else "filling replay")
                if due_report(self.agent_steps) and self.config.log.videos:
                    self.report()
                if due_eval(self.agent_steps):
                    self.evaluate()
                self._try_saving(self.checkpointer.poll)
                if self.due_save(self.agent_steps):
                    self.save()
            if not stop and not self.failed:
                self.learner.settle()
                self._log_metrics()
            self.save()
        if not stop and not self.failed:
            self._finish()

    def _act(self, collector: Collector) -> None:
        """Choose actions, send them off, store the steps."""
        try:
            with self.watch.section("act"):
                step = collector.act(self.learner.params)
        except NonFiniteActionError:
            # An update that is still under way may have broken the weights: then that is what to tell.
            self.learner.settle()
            raise
        with self.watch.section("replay"):
            self.replay.add(step)
        self.watch.count(policy=self.envs.num_envs)

    def _wait(self, collector: Collector, due_video: Every) -> None:
        """Take the next observations and the episodes that have ended."""
        try:
            with self.watch.section("env"):
                episodes = collector.wait()
        except EnvError as error:  # An environment that could not be made anew, time after time.
            self.failed = str(error)
            return
        with self.watch.section("log"):
            self._log_episodes(episodes)
            if due_video(self.agent_steps) and self.config.log.videos:
                collector.record()

    def _update(self) -> None:
        """Dispatch the updates that are due."""
        run = self.config.run
        if not self.schedule.started and self.replay.starts >= run.batch_size * run.batch_length:
            self.schedule.start(self.agent_steps)
        for _ in range(self.schedule.due(self.agent_steps)):
            self.metrics.add(self.learner.update(), "train/")
            self.schedule.done()
            self.updates += 1
            self.watch.count(train=run.batch_size * run.batch_length)

    def _log_episodes(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            self.logger.episode(self.steps, episode.score, episode.length)
            self.display.episode(episode.score)
            self.metrics.add({"score": episode.score, "length": episode.length}, "episode/mean_")
            self.metrics.add(episode.logs, "episode/")
            if episode.frames:
                self.logger.video(self.steps, "episode/video", np.stack(episode.frames))

    def _training_fault(self, fault: Fault) -> None:
        """An environment failed and begins a new episode: the one that was cut is stored as abandoned."""
        self.replay.abandon([fault.env])
        self._evaluation_fault(fault)

    def _evaluation_fault(self, fault: Fault) -> None:
        self.metrics.add({"env/failures_sum": 1})
        text = f"environment {fault.env} {fault.kind} and was started anew: {fault.message}\n{fault.traceback}"
        self.console.print(f"[bold red]{self.config.task}[/]", escape(text), soft_wrap=True)
        try:
            self.faults.add(fault)
        except EnvError as error:
            self.failed = str(error)

    def _log_metrics(self) -> None:
        stats = {f"replay/{name}": value for name, value in self.replay.stats().items()}
        times = self.watch.result()
        self.display.times(times)
        self.logger.scalars(self.steps, {**self.metrics.result(), **stats, **times})

    def report(self) -> None:
        """Write the open-loop dream video and its errors."""
        if self.learner.batch is None:
            return
        with self.watch.section("report"):
            videos, errors = open_loop_report(self.agent, self.learner.state, self.learner.batch)
            self.logger.scalars(self.steps, errors)
            for name, frames in videos.items():
                self.dream_video = self.logger.video(self.steps, name, frames)

    def evaluate(self) -> list[float]:
        """Play evaluation episodes, log them, keep the weights if they are the best so far.

        Returns the scores; none if the run was asked to stop meanwhile.
        """
        with self.watch.section("eval"):
            self.learner.settle()
            episodes = self.evaluator(self.learner.params, self._evaluating)
        if self.stop:
            return []
        scores = [episode.score for episode in episodes]
        mean, best = float(np.mean(scores)), self.checkpointer.best_score()
        values = {"eval/score": mean, "eval/score_std": float(np.std(scores))}
        further = as_evaluation(self.config, scores, [episode.logs for episode in episodes]).further
        values |= {f"eval/{name}": value for name, value in further.items()}
        self.logger.scalars(self.steps, values | {"eval/length": float(np.mean([e.length for e in episodes]))})
        if np.isfinite(mean) and (best is None or mean >= best):
            weights, meta = {"params": self.learner.params}, {"agent_steps": self.agent_steps}
            self._try_saving(lambda: self.checkpointer.save_best(mean, weights, meta))
        return scores

    def _evaluating(self) -> bool:
        """Between two steps of an evaluation; whether to give it up."""
        self.display.update(self.steps, "evaluating")
        return bool(self.stop)

    def save(self) -> None:
        """Save a checkpoint in the background. It changes no number: what is on its way stays so."""
        with self.watch.section("checkpoint"):
            files = pack_progress(self.learner, self.collector, self.metrics, self.envs, self.evaluator)
            meta = {
                "agent_steps": self.agent_steps,
                "updates": self.updates,
                "restarts": self.restarts,
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
            state, replay = self.learner.state, self.replay
            self._try_saving(lambda: self.checkpointer.save(self.agent_steps, state, meta, replay, files))

    def _try_saving(self, save: Callable[[], object]) -> None:
        """A disk that refuses is reported, training goes on, and the checkpoint is tried again soon."""
        try:
            save()
        except CheckpointError as error:
            self.console.print(f"[bold red]checkpoint failed:[/] {escape(str(error))}", soft_wrap=True)
            self.due_save.failed()

    def _begin(self, preload: Preload | None) -> tuple[Any, dict[str, Any], None]:
        """(fresh training state, no meta data, no progress); what an attempt that left no checkpoint has recorded is
        forgotten."""
        self.logger.truncate(dict.fromkeys(self.logger.offsets(), 0), self.steps)
        if preload is not None:
            self.console.print(f"data to begin with: {preload.fill(self.replay)}", soft_wrap=True)
        return warm_start(self.config, self.agent.init(self.config.seed)), {}, None

    def _restore(self) -> tuple[Any, dict[str, Any], Progress]:
        """(training state, meta data, progress) of the newest checkpoint; counters, replay and log files go on from
        there."""
        template = jax.eval_shape(self.agent.init, 0)
        found: list[Progress] = []

        def load(meta: dict[str, Any], folder: Path) -> None:
            self.replay.load(self.checkpointer.replay_folder, meta["replay"])
            found[:] = [read_progress(folder)]

        _, state, meta = self.checkpointer.restore(template, check=load)
        self.agent_steps, self.updates = meta["agent_steps"], meta["updates"]
        changed = meta["train_ratio"] != self.config.run.train_ratio
        self.schedule.restore(meta["schedule"], self.agent_steps, changed)
        self.display.restore(meta["episodes"])
        self.logger.truncate(meta["offsets"], self.steps)
        self.checkpointer.forget_best_after(self.agent_steps)
        if surroundings := changed_surroundings(meta["versions"]):
            text = "; ".join(surroundings)
            self.console.print(f"[yellow]not the surroundings of the checkpoint[/], so last digits may differ: {text}")
        return jax.device_put(state), meta, found[0]

    def _go_on(self, progress: Progress) -> Mapping[str, Any] | None:
        """Learner, statistics and environments go on from a checkpoint. Returns the collector's state, or None where
        the environments begin anew: then the episodes that were cut are stored as abandoned."""
        self.learner.restore(progress.loop["learner"])
        self.metrics.restore(progress.loop["metrics"])
        saved = progress.environments
        if saved is not None and can_be_put_back(self.envs):
            if saved["training"] is not None:
                self.envs.set_state(saved["training"])
            self.evaluator.restore(saved["evaluation"])
            return progress.loop["collector"]
        if saved is not None:  # They could be saved then, but not put back now: same seeds would repeat themselves.
            self.envs.close()
            self.restarts += 1
            self.envs = training_envs(self.config, self.restarts, self._make_env)
        if self.config.run.collect:
            self.replay.close_open_episodes()
        return None

    def _finish(self) -> None:
        """What a person wants to see at the end."""
        self.report()
        if self.config.run.final_eval and (scores := self.evaluate()):
            self.console.print(evaluation_table([as_evaluation(self.config, scores)]))
        if self.dream_video is not None:
            self.console.print(f"dream video: {self.dream_video}", soft_wrap=True)
        if self.config.log.tensorboard:
            viewer = Path(sys.executable).with_name("tensorboard")
            self.console.print(f"curves and videos: {viewer} --logdir {self.logdir}", soft_wrap=True)

    def close(self) -> None:
        """Give everything back."""
        self._try_saving(self.checkpointer.wait)
        self.logger.close()
        self.envs.close()
        self.evaluator.close()
