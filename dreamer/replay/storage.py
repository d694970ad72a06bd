"""Where the steps lie: host memory, one array per field, addressed by flat slots; and what it costs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dreamer.replay.errors import ReplayError
from dreamer.types import Field

Fields = Mapping[str, Field]

#: Share of the machine's memory that replay may reserve; the rest is for the program itself.
MEMORY_SHARE = 0.9

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def bytes_per_step(fields: Fields) -> int:
    """Bytes of one step of one environment."""
    return sum(field.nbytes for field in fields.values())


def bytes_at_capacity(fields: Fields, capacity: int) -> int:
    """Bytes of `capacity` steps, environments counted together."""
    return capacity * bytes_per_step(fields)


def machine_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit if that is lower."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else "max"
        if text != "max":
            sizes.append(int(text))
    return min(sizes)


def largest_capacity(fields: Fields) -> int:
    """Most steps, over all environments, that fit into this machine's memory."""
    return int(machine_memory() * MEMORY_SHARE) // max(bytes_per_step(fields), 1)


def check_capacity(fields: Fields, capacity: int) -> None:
    """Raise ReplayError if `capacity` steps cannot fit into this machine's memory."""
    largest = largest_capacity(fields)
    if capacity > largest:
        raise ReplayError(
            f"expected a replay capacity that fits into memory, got {capacity} steps of {bytes_per_step(fields)} bytes"
            f" = {bytes_at_capacity(fields, capacity) / 1e9:.1f} GB on a machine with {machine_memory() / 1e9:.1f} GB;"
            f" the largest that fits is {largest} steps: set --replay.capacity {largest} or less"
        )


class HostStorage:
    """Fields as numpy arrays (N * rows, ...) in host memory. Knows slots only: validity is the ring's matter.

    Pages that were never written cost no memory: the kernel hands out zeroed pages at the first touch.
    """

    def __init__(self, fields: Fields, slots: int):
        check_capacity(fields, slots)
        self.fields = dict(fields)
        self._arrays = {name: np.zeros((slots, *f.shape), f.dtype) for name, f in fields.items()}

    def put(self, slots: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Write `values` (M, ...) of some or all fields to distinct slots (M,)."""
        for name, value in values.items():
            self._arrays[name][slots] = value

    def gather(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """Steps at `slots` (B, L) as fresh, contiguous arrays (B, L, ...), never handed out again.

        jax may alias a numpy array that it was given, so none of them is ever reused.
        """
        return {name: array.take(slots, axis=0) for name, array in self._arrays.items()}

    def take(self, name: str, slots: np.ndarray) -> np.ndarray:
        """One field at `slots` (M,), a fresh array (M, ...)."""
        return self._arrays[name].take(slots, axis=0)

    def pieces(self, name: str, start: int, count: int, low: int, high: int) -> Iterator[np.ndarray]:
        """Views of `count` slots of one field from `start` on, wrapping from slot `high` to slot `low`."""
        first = min(count, high - start)
        yield self._arrays[name][start : start + first]
        if count > first:
            yield self._arrays[name][low : low + count - first]
