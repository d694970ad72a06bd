"""The training loop: act, dispatch the updates that are due, step the environments while the device works."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dreamer.config import Config
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
from dreamer.runtime.provenance import versions
from dreamer.runtime.report import open_loop_report
from dreamer.runtime.schedule import Every, UpdateSchedule
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


def train(config: Config, make_env: MakeEnv | None = None) -> int:
    """Run, or resume, the training that `config` describes; returns the exit code.

    make_env: ``(index, seed) -> environment``, a Gymnasium or `dreamer.envs.Env` one, instead of `config.task`.
    0: reached the end or was asked to stop (a checkpoint is saved); 3: a loss or an action was not finite.
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
        if stop:
            again = f"dreamer train --logdir {shlex.quote(str(logdir))}"
            console.print(f"\nstopped; go on with: {again if make_env is None else 'the same call'}", soft_wrap=True)
    return 0


class Run:
    """One run: its parts, its counters, and the loop."""

    def __init__(self, config: Config, make_env: MakeEnv | None, console: Console) -> None:
        self.config, self.logdir, self.console = config, Path(config.logdir), console
        self.checkpointer = Checkpointer(self.logdir, config.run.checkpoint_keep, config.run.checkpoint_milestones)
        resuming = self.checkpointer.latest() is not None
        self.restarts = self._next_restart() if resuming else 0
        self.envs = training_envs(config, self.restarts, make_env)
        try:
            self._build(make_env, resuming)
        except BaseException:
            self.envs.close()
            raise

    def _build(self, make_env: MakeEnv | None, resuming: bool) -> None:
        config = self.config
        self.agent = make_agent(config, self.envs.observation_spaces, self.envs.action_spaces)
        self.replay = make_replay(config, self.agent)
        self.schedule = UpdateSchedule(config.run.train_ratio, config.run.batch_size, config.run.batch_length)
        self.logger = Logger(self.logdir, config.log.jsonl, config.log.tensorboard, config.log.video_fps)
        self.agent_steps = self.updates = 0
        self.dream_video: Path | None = None
        self.metrics, self.watch = Aggregator(), Stopwatch()
        self.display = Display(config.task, config.run.agent_steps, live=config.run.display, console=self.console)
        state, meta = self._restore() if resuming else self._begin()
        run_key = np.asarray(state["key"])
        self.learner = Learner(self.agent, state, self.replay, config.run.batch_size)
        self.learner.prefetch(meta.get("next_batch"))
        self.collector = Collector(self.agent, self.envs, run_key, "policy")
        self.collector.counter = self.agent_steps // self.envs.num_envs
        self.evaluator = Evaluator(config, self.agent, run_key, make_env)
        self.evaluator.rounds = meta.get("evaluations", 0)
        save_config(config, self.logdir / CONFIG_FILE)
        title = f"Resuming at agent step {self.agent_steps:,}" if resuming else "Training"
        self.console.print(start_summary(title, summary_rows(config, self.agent, state, self.replay, self.envs)))

    @property
    def steps(self) -> Steps:
        return Steps(self.agent_steps, self.agent_steps * self.config.repeat, self.updates)

    def loop(self, stop: StopRequest) -> None:
        """Until `run.agent_steps` or a request to stop."""
        self.stop = stop
        run, watch, start = self.config.run, self.watch, self.agent_steps
        due_log, due_report = Every(run.log_every, start), Every(run.report_every, start)
        due_eval, due_save = Every(run.eval_every, start), Every(run.checkpoint_every, start)
        due_video = Every(self.config.log.video_every, start)
        saved_at = time.monotonic()
        if self.config.log.videos:
            self.collector.record()
        with self.display:
            while self.agent_steps < run.agent_steps and not stop:
                with watch.section("act"):
                    step = self._act()
                with watch.section("replay"):
                    self.replay.add(step)
                self.agent_steps += self.envs.num_envs
                watch.count(policy=self.envs.num_envs)
                self._update()
                with watch.section("env"):
                    episodes = self.collector.wait()
                with watch.section("log"):
                    self._log_episodes(episodes)
                    if due_video(self.agent_steps) and self.config.log.videos:
                        self.collector.record()
                    if due_log(self.agent_steps):
                        self._log_metrics()
                    self.display.update(self.steps, "" if self.schedule.started else "filling replay")
                if due_report(self.agent_steps) and self.config.log.videos:
                    self.report()
                if due_eval(self.agent_steps):
                    self.evaluate()
                if due_save(self.agent_steps) or time.monotonic() - saved_at > 60 * run.checkpoint_minutes:
                    self.save()
                    saved_at = time.monotonic()
            self.learner.settle()
            self._log_metrics()
            self.save()
        if not stop:
            self._finish()

    def _act(self) -> dict[str, np.ndarray]:
        try:
            return self.collector.act(self.learner.params)
        except NonFiniteActionError:
            # An update that is still under way may have broken the weights: then that is what to tell.
            self.learner.settle()
            raise

    def _update(self) -> None:
        """Dispatch the updates that are due."""
        run = self.config.run
        if not self.schedule.started and self.replay.starts >= run.batch_size * run.batch_length:
            self.schedule.start(self.agent_steps)
        for _ in range(self.schedule.due(self.agent_steps)):
            with self.watch.section("update"):
                metrics = self.learner.update()
            self.metrics.add(metrics, "train/")
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

    def _log_metrics(self) -> None:
        stats = {f"replay/{name}": value for name, value in self.replay.stats().items()}
        self.logger.scalars(self.steps, {**self.metrics.result(), **stats, **self.watch.result()})

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
        """Save a checkpoint in the background."""
        with self.watch.section("checkpoint"):
            self.learner.settle()
            meta = {
                "agent_steps": self.agent_steps,
                "updates": self.updates,
                "restarts": self.restarts,
                "schedule": self.schedule.state(),
                "train_ratio": self.config.run.train_ratio,
                "observations": spaces_to_json(self.agent.observations),
                "actions": spaces_to_json(self.agent.actions),
                "next_batch": self.learner.prefetched(),
                "evaluations": self.evaluator.rounds,
                "episodes": self.display.state(),
                "offsets": self.logger.offsets(),
                "versions": versions(),
            }
            self._try_saving(lambda: self.checkpointer.save(self.agent_steps, self.learner.state, meta, self.replay))

    def _try_saving(self, save: Callable[[], None]) -> None:
        """A disk that refuses is reported, and training goes on."""
        try:
            save()
        except CheckpointError as error:
            self.console.print(f"[bold red]checkpoint failed:[/] {error}", soft_wrap=True)

    def _begin(self) -> tuple[Any, dict[str, Any]]:
        """(fresh training state, no meta data); what an attempt that left no checkpoint has recorded is forgotten."""
        self.logger.truncate(dict.fromkeys(self.logger.offsets(), 0), self.steps)
        return warm_start(self.config, self.agent.init(self.config.seed)), {}

    def _restore(self) -> tuple[Any, dict[str, Any]]:
        """(training state, meta data) of the newest checkpoint; counters, replay and log files go on from there."""
        template = jax.eval_shape(self.agent.init, 0)
        folder = self.checkpointer.replay_folder

        load_replay = lambda meta: self.replay.load(folder, meta["replay"])  # noqa: E731
        _, state, meta = self.checkpointer.restore(template, check=load_replay)
        self.agent_steps, self.updates = meta["agent_steps"], meta["updates"]
        changed = meta["train_ratio"] != self.config.run.train_ratio
        self.schedule.restore(meta["schedule"], self.agent_steps, changed)
        self.replay.close_open_episodes()
        self.display.restore(meta["episodes"])
        self.logger.truncate(meta["offsets"], self.steps)
        return jax.device_put(state), meta

    def _next_restart(self) -> int:
        return int(self.checkpointer.restore(parts=())[2]["restarts"]) + 1

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
