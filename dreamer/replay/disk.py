"""Storage on disk, mapped into memory: the buffer is its own save, and a restart reads next to nothing back.

What never changes lies in *segments*: append-only files with a stretch of rows of every environment each; all others
of its fields lie in `versions.py`. A segment leaves when every row in it was overwritten and no kept checkpoint refers
to it (`prune`), so the disk holds a few more steps than the capacity.

A save flushes what was written to disk; the kernel keeps mapped pages of a process that is killed, and what was
written after the last save belongs to rows, and places, that no save refers to. After a power loss the newest save is
whole if the disk keeps what it has confirmed; to notice where it does not, sizes of all files are checked on
loading, and checksums of the newest segments.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.replay.blocks import Block, Layout, remove_open
from dreamer.replay.errors import ReplayError
from dreamer.replay.files import StoredFile, sync_folder
from dreamer.replay.memory import Fields, bytes_per_step
from dreamer.replay.persistence import Place, read_chunks
from dreamer.replay.ring import Ring
from dreamer.replay.versions import VersionedRows

#: A segment holds this share of all rows at least, and so many bytes.
SEGMENTS = 32
SEGMENT_BYTES = 32 * 2**20
#: Bytes of segments, the newest first, whose checksums are compared on loading.
VERIFIED_BYTES = 256 * 2**20

Values = Mapping[str, np.ndarray]


class DiskStorage:
    """Fields of the rings in files of `folder`, which no other live buffer may use."""

    def __init__(self, fields: Fields, mutable: Sequence[str], ring: Ring, folder: Path):
        self.fields = dict(fields)
        self._mutable = tuple(sorted(mutable))
        self._fixed = {name: fields[name] for name in sorted(fields) if name not in self._mutable}
        self._ring, self._folder = ring, Path(folder)
        smallest = SEGMENT_BYTES // max(bytes_per_step(self._fixed) * ring.num_envs, 1)
        self._rows = max(-(-ring.rows // SEGMENTS), smallest, 1)
        self._segments: dict[int, Block] = {}
        self._checksums: dict[int, tuple[list[int], int]] = {}  # ends of the rows, checksum of them
        self._first = np.zeros(ring.num_envs, np.int64)  # oldest row of each environment that segments hold
        self._marked = np.zeros(ring.num_envs * ring.rows, bool)  # made last ones later on
        self._versions = VersionedRows(self._folder, {name: fields[name] for name in self._mutable}, ring)
        remove_open(self._folder)

    def add(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        number = row // self._rows
        for index in np.unique(number):
            where = number == index
            block = self._segment(int(index))
            block.dirty = True
            for name in self._fixed:
                block.arrays[name][env[where], row[where] % self._rows] = values[name][where]
        slots = self._ring.slots(env, row)
        self._marked[slots] = False
        self._versions.put(slots, {name: values[name] for name in self._mutable})

    def put(self, env: np.ndarray, row: np.ndarray, values: Values) -> None:
        self._versions.put(self._ring.slots(env, row), values)

    def mark_last(self, env: int, rows: np.ndarray) -> None:
        # Not in the segment: earlier saves know these steps as they were.
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
            raise ReplayError(f"expected to save disk storage where it lies, {self._folder}, got {folder}")
        self._drop_dead()
        entries = [self._save_segment(index) for index in sorted(self._segments)]
        latents = self._versions.save()
        sync_folder(self._folder)
        sync_folder(self._folder.parent)
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
        self._segments, self._checksums = {}, {}
        self._first[:] = 0
        self._marked[:] = False
        self._versions.clear()

    def _segment(self, index: int) -> Block:
        if index not in self._segments:
            self._drop_dead()
            self._segments[index] = Block.create(self._folder, _segment(index), self._layout)
        return self._segments[index]

    def _drop_dead(self) -> None:
        """Let go of segments in which every row was overwritten."""
        for index in [i for i in self._segments if ((i + 1) * self._rows <= self._ring.tail).all()]:
            self._segments.pop(index).discard()
            self._checksums.pop(index, None)

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

    def _save_segment(self, index: int) -> dict[str, Any]:
        entry = self._segments[index].save(self._folder, _segment(index))
        start = np.maximum(self._first, index * self._rows)
        stop = np.maximum(np.minimum(self._ring.head, (index + 1) * self._rows), start)
        if index not in self._checksums or self._checksums[index][0] != stop.tolist():
            self._checksums[index] = (stop.tolist(), self._checksum(index, start, stop))
        return {
            **entry,
            "index": index,
            "start": start.tolist(),
            "stop": stop.tolist(),
            "crc32": self._checksums[index][1],
        }

    def _checksum(self, index: int, start: Sequence[int] | np.ndarray, stop: Sequence[int] | np.ndarray) -> int:
        """Of rows [start, stop) of each environment."""
        crc, origin = 0, index * self._rows
        for name in self._fixed:
            for env, (low, high) in enumerate(zip(start, stop, strict=True)):
                rows = self._segments[index].arrays[name][env, low - origin : high - origin]
                crc = zlib.crc32(rows.reshape(-1).view(np.uint8).data, crc)
        return crc

    def _map(self, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray) -> None:
        """Take the files of a save over as they are, but for what is still to grow."""
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
            self._segments[index] = Block.open(self._folder / file.file, self._layout)
            if verified < VERIFIED_BYTES:
                verified += file.bytes
                self._verify(index, entry, file)
            filled = np.array(entry["stop"]) > np.array(entry["start"])
            first = np.where(filled, np.minimum(first, entry["start"]), first)
            self._checksums[index] = (list(entry["stop"]), file.crc32)
            if (np.array(entry["stop"]) < (index + 1) * self._rows).any():
                self._segments[index] = self._copy(index)
        self._first = np.where(first > head, head, first)
        self._versions.load(entries["latents"], head, tail, np.array(entries["tail"]))

    def _verify(self, index: int, entry: Mapping[str, Any], file: StoredFile) -> None:
        if (crc := self._checksum(index, entry["start"], entry["stop"])) != file.crc32:
            raise ReplayError(
                f"replay file {self._folder / file.file} is corrupted: expected checksum {file.crc32:08x}, got"
                f" {crc:08x}; use an older checkpoint"
            )

    def _copy(self, index: int) -> Block:
        """A segment of our own: another checkpoint may know other rows behind those of this one."""
        copy = Block.create(self._folder, _segment(index), self._layout)
        copy.dirty = True
        for name, array in self._segments[index].arrays.items():
            copy.arrays[name][...] = array
        return copy


def read_blocks(
    folder: Path, entries: Mapping[str, Any], fields: Fields, head: np.ndarray, tail: np.ndarray, add: Place
) -> None:
    """Hand the rows [tail, head) of each environment, (N,) each, of files of disk storage to `add`."""
    ring = Ring(len(head), max(1, int((head - tail).max())))
    ring.reset(head, tail)
    source = DiskStorage(fields, entries["mutable"], ring, folder)
    source.load(folder, entries, head, tail)
    count = max(1, SEGMENT_BYTES // bytes_per_step(fields))
    for env in range(len(head)):
        for start in range(int(tail[env]), int(head[env]), count):
            rows = np.arange(start, min(start + count, int(head[env])))
            add(np.full(len(rows), env), rows, {name: source.take(name, env, rows) for name in fields})
    source.clear()


def _segment(index: int) -> str:
    return f"segment-{index:06d}"
