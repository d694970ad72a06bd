"""Where the dreams of a run begin: what its world model makes of episodes in its replay, or of one in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dreamer.config import Config
from dreamer.dreaming import Dreams
from dreamer.paths import absolute
from dreamer.presets import ConfigError
from dreamer.replay import ReplayError
from dreamer.replay.episodes import Episode, read_episode
from dreamer.rssm import State
from dreamer.run.export_episodes import newest_replay, stored_episodes
from dreamer.run.loaded_agent import load_agent
from dreamer.types import visible

#: Most episodes of a replay that dreams begin like, the newest, and most bytes that are read to find them.
EPISODES, MOST_BYTES = 1024, 1e9
#: Beginnings that the model watches at a time: a fixed number, so that its program is compiled once.
_TOGETHER = 64


@dataclasses.dataclass(frozen=True)
class Starts:
    """Model states (M, ...) at which dreams begin.

    drawn: how many of them, the first ones, are drawn from if nobody chooses; longest: actions of the longest episode
    that they come from.
    """

    states: State
    drawn: int
    longest: int

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.states)[0])


def load_dreams(config: Config) -> Dreams:
    """The dreams of the run in `config.logdir`, with its best or newest weights. ConfigError if it predicts no
    observation, CheckpointError if it has no weights yet."""
    agent, params, _ = load_agent(config)
    try:
        return Dreams(agent, params)
    except ValueError as error:
        raise ConfigError(f"{config.logdir}: {error}") from error


def replayed_starts(dreams: Dreams, logdir: Path | str) -> Starts:
    """The first steps of the newest episodes in the replay of a run's newest checkpoint.

    ConfigError if it holds none.
    """
    _, meta, replay = newest_replay(logdir, MOST_BYTES)
    episodes = [] if replay is None else list(stored_episodes(replay, meta, unfinished=True))[-EPISODES:]
    if not episodes:
        raise ConfigError(
            f"expected episodes in the replay of {logdir}, found none whose beginning is kept; begin in a recorded "
            "episode instead: episode=FILE.npz"
        )
    firsts = [{key: value[:1] for key, value in episode.items()} for episode in episodes]
    parts = [_watched(dreams, firsts[i : i + _TOGETHER]) for i in range(0, len(firsts), _TOGETHER)]
    states = jax.tree.map(lambda *found: np.concatenate(found)[:, 0], *parts)
    longest = max(len(episode["reward"]) for episode in episodes) - 1
    return Starts(jax.device_put(states), len(episodes), longest)


def recorded_starts(dreams: Dreams, path: Path | str) -> Starts:
    """The steps of an episode in a file (`replay.episodes`), the model having seen all up to there; the first is the
    beginning. ConfigError if it is not an episode of the run's task."""
    try:
        episode = read_episode(absolute(path), visible(dreams.agent.observations), dreams.agent.actions)
    except ReplayError as error:
        raise ConfigError(f"episode: {error}") from error
    length = len(episode["reward"])
    states = dreams.watch({key: value[None] for key, value in episode.items()})
    return Starts(jax.tree.map(lambda x: x[0], states), 1, length - 1)


def _watched(dreams: Dreams, firsts: Sequence[Episode]) -> Any:
    """States (n, 1, ...) on the host after each of n beginnings of one step, n at most `_TOGETHER`."""
    filled = [*firsts, *[firsts[-1]] * (_TOGETHER - len(firsts))]
    states = dreams.watch({key: np.stack([one[key] for one in filled]) for key in firsts[0]})
    return jax.tree.map(lambda x: np.asarray(x)[: len(firsts)], states)
