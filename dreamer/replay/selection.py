"""Which sequences are trained on: the online queue first, then a mixture of ways to draw among all valid starts.

Selection is numpy on the host and yields positions only, so it is the same wherever the arrays are kept.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import SelectionConfig
from dreamer.replay.priorities import Priorities
from dreamer.replay.ring import ReplayError, Ring

#: Identifies the random stream of selection among all that are derived from the run's seed.
SELECTION_STREAM = 0x5E1EC7


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """B sequences: one context step, then T trained steps each.

    env     (B,) int64, environment of each sequence.
    row     (B,) int64, row of its context step.
    online  (B,) bool, whether it came from the online queue.
    length  1 + T.
    """

    env: np.ndarray
    row: np.ndarray
    online: np.ndarray
    length: int

    @property
    def rows(self) -> np.ndarray:
        """Rows of all steps, (B, 1 + T)."""
        return self.row[:, None] + np.arange(self.length)

    def __len__(self) -> int:
        return len(self.row)


def landing(ring: Ring, selection: Selection) -> tuple[np.ndarray, int]:
    """Which of the B * T trained steps of a selection take a new value, and how many were overwritten meanwhile.

    The steps are distinct: of several sequences that share a step, the last in the batch counts.
    """
    env, rows = selection.env[:, None], selection.rows[:, 1:]
    kept = np.flatnonzero(ring.alive(env, rows))
    slots = ring.slots(env, rows).reshape(-1)[kept]
    # unique() keeps the first in reversed order: the last of several values for one step.
    return kept[::-1][np.unique(slots[::-1], return_index=True)[1]], rows.size - len(kept)


def uniform_starts(rng: np.random.Generator, ring: Ring, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` starts (env, row), each (count,) int64, with replacement, every valid start equally likely."""
    starts = ring.starts(length)
    ends = np.cumsum(starts)
    draws = rng.integers(0, ends[-1], count)
    env = np.searchsorted(ends, draws, side="right")
    return env, ring.tail[env] + draws - (ends[env] - starts[env])


def recent_starts(
    rng: np.random.Generator, ring: Ring, length: int, count: int, half_life: float
) -> tuple[np.ndarray, np.ndarray]:
    """`count` starts (env, row), each (count,) int64, with replacement; weights fall with age.

    A start that is `half_life` steps (of all environments together) older than the newest one of its environment
    weighs half as much: w(a) = qᵃ with q = 2^(-N / half_life) at age a. Drawn by inverting the sum
    Σ_{a<x} qᵃ = (1 - qˣ) / (1 - q).
    """
    starts = ring.starts(length)
    log_q = -np.log(2) * ring.num_envs / half_life
    mass = -np.expm1(starts * log_q)
    ends = np.cumsum(mass)
    env = np.searchsorted(ends, rng.random(count) * ends[-1], side="right")
    env = np.minimum(env, np.flatnonzero(starts)[-1])  # rounding may point beyond the last one
    age = np.floor(np.log1p(-rng.random(count) * mass[env]) / log_q).astype(np.int64)
    return env, ring.head[env] - length - np.minimum(age, starts[env] - 1)


