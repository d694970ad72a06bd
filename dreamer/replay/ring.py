"""Positions in the buffer: one ring per environment, addressed by rows that are never reused.

A *row* counts the steps of one environment from 0 upwards without end; its *slot* is its position in memory.
Because rows are never reused, "was this overwritten meanwhile?" is a comparison with the oldest row::

    row    0  1  2  3  4  5  6          rows = 4, head = 7
    slot   0  1  2  3  0  1  2
                    ^tail     ^head - 1          rows 0, 1, 2 are gone

The exception of this package is here too, since every module of the package imports this one.
"""

from __future__ import annotations

import numpy as np


class ReplayError(RuntimeError):
    """Data that does not fit the buffer, a request it cannot answer, or a file that cannot be trusted."""


class Ring:
    """Counters of N rings of `rows` slots each. `head` (N,): next row to be written."""

    def __init__(self, num_envs: int, rows: int):
        self.num_envs = num_envs
        self.rows = rows
        self.head = np.zeros(num_envs, np.int64)
        self._floor = np.zeros(num_envs, np.int64)  # rows below this were never loaded, whatever the ring could hold

    @property
    def tail(self) -> np.ndarray:
        """Oldest row of each environment that is still stored, (N,)."""
        return np.maximum(self._floor, self.head - self.rows)

    def __len__(self) -> int:
        return int((self.head - self.tail).sum())

    def starts(self, length: int) -> np.ndarray:
        """Number of rows of each environment at which `length` consecutive rows begin, (N,)."""
        return np.maximum(self.head - self.tail - length + 1, 0)

    def slots(self, env: np.ndarray | int, row: np.ndarray) -> np.ndarray:
        """Flat slot of each row, in [0, N * rows); `env` and `row` broadcast."""
        return env * self.rows + row % self.rows

    def rows_at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(env, row) of the newest row written to each slot, int64."""
        env, place = slots // self.rows, slots % self.rows
        newest = self.head[env] - 1
        return env, newest - (newest - place) % self.rows

    def alive(self, env: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Which rows are stored now, bool; `env` and `row` broadcast."""
        return (row >= self.tail[env]) & (row < self.head[env])

    def reset(self, head: np.ndarray | None = None, tail: np.ndarray | None = None) -> None:
        """Set the counters; without arguments, to empty. Rows below `tail` are gone."""
        self.head[:] = 0 if head is None else head
        self._floor[:] = 0 if tail is None else tail
