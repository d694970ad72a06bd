"""The training loop: act, dispatch the updates that are due, step the environments while the device works."""

from __future__ import annotations

import abc
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer import transfer
from dreamer.envs import EnvError, TaskError
from dreamer.envs.interface import Batch
from dreamer.paths import brief
from dreamer.records.display import Display, evaluation_table
from dreamer.records.meters import Packed
from dreamer.run.collector import Episode
from dreamer.run.components import RunComponents
from dreamer.run.evaluate import as_evaluation
from dreamer.run.reports import make_report
from dreamer.run.schedule import Every
from dreamer.run.shares import share
from dreamer.run.signals import StopRequest


class Loop(abc.ABC):
    """The training loop. Subclasses say what each of its steps is: for one run, for the runs of many seeds at once, or
    for one of the processes that share a run."""

    display: Display

    def loop(self, stop: StopRequest) -> None:
        """Runs until `run.agent_steps`, a request to stop, or too many failures of environments."""
        self.begin(stop)
        with self.display:
            while self.agree():
                self.act()
                self.update()
                self.wait()
                self.record(self.saves())
            self.settle()
        self.finish()

    @abc.abstractmethod
    def begin(self, stop: StopRequest) -> None:
        """Before the first step: say what will run."""

    @abc.abstractmethod
    def agree(self) -> bool:
        """Whether there is another step, the same answer for all who take part in it."""

    @abc.abstractmethod
    def act(self) -> None:
        """Choose actions, send them off, store the steps."""

    @abc.abstractmethod
    def update(self) -> None:
        """Dispatch the updates that are due."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Take the next observations and the episodes that ended."""

    @abc.abstractmethod
    def saves(self) -> bool:
        """Whether it is time for a checkpoint."""

    @abc.abstractmethod
    def record(self, save: bool) -> None:
        """Log, report and evaluate when it is time to; save if asked to."""

    @abc.abstractmethod
    def settle(self) -> None:
        """After the last step: write everything down."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Show what a person wants to see at the end, unless the run ended early."""


