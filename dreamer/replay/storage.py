"""Where the steps are kept: the protocol of storages, and the storage in host memory.

A storage is a set of arrays, addressed by environment and row. Which rows are valid, and which are drawn, is up to
`ring.py` and `selection.py`, the same for all storages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dreamer.replay.disk import DiskStorage, read_blocks
from dreamer.replay.memory import Fields, Kind, latents_of
from dreamer.replay.persistence import ChunkLog
from dreamer.replay.ring import ReplayError, Ring

Values = Mapping[str, np.ndarray]


class Storage(Protocol):
    """Fields of the steps in the rings."""

    def add(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        """Store new steps: row `row` of environment `env`, (M,) each, `values` (M, ...) of all fields."""

    def put(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        """Replace mutable fields of distinct stored steps (M,) by `values` (M, ...)."""

    def mark_last(self, env: int, rows: np.ndarray) -> None:
        """Set `is_last` of stored steps of one environment, rows (M,)."""

    def gather(self, env: np.ndarray, row: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """`length` steps starting at each row: fresh, contiguous arrays (B, length, ...), never handed out again.

        JAX may alias a numpy array that it was given, so none of them is ever reused.
        """

    def take(self, name: str, env: int, rows: np.ndarray) -> np.ndarray:
        """One field of rows (M,) of one environment: a fresh array (M, ...)."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what the files in `folder` do not hold yet. Returns entries for the manifest, JSON-able.

        OSError (disk full, say) loses nothing: saving again later continues from there.
        """

    def load(self, folder: Path, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray) -> None:
        """Hold the rows [tail, head) of each environment, (N,) each, of a save; ReplayError if that is impossible.

        The ring's counters are not set yet.
        """

    def clear(self) -> None:
        """Drop all contents. What is saved stays on disk."""


class SlotStorage:
    """A storage addressed by flat slots and saved as chunks and patches. Subclasses hold its arrays."""

    def __init__(self, fields: Fields, mutable: Sequence[str], ring: Ring):
        self.fields = dict(fields)
        self._ring = ring
        self._log = ChunkLog(self.fields, mutable, ring)

    def write_slots(self, slots: np.ndarray, values: Values) -> None:
        """Write `values` (M, ...) of some or all fields to distinct slots (M,)."""
        raise NotImplementedError

    def read_slots(self, name: str, slots: np.ndarray) -> np.ndarray:
        """One field at `slots`, of any shape: a fresh array (*slots.shape, ...)."""
        raise NotImplementedError

    def add(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        self.write_slots(self._ring.slots(env, row), values)

    def put(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        slots = self._ring.slots(env, row)
        self.write_slots(slots, values)
        self.touch(slots)

    def touch(self, slots: np.ndarray) -> None:
        """Note that mutable fields of these slots are rewritten."""
        self._log.touch(slots)

    def mark_last(self, env: int, rows: np.ndarray) -> None:
        self.write_slots(self._ring.slots(env, rows), {"is_last": np.ones(len(rows), bool)})

    def gather(self, env: np.ndarray, row: np.ndarray, length: int) -> dict[str, np.ndarray]:
        slots = self._ring.slots(env[:, None], row[:, None] + np.arange(length))
        return {name: self.read_slots(name, slots) for name in self.fields}

    def take(self, name: str, env: int, rows: np.ndarray) -> np.ndarray:
        return self.read_slots(name, self._ring.slots(env, rows))

    def save(self, folder: Path) -> dict[str, Any]:
        return {"format": "chunks", **self._log.save(folder, self.take)}

    def load(self, folder: Path, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray) -> None:
        if entries["format"] == "chunks":
            self._log.load(folder, entries, head, tail, self.add)
        else:
            read_blocks(folder, entries, self.fields, head, tail, self.add)

    def clear(self) -> None:
        self._log.forget()


class HostStorage(SlotStorage):
    """Fields as numpy arrays (N * rows, ...) in host memory.

    Pages that were never written cost no memory: the kernel hands out zeroed pages on first use.
    """

    def __init__(self, fields: Fields, mutable: Sequence[str], ring: Ring):
        super().__init__(fields, mutable, ring)
        slots = ring.num_envs * ring.rows
        self._arrays = {name: np.zeros((slots, *f.shape), f.dtype) for name, f in fields.items()}

    def write_slots(self, slots: np.ndarray, values: Values) -> None:
        for name, value in values.items():
            self._arrays[name][slots] = value

    def read_slots(self, name: str, slots: np.ndarray) -> np.ndarray:
        return self._arrays[name].take(slots, axis=0)


def make_storage(kind: Kind, fields: Fields, ring: Ring, folder: Path | None) -> Storage:
    """An empty storage. folder: for disk storage."""
    mutable = latents_of(fields)
    if kind == "host":
        return HostStorage(fields, mutable, ring)
    if kind == "disk":
        if folder is None:
            raise ReplayError("expected a folder for disk storage, got none")
        return DiskStorage(fields, mutable, ring, folder)
    from dreamer.replay.device import DeviceStorage

    return DeviceStorage(fields, mutable, ring)
