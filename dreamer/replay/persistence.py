"""Replay on disk: immutable files, and a manifest that says which of them, in which order, make up a buffer.

A *chunk* holds a stretch of rows of every environment as they were at the time of writing, raw and without a header:
for each field in sorted order, for each environment in order, its rows in C order. A *patch* holds later values of the
fields that change in place (latents), for single rows: environments (int32), rows (int64), then the fields in sorted
order. A save writes chunks of the rows that are new, and patches of the rows in chunks that were rewritten since they
were last saved; loading reads the chunks, then applies the patches in order, so it yields the state at the save. When
patches outgrow the latents themselves, they are replaced by one set of patches with all latents.

A file is named after its rows and its checksum, so a name always means the same contents, and several checkpoints can
share a folder, even if a run was resumed from an older one. Files leave the manifest once all of their rows were
overwritten, and the folder through `prune`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import make_durable
from dreamer.replay.files import StoredFile, read_file, write_file
from dreamer.replay.memory import Fields, bytes_per_step
from dreamer.replay.ring import ReplayError, Ring

#: A file has at most about this many bytes (but at least one row of each environment).
CHUNK_BYTES = 64 * 2**20

_ADDRESS_BYTES = 4 + 8  # environment and row of a patched step

Values = Mapping[str, np.ndarray]
#: Returns one field (M, ...) of rows (M,) of an environment.
Take = Callable[[str, int, np.ndarray], np.ndarray]
#: Receives values (M, ...) of steps: their environments and rows, (M,) each.
Place = Callable[[np.ndarray, np.ndarray, Values], None]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`start`, `stop` (N,): it has rows [start, stop) of each environment."""

    stored: StoredFile
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def parse(entry: Mapping[str, Any], num_envs: int, step_bytes: int) -> Chunk:
        """From a manifest's entry; ReplayError if it contradicts itself."""
        chunk = Chunk(StoredFile.parse(entry), tuple(entry["start"]), tuple(entry["stop"]))
        counts = np.subtract(chunk.stop, chunk.start)
        if len(counts) != num_envs or (counts < 0).any() or counts.sum() * step_bytes != chunk.stored.bytes:
            raise ReplayError(f"the replay manifest contradicts itself at chunk {chunk}; use an older checkpoint")
        return chunk

    def entry(self) -> dict[str, Any]:
        """The manifest's entry, JSON-able."""
        return {**self.stored.entry(), "start": list(self.start), "stop": list(self.stop)}


@dataclasses.dataclass(frozen=True)
class Patch:
    """`stop` (N,): all its rows of each environment are below this."""

    stored: StoredFile
    stop: tuple[int, ...]

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> Patch:
        return Patch(StoredFile.parse(entry), tuple(entry["stop"]))

    def entry(self) -> dict[str, Any]:
        """The manifest's entry, JSON-able."""
        return {**self.stored.entry(), "stop": list(self.stop)}