class Run(RunComponents, Loop):
    """One run: the loop over its components."""

    def begin(self, stop: StopRequest) -> None:
        self.console.print(self.summary)
        self.heed(stop)

    def heed(self, stop: StopRequest) -> None:
        """Count intervals from here, and end at this request."""
        run, start = self.config.run, self.agent_steps
        self.stop = stop
        self._due_log, self._due_report = Every(run.log_every, start), Every(run.report_every, start)
        self._due_eval, self._due_video = Every(run.eval_every, start), Every(self.config.log.video_every, start)

    @property
    def going(self) -> bool:
        return self.agent_steps < self.config.run.agent_steps and not self.stop and not self.failed

    def agree(self) -> bool:
        return self.going

    def act(self) -> None:
        if self.collector is not None:
            with self.watch.section("act"):
                # The actions wait for the newest weights; what else those updates returned is read with them.
                chosen = self.collector.choose(self.learner.params)
                (action, extras), arrived = transfer.read((chosen, self.learner.under_way()))
                self.learner.arrived(arrived)
                step = self.collector.send(action, extras)
            self.startup.mark("first action", once=True)
            self.store(step)
        self.agent_steps += self.stride

    def store(self, step: Batch) -> None:
        """Put what the collector returned into replay."""
        with self.watch.section("replay"):
            self.replay.add(step)
        self.watch.count(policy=self.stride)

    def wait(self) -> None:
        collector = self.collector
        if collector is None:
            return
        try:
            with self.watch.section("env"):
                episodes = collector.wait()
        except EnvError as error:  # An environment could not be recreated, time after time.
            self.failed = str(error)
            return
        with self.watch.section("log"):
            self._log_episodes(episodes)
            if self._due_video(self.agent_steps) and self.config.log.videos:
                collector.record()

    def saves(self) -> bool:
        return self.due_save(self.agent_steps)

    def record(self, save: bool) -> None:
        with self.watch.section("log"):
            if self._due_log(self.agent_steps):
                self._log_metrics()
            self.display.update(self.steps, "" if self.schedule.started else "filling replay")
        if self._due_report(self.agent_steps):
            self.report()
        if self._due_eval(self.agent_steps):
            self.evaluate()
        self.try_saving(self.checkpointer.poll)
        if save:
            self.save()

    def settle(self) -> None:
        if not self.stop and not self.failed:
            try:
                self.faults.check_end(self.display.episodes)
            except EnvError as error:
                self.failed = str(error)
        if not self.stop and not self.failed:
            self.learner.settle()
            self._log_metrics()
        self.save()

    def update(self) -> None:
        if not self.schedule.started and self.filled:
            self.schedule.start(self.agent_steps)
            self.startup.mark("filling replay")
        for count, following in self.schedule.dispatches(self.agent_steps, self.stride):
            self.updated(count, self.learner.update(count, following))

    @property
    def filled(self) -> bool:
        """Whether replay holds enough to begin training."""
        return self.replay.starts >= share(self.config.run.batch_size) * self.config.run.batch_length

    def updated(self, count: int, metrics: Mapping[str, Any] | Packed) -> None:
        """`count` updates are on their way, with these metrics."""
        self.metrics.add(metrics, "train/")
        self.updates += count
        if told := self.startup.finish("first update"):
            self.console.print(told)
        self.watch.count(train=count * self.config.run.batch_size * self.config.run.batch_length)

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
        system = {f"system/{name}": value for name, value in self.system.result().items()}
        self.logger.scalars(self.steps, {**self.metrics.result(), **stats, **times, **system})

    def report(self) -> None:
        """Record how good the world model is: numbers, dream videos, the health page."""
        batch, log = self.learner.batch, self.config.log
        if batch is None:
            return
        with self.watch.section("report"):
            recent = self.replay.newest(len(batch["is_first"])) if self.collector is not None else None
            newest = None if recent is None else self.replay.gather(recent)
            state = self.agent.devices.one_copy(self.learner.state)
            found = make_report(self.agent, state, batch, newest, self.learner.metrics)
            self.logger.scalars(self.steps, found.scalars)
            if log.videos:
                self.logger.page(self.steps, "report/health", found.page)
                for name, draw in found.videos.items():
                    self.dream_video = self.logger.video(self.steps, name, draw)

    def evaluate(self) -> list[float]:
        """Play evaluation episodes, log them, keep the weights if they are the best so far.

        Returns the scores; none if the run was asked to stop meanwhile, or if the environments failed for good.
        """
        with self.watch.section("eval"):
            self.learner.settle()
            try:
                episodes = self.evaluator(self.learner.params, self._evaluating)
            except (EnvError, TaskError) as error:
                self.failed = f"evaluation: {error}"
        if self.stop or self.failed:
            return []
        scores = [episode.score for episode in episodes]
        mean, best = float(np.mean(scores)), self.checkpointer.best_score()
        values = {"eval/score": mean, "eval/score_std": float(np.std(scores))}
        further = as_evaluation(self.config, scores, [episode.logs for episode in episodes]).further
        values |= {f"eval/{name}": value for name, value in further.items()}
        self.logger.scalars(self.steps, values | {"eval/length": float(np.mean([e.length for e in episodes]))})
        if np.isfinite(mean) and (best is None or mean >= best):
            params = self.agent.devices.one_copy(self.learner.params)
            weights, meta = {"params": params}, {"agent_steps": self.agent_steps}
            self.try_saving(lambda: self.checkpointer.save_best(mean, weights, meta))
        return scores

    def _evaluating(self) -> bool:
        """Called between two steps of an evaluation; returns whether to abort it."""
        self.display.update(self.steps, "evaluating")
        return bool(self.stop)

    def finish(self) -> None:
        if self.stop or self.failed:
            return
        if self.config.run.report_every is not None:
            self.report()
        if self.config.run.final_eval and (scores := self.evaluate()):
            self.console.print(evaluation_table([as_evaluation(self.config, scores)]))
        if self.dream_video is not None:
            self.console.print(f"dream video: {self.dream_video}")
        if self.config.log.tensorboard:
            viewer, folder = Path(sys.executable).with_name("tensorboard"), brief(self.logdir)
            shown = shlex.quote(folder) if " " in folder else folder
            self.console.print(f"curves and videos: {viewer} --logdir {shown}")
