"""How good an agent is: episodes in separate environments, during a run or from its logdir."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.agent import Agent, seed_key
from dreamer.config import Config
from dreamer.envs import EnvError, TaskError, VectorEnv, best_score, human_normalized, summary
from dreamer.envs.interface import Fault
from dreamer.envs.vector import MakeEnv
from dreamer.paths import absolute, check_file
from dreamer.presets import run_config
from dreamer.process import unfailing_output
from dreamer.records.display import Evaluation, evaluation_table
from dreamer.records.video import save_gif
from dreamer.run.collector import Collector, Episode, run_episodes
from dreamer.run.factories import check_spaces_as_trained, evaluation_envs, is_listed
from dreamer.run.loaded_agent import load_agent
from dreamer.run.promises import Promises
from dreamer.terminal import Console


class Evaluator:
    """Evaluation inside a run: environments are made at the first evaluation and reused."""

    def __init__(
        self,
        config: Config,
        agent: Agent,
        run_key: np.ndarray,
        make_env: MakeEnv | None,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        """on_fault: called for failed environments, whose episodes do not count. None: a failure is an EnvError."""
        self._config, self._agent, self._key, self._make_env = config, agent, run_key, make_env
        self._on_fault = on_fault
        self._envs: VectorEnv | None = None
        self._states: list[bytes] | None = None
        #: Evaluations so far; each draws different actions.
        self.rounds = 0

    def __call__(self, params: Any, on_step: Callable[[], bool] | None = None) -> list[Episode]:
        """Play `run.eval_episodes` episodes with these weights; fewer if `on_step` returns True to stop.

        EnvError or TaskError if environments cannot be made, or not recreated after they failed.
        """
        run = self._config.run
        if self._envs is None:
            self._envs = evaluation_envs(self._config, self._make_env, min(run.eval_envs, run.eval_episodes))
            if self._states is not None and len(self._states) == self._envs.num_envs:
                with contextlib.suppress(EnvError):  # A new episode begins in environments that could not be restored.
                    self._envs.set_state(self._states)
        sample = run.eval_policy == "sample"
        collector = Collector(self._agent, self._envs, self._key, "eval", sample, self._on_fault)
        # Rounds draw different actions; a million counts for each keep them apart.
        collector.counter = self.rounds * 1_000_000
        self.rounds += 1
        return run_episodes(collector, params, run.eval_episodes, on_step)

    def state(self) -> list[bytes] | None:
        """State of each environment; None: there are none yet, or they cannot save it."""
        if self._envs is None:
            return self._states
        return self._envs.get_state() if self._envs.restorable else None

    def restore(self, states: list[bytes] | None) -> None:
        """Let the environments, when they are made, continue from these states."""
        self._states = states

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()


def as_evaluation(config: Config, scores: list[float], logs: Sequence[Mapping[str, float]] = ()) -> Evaluation:
    """Scores with what is known about the task (nothing for a user's own environment). logs: of the same episodes."""
    further: Mapping[str, float] = {}
    try:
        further = summary(config.task, logs)
        best = best_score(config.task, config.env)
        human = human_normalized(config.task, float(np.mean(scores)))
    except TaskError:
        best = human = None
    return Evaluation(config.task, scores, best, human, further)


@unfailing_output()
def evaluate_run(
    logdir: Path | str,
    episodes: int,
    video: Path | str | None = None,
    policy: str = "mode",
    seed: int | None = None,
    make_env: MakeEnv | None = None,
    console: Console | None = None,
    planner: Mapping[str, Any] | None = None,
) -> int:
    """`dreamer eval`: load weights, play, print a table, write a video if asked to. Returns the exit code.

    planner: options of the group `planner` by dotted name, in place of the run's own.
    """
    console = console or Console()
    config = run_config(logdir, planner)
    picture = None if video is None else absolute(video)
    if picture is not None:
        check_file(picture)
    if make_env is None and not is_listed(config.task):
        raise TaskError(
            f"the run in {logdir} was trained with an environment function of its own (task {config.task!r}); play it "
            f"from Python: dreamer.run.evaluate.evaluate_run({str(logdir)!r}, {episodes}, make_env=FUNCTION)"
        )
    agent, params, key = load_agent(config)
    if seed is not None:
        key = seed_key(seed)
    envs = evaluation_envs(config, make_env, min(config.run.eval_envs, episodes), seed)
    try:
        check_spaces_as_trained(agent, envs)
        collector = Collector(agent, envs, key, "eval", sample=policy == "sample")
        if picture is not None:
            collector.record()
        promises = Promises(agent)
        played = run_episodes(collector, params, episodes, on_transition=lambda step: promises.see(step, params))
    finally:
        envs.close()
    scores = [episode.score for episode in played]
    console.print(evaluation_table([as_evaluation(config, scores, [episode.logs for episode in played])]))
    for who, gap in promises.gaps().items():
        console.print(f"{who}: {gap}")
    frames = next((np.stack(e.frames) for e in played if e.frames), None)
    if picture is not None and frames is not None:
        console.print(f"video: {save_gif(picture, frames, config.log.video_fps)}")
    elif picture is not None:
        console.print(f"no video: {config.task} gives no images")
    return 0
