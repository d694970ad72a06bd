"""Storage on disk, mapped into memory: the buffer is its own save, and a restart reads almost nothing.

Fields that never change are in *segments*, files that each have a stretch of rows of every environment. The newest
grows in memory and is written when it is complete, and in its current state at each save. All other fields are in
`versions.py`. A segment is removed once every row in it was overwritten and no kept checkpoint refers to it (`prune`),
so the disk holds a few more steps than the capacity. If the disk is full, segments wait in memory.

The kernel keeps what a killed process has written, and files that a save refers to are never written again. After a
power loss the newest save is whole if the disk keeps what it has confirmed; in case it does not, loading checks the
sizes of all files, and the checksums of the newest segments and of all lists of places.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import make_durable
from dreamer.replay.blocks import OPEN, Block, Layout, remove_open
from dreamer.replay.files import SUFFIX, StoredFile, write_file
from dreamer.replay.memory import Fields, bytes_per_step
from dreamer.replay.persistence import Place, read_chunks
from dreamer.replay.ring import ReplayError, Ring
from dreamer.replay.versions import VersionedRows

#: A segment holds at least this share of all rows, and at least this many bytes.
SEGMENTS = 32
SEGMENT_BYTES = 32 * 2**20
#: Bytes of segments, from the newest on, whose checksums are compared on loading.
VERIFIED_BYTES = 256 * 2**20

Values = Mapping[str, np.ndarray]


class DiskStorage:
    """Fields of the rings in files of `folder`, which no other live buffer may use.

    writable  False: only to load a save and read it, even while another buffer uses the folder.
    """

    def __init__(self, fields: Fields, mutable: Sequence[str], ring: Ring, folder: Path, writable: bool = True):
        self.fields = dict(fields)
        self._mutable = tuple(sorted(mutable))
        self._fixed = {name: fields[name] for name in sorted(fields) if name not in self._mutable}
        self._ring, self._folder = ring, Path(folder)
        smallest = SEGMENT_BYTES // max(bytes_per_step(self._fixed) * ring.num_envs, 1)
        self._rows = min(max(-(-ring.rows // SEGMENTS), smallest, 1), ring.rows)
        self._segments: dict[int, Block] = {}
        self._stored: dict[int, tuple[list[int], StoredFile]] = {}  # ends of the rows in a segment's file, the file
        self._spare: Block | None = None  # memory that the next segment can reuse
        self._first = np.zeros(ring.num_envs, np.int64)  # oldest row of each environment in the segments
        self._marked = np.zeros(ring.num_envs * ring.rows, bool)  # marked as last later on
        self._versions = VersionedRows(self._folder, {name: fields[name] for name in self._mutable}, ring, writable)
        if writable:
            remove_open(self._folder)

    def add(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        number, place = row // self._rows, row % self._rows
        if (number == number[0]).all():
            self._fill(int(number[0]), env, place, values)
        else:
            for index in np.unique(number):
                where = number == index
                self._fill(int(index), env[where], place[where], {n: values[n][where] for n in self._fixed})
        slots = self._ring.slots(env, row)
        self._marked[slots] = False
        self._versions.put(slots, {name: values[name] for name in self._mutable})

    def put(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        self._versions.put(self._ring.slots(env, row), values)

    def mark_last(self, env: int, rows: np.ndarray) -> None:
        # Not in the segment: earlier saves hold these steps as they were.
        self._marked[self._ring.slots(env, rows)] = True

    def gather(self, env: np.ndarray, row: np.ndarray, length: int) -> dict[str, np.ndarray]:
        out = {n: np.empty((len(env), length, *f.shape), f.dtype) for n, f in self._fixed.items()}
        for b, (e, start) in enumerate(zip(env.tolist(), row.tolist(), strict=True)):
            for index, low, high in self._stretches(start, start + length):
                arrays, origin = self._segments[index].arrays, index * self._rows
                for name, found in out.items():
                    found[b, low - start : high - start] = arrays[name][e, low - origin : high - origin]
        slots = self._ring.slots(env[:, None], row[:, None] + np.arange(length))
        if "is_last" in out:
            out["is_last"] |= self._marked[slots]
        for name in self._mutable:
            out[name] = self._versions.read(name, slots.reshape(-1)).reshape(*slots.shape, *self.fields[name].shape)
        return out

    def take(self, name: str, env: int, rows: np.ndarray) -> np.ndarray:
        slots = self._ring.slots(env, rows)
        if name in self._mutable:
            return self._versions.read(name, slots)
        out = np.empty((len(rows), *self.fields[name].shape), self.fields[name].dtype)
        for index in np.unique(rows // self._rows):
            where = rows // self._rows == index
            out[where] = self._segments[int(index)].arrays[name][env, rows[where] % self._rows]
        return out | self._marked[slots] if name == "is_last" else out

    def save(self, folder: Path) -> dict[str, Any]:
        if folder.resolve() != self._folder.resolve():
            raise ReplayError(f"expected to save disk storage in its own folder, {self._folder}, got {folder}")
        self._drop_dead()
        entries = [self._save_segment(index) for index in sorted(self._segments)]
        latents = self._versions.save()
        make_durable(self._folder)
        make_durable(self._folder.parent)
        files = {"segments": entries, "latents": latents}
        return {"format": "blocks", "rows": self._rows, "mutable": list(self._mutable), **files}

    def load(self, folder: Path, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray) -> None:
        self.clear()
        self._first = tail.copy()
        if entries["format"] == "chunks":
            read_chunks(folder, entries, self.fields, self._mutable, head, tail, self.add, self.put)
        elif folder.resolve() != self._folder.resolve() or tuple(entries["mutable"]) != self._mutable:
            read_blocks(folder, entries, self.fields, head, tail, self.add)
        else:
            self._map(entries, head, tail)

    def clear(self) -> None:
        for block in self._segments.values():
            block.discard()
        self._segments, self._stored = {}, {}
        self._first[:] = 0
        self._marked[:] = False
        self._versions.clear()

    def _fill(self, index: int, env: np.ndarray, place: np.ndarray, values: Values) -> None:
        if index not in self._segments:
            self._drop_dead()
            self._write_complete()
            spare, self._spare = self._spare, None
            self._segments[index] = spare or Block.in_memory(self._layout)
        together = len(env) == self._ring.num_envs and (place == place[0]).all() and (np.diff(env) > 0).all()
        where = (slice(None), int(place[0])) if together else (env, place)
        for name, array in self._segments[index].arrays.items():
            array[where] = values[name]

    def _drop_dead(self) -> None:
        """Drop segments in which every row was overwritten."""
        for index in [i for i in self._segments if ((i + 1) * self._rows <= self._ring.tail).all()]:
            self._segments.pop(index).discard()
            self._stored.pop(index, None)

    def _write_complete(self) -> None:
        """Move segments that no environment adds to any longer from memory to files, if there is room."""
        for index, block in self._segments.items():
            if block.path is None and (self._ring.head >= (index + 1) * self._rows).all():
                try:
                    self._write(index, OPEN, sync=False)
                except OSError:
                    return  # the next save tries again, and reports the error

    def _write(self, index: int, suffix: str, sync: bool) -> None:
        """Write a segment from memory to a file, and use that file from now on if the segment is complete."""
        block = self._segments[index]
        self._folder.mkdir(parents=True, exist_ok=True)
        stored = write_file(self._folder, _segment(index), [block.bytes], suffix, sync)
        _, stop = self._rows_of(index)
        self._stored[index] = (stop.tolist(), stored)
        if (stop >= (index + 1) * self._rows).all():
            self._segments[index] = Block.open(self._folder / stored.file, self._layout)
            self._spare = block

    @property
    def _layout(self) -> Layout:
        shape = (self._ring.num_envs, self._rows)
        return {name: ((*shape, *field.shape), field.dtype) for name, field in self._fixed.items()}

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(segment, first row, last row + 1) of the parts of rows [start, stop)."""
        while start < stop:
            index = start // self._rows
            end = min(stop, (index + 1) * self._rows)
            yield index, start, end
            start = end

    def _rows_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [start, stop) of each environment, (N,) each, that a segment holds."""
        start = np.maximum(self._first, index * self._rows)
        return start, np.maximum(np.minimum(self._ring.head, (index + 1) * self._rows), start)

    def _save_segment(self, index: int) -> dict[str, Any]:
        start, stop = self._rows_of(index)
        block = self._segments[index]
        if block.path is None and (index not in self._stored or self._stored[index][0] != stop.tolist()):
            self._write(index, SUFFIX, sync=True)
        elif block.path is not None and not block.saved:
            block.save(self._folder, _segment(index))
            ends, stored = self._stored[index]
            self._stored[index] = (ends, StoredFile(block.path.name, stored.bytes, stored.crc32))
        entry = self._stored[index][1].entry()
        return {**entry, "index": index, "start": start.tolist(), "stop": stop.tolist()}

    def _map(self, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray) -> None:
        """Adopt the files of a save as they are, except for segments that are still growing."""
        self._rows = int(entries["rows"])
        found = {int(entry["index"]): entry for entry in entries["segments"]}
        for index in range(int(tail.min()) // self._rows, -(-int(head.max()) // self._rows)):
            low, high = index * self._rows, (index + 1) * self._rows
            needed = np.maximum(tail, low) < np.minimum(head, high)
            entry = found.get(index)
            if needed.any() and (
                entry is None
                or (needed & (np.array(entry["start"]) > np.maximum(tail, low))).any()
                or (needed & (np.array(entry["stop"]) < np.minimum(head, high))).any()
            ):
                raise ReplayError(f"the replay manifest contradicts itself at segment {index}; use an older checkpoint")
        verified = 0
        first = np.full_like(tail, np.iinfo(np.int64).max)
        for index, entry in sorted(found.items(), reverse=True):
            if (np.array(entry["stop"]) <= tail).all():
                continue
            file = StoredFile.parse(entry)
            block = Block.open(self._folder / file.file, self._layout)
            if verified < VERIFIED_BYTES and (crc := zlib.crc32(block.bytes.data)) != file.crc32:
                raise ReplayError(
                    f"replay file {self._folder / file.file} is corrupted: expected checksum {file.crc32:08x}, got"
                    f" {crc:08x}; use an older checkpoint"
                )
            verified += file.bytes
            filled = np.array(entry["stop"]) > np.array(entry["start"])
            first = np.where(filled, np.minimum(first, entry["start"]), first)
            self._stored[index] = (list(entry["stop"]), file)
            self._segments[index] = block
            if (np.array(entry["stop"]) < (index + 1) * self._rows).any():  # keeps growing, in memory
                self._segments[index] = Block.in_memory(self._layout)
                self._segments[index].bytes[:] = block.bytes
        self._first = np.where(first > head, head, first)
        self._versions.load(entries["latents"], head, tail, np.array(entries["tail"]))


def read_blocks(
    folder: Path, entries: Mapping[str, Any], fields: Fields, head: np.ndarray, tail: np.ndarray, add: Place
) -> None:
    """Hand the rows [tail, head) of each environment, (N,) each, of files of disk storage to `add`."""
    ring = Ring(len(head), max(1, int((head - tail).max())))
    ring.reset(head, tail)
    source = DiskStorage(fields, entries["mutable"], ring, folder, writable=False)
    source.load(folder, entries, head, tail)
    count = max(1, SEGMENT_BYTES // bytes_per_step(fields))
    for env in range(len(head)):
        for start in range(int(tail[env]), int(head[env]), count):
            rows = np.arange(start, min(start + count, int(head[env])))
            add(np.full(len(rows), env), rows, {name: source.take(name, env, rows) for name in fields})
    source.clear()


def _segment(index: int) -> str:
    return f"segment-{index:06d}"
