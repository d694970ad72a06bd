"""What replay costs compared with plain copying: `dreamer bench replay`.

For storage in memory and on disk: drawing and gathering a batch, compared with gathering the same bytes from plain
numpy arrays; adding a step of all environments, and writing back the latents of a batch, compared with copying them.
Both sides take turns, in processor time of this thread (copying in the kernel included), which other load on the
machine does not lengthen. Data on disk has been read before, so the disk itself is not measured.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.bench.alone import spaces_of
from dreamer.bench.measuring import Report, Rows, figure, take_turns
from dreamer.config import Config
from dreamer.replay import Replay
from dreamer.run.factories import make_agent
from dreamer.types import Field, replay_fields

STORAGES = ("host", "disk")
#: Number of different steps that are added in turn.
_SAMPLES = 8
#: Number of short operations in one round.
_CALLS = 20

Fields = dict[str, Field]


def bench_replay(config: Config, rounds: int, capacity: int, folder: Path | None = None) -> Report:
    """capacity: steps in the buffer. folder: for disk storage; None: a temporary folder."""
    agent = make_agent(config, *spaces_of(config))
    fields = replay_fields(agent.observations, agent.actions, agent.extras)
    rows: Rows = {}
    for storage in STORAGES:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            bench = _Bench(config, fields, storage, Path(place), capacity)
            rows |= {f"{storage}: {what}": row for what, row in bench.measure(rounds).items()}
    run = config.run
    request = {
        "task": config.task,
        "num_envs": config.env.num_envs,
        "batch": f"{run.batch_size} x {run.batch_length + 1}",
        "bytes_per_step": sum(field.nbytes for field in fields.values()),
        "capacity": capacity,
        "rounds": rounds,
    }
    note = (
        f"Batches of {request['batch']} steps of {request['bytes_per_step']} bytes, {config.env.num_envs} environments;"
        " ratio: to plain copying of the same bytes, paired round by round."
    )
    return Report("replay", request, ("ms", "plain_ms", "ratio"), rows, note)


class _Bench:
    """A full buffer, and plain arrays beside it."""

    def __init__(self, config: Config, fields: Fields, storage: Any, folder: Path, capacity: int) -> None:
        envs, self._batch, self._length = config.env.num_envs, config.run.batch_size, config.run.batch_length + 1
        self._envs, self._rows, self._turn = envs, max(capacity // envs, 2 * self._length), 0
        self._rng = np.random.default_rng(0)
        self._samples = [
            {name: self._rng.integers(0, 2, (envs, *f.shape)).astype(f.dtype) for name, f in fields.items()}
            for _ in range(_SAMPLES)
        ]
        capacity = envs * self._rows
        self._replay = Replay(fields, envs, capacity, self._length, 0, False, storage=storage, folder=folder)
        for row in range(self._rows):
            self._replay.add(self._samples[row % _SAMPLES])
        self._plain = {name: np.zeros((capacity, *field.shape), field.dtype) for name, field in fields.items()}
        for array in self._plain.values():
            array.reshape(-1).view(np.uint8)[:] = 1
        self._selection = self._replay.select(self._batch)
        batch = self._replay.gather(self._selection)
        self._latents = {name: batch[name][:, 1:] for name, field in fields.items() if field.latent}

    def measure(self, rounds: int) -> Rows:
        """By operation: the times of replay and of plain copying."""
        operations: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
            "draw a batch": (lambda: self._replay.gather(self._replay.select(self._batch)), self._gather_plain, 1),
            "add a step": (self._add, self._copy_plain, _CALLS),
            "write latents": (self._write, self._write_plain, 1),
        }
        rows: Rows = {}
        for name, (ours, plain, calls) in operations.items():
            pair = {"ours": functools.partial(_spent, ours, calls), "plain": functools.partial(_spent, plain, calls)}
            take_turns(pair, max(1, rounds // 10))  # warm-up
            times = {side: np.array(found) for side, found in take_turns(pair, rounds).items()}
            rows[name] = figure("ms", times["ours"]) | figure("plain_ms", times["plain"])
            rows[name] |= figure("ratio", times["ours"] / times["plain"])
        return rows

    def _add(self) -> None:
        self._turn += 1
        self._replay.add(self._samples[self._turn % _SAMPLES])

    def _write(self) -> None:
        self._selection = self._replay.select(self._batch)
        self._replay.write(self._selection, self._latents)

    def _gather_plain(self) -> dict[str, np.ndarray]:
        slots = self._slots()
        return {name: array[slots] for name, array in self._plain.items()}

    def _slots(self) -> np.ndarray:
        start = self._rng.integers(0, self._envs * self._rows - self._length, self._batch)
        return start[:, None] + np.arange(self._length)

    def _copy_plain(self) -> None:
        self._turn += 1
        start = self._turn % self._rows * self._envs
        for name, value in self._samples[self._turn % _SAMPLES].items():
            self._plain[name][start : start + self._envs] = value

    def _write_plain(self) -> None:
        slots = self._slots()[:, 1:]
        for name, value in self._latents.items():
            self._plain[name][slots] = value


def _spent(function: Callable[[], object], calls: int) -> float:
    """Milliseconds of this thread's processor time for one of `calls` calls."""
    start = time.thread_time()
    for _ in range(calls):
        function()
    return (time.thread_time() - start) * 1e3 / calls
