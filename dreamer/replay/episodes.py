"""Episodes as files: one .npz each, written whole or not at all, and checked on reading.

An episode of k actions has k + 1 steps. A file holds, for each step, everything that replay stores except latents, as
arrays (k + 1, ...)::

    observations   by key, as the agent sees them
    actions        by key: the one chosen after seeing the observation; the last was never executed
    reward         float32, received on arriving at the step; 0 at the first
    is_first       bool, True at the first step only
    is_last        bool, True at the last step only
    is_terminal    bool, True at the last step if the task ended there; all False if the episode was cut

Files are named `number_actions_score.npz`, so they sort in the order in which they were written.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from dreamer.paths import whole_file
from dreamer.replay.buffer import Replay
from dreamer.replay.ring import ReplayError
from dreamer.types import LOG_PREFIX, TRANSITION_FIELDS, Space, Spaces, replay_fields

#: Arrays (L, ...) by field name.
Episode = Mapping[str, np.ndarray]

SUFFIX = ".npz"
#: The fastest level of zlib: pictures of games shrink to a few percent, and reading costs little.
_COMPRESSION = 1


class EpisodeSource(Protocol):
    """Episodes stored elsewhere, in the order in which they were collected."""

    lengths: Sequence[int]

    def read(self, index: int) -> Episode:
        """Episode number `index`, checked: `lengths[index]` steps. ReplayError if it is damaged or does not fit."""
        ...


class EpisodeFolder:
    """The episode files in a folder and its subfolders, by name. Only lengths are read until `read` is called."""

    def __init__(self, folder: Path, observations: Spaces, actions: Spaces) -> None:
        """ReplayError if there is no episode, or if a file cannot be read."""
        self._spaces = observations, actions
        self._paths = sorted(path for path in folder.rglob(f"*{SUFFIX}") if not path.name.startswith("."))
        if not self._paths:
            raise ReplayError(f"expected a folder with episodes ({SUFFIX} files) in it, found none in {folder}")
        self.lengths: Sequence[int] = [_length(path) for path in self._paths]

    def read(self, index: int) -> Episode:
        return read_episode(self._paths[index], *self._spaces)


class EpisodeWriter:
    """Writes episodes into a folder that holds none yet, numbered in the order of the calls."""

    def __init__(self, folder: Path) -> None:
        """ReplayError if it holds episodes: nobody could tell them apart from new ones."""
        if folder.is_dir() and any(folder.glob(f"*{SUFFIX}")):
            raise ReplayError(f"expected a folder without episodes to write to, {folder} has some; name another")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.steps = 0
        self.scores: list[float] = []

    def write(self, episode: Episode) -> Path:
        """Write one episode. OSError if the disk refuses; then nothing of the file is left."""
        length, score = len(episode["reward"]), float(episode["reward"].sum(dtype=np.float64))
        path = self.folder / f"{len(self.scores):09d}_{length - 1}_{score:g}{SUFFIX}"
        with whole_file(path, sync=False) as file:
            write_arrays(file, episode)
        self.steps += length
        self.scores.append(score)
        return path


class EpisodeCutter:
    """Cuts the steps of N environments, given piece by piece, into episodes.

    An episode whose beginning was never given is left out. One that stops without an end, because the next step of
    its environment is a first one, ends as cut: `is_last`, not terminal. An episode of a single step, which says
    nothing, is left out.
    """

    def __init__(self, num_envs: int) -> None:
        self._parts: list[list[Episode]] = [[] for _ in range(num_envs)]

    def add(self, env: int, steps: Episode) -> list[Episode]:
        """The next steps (n, ...) of an environment; returns the episodes that are complete with them."""
        first, last = steps["is_first"], steps["is_last"]
        inner = {*np.flatnonzero(first).tolist(), *(np.flatnonzero(last) + 1).tolist()}
        done: list[Episode] = []
        for start, stop in itertools.pairwise(sorted(inner | {0, len(first)})):
            if first[start]:
                done += self._close(env)
            if first[start] or self._parts[env]:
                self._parts[env].append({key: value[start:stop] for key, value in steps.items()})
            if last[stop - 1]:
                done += self._close(env)
        return done

    def rest(self) -> list[Episode]:
        """Ends the unfinished episodes, as cut, and returns them."""
        return [episode for env in range(len(self._parts)) for episode in self._close(env)]

    def _close(self, env: int) -> list[Episode]:
        parts, self._parts[env] = self._parts[env], []
        if sum(len(part["is_last"]) for part in parts) < 2:
            return []
        episode = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        episode["is_last"][-1] = True
        return [episode]


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """A compressed .npz file of arrays by any name: `numpy.savez` reserves some names for itself."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION) as archive:
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def read_episode(path: Path, observations: Spaces, actions: Spaces) -> dict[str, np.ndarray]:
    """The episode in a file: arrays (L, ...) of the dtypes replay stores. `log/` keys are left out.

    ReplayError, naming file and key, if it cannot be read, or is not an episode with these spaces.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            episode = {name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()}
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    episode = {key: value for key, value in episode.items() if not key.startswith(LOG_PREFIX)}
    return check_episode(episode, observations, actions, str(path))


def check_episode(episode: Episode, observations: Spaces, actions: Spaces, name: str) -> dict[str, np.ndarray]:
    """The episode with the dtypes that replay stores; ReplayError, naming it and the key, if it is not one."""
    fields = replay_fields(observations, actions, {})
    if episode.keys() != fields.keys():
        missing, unknown = sorted(fields.keys() - episode.keys()), sorted(episode.keys() - fields.keys())
        raise ReplayError(f"{name}: expected the fields {sorted(fields)} of the task, missing {missing}, got {unknown}")
    length = len(episode["reward"]) if episode["reward"].ndim else 0
    for key, field in sorted(fields.items(), key=lambda item: item[0] != "reward"):  # the others must have its length
        value = episode[key]
        if value.shape != (length, *field.shape) or length < 2:
            wanted = ", ".join(["steps (2 or more)", *map(str, field.shape)])
            raise ReplayError(
                f"{name}: expected {key!r} of shape ({wanted}), the same number in all, got {value.shape}"
            )
        if value.dtype != field.dtype and not np.can_cast(value.dtype, field.dtype, "same_kind"):
            raise ReplayError(f"{name}: expected {key!r} of dtype {field.dtype}, got {value.dtype}; convert it")
    for key, space in {**observations, **actions}.items():
        if key in fields:
            _check_range(name, key, episode[key], space)
    _check_structure(name, episode)
    return {key: episode[key].astype(field.dtype, copy=False) for key, field in fields.items()}


def add_episodes(replay: Replay, episodes: Iterable[Episode]) -> None:
    """Add whole episodes to the rings of a replay, as if its environments had played them.

    Each environment takes the next episode when its current one is finished. So no more than N are in memory at once,
    the rings fill evenly, and where an episode ends the next step is a first one. Fields that episodes lack, the
    latents, become zeros: what the model will infer at a step that it has not seen is not known yet. Training writes
    them back as for every step. Until then a sequence that begins inside an episode starts like an agent that has
    forgotten what came before; one that begins at a first step loses nothing.
    """
    zeros = {name: np.zeros(field.shape, field.dtype) for name, field in replay.fields.items()}
    waiting = iter(episodes)

    def play() -> Iterator[dict[str, np.ndarray]]:
        for episode in waiting:
            for step in range(len(episode["reward"])):
                yield {name: episode[name][step] if name in episode else zero for name, zero in zeros.items()}

    players = {env: play() for env in range(replay.num_envs)}
    while True:
        steps = {env: step for env, player in players.items() if (step := next(player, None)) is not None}
        if not steps:
            return
        players = {env: players[env] for env in steps}
        replay.add({name: np.stack([step[name] for step in steps.values()]) for name in zeros}, list(steps))


_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def _length(path: Path) -> int:
    """Steps of the episode in a file, from a header alone."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("reward.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            (length,) = read(member)[0]
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return length


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _damaged(path: Path, error: Exception) -> ReplayError:
    return ReplayError(f"{path}: expected an episode, but it cannot be read ({error}); remove it or write it again")


