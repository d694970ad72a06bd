"""What a run takes of its machine, against other ways of asking, and against a driver that is made up."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from dreamer.records import system
from dreamer.records.system import INTERVAL, Nvml, SystemMeter


def test_memory_and_disk_are_those_of_the_machine(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = SystemMeter(tmp_path).result()
        pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
        child.communicate(b"\n")
    pages_here = int(Path("/proc/self/statm").read_text().split()[1])
    page = resource.getpagesize() / 1e9
    assert found["ram_gigabytes"] == pytest.approx(pages_here * page, rel=0.2)
    assert found["workers_ram_gigabytes"] >= 0.9 * pages * page
    assert found["disk_free_gigabytes"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.1)
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(memory["MemAvailable"].split()[0]) * 1024 / 1e9
    assert found["ram_free_gigabytes"] == pytest.approx(free, rel=0.3)
    assert not [name for name in found if name.startswith(("device", "gpu"))], "there is no accelerator"


def test_a_look_is_taken_now_and_then(tmp_path: Path) -> None:
    now = [100.0]
    meter = SystemMeter(tmp_path, clock=lambda: now[0])
    assert meter.result()
    now[0] += INTERVAL - 0.1
    assert meter.result() == {}
    now[0] += 0.1
    assert meter.result()


def test_memory_of_accelerators_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(platform: str, stats: dict[str, int] | None) -> Any:
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    two = [device("gpu", {"bytes_in_use": 2 * 10**9, "peak_bytes_in_use": 3 * 10**9})] * 2
    monkeypatch.setattr(jax, "local_devices", lambda: [*two, device("cpu", None)])
    assert system.device_memory() == {"device_gigabytes": 4.0, "device_peak_gigabytes": 6.0}
    monkeypatch.setattr(jax, "local_devices", lambda: [device("tpu", None)])
    assert system.device_memory() == {}


class Driver:
    """In place of NVIDIA's library: two devices, busy 50 % and 100 %; the second does not tell its memory."""

    def __init__(self, count: int = 2, fails: bool = False) -> None:
        self.count, self.fails, self.asked = count, fails, list[int]()

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 9 if self.fails else 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        self.asked.append(index.value)
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: ctypes.c_void_p, found: Any) -> int:  # noqa: N802
        found._obj.gpu = 50 * int(device.value or 0)
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: ctypes.c_void_p, found: Any) -> int:  # noqa: N802
        found._obj.used = 7 * 10**9
        return 0 if device.value == 1 else 3


def test_load_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = Nvml.load(Driver())
    assert found is not None and found.read() == {"gpu_load": 0.75, "gpu_gigabytes": 7.0}
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "1")
    found, driver = Nvml.load(second := Driver()), second
    assert driver.asked == [1] and found is not None and found.read() == {"gpu_load": 1.0}


def test_a_driver_that_is_not_there_or_says_nothing_is_left_out() -> None:
    assert Nvml.load(Driver(fails=True)) is None and Nvml.load(Driver(count=0)) is None
    assert Nvml.load(object()) is None
