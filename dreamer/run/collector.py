"""Acting in environments: the policy's carry, episode statistics, and episodes for evaluation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamer import transfer
from dreamer.agent import Agent, stream_key
from dreamer.envs import EnvError, VectorEnv
from dreamer.envs.faults import place
from dreamer.envs.interface import Batch, Fault
from dreamer.records.video import reduced
from dreamer.run.nonfinite import NonFiniteActionError, not_finite
from dreamer.types import LOG_PREFIX, TRANSITION_FIELDS, UNSCALED_REWARD, visible

#: Most frames of a recorded episode.
VIDEO_FRAMES = 600
#: Steps without the end of an episode that are worth a word: more than the time limits of the presets' tasks.
ENDLESS = 100_000


@dataclasses.dataclass
class Episode:
    """A finished episode: undiscounted sum of unscaled rewards, number of actions, mean and maximum over its steps of
    each `log/` key, frames if recorded."""

    env: int
    score: float
    length: int
    logs: dict[str, float]
    frames: list[np.ndarray]


class Collector:
    """N environments and the policy that acts in them.

    One step is split so that the caller can read other numbers together with the actions, and dispatch updates while
    the environments step::

        chosen = collector.choose(params)            actions for the current observations, still on the device
        transition = collector.send(*read(chosen))   send them off; `act` does both
        ...                                          the environments step, the device works
        episodes = collector.wait()                  the next observations are there
    """

    def __init__(
        self,
        agent: Agent,
        envs: VectorEnv,
        run_key: np.ndarray,
        stream: str,
        sample: bool = True,
        on_fault: Callable[[Fault], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """sample: False takes the most likely actions. on_fault: called for every environment that failed and now
        begins a new episode; None: a failure is an EnvError. state: continue from there, environments included.
        """
        self.envs = envs
        self._agent = agent
        self._key = jax.jit(lambda counter: stream_key(run_key, stream, counter)) if sample else None
        self._on_fault = on_fault or _refuse
        self.counter = 0
        self._visible = list(visible(envs.observation_spaces))
        self._logged = [key for key in envs.observation_spaces if key.startswith(LOG_PREFIX)]
        self._frames: list[np.ndarray] = []
        self._wanted = self._recording = False
        if state is None:
            self._begin()
        else:
            self._restore(state)

    def _begin(self) -> None:
        count = self.envs.num_envs
        self.carry = self._agent.init_policy(count)
        self._obs = self.envs.reset()
        self._scores, self._lengths = np.zeros(count), np.zeros(count, int)
        self._log_sum = {key: np.zeros(count) for key in self._logged}
        self._log_max = {key: np.zeros(count) for key in self._logged}
        self._account()

    def state(self) -> dict[str, Any]:
        """Everything that the next action and the running statistics depend on: host arrays in plain containers.

        A recording starts over with the next episode.
        """
        return {
            "counter": self.counter,
            "carry": transfer.read(self.carry),
            "obs": self._obs,
            "scores": self._scores,
            "lengths": self._lengths,
            "log_sum": self._log_sum,
            "log_max": self._log_max,
            "wanted": self._wanted or self._recording,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.counter, self._wanted = state["counter"], state["wanted"]
        # A copy: the policy donates its carry.
        self.carry = jax.tree.map(jnp.array, state["carry"])
        self._obs = state["obs"]
        self._scores, self._lengths = state["scores"], state["lengths"]
        self._log_sum, self._log_max = dict(state["log_sum"]), dict(state["log_max"])

    def act(self, params: Any) -> Batch:
        """Choose actions and start stepping; returns what replay stores, as `send`."""
        return self.send(*transfer.read(self.choose(params)))

    def choose(self, params: Any) -> tuple[Any, Any]:
        """Actions by name and policy extras, on the device."""
        key = None if self._key is None else self._key(self.counter)
        self.carry, action, extras = self._agent.policy(params, self.carry, self.seen, key)
        return action, extras

    @property
    def seen(self) -> Batch:
        """What the policy looks at."""
        return {k: self._obs[k] for k in (*self._visible, "is_first")}

    def send(self, action: Batch, extras: Batch) -> Batch:
        """Start stepping with what was chosen. Returns what replay stores: transition, action and policy extras."""
        seen = self.seen
        self.counter += 1
        # The policy's outputs show an observation that is not finite a step later at the earliest.
        if not_finite({**seen, **action, **extras}):
            raise NonFiniteActionError(self.counter * self.envs.num_envs, {**seen, **action, **extras})
        if self._recording:
            self._add_frame()
        self.envs.step_async(action)
        return {**{k: self._obs[k] for k in (*self._visible, *TRANSITION_FIELDS)}, **action, **extras}

    def wait(self) -> list[Episode]:
        """Take the next observations; returns the episodes that ended with them."""
        self._obs = self.envs.step_wait()
        for fault in self.envs.take_faults():
            if fault.env == 0 and self._recording:
                self._wanted, self._recording, self._frames = True, False, []
            self._on_fault(fault)
        self._account()
        self._begin_recording()
        return [self._finished(int(i)) for i in np.flatnonzero(self._obs["is_last"])]

    def _account(self) -> None:
        """Count the current observations in the statistics of their episodes."""
        obs, first = self._obs, self._obs["is_first"]
        self._scores = np.where(first, 0.0, self._scores) + obs.get(UNSCALED_REWARD, obs["reward"])
        self._lengths = np.where(first, 0, self._lengths + 1)
        for key in self._logged:
            value = obs[key].reshape(len(first), -1).sum(-1)
            self._log_sum[key] = np.where(first, 0.0, self._log_sum[key]) + value
            self._log_max[key] = np.where(first, value, np.maximum(self._log_max[key], value))

    def record(self) -> None:
        """Record the first environment's next episode, or this one if it has just begun."""
        self._wanted = True
        self._begin_recording()

    def _begin_recording(self) -> None:
        if self._wanted and self._obs["is_first"][0]:
            self._wanted, self._recording, self._frames = False, True, []

    def _add_frame(self) -> None:
        frame = self.envs.render() if len(self._frames) < VIDEO_FRAMES else None
        if frame is not None:
            self._frames.append(reduced(frame))

    def _finished(self, index: int) -> Episode:
        frames: list[np.ndarray] = []
        if index == 0 and self._recording:
            self._add_frame()
            frames, self._frames, self._recording = self._frames, [], False
            if len({frame.shape for frame in frames}) > 1:
                frames = []  # pictures of several sizes make no video
        steps = int(self._lengths[index])
        logs: dict[str, float] = {}
        for key in self._logged:
            name = key.removeprefix(LOG_PREFIX)
            logs[f"{name}/mean"] = float(self._log_sum[key][index]) / (steps + 1)
            logs[f"{name}/max"] = float(self._log_max[key][index])
        return Episode(index, float(self._scores[index]), steps, logs, frames)


