"""Loads data from elsewhere into a run's replay before it trains: `--replay.preload PATH`, collecting or not."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from dreamer.config import Config
from dreamer.data.minari import MinariSource, find_dataset
from dreamer.envs import frames_per_step
from dreamer.envs.vector import make_vector_env
from dreamer.presets import ConfigError
from dreamer.replay import Replay, ReplayError
from dreamer.replay.episodes import Episode, EpisodeFolder, EpisodeSource, add_episodes
from dreamer.types import Spaces, visible


class PreloadWarning(UserWarning):
    """Not all of the data fits into the replay."""


@dataclasses.dataclass(frozen=True)
class Preload:
    """The episodes that `replay.preload` names, not read yet."""

    path: str
    source: EpisodeSource

    @property
    def steps(self) -> int:
        return sum(self.source.lengths)

    def room(self, num_envs: int) -> int:
        """Capacity with which no step is lost, however the episodes are spread over `num_envs` rings."""
        return self.steps + num_envs * max(self.source.lengths)

    def fill(self, replay: Replay) -> str:
        """Put the episodes into the replay, only the newest if not all fit. Returns what was done, in words."""
        lengths, first, steps = self.source.lengths, len(self.source.lengths), 0
        while first and steps + lengths[first - 1] <= replay.capacity:
            first, steps = first - 1, steps + lengths[first - 1]
        first = min(first, len(lengths) - 1)  # of an episode that is too long the ring keeps the end
        try:
            add_episodes(replay, self._read(first))
        except ReplayError as error:
            raise ConfigError(f"--replay.preload {self.path}: {error}") from error
        if len(replay) < self.steps:
            warnings.warn(
                f"{self.path} holds {self.steps:,} steps, the replay has room for the newest {len(replay):,} of them; "
                "raise --replay.capacity to train on all",
                PreloadWarning,
                stacklevel=2,
            )
        return f"{len(lengths) - first:,} episodes, {len(replay):,} steps from {self.path}"

    def _read(self, first: int) -> Iterator[Episode]:
        for index in range(first, len(self.source.lengths)):
            yield self.source.read(index)


def check_place(config: Config) -> None:
    """ConfigError if the configuration names data in a folder that does not exist."""
    if config.replay.preload is not None and not os.path.isdir(config.replay.preload):
        raise ConfigError(
            f"--replay.preload: expected a folder with episodes in it, found no folder at {config.replay.preload}"
        )


def find_preload(config: Config, observations: Spaces, actions: Spaces) -> Preload | None:
    """What `replay.preload` names, None if it names nothing; spaces are those of the task. Reads lengths only.

    ConfigError if there are no episodes there, or if a dataset has other spaces.
    """
    if config.replay.preload is None:
        return None
    path = Path(config.replay.preload)
    observations = visible(observations)
    try:
        dataset = find_dataset(path)
        if dataset is None:
            return Preload(str(path), EpisodeFolder(path, observations, actions))
        if (repeat := frames_per_step(config.task, config.env)) != 1:
            raise ConfigError(
                "expected an action repeat of 1 with a Minari dataset, whose steps are not repeated, got "
                f"{repeat}; set the task's option repeat to 1"
            )
        return Preload(str(path), MinariSource(dataset, observations, actions))
    except ReplayError as error:
        raise ConfigError(f"--replay.preload: {error}") from error


def check_trainable(config: Config, replay: Replay) -> None:
    """ConfigError if a run that collects nothing could never train: the updates need a batch of sequences."""
    needed = config.run.batch_size * config.run.batch_length
    if not config.run.collect and replay.starts < needed:
        raise ConfigError(
            f"expected data with at least {needed} positions at which {replay.length} steps in a row begin (a batch of "
            f"them), got {replay.starts} in {len(replay):,} steps over {replay.num_envs} rings; give more data, or "
            "lower --env.num_envs, --run.batch_size or --run.batch_length"
        )


def task_spaces(config: Config) -> tuple[Spaces, Spaces]:
    """(observations, actions) of the task, from an environment that is made for this and closed."""
    envs = make_vector_env(config.task, config.env, 1, config.seed, training=False)
    try:
        return envs.observation_spaces, envs.action_spaces
    finally:
        envs.close()
