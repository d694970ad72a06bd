"""Latents on disk: rows that change in place, while the kept saves still see the old values.

Each step has a *place* in a few mapped files. The first rewrite of a step after a save goes to a free place, since the
save refers to the old one; later rewrites stay there. A save is thus one list of places, and a place is free again when
neither the buffer nor any list still in the folder refers to it::

    save 1  step 7 -> place 3          places: 3 holds step 7 as it was at save 1
    write   step 7 -> place 9                  9 holds what it is now; the next rewrite goes there, too
    save 2  step 7 -> place 9                  3 is free as soon as `prune` has removed the list of save 1

Places that a save refers to are never written, so a killed run leaves every save as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.replay.blocks import Block, Layout
from dreamer.replay.files import SUFFIX, StoredFile, read_file, write_file
from dreamer.replay.memory import Fields, bytes_per_step
from dreamer.replay.ring import Ring

#: A file has room for at least this share of all steps, and for at least this many bytes.
EXTENTS = 16
EXTENT_BYTES = 32 * 2**20

_STEM = "places"


class VersionedRows:
    """Some fields of the steps in the rings, addressed by flat slots, kept in `folder`.

    writable  False: only to be read.
    """

    def __init__(self, folder: Path, fields: Fields, ring: Ring, writable: bool = True):
        self._folder, self._fields, self._ring, self._writable = folder, dict(fields), ring, writable
        slots = ring.num_envs * ring.rows
        smallest = EXTENT_BYTES // max(bytes_per_step(fields), 1)
        self._size = min(max(-(-slots // EXTENTS), smallest, 1), slots)  # places in a file
        self._place = np.full(slots, -1, np.int32)
        self._extents: dict[int, Block] = {}
        self._references = np.zeros(0, np.uint16)  # by place: how many saves refer to it
        self._free = np.zeros(0, np.int32)
        self._saves: dict[str, np.ndarray] = {}  # places by the file that lists them

    def put(self, slots: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Write `values` (M, ...) of some or all fields to distinct slots (M,)."""
        if not self._fields:
            return
        place = self._place[slots]
        moved = place < 0
        moved[~moved] = self._references[place[~moved]] > 0
        if moved.any():
            kept = [name for name in self._fields if name not in values]
            values = {**values, **{name: self.read(name, slots) for name in kept}}
            self._place[slots[moved]] = self._allocate(int(moved.sum()))
            place = self._place[slots]
        for extent, where in self._by_extent(place):
            block = self._extents[extent]
            block.dirty = True
            for name, value in values.items():
                block.arrays[name][place[where] - extent * self._size] = value[where]

    def read(self, name: str, slots: np.ndarray) -> np.ndarray:
        """One field at written slots (M,): a fresh array (M, ...)."""
        place, field = self._place[slots], self._fields[name]
        out = np.empty((len(slots), *field.shape), field.dtype)
        for extent, where in self._by_extent(place):
            if extent not in self._extents:  # never written
                out[where] = 0
                continue
            index, source = place[where] - extent * self._size, self._extents[extent].arrays[name]
            if isinstance(where, slice):
                source.take(index, axis=0, out=out[where], mode="clip")  # straight into place
            else:
                out[where] = source.take(index, axis=0)
        return out

    def save(self) -> dict[str, Any]:
        """The manifest's entries: files, and the places of all stored steps. OSError if there is no room."""
        self._drop_saves()
        files = [{"index": i, **block.save(self._folder, _extent(i))} for i, block in sorted(self._extents.items())]
        tail, head = self._ring.tail, self._ring.head
        slots = [self._ring.slots(env, np.arange(tail[env], head[env])) for env in range(self._ring.num_envs)]
        places = self._place[np.concatenate(slots)]
        stored = write_file(self._folder, f"{_STEM}-{head.max():012d}", [places])
        if stored.file not in self._saves:
            self._refer(stored.file, places)
        self._collect(places)
        return {"size": self._size, "extents": files, "places": stored.entry()}

    def load(self, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray, first: np.ndarray) -> None:
        """Hold rows [tail, head) of each environment as they were in a save, which had rows [first, head)."""
        self.clear()
        self._size = int(entries["size"])
        for entry in entries["extents"]:
            self._extents[int(entry["index"])] = Block.open(self._folder / entry["file"], self._layout, self._writable)
        self._references = np.zeros(self._size * (1 + max(self._extents, default=-1)), np.uint16)
        for path in sorted(self._folder.glob(f"{_STEM}-*{SUFFIX}")):
            found = np.fromfile(path, np.uint8)
            self._refer(path.name, found[: len(found) // 4 * 4].view(np.int32))
        places = read_file(self._folder, StoredFile.parse(entries["places"])).view(np.int32)
        for env, part in enumerate(np.split(places, np.cumsum(head - first)[:-1])):
            rows = np.arange(tail[env], head[env])
            self._place[self._ring.slots(env, rows)] = part[len(part) - len(rows) :]
        self._collect(self._place[self._place >= 0])

    def clear(self) -> None:
        """Drop all contents; files that were not saved are removed."""
        for block in self._extents.values():
            block.discard()
        self._extents, self._saves = {}, {}
        self._place[:] = -1
        self._references, self._free = np.zeros(0, np.uint16), np.zeros(0, np.int32)

    @property
    def _layout(self) -> Layout:
        return {name: ((self._size, *field.shape), field.dtype) for name, field in sorted(self._fields.items())}

    def _by_extent(self, place: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
        """(extent, which entries of `place` are in it) of each extent."""
        if not len(place):
            return []
        extent = place // self._size
        cuts = np.flatnonzero(np.diff(extent)) + 1
        if len(cuts) <= len(place) // 8:  # a few runs, each in one extent
            return [(int(extent[a]), slice(a, b)) for a, b in itertools.pairwise([0, *cuts.tolist(), len(place)])]
        order = np.argsort(extent, kind="stable")
        ids, starts = np.unique(extent[order], return_index=True)
        return list(zip(ids.tolist(), np.split(order, starts[1:]), strict=True))

    def _allocate(self, count: int) -> np.ndarray:
        """`count` free places, in a new file if need be."""
        if len(self._free) < count and self._drop_saves():
            self._collect(self._place[self._place >= 0])
        while len(self._free) < count:
            taken = [int(p.stem.split("-")[1]) for p in self._folder.glob("latents-*")]
            index = 1 + max([*taken, *self._extents], default=-1)
            self._extents[index] = Block.create(self._folder, _extent(index), self._layout)
            end = (index + 1) * self._size
            self._references = np.concatenate([self._references, np.zeros(end - len(self._references), np.uint16)])
            self._free = np.concatenate([self._free, np.arange(index * self._size, end, dtype=np.int32)])
        places, self._free = self._free[:count], self._free[count:]
        return places

    def _refer(self, name: str, places: np.ndarray) -> None:
        places = places[(places >= 0) & (places < len(self._references))]
        self._references[places] += 1
        self._saves[name] = places

    def _drop_saves(self) -> bool:
        """Release the places of saves whose list was removed. Returns whether there were any."""
        gone = [name for name in self._saves if not (self._folder / name).exists()]
        for name in gone:
            self._references[self._saves.pop(name)] -= 1
        return bool(gone)

    def _collect(self, places: np.ndarray) -> None:
        """Find the free places; `places` are those of the buffer."""
        used = self._references > 0
        used[places] = True
        for index in set(range(len(used) // self._size)) - self._extents.keys():
            used[index * self._size : (index + 1) * self._size] = True
        self._free = np.flatnonzero(~used).astype(np.int32)


def _extent(index: int) -> str:
    return f"latents-{index:06d}"