class ChunkLog:
    """The files that hold one buffer. Knows what is already on disk.

    mutable  Fields that change in place.
    """

    def __init__(self, fields: Fields, mutable: Sequence[str], ring: Ring):
        self._fields = fields
        self._mutable = {name: fields[name] for name in sorted(mutable)}
        self._ring = ring
        self._chunks: list[Chunk] = []
        self._patches: list[Patch] = []
        self._saved = np.zeros(ring.num_envs, np.int64)  # rows below this are in chunks, or were overwritten before
        self._dirty = np.zeros(ring.num_envs * ring.rows, bool)  # by slot: rewritten since the last save

    def touch(self, slots: np.ndarray) -> None:
        """The mutable fields of these slots (M,) were rewritten."""
        self._dirty[slots] = True

    def save(self, folder: Path, take: Take) -> dict[str, Any]:
        """Write what the files do not hold yet. Returns the manifest's entries of all files with live rows.

        OSError (disk full, say) loses nothing: saving again later continues from there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in os.scandir(folder)}
        tail = self._ring.tail
        self._chunks = [c for c in self._chunks if (np.array(c.stop) > tail).any()]
        self._patches = [p for p in self._patches if (np.array(p.stop) > tail).any()]
        files = [*(c.stored.file for c in self._chunks), *(p.stored.file for p in self._patches)]
        if not present.issuperset(files):
            # A different folder than last time, or files were removed: what is missing cannot be referred to.
            self._chunks, self._patches, self._saved = [], [], np.zeros_like(self._saved)
        self._patch(folder, take)
        start = np.maximum(self._saved, tail)
        rows = max(1, CHUNK_BYTES // (bytes_per_step(self._fields) * self._ring.num_envs))
        while (start < self._ring.head).any():
            stop = np.minimum(start + rows, self._ring.head)
            self._chunks.append(self._write(folder, take, start, stop))
            self._saved = start = stop
        make_durable(folder)
        make_durable(folder.parent)
        return {"chunks": [c.entry() for c in self._chunks], "patches": [p.entry() for p in self._patches]}

    def load(self, folder: Path, entries: Mapping[str, Any], head: np.ndarray, tail: np.ndarray, place: Place) -> None:
        """Hand the rows [tail, head) of each environment, (N,) each, to `place`; ReplayError if that cannot be."""
        self._chunks, self._patches = read_chunks(
            folder, entries, self._fields, self._mutable, head, tail, place, place
        )
        self._saved = head.copy()
        self._dirty[:] = False

    def forget(self) -> None:
        """Nothing of this buffer is on disk."""
        self._chunks, self._patches, self._saved = [], [], np.zeros_like(self._saved)
        self._dirty[:] = False

    def _write(self, folder: Path, take: Take, start: np.ndarray, stop: np.ndarray) -> Chunk:
        def pieces() -> Iterator[np.ndarray]:
            for name in sorted(self._fields):
                for env in range(self._ring.num_envs):
                    yield take(name, env, np.arange(start[env], stop[env]))

        stored = write_file(folder, f"rows-{start.min():012d}-{stop.max():012d}", pieces())
        return Chunk(stored, tuple(start.tolist()), tuple(stop.tolist()))

    def _patch(self, folder: Path, take: Take) -> None:
        """Write patches for what was rewritten; or for everything, replacing the earlier ones, if that is less."""
        step = bytes_per_step(self._mutable) + _ADDRESS_BYTES
        rows = self._rows_in_chunks(only_dirty=True)
        alive = int(np.maximum(self._saved - self._ring.tail, 0).sum())
        earlier = self._patches
        if sum(p.stored.bytes for p in earlier) + len(rows) * step > alive * step:
            rows, earlier = self._rows_in_chunks(only_dirty=False), []
        count = max(1, CHUNK_BYTES // step)
        starts = range(0, len(rows), count)
        self._patches = [*earlier, *(self._write_patch(folder, take, *rows[i : i + count].T) for i in starts)]
        self._dirty[:] = False  # rows that are in no chunk yet will get there with their newest values

    def _rows_in_chunks(self, only_dirty: bool) -> np.ndarray:
        """(env, row) of live rows that chunks hold, (M, 2) int64."""
        found = []
        for env, (tail, saved) in enumerate(zip(self._ring.tail, self._saved, strict=True)):
            row = np.arange(tail, saved)
            if only_dirty:
                row = row[self._dirty[self._ring.slots(env, row)]]
            found.append(np.stack([np.full_like(row, env), row], 1))
        return np.concatenate(found)

    def _write_patch(self, folder: Path, take: Take, env: np.ndarray, row: np.ndarray) -> Patch:
        ids, starts = np.unique(env, return_index=True)  # rows come sorted by environment
        parts = list(zip(ids.tolist(), np.split(row, starts[1:]), strict=True))
        values = (take(name, i, rows) for name in self._mutable for i, rows in parts)
        stored = write_file(folder, f"patch-{row.min():012d}-{row.max():012d}", [env.astype(np.int32), row, *values])
        stop = np.zeros(self._ring.num_envs, np.int64)
        np.maximum.at(stop, env, row + 1)
        return Patch(stored, tuple(stop.tolist()))


def read_chunks(
    folder: Path,
    entries: Mapping[str, Any],
    fields: Fields,
    mutable: Sequence[str] | Fields,
    head: np.ndarray,
    tail: np.ndarray,
    add: Place,
    put: Place,
) -> tuple[list[Chunk], list[Patch]]:
    """Hand the rows [tail, head) of each environment, (N,) each, to `add`, then their later values to `put`.

    ReplayError if the files lack some of them or were changed. Returns the files.
    """
    chunks = [Chunk.parse(c, len(head), bytes_per_step(fields)) for c in entries["chunks"]]
    patches = [Patch.parse(p) for p in entries["patches"]]
    covered = tail
    for chunk in chunks:
        if (np.array(chunk.start) > covered).any():
            break
        covered = np.maximum(covered, chunk.stop)
    if (covered != head).any():
        raise ReplayError(
            f"expected chunks with rows {tail.tolist()} to {head.tolist()} of the environments, but the manifest's"
            f" end at {covered.tolist()}; use an older checkpoint"
        )
    for chunk in chunks:
        if (np.array(chunk.stop) > tail).any():
            _read_chunk(read_file(folder, chunk.stored), fields, chunk, tail, add)
    for patch in patches:
        if (np.array(patch.stop) > tail).any():
            changed = {name: fields[name] for name in sorted(mutable)}
            _read_patch(read_file(folder, patch.stored), changed, tail, put)
    return chunks, patches


def _read_chunk(data: np.ndarray, fields: Fields, chunk: Chunk, tail: np.ndarray, add: Place) -> None:
    counts = np.subtract(chunk.stop, chunk.start)
    ends, offset = np.cumsum(counts), 0
    columns = {}
    for name in sorted(fields):
        size = int(ends[-1]) * fields[name].nbytes
        columns[name] = data[offset : offset + size].view(fields[name].dtype).reshape(ends[-1], *fields[name].shape)
        offset += size
    for env, (start, stop) in enumerate(zip(chunk.start, chunk.stop, strict=True)):
        first = max(start, int(tail[env]))
        if first < stop:
            part = slice(int(ends[env]) - (stop - first), int(ends[env]))
            rows = np.arange(first, stop)
            add(np.full(len(rows), env), rows, {name: column[part] for name, column in columns.items()})


def _read_patch(data: np.ndarray, fields: Fields, tail: np.ndarray, put: Place) -> None:
    count = len(data) // (bytes_per_step(fields) + _ADDRESS_BYTES)
    env, row = data[: 4 * count].view(np.int32).astype(np.int64), data[4 * count : 12 * count].view(np.int64)
    live, offset, values = row >= tail[env], 12 * count, {}
    for name, field in fields.items():
        size = count * field.nbytes
        values[name] = data[offset : offset + size].view(field.dtype).reshape(count, *field.shape)[live]
        offset += size
    put(env[live], row[live], values)


# --- What a saved buffer says of itself ------------------------------------------------------------


VERSION = 2


def describe(fields: Fields, num_envs: int) -> dict[str, Any]:
    """What `check_manifest` compares, JSON-able."""
    return {"version": VERSION, "fields": describe_fields(fields), "num_envs": num_envs}


def check_manifest(manifest: Mapping[str, Any], fields: Fields, num_envs: int) -> None:
    """Raise ReplayError unless the manifest is of a buffer of these fields and environments, and of this version."""
    if manifest["version"] != VERSION:
        raise ReplayError(
            f"expected a replay manifest of version {VERSION}, got {manifest['version']};"
            " use the version of this program that wrote it"
        )
    check_fields(fields, manifest["fields"])
    if manifest["num_envs"] != num_envs:
        raise ReplayError(
            f"expected a replay of {num_envs} environments, got one of {manifest['num_envs']};"
            f" set --env.num_envs {manifest['num_envs']} or use another logdir"
        )


def check_fields(expected: Fields, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ReplayError if the manifest's fields `found` are not those `expected`, naming the ones that differ."""
    ours, theirs = describe_fields(expected), {name: dict(entry) for name, entry in found.items()}
    wrong = [
        f"{name}: expected {ours.get(name, 'no such field')}, got {theirs.get(name, 'no such field')}"
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        raise ReplayError(
            "the stored replay has other fields than this run: "
            + "; ".join(wrong)
            + ". Use the task and the model size it was collected with, or another logdir"
        )


def describe_fields(fields: Fields) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes of `fields`, JSON-able."""
    return {name: {"shape": list(field.shape), "dtype": field.dtype.name} for name, field in sorted(fields.items())}
