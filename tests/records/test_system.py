"""What a run takes of its machine, against other ways of asking, and against a driver that is made up."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from dreamer import nvidia
from dreamer.records import system
from dreamer.records.system import INTERVAL, SystemMeter
from dreamer.sweeps.local import found_devices


def test_memory_and_disk_are_those_of_the_machine(tmp_path):
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


def test_a_look_is_taken_now_and_then(tmp_path):
    now = [100.0]
    meter = SystemMeter(tmp_path, clock=lambda: now[0])
    assert meter.result()
    now[0] += INTERVAL - 0.1
    assert meter.result() == {}
    now[0] += 0.1
    assert meter.result()


def test_memory_of_accelerators_is_summed(monkeypatch):
    def device(platform: str, stats: dict[str, int] | None) -> Any:
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    two = [device("gpu", {"bytes_in_use": 2 * 10**9, "peak_bytes_in_use": 3 * 10**9})] * 2
    monkeypatch.setattr(jax, "local_devices", lambda: [*two, device("cpu", None)])
    assert system.device_memory() == {"device_gigabytes": 4.0, "device_peak_gigabytes": 6.0}
    monkeypatch.setattr(jax, "local_devices", lambda: [device("tpu", None)])
    assert system.device_memory() == {}


@pytest.fixture
def driver(monkeypatch):
    """Sets what a made-up driver says; see tests/fake_driver."""
    path = Path(__file__).parents[1] / "fake_driver" / "pynvml.py"
    spec = importlib.util.spec_from_file_location("fake_pynvml", path)
    assert spec is not None and spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    monkeypatch.setattr(nvidia, "pynvml", fake)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda said: monkeypatch.setenv("FAKE_CARDS", json.dumps(said))


#: The second does not tell its memory.
CARDS = [
    {"name": "A", "driver": "570.1", "total": 10_000, "used": 7_000, "load": 50},
    {"name": "B", "driver": "570.1", "total": 10_000, "used": None, "load": 100},
]


def load(folder: Path) -> dict[str, float]:
    found = SystemMeter(folder, clock=iter([0.0, 1.0, 1.0]).__next__).result()
    return {name: value for name, value in found.items() if name.startswith("gpu")}


def test_load_is_asked_of_the_driver(tmp_path, monkeypatch, driver):
    driver(CARDS)
    assert load(tmp_path) == {"gpu_load": 0.75, "gpu_gigabytes": pytest.approx(7_000 * 2**20 / 1e9)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert load(tmp_path) == {"gpu_load": 1.0}


def test_a_driver_that_is_not_there_or_says_nothing_is_left_out(tmp_path, driver):
    assert nvidia.cards() == [] and load(tmp_path) == {}
    driver([])
    assert nvidia.cards() == [] and load(tmp_path) == {}
    driver("Driver/library version mismatch")
    assert load(tmp_path) == {}
    with pytest.raises(nvidia.DriverError, match="version mismatch"):
        nvidia.cards()


def test_a_sweep_deals_to_all_cards_that_there_are(driver):
    assert found_devices({}) == []
    driver(CARDS)
    assert found_devices({}) == ["0", "1"] and found_devices({"CUDA_VISIBLE_DEVICES": "1,3"}) == ["1", "3"]
    assert found_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    driver("no answer")
    assert found_devices({}) == []
