"""`dreamer export`: the episodes in a run's newest checkpoint, as files; also while the run is going on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import absolute, make_folder
from dreamer.presets import ConfigError
from dreamer.replay import Replay, ReplayError, Selection, bytes_per_step
from dreamer.replay.episodes import Episode, EpisodeCutter, EpisodeWriter
from dreamer.run.factories import spaces_from_json
from dreamer.saves.checkpoint import Checkpointer, CheckpointError
from dreamer.terminal import Console
from dreamer.types import Field, replay_fields

#: Rows of an environment that are read from the replay at a time.
_ROWS = 256


def export_episodes(
    logdir: Path | str, out: Path | str, unfinished: bool = False, console: Console | None = None
) -> int:
    """Write the episodes that the replay of `logdir`'s newest intact checkpoint holds into the folder `out`.

    unfinished  Also those that had not ended, closed as cut: `is_last`, not terminal.

    Returns the exit code. CheckpointError if there is no checkpoint, ConfigError if `out` holds episodes already,
    PathError if it cannot be written to.
    Nothing is written to the logdir, and only arrays and JSON are read from it.
    """
    console = console or Console()
    writer = new_writer(out)
    step, meta, replay = newest_replay(logdir)
    for episode in stored_episodes(replay, meta, unfinished) if replay is not None else ():
        writer.write(episode)
    if not writer.scores:
        raise CheckpointError(
            f"expected whole episodes in the checkpoint of step {step} in {logdir}, found none; export later, or the "
            "unfinished ones too: --unfinished"
        )
    console.print(written(writer))
    return 0


def new_writer(out: Path | str) -> EpisodeWriter:
    """For a folder without episodes. ConfigError if it has some, PathError if nothing can be written there."""
    folder = absolute(out)
    make_folder(folder)
    try:
        return EpisodeWriter(folder)
    except ReplayError as error:
        raise ConfigError(str(error)) from error


def written(writer: EpisodeWriter) -> str:
    """What was written, in words."""
    scores = np.array(writer.scores)
    return (
        f"{len(scores):,} episodes, {writer.steps:,} steps, score {scores.mean():.4g} on average "
        f"({scores.min():.4g} to {scores.max():.4g}): {writer.folder}"
    )


def stored_episodes(replay: Replay, meta: Mapping[str, Any], unfinished: bool) -> Iterator[Episode]:
    """The episodes of a replay, roughly in the order in which they ended, without latents.

    meta: of its checkpoint. Those with an overwritten beginning are left out; unless `unfinished`, those that go on
    too.
    """
    names = _episode_fields(meta)
    head = np.array(meta["replay"]["head"], np.int64)
    tail = np.maximum(np.array(meta["replay"]["tail"], np.int64), head - replay.capacity // replay.num_envs)
    cutter = EpisodeCutter(replay.num_envs)
    # All environments from the same number of rows before their newest step: the same moment, where they step together.
    for back in range(int((head - tail).max()), 0, -_ROWS):
        for env in range(replay.num_envs):
            start = max(int(head[env]) - back, int(tail[env]))
            stop = int(head[env]) - max(back - _ROWS, 0)
            if start < stop:
                where = Selection(np.array([env]), np.array([start]), np.array([False]), stop - start)
                rows = replay.gather(where)
                yield from cutter.add(env, {name: rows[name][0] for name in names})
    if unfinished:
        yield from cutter.rest()


def _episode_fields(meta: Mapping[str, Any]) -> dict[str, Field]:
    """What an episode file holds for a step."""
    observations, actions = (spaces_from_json(meta[name]) for name in ("observations", "actions"))
    return replay_fields(observations, actions, {})


def newest_replay(logdir: Path | str, most_bytes: float = math.inf) -> tuple[int, Mapping[str, Any], Replay | None]:
    """(step, meta, replay) of a run's newest intact checkpoint, as `_load`; None where it was saved without one.

    CheckpointError if there is no checkpoint.
    """
    checkpointer = Checkpointer(logdir, read_only=True)
    stored: list[Replay] = []

    def load(meta: Mapping[str, Any], *_: Any) -> None:
        if "replay" in meta:
            stored.append(_load(checkpointer.replay_folder, meta, most_bytes))

    step, _, meta = checkpointer.restore(parts=(), check=load)
    return step, meta, stored[-1] if "replay" in meta else None


def _load(folder: Path, meta: Mapping[str, Any], most_bytes: float) -> Replay:
    """The replay of a checkpoint, no larger than what it holds; if that exceeds `most_bytes`, its newest steps."""
    manifest = meta["replay"]
    whole = _episode_fields(meta)
    fields = {
        name: Field(tuple(entry["shape"]), np.dtype(entry["dtype"]), latent=name not in whole)
        for name, entry in manifest["fields"].items()
    }
    rows = int(np.subtract(manifest["head"], manifest["tail"]).max())
    envs, length = manifest["num_envs"], manifest["length"]
    rows = int(min(rows, most_bytes / (envs * bytes_per_step(fields))))
    replay = Replay(fields, envs, max(rows, length) * envs, length, seed=0, online=False)
    replay.load(folder, manifest)
    return replay
