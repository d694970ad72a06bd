"""The training loop: act, dispatch the updates that are due, step the environments while the device works."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from dreamer.config import Config
from dreamer.envs import EnvError
from dreamer.envs.vector import MakeEnv
from dreamer.presets import check_resume, stored_config
from dreamer.runtime.collect import Collector, Episode
from dreamer.runtime.devices import keep_compiled_programs, reuse_freed_memory
from dreamer.runtime.display import evaluation_table
from dreamer.runtime.evaluate import as_evaluation
from dreamer.runtime.lock import LogdirLock
from dreamer.runtime.nonfinite import NonFiniteActionError, NonFiniteError
from dreamer.runtime.parts import RunParts
from dreamer.runtime.report import open_loop_report
from dreamer.runtime.schedule import Every
from dreamer.runtime.setup import (
    name_own_task,
    resolve_logdir,
)
from dreamer.runtime.signals import StopRequest

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


class Run(RunParts):
    """One run: the loop over its parts."""

    def loop(self, stop: StopRequest) -> None:
        """Until `run.agent_steps`, a request to stop, or too many failures of environments."""
        self.stop = stop
        run, watch, start = self.config.run, self.watch, self.agent_steps
        due_log, due_report = Every(run.log_every, start), Every(run.report_every, start)
        due_eval, due_video = Every(run.eval_every, start), Every(self.config.log.video_every, start)
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
        for count, following in self.schedule.dispatches(self.agent_steps, self.envs.num_envs):
            self.metrics.add(self.learner.update(count, following), "train/")
            self.updates += count
            self.watch.count(train=count * run.batch_size * run.batch_length)

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
