"""What a run takes of its machine: memory of its processes, disk, memory and load of the accelerator."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import psutil

#: Least time between two looks, seconds: one look takes a few milliseconds.
INTERVAL = 5.0
_GB = 1e9


class SystemMeter:
    """Reads what can be read, at most every `INTERVAL` seconds. What a machine does not tell is left out."""

    def __init__(self, logdir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._logdir, self._clock = logdir, clock
        self._next = clock()
        self._nvml: Nvml | None = None
        self._looked = False

    def result(self) -> dict[str, float]:
        """Numbers by name, without prefix; none if the last look was just now."""
        if self._clock() < self._next:
            return {}
        self._next = self._clock() + INTERVAL
        return {**_processes(), **self._disk(), **device_memory(), **self._load()}

    def _disk(self) -> dict[str, float]:
        try:
            return {"disk_free_gigabytes": shutil.disk_usage(self._logdir).free / _GB}
        except OSError:
            return {}

    def _load(self) -> dict[str, float]:
        """Of NVIDIA's devices that this process may use."""
        if not self._looked:
            self._looked = True
            self._nvml = Nvml.load() if jax.default_backend() == "gpu" else None
        return {} if self._nvml is None else self._nvml.read()


def _processes() -> dict[str, float]:
    """Resident memory of this process and of those it has started, shared pages counted in each."""
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
    """What JAX holds now, and has held at most, summed over the accelerators of this process."""
    stats = [device.memory_stats() for device in jax.local_devices() if device.platform != "cpu"]
    found = [one for one in stats if one]
    names = {"device_gigabytes": "bytes_in_use", "device_peak_gigabytes": "peak_bytes_in_use"}
    return {
        name: sum(one[key] for one in found) / _GB
        for name, key in names.items()
        if found and all(key in one for one in found)
    }


class _Utilization(ctypes.Structure):
    """Per cent of the last moments in which something was computed, and in which memory was read or written."""

    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    """Bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Nvml:
    """The part of NVIDIA's management library that is needed here; the driver brings it along."""

    def __init__(self, library: Any, devices: list[ctypes.c_void_p]) -> None:
        self._library, self._devices = library, devices

    @classmethod
    def load(cls, library: Any = None) -> Nvml | None:
        """None where it is not, or has nothing to say. library: in place of the driver's."""
        try:
            library = library or ctypes.CDLL("libnvidia-ml.so.1")
            count = ctypes.c_uint()
            if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
                return None
            devices = []
            for index in _visible(count.value):
                handle = ctypes.c_void_p()
                if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                    devices.append(handle)
        except (OSError, AttributeError):
            return None
        return cls(library, devices) if devices else None

    def read(self) -> dict[str, float]:
        """gpu_load: mean share of time with something being computed; gpu_gigabytes: in use by anybody."""
        loads, used = [], []
        for device in self._devices:
            utilization, memory = _Utilization(), _Memory()
            if self._library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(utilization)) == 0:
                loads.append(utilization.gpu / 100)
            if self._library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0:
                used.append(memory.used / _GB)
        found = {"gpu_load": sum(loads) / len(loads)} if loads else {}
        return found | ({"gpu_gigabytes": sum(used)} if used else {})


def _visible(count: int) -> list[int]:
    """Numbers of the devices that CUDA_VISIBLE_DEVICES names, if it names them by number; else all."""
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    numbers = [int(part) for part in named if part.isdigit() and int(part) < count]
    return numbers or list(range(count))
