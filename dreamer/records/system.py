"""What a run uses of its machine: memory of its processes, disk, accelerator; and the versions of its packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import psutil

from dreamer.nvidia import DriverError, cards, visible

#: Least time between two readings, seconds: a reading takes a few milliseconds.
INTERVAL = 5.0
_GB = 1e9


class SystemMeter:
    """Reads what can be read, at most every `INTERVAL` seconds. What a machine does not report is left out."""

    def __init__(self, logdir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._logdir, self._clock = logdir, clock
        self._next = clock()

    def result(self) -> dict[str, float]:
        """Numbers by name, without prefix; none if the last reading was just now."""
        if self._clock() < self._next:
            return {}
        self._next = self._clock() + INTERVAL
        return {**_processes(), **self._disk(), **device_memory(), **_load()}

    def _disk(self) -> dict[str, float]:
        try:
            return {"disk_free_gigabytes": shutil.disk_usage(self._logdir).free / _GB}
        except OSError:
            return {}


def _processes() -> dict[str, float]:
    """Resident memory of this process and of those it started, shared pages counted in each."""
    me = psutil.Process()
    sizes = []
    for process in (me, *me.children(recursive=True)):
        try:
            sizes.append(process.memory_info().rss)
        except psutil.Error:  # It has just ended.
            continue
    found = {"ram_gigabytes": sizes[0] / _GB, "ram_free_gigabytes": psutil.virtual_memory().available / _GB}
    return found | ({"workers_ram_gigabytes": sum(sizes[1:]) / _GB} if len(sizes) > 1 else {})


def device_memory() -> dict[str, float]:
    """Memory that JAX holds now, and its peak, summed over the accelerators of this process."""
    stats = [device.memory_stats() for device in jax.local_devices() if device.platform != "cpu"]
    found = [one for one in stats if one]
    names = {"device_gigabytes": "bytes_in_use", "device_peak_gigabytes": "peak_bytes_in_use"}
    return {
        name: sum(one[key] for one in found) / _GB
        for name, key in names.items()
        if found and all(key in one for one in found)
    }


def _load() -> dict[str, float]:
    """Load of the NVIDIA cards that this process may use. gpu_load: mean share of time in which they were busy;
    gpu_gigabytes: in use by any process."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        found = cards(visible())
    except DriverError:
        return {}
    loads = [card.load for card in found if card.load is not None]
    used = [card.used / _GB for card in found if card.used is not None]
    told = {"gpu_load": sum(loads) / len(loads)} if loads else {}
    return told | ({"gpu_gigabytes": sum(used)} if used else {})


# --- Versions --------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions that decide whether a resumed run repeats the numbers of an uninterrupted one."""
    packages = ("dreamer", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "gymnasium")
    found = {"python": platform.python_version(), "cores": str(_cores())}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cores() -> int:
    """Cores this process may use; the number of threads decides the order of some sums."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
