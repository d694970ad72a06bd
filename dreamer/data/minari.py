"""Episodes out of a Minari dataset: local files, converted as `envs.suites.gym` converts its environment's steps.

An episode with k actions has k + 1 observations there and k of everything else; ours has k + 1 of all: reward 0 and the
flags of a first step at the front, an action that was never executed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium.spaces as gs
import numpy as np

from dreamer.envs.spaces import Leaf, action_leaves, observation_leaves
from dreamer.presets import ConfigError
from dreamer.replay import ReplayError
from dreamer.replay.episodes import Episode, check_episode
from dreamer.types import Spaces

_METADATA = "metadata.json"


def find_dataset(path: Path) -> Path | None:
    """The data folder of the Minari dataset at `path`, which may be that folder or the one above; None: no dataset."""
    return next((folder for folder in (path, path / "data") if os.path.isfile(folder / _METADATA)), None)


class MinariSource:
    """The episodes of a dataset, in its order, as `replay.episodes.EpisodeSource` wants them."""

    def __init__(self, folder: Path, observations: Spaces, actions: Spaces) -> None:
        """folder: as `find_dataset` returns it. ConfigError if the dataset has other spaces than the task."""
        try:
            import minari
        except ImportError as error:
            raise ConfigError(
                f"expected the package minari to read {folder} ({error}); "
                "install it with `pip install 'dreamer[minari]'`"
            ) from error
        self._folder, self._spaces = folder, (observations, actions)
        try:
            self._data = minari.MinariDataset(folder)
            metadata = self._data.storage.get_episode_metadata(self._data.episode_indices)
            self.lengths: Sequence[int] = [int(entry["total_steps"]) + 1 for entry in metadata]
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ReplayError(f"{folder}: expected a Minari dataset, but it cannot be read ({error})") from error
        self._see = observation_leaves(self._data.observation_space)
        self._act = action_leaves(self._data.action_space)
        for what, leaves, spaces in (("observations", self._see, observations), ("actions", self._act, actions)):
            found = {leaf.key: leaf.space for leaf in leaves}
            if found != dict(spaces):
                raise ConfigError(
                    f"{folder}: expected a dataset with the {what} of the task, {dict(spaces)}, got {found}; name the "
                    "environment it was made with, without options that change what is seen"
                )

    def read(self, index: int) -> Episode:
        number = self._data.episode_indices[index]
        name = f"{self._folder}, episode {number}"
        try:
            (data,) = self._data.iterate_episodes([number])
        except (OSError, ValueError, KeyError) as error:
            raise ReplayError(f"{name}: cannot be read ({error})") from error
        terminated = np.asarray(data.terminations, bool)
        flags = np.zeros((3, len(terminated) + 1), bool)
        flags[0, 0] = flags[1, -1] = True
        flags[2, 1:] = terminated
        episode = {
            **{leaf.key: _observed(leaf, data.observations) for leaf in self._see},
            **{leaf.key: _acted(leaf, self._data.action_space, data.actions) for leaf in self._act},
            "reward": np.concatenate([[0.0], np.asarray(data.rewards, np.float64)]).astype(np.float32),
            **dict(zip(("is_first", "is_last", "is_terminal"), flags, strict=True)),
        }
        return check_episode(episode, *self._spaces, name)


def _observed(leaf: Leaf, observations: Any) -> np.ndarray:
    """One part of Gymnasium's observations in our form, (L, ...)."""
    return np.stack([leaf.convert(value) for value in _at(observations, leaf.path)])


def _acted(leaf: Leaf, space: gs.Space, actions: Any) -> np.ndarray:
    """One part of Gymnasium's actions (L - 1, ...) in our form, (L, ...); the last one, never executed, is zero."""
    for step in leaf.path:
        space = space[step]  # type: ignore[index]
    back = next(function for kind, function in _BACK.items() if isinstance(space, kind))
    taken = np.asarray(back(space, np.asarray(_at(actions, leaf.path))), leaf.space.dtype)
    return np.concatenate([taken.reshape(-1, *leaf.space.shape), leaf.space.zeros()[None]])


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _from_box(space: gs.Box, action: np.ndarray) -> np.ndarray:
    """[low, high] to [-1, 1], the inverse of `envs.spaces.rescale`; 0 where there is no choice."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    width = np.where(high > low, high - low, 1.0)
    return np.where(high > low, np.clip(2.0 * (action - low) / width - 1.0, -1.0, 1.0), 0.0)


#: Gymnasium's actions to ours: the inverses of the functions in `envs.spaces.ACTIONS`.
_BACK: dict[type, Callable[[Any, np.ndarray], np.ndarray]] = {
    gs.Box: _from_box,
    gs.Discrete: lambda space, action: action - space.start,
    gs.MultiDiscrete: lambda space, action: action - space.start,
    gs.MultiBinary: lambda space, action: action,
}