def _check_range(name: str, key: str, value: np.ndarray, space: Space) -> None:
    """ReplayError unless the values of an observation or action (L, ...) are possible in its space."""
    if space.kind == "vector" and not np.isfinite(value).all():
        raise ReplayError(f"{name}: expected finite numbers in {key!r}, got some that are not; leave the episode out")
    if space.classes is not None:
        flat = value.reshape(len(value), -1)
        if (flat < 0).any() or (flat >= np.array(space.classes)).any():
            raise ReplayError(
                f"{name}: expected classes from 0 up to below {space.classes} in {key!r}, got {flat.min()} to"
                f" {flat.max()}; is it an episode of another task?"
            )


def _check_structure(name: str, episode: Episode) -> None:
    """ReplayError unless flags and rewards are those of exactly one episode."""
    reward, first, last, terminal = (episode[key] for key in TRANSITION_FIELDS)
    faults = {
        "is_first true at the first step only": not first[0] or first[1:].any(),
        "is_last true at the last step only": not last[-1] or last[:-1].any(),
        "is_terminal true at the last step or nowhere": terminal[:-1].any(),
        "reward 0 at the first step, which no action led to": reward[0] != 0,
        "finite numbers in reward": not np.isfinite(reward).all(),
    }
    if broken := [rule for rule, fault in faults.items() if fault]:
        raise ReplayError(f"{name}: expected one whole episode with {', and '.join(broken)}; cut the data otherwise")