class OnlineQueue:
    """New data of each environment, cut into stretches of T steps; each is served once, oldest first.

    A stretch is identified by the row of its context step, the last step of the previous stretch (T = 3)::

        row      0  1  2  3  4  5  6
        first    c  t  t  t
        second            c  t  t  t

    At most `limit` stretches wait: if collecting outruns training, the oldest are dropped and counted in `dropped`, as
    are stretches that were overwritten while waiting.
    """

    def __init__(self, ring: Ring, stretch: int, limit: int):
        self._ring = ring
        self._stretch = stretch
        self._limit = limit
        self._cursor = np.zeros(ring.num_envs, np.int64)  # context row of the stretch being collected
        self._queue: collections.deque[tuple[int, int]] = collections.deque()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._queue)

    def update(self) -> None:
        """Queue the stretches that became complete. Called after every addition to the ring."""
        while (ready := self._ring.head - self._cursor > self._stretch).any():
            self._queue.extend((int(env), int(self._cursor[env])) for env in np.flatnonzero(ready))
            self._cursor[ready] += self._stretch
        while self._queue and (len(self._queue) > self._limit or not self._alive(*self._queue[0])):
            self._queue.popleft()
            self.dropped += 1

    def pop(self, count: int) -> Iterator[tuple[int, int]]:
        """Remove and yield up to `count` stretches (env, row), the oldest first."""
        while count and self._queue:
            env, row = self._queue.popleft()
            if self._alive(env, row):
                count -= 1
                yield env, row
            else:
                self.dropped += 1

    def _alive(self, env: int, row: int) -> bool:
        return row >= self._ring.tail[env]

    def state(self) -> dict[str, Any]:
        """Everything `restore` needs, JSON-able."""
        return {
            "stretch": self._stretch,
            "cursor": self._cursor.tolist(),
            "queue": [list(item) for item in self._queue],
            "dropped": self.dropped,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from `state`; without it, or if its stretches have another length, start with the data to come."""
        if state is None or state["stretch"] != self._stretch:
            self._cursor[:] = np.maximum(self._ring.head - 1, 0)
            self._queue.clear()
            self.dropped = 0
            return
        self._cursor[:] = state["cursor"]
        self._queue = collections.deque((int(env), int(row)) for env, row in state["queue"])
        self.dropped = int(state["dropped"])


class Selector:
    """Draws selections from its own random stream.

    online_limit  Most stretches waiting in the online queue; None: no online queue.
    config        The mixture to draw from after the queue.
    """

    def __init__(self, ring: Ring, length: int, seed: int, online_limit: int | None, config: SelectionConfig):
        self._ring = ring
        self._length = length
        self._config = config
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SELECTION_STREAM])))
        self.queue = None if online_limit is None else OnlineQueue(ring, length - 1, online_limit)
        self.priorities = (
            Priorities(ring, length, config.priority, config.priority_exponent, config.priority_zero_on_sample)
            if config.prioritised
            else None
        )
        table = {
            "uniform": (config.uniform, self._uniform),
            "prioritised": (config.prioritised, self._prioritised),
            "recency": (config.recency, self._recent),
        }
        self._draws = [draw for fraction, draw in table.values() if fraction]
        fractions = np.array([fraction for fraction, _ in table.values() if fraction])
        self._shares = fractions / fractions.sum()

    def update(self, ids: np.ndarray) -> None:
        """Note that one step was added to each of the environments `ids` (M,)."""
        if self.queue is not None:
            self.queue.update()
        if self.priorities is not None:
            self.priorities.extend(ids)

    def select(self, batch: int) -> Selection:
        """`batch` sequences; ReplayError if the ring holds none."""
        if not self._ring.starts(self._length).any():
            raise ReplayError(
                f"expected an environment with at least {self._length} stored steps (one context step and"
                f" {self._length - 1} trained ones), got at most {int((self._ring.head - self._ring.tail).max())};"
                " collect more before selecting"
            )
        if batch < 1:
            raise ReplayError(f"expected a batch of at least one sequence, got {batch}")
        fresh = [] if self.queue is None else list(self.queue.pop(batch))
        env, row = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        env[: len(fresh)], row[: len(fresh)] = np.array(fresh, np.int64).reshape(-1, 2).T
        rest = np.arange(len(fresh), batch)
        single = len(self._draws) == 1
        kinds = np.zeros(len(rest), int) if single else self._rng.choice(len(self._draws), len(rest), p=self._shares)
        for kind, draw in enumerate(self._draws):
            where = rest[kinds == kind]
            if len(where):
                env[where], row[where] = draw(len(where))
        return Selection(env, row, np.arange(batch) < len(fresh), self._length)

    def _uniform(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return uniform_starts(self._rng, self._ring, self._length, count)

    def _prioritised(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.priorities is not None
        return self.priorities.draw(self._rng, count) or self._uniform(count)

    def _recent(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return recent_starts(self._rng, self._ring, self._length, count, self._config.recency_half_life)

    def clear(self) -> None:
        """Empty the queue and the priorities, after the ring has been emptied."""
        if self.queue is not None:
            self.queue.restore(None)
        if self.priorities is not None:
            self.priorities.clear()

    def save(self, folder: Path) -> dict[str, Any]:
        """Generator, queue, and the name of a file of priorities: JSON-able. OSError if the disk fails."""
        return {
            "generator": self._rng.bit_generator.state,
            "online": None if self.queue is None else self.queue.state(),
            "length": self._length,
            "priorities": None if self.priorities is None else self.priorities.save(folder),
        }

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue from a save; restore the ring first. Priorities of sequences of another length start over."""
        self._rng.bit_generator.state = state["generator"]
        if self.queue is not None:
            self.queue.restore(state["online"])
        if self.priorities is not None:
            self.priorities.load(folder, state["priorities"] if state["length"] == self._length else None)