def _refuse(fault: Fault) -> None:
    raise EnvError(
        f"expected environments that play to the end, got {fault.message} ({place(fault.traceback)}); correct them"
    )


def run_episodes(
    collector: Collector,
    params: Any,
    count: int,
    on_step: Callable[[], bool] | None = None,
    on_transition: Callable[[Batch], None] | None = None,
) -> list[Episode]:
    """Play `count` episodes, fewer if `on_step`, called after each step, returns True to stop.

    on_transition: called with what each step was, as `Collector.send` returns it, and with that at which the last
    episode ended.

    Every environment plays the same number, so short episodes are not over-represented. RuntimeWarning if none ends for
    `ENDLESS` steps: a policy without chance may stay where nothing happens.
    """
    envs = collector.envs.num_envs
    owed = [count // envs + (i < count % envs) for i in range(envs)]
    episodes: list[Episode] = []
    endless = 0
    while any(owed):
        transition = collector.act(params)
        if on_transition is not None:
            on_transition(transition)
        ended = collector.wait()
        endless = 0 if ended else endless + 1
        if endless == ENDLESS:
            text = f"no episode of {envs} has ended in {ENDLESS:,} steps; the option env.time_limit would end them"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        for episode in ended:
            if owed[episode.env]:
                owed[episode.env] -= 1
                episodes.append(episode)
        if on_step is not None and on_step():
            break
    if on_transition is not None:
        on_transition(collector.act(params))
        collector.wait()
    return episodes
