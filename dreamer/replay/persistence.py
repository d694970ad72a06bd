"""Replay on disk: append-only, immutable chunk files, and a manifest that says which of them make up a buffer.

A chunk holds a stretch of rows of every environment, raw and without a header: for each field in sorted order, for
each environment in order, its rows in C order. A file is named after its rows and its checksum, so a name never
changes its content, and several checkpoints, also of runs that were resumed from an older one, share a folder.
Chunks are written once; old ones leave the manifest when every row in them was overwritten, and the folder through
`prune`. Values that change in place (latents) are stored as they were when their chunk was written.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.replay.errors import ReplayError
from dreamer.replay.ring import Ring
from dreamer.replay.storage import Fields, HostStorage, bytes_per_step

#: A chunk file has at most about this many bytes (one row of each environment at least).
CHUNK_BYTES = 64 * 2**20

SUFFIX = ".chunk"
PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One file. `start`, `stop` (N,): the rows of each environment in it are [start, stop)."""

    file: str
    bytes: int
    crc32: int
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def parse(entry: Mapping[str, Any], num_envs: int, step_bytes: int) -> Chunk:
        """From a manifest's entry; ReplayError if it contradicts itself."""
        chunk = Chunk(entry["file"], entry["bytes"], entry["crc32"], tuple(entry["start"]), tuple(entry["stop"]))
        counts = np.subtract(chunk.stop, chunk.start)
        sound = len(counts) == num_envs and (counts >= 0).all() and counts.sum() * step_bytes == chunk.bytes
        if not sound or Path(chunk.file).name != chunk.file:
            raise ReplayError(f"the replay manifest contradicts itself at chunk {chunk}; use an older checkpoint")
        return chunk

    def entry(self) -> dict[str, Any]:
        """The manifest's entry, JSON-able."""
        return {**dataclasses.asdict(self), "start": list(self.start), "stop": list(self.stop)}


class ChunkLog:
    """The chunks that hold the rows of one buffer. Knows what is on disk already."""

    def __init__(self, fields: Fields, ring: Ring):
        self._fields = fields
        self._ring = ring
        self._chunks: list[Chunk] = []
        self._saved = np.zeros(ring.num_envs, np.int64)  # rows below are in chunks, or were overwritten before

    def save(self, folder: Path, storage: HostStorage) -> list[dict[str, Any]]:
        """Write the rows that are in no chunk yet. Returns the manifest's entries of all chunks with live rows.

        OSError (disk full, say) leaves everything as it was; saving again later continues from there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in os.scandir(folder)}
        tail = self._ring.tail
        self._chunks = [c for c in self._chunks if (np.array(c.stop) > tail).any()]
        if not present.issuperset(c.file for c in self._chunks):
            # Another folder than last time, or somebody removed files: what is missing cannot be referred to.
            self._chunks, self._saved = [], np.zeros_like(self._saved)
        start = np.maximum(self._saved, tail)
        rows = max(1, CHUNK_BYTES // (bytes_per_step(self._fields) * self._ring.num_envs))
        while (start < self._ring.head).any():
            stop = np.minimum(start + rows, self._ring.head)
            self._chunks.append(self._write(folder, storage, start, stop))
            self._saved = start = stop
        _sync_folder(folder)
        _sync_folder(folder.parent)
        return [chunk.entry() for chunk in self._chunks]

    def load(self, folder: Path, storage: HostStorage, chunks: list[Chunk], head: np.ndarray, tail: np.ndarray) -> None:
        """Read rows [tail, head) of each environment, (N,) each, into `storage`; ReplayError if that cannot be."""
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
                self._read(folder, storage, chunk, tail)
        self._chunks, self._saved = list(chunks), head.copy()

    def forget(self) -> None:
        """Nothing of this buffer is on disk."""
        self._chunks, self._saved = [], np.zeros_like(self._saved)

    def _write(self, folder: Path, storage: HostStorage, start: np.ndarray, stop: np.ndarray) -> Chunk:
        ring, crc, size = self._ring, 0, 0
        partial = folder / f"rows-{start.min():012d}-{stop.max():012d}{PARTIAL}"
        try:
            with partial.open("wb") as file:
                for name in sorted(self._fields):
                    for env in range(ring.num_envs):
                        low, count = env * ring.rows, int(stop[env] - start[env])
                        first = low + int(start[env]) % ring.rows
                        for piece in storage.pieces(name, first, count, low, low + ring.rows):
                            raw = piece.reshape(-1).view(np.uint8).data
                            crc, size = zlib.crc32(raw, crc), size + len(raw)
                            file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            final = partial.with_name(f"{partial.stem}-{crc:08x}{SUFFIX}")
            os.replace(partial, final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return Chunk(final.name, size, crc, tuple(start.tolist()), tuple(stop.tolist()))

    def _read(self, folder: Path, storage: HostStorage, chunk: Chunk, tail: np.ndarray) -> None:
        data = _read_checked(folder / chunk.file, chunk)
        offset = 0
        for name in sorted(self._fields):
            field = self._fields[name]
            for env, (start, stop) in enumerate(zip(chunk.start, chunk.stop, strict=True)):
                size = (stop - start) * field.nbytes
                values = data[offset : offset + size].view(field.dtype).reshape(stop - start, *field.shape)
                offset += size
                rows = np.arange(max(start, int(tail[env])), stop)
                if len(rows):
                    storage.put(self._ring.slots(env, rows), {name: values[rows[0] - start :]})


def prune(folder: Path, manifests: Iterable[Mapping[str, Any]]) -> list[str]:
    """Remove chunks that none of the `manifests` (of all checkpoints that are kept) refers to, and torn files.

    Not to be called between a `save` and the moment its manifest is among the kept ones. Returns the names removed.
    """
    kept = {chunk["file"] for manifest in manifests for chunk in manifest["chunks"]}
    if not folder.is_dir():
        return []
    gone = sorted(p.name for p in folder.iterdir() if p.suffix in (SUFFIX, PARTIAL) and p.name not in kept)
    for name in gone:
        (folder / name).unlink()
    return gone


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


def _read_checked(path: Path, chunk: Chunk) -> np.ndarray:
    """The file's bytes, uint8, if they are those that were written."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ReplayError(f"cannot read replay file {path}: {error}; use an older checkpoint") from error
    if len(data) != chunk.bytes:
        raise ReplayError(
            f"replay file {path} is truncated or was changed: expected {chunk.bytes} bytes, got {len(data)};"
            " use an older checkpoint"
        )
    if (crc := zlib.crc32(data.data)) != chunk.crc32:
        raise ReplayError(
            f"replay file {path} is corrupted: expected checksum {chunk.crc32:08x}, got {crc:08x};"
            " use an older checkpoint"
        )
    return data


def _sync_folder(folder: Path) -> None:
    """Make renames durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
