"""Arrays over one file, mapped into memory: written like any array, on disk when the kernel chooses or at a flush.

A block that is not saved yet has the suffix `.open`; if the run ends before saving it, it is worthless and is removed.
Where the disk has no room, a block lives in memory until it is saved.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dreamer.replay.files import SUFFIX
from dreamer.replay.ring import ReplayError

OPEN = ".open"

#: Arrays begin at multiples of this many bytes.
_ALIGNMENT = 64

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Block:
    """Arrays of a `layout` (shape and dtype by name), made by `create` or `open`.

    path    Its file; None: there was no room on disk, so the arrays are in memory.
    dirty   Set by whoever writes to the arrays; reset by a flush.
    """

    def __init__(self, layout: Layout, path: Path | None, memory: mmap.mmap | bytearray):
        self._layout, self._memory = layout, memory
        self.path, self.dirty = path, False
        self.arrays: dict[str, np.ndarray] = {}
        offset = 0
        for name, (shape, dtype) in layout.items():
            self.arrays[name] = np.ndarray(shape, dtype, buffer=memory, offset=offset)
            offset += _aligned(self.arrays[name].nbytes)

    @property
    def bytes(self) -> np.ndarray:
        """Its whole contents, as they would be in a file: uint8."""
        return np.frombuffer(self._memory, np.uint8)

    @staticmethod
    def in_memory(layout: Layout) -> Block:
        """Zeros in memory."""
        return Block(layout, None, bytearray(layout_bytes(layout)))

    @staticmethod
    def create(folder: Path, stem: str, layout: Layout) -> Block:
        """Zeros in a new file, or in memory if there is no room for one."""
        try:
            return Block._allocate(folder, stem, layout)
        except OSError:
            return Block.in_memory(layout)

    @staticmethod
    def open(path: Path, layout: Layout, writable: bool = False) -> Block:
        """What was written to a file; ReplayError if it is not of the right size."""
        expected = layout_bytes(layout)
        try:
            with path.open("r+b" if writable else "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == expected:
                    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                    return Block(layout, path, mmap.mmap(file.fileno(), size, access=access))
        except OSError as error:
            raise ReplayError(f"cannot read replay file {path}: {error}; use an older checkpoint") from error
        raise ReplayError(
            f"replay file {path} is truncated or was changed: expected {expected} bytes, got {size};"
            " use an older checkpoint"
        )

    @property
    def saved(self) -> bool:
        return self.path is not None and self.path.suffix == SUFFIX

    def save(self, folder: Path, stem: str) -> dict[str, str | int]:
        """Write everything to the file and make its name final. Returns the manifest's entry; OSError without room."""
        if self.path is None:
            placed = Block._allocate(folder, stem, self._layout)
            for name, array in self.arrays.items():
                placed.arrays[name][...] = array
            self.path, self.arrays, self._memory, self.dirty = placed.path, placed.arrays, placed._memory, True
        assert self.path is not None
        if self.dirty and isinstance(self._memory, mmap.mmap):
            self._memory.flush()
            self.dirty = False
        if not self.saved:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            final = self.path.with_suffix(SUFFIX)
            os.replace(self.path, final)
            self.path = final
        return {"file": self.path.name, "bytes": layout_bytes(self._layout)}

    def discard(self) -> None:
        """Remove the file, unless it was saved: then that is up to `prune`."""
        if self.path is not None and not self.saved:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _allocate(folder: Path, stem: str, layout: Layout) -> Block:
        folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while any((folder / f"{stem}-{number}{suffix}").exists() for suffix in (OPEN, SUFFIX)):
            number += 1
        path = folder / f"{stem}-{number}{OPEN}"
        try:
            with path.open("w+b") as file:
                reserve(file.fileno(), layout_bytes(layout))
                return Block(layout, path, mmap.mmap(file.fileno(), layout_bytes(layout)))
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def layout_bytes(layout: Layout) -> int:
    """Bytes of a file of this layout."""
    sizes = (int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in layout.values())
    return max(sum(map(_aligned, sizes)), _ALIGNMENT)


def reserve(descriptor: int, size: int) -> None:
    """Reserve disk space for a file of `size` zero bytes; OSError if there is none.

    Writing to a mapped hole in a file kills the process when the disk is full, so there must be no holes.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV):
            raise
        for start in range(0, size, 2**20):  # a file system that cannot reserve space
            os.write(descriptor, bytes(min(2**20, size - start)))
        os.fsync(descriptor)


def remove_open(folder: Path) -> None:
    """Remove the blocks that an earlier run did not save."""
    for path in folder.glob(f"*{OPEN}"):
        path.unlink()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
