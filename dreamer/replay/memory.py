"""What replay needs, in bytes of memory, disk and device, and what is available: known before allocating anything."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dreamer.replay.ring import ReplayError
from dreamer.types import Field

Fields = Mapping[str, Field]
Kind = Literal["host", "disk", "device"]
Medium = Literal["memory", "disk", "device"]

#: Share of each medium that replay may reserve; the rest is for the program itself, its weights and files.
SHARES: dict[Medium, float] = {"memory": 0.9, "disk": 0.9, "device": 0.5}

#: Checkpoints that keep their own values of what changes in place, beside the newest values.
_KEPT = 2
#: Bytes of memory per step in disk storage: the places of its latents, also for the kept checkpoints, and flags.
_INDEX_BYTES = 48

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def bytes_per_step(fields: Fields) -> int:
    """Bytes of one step of one environment."""
    return sum(field.nbytes for field in fields.values())


def machine_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit if that is lower."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else "max"
        if text != "max":
            sizes.append(int(text))
    return min(sizes)


def disk_space(folder: Path | None) -> int:
    """Bytes that replay files in `folder` (which need not exist yet) may fill: free space, and what they fill now."""
    folder = Path(os.path.realpath(folder or Path()))
    existing = next(path for path in (folder, *folder.parents) if os.path.isdir(path))
    ours = sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder)) if os.path.isdir(folder) else 0
    return shutil.disk_usage(existing).free + ours


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a kind of storage needs per step, and what this machine has.

    needs  Bytes per step in each medium. "disk" includes the checkpoints of what is kept elsewhere.
    has    Bytes available in each medium.
    holds  The media in which the storage must have room.
    """

    kind: Kind
    needs: Mapping[Medium, int]
    has: Mapping[Medium, int]
    holds: tuple[Medium, ...]

    @property
    def largest(self) -> int:
        """Most steps, over all environments, that fit."""
        return min(int(self.has[medium] * SHARES[medium]) // max(self.needs[medium], 1) for medium in self.holds)

    def check(self, capacity: int) -> None:
        """Raise ReplayError, naming the largest capacity that fits, if `capacity` does not."""
        if capacity <= self.largest:
            return
        short = min(self.holds, key=lambda m: self.has[m] * SHARES[m] / max(self.needs[m], 1))
        raise ReplayError(
            f"expected a replay capacity that fits ({self.kind} storage), got {capacity} steps of {self.needs[short]}"
            f" bytes = {capacity * self.needs[short] / 1e9:.1f} GB of {short}, of which there are"
            f" {self.has[short] / 1e9:.1f} GB; the largest that fits is {self.largest} steps:"
            f" set --replay.capacity {self.largest} or less, or another --replay.storage"
        )


def latents_of(fields: Fields) -> tuple[str, ...]:
    """The fields that updates rewrite."""
    return tuple(name for name, field in fields.items() if field.latent)


def budget(kind: Kind, fields: Fields, folder: Path | None = None, device: int | None = None) -> Budget:
    """What this `kind` of storage needs and finds. `device`: free bytes of its own, if any.

    Images and everything else that never changes are on disk once, however many checkpoints are kept; what changes in
    place is there once more for each of them.
    """
    step, changing = bytes_per_step(fields), bytes_per_step({name: fields[name] for name in latents_of(fields)})
    disk = step + _KEPT * changing
    needs: dict[Kind, dict[Medium, int]] = {
        "host": {"memory": step, "disk": disk, "device": 0},
        "disk": {"memory": _INDEX_BYTES, "disk": disk, "device": 0},
        "device": {"memory": 0, "disk": disk, "device": step},
    }
    holds: dict[Kind, tuple[Medium, ...]] = {"host": ("memory",), "disk": ("memory", "disk"), "device": ("device",)}
    if kind == "device" and device is None:  # a CPU: its memory is the machine's
        needs["device"], holds["device"] = needs["host"], holds["host"]
    has: dict[Medium, int] = {"memory": machine_memory(), "disk": disk_space(folder), "device": device or 0}
    return Budget(kind, needs[kind], has, holds[kind])


def choose_storage(fields: Fields, capacity: int, folder: Path | None, device: int | None) -> Kind:
    """The fastest storage that fits: the device's memory if an accelerator has `device` free bytes, else the
    machine's, else the disk."""
    order: list[Kind] = ["device", "host", "disk"]
    budgets = [budget(kind, fields, folder, device) for kind in (order if device else order[1:])]
    fitting = [found for found in budgets if capacity <= found.largest]
    return (fitting or [max(budgets, key=lambda found: found.largest)])[0].kind
