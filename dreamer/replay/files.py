"""Files that are written once, whole or not at all, and trusted only if they are unchanged since."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import whole_file
from dreamer.replay.ring import ReplayError

SUFFIX = ".chunk"
PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """An immutable file, as a manifest names it."""

    file: str
    bytes: int
    crc32: int

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> StoredFile:
        """From a manifest's entry, which may hold more; ReplayError if the name leads out of the folder."""
        if Path(entry["file"]).name != entry["file"]:
            raise ReplayError(f"the replay manifest contradicts itself at {entry['file']!r}; use an older checkpoint")
        return StoredFile(entry["file"], entry["bytes"], entry["crc32"])

    def entry(self) -> dict[str, Any]:
        """The manifest's entry, JSON-able."""
        return dataclasses.asdict(self)


def write_file(
    folder: Path, stem: str, pieces: Iterable[np.ndarray], suffix: str = SUFFIX, sync: bool = True
) -> StoredFile:
    """Write the bytes of `pieces` one after another; the checksum becomes part of the name.

    OSError (such as disk full) leaves no trace. Durable names take `make_durable`, durable contents `sync`.
    """
    crc, size = 0, 0
    nameless = folder / f"{stem}{PARTIAL}"
    with whole_file(nameless, sync) as file:
        for piece in pieces:
            raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            crc, size = zlib.crc32(raw, crc), size + len(raw)
            file.write(raw)
    final = nameless.replace(folder / f"{stem}-{crc:08x}{suffix}")
    return StoredFile(final.name, size, crc)


def read_file(folder: Path, stored: StoredFile) -> np.ndarray:
    """The file's bytes, uint8; ReplayError unless they are exactly those that were written."""
    path = folder / stored.file
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ReplayError(f"cannot read replay file {path}: {error}; use an older checkpoint") from error
    if len(data) != stored.bytes:
        raise ReplayError(
            f"replay file {path} is truncated or was changed: expected {stored.bytes} bytes, got {len(data)};"
            " use an older checkpoint"
        )
    if (crc := zlib.crc32(data.data)) != stored.crc32:
        raise ReplayError(
            f"replay file {path} is corrupted: expected checksum {stored.crc32:08x}, got {crc:08x};"
            " use an older checkpoint"
        )
    return data


def prune(folder: Path, manifests: Iterable[Mapping[str, Any]]) -> list[str]:
    """Remove files that none of the `manifests` (of all kept checkpoints) refers to, and incomplete files.

    Not to be called between a `save` and the time when its manifest is kept. Returns the removed
    names.
    """
    kept = {name for manifest in manifests for name in _names(manifest)}
    if not folder.is_dir():
        return []
    gone = sorted(p.name for p in folder.iterdir() if p.suffix in (SUFFIX, PARTIAL) and p.name not in kept)
    for name in gone:
        (folder / name).unlink()
    return gone


def _names(manifest: Any) -> Iterator[str]:
    """Every file that a manifest names."""
    if isinstance(manifest, Mapping):
        if isinstance(manifest.get("file"), str):
            yield manifest["file"]
        manifest = list(manifest.values())
    if isinstance(manifest, list):
        for item in manifest:
            yield from _names(item)
