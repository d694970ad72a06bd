"""The report of an accelerator, from programs that only pretend to be updates."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_report.py"
spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
gpu_report = sys.modules["gpu_report"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_report)
SEEDS, SIZES, Job, jobs = gpu_report.SEEDS, gpu_report.SIZES, gpu_report.Job, gpu_report.jobs
markdown, time_all = gpu_report.markdown, gpu_report.time_all

STEADY = """
import json, sys
print(json.dumps({"compile_s": 2.0, "gflop": 300.0}), flush=True)
for i, line in enumerate(sys.stdin):
    print(json.dumps({"ms": 2.0 + (i % 3)}), flush=True)
"""
BROKEN = "import sys; sys.exit('no memory left')"
HANGING = "import time; time.sleep(600)"


def program(name: str, text: str, updates: int = 1) -> Job:
    return Job("size", name, (sys.executable, "-c", text), updates=updates)


def test_programs_are_timed_and_broken_ones_are_told():
    wanted = [program("steady", STEADY), program("four", STEADY, 4), program("broken", BROKEN)]
    steady, four, broken = time_all(wanted, time.monotonic() + 60)
    assert steady["ms"] == 3.0 and steady["ms_quartiles"] == [2.0, 4.0] and steady["compile_s"] == 2.0
    assert steady["updates_per_s"] == pytest.approx(1000 / 3)
    assert four["updates_per_s"] == pytest.approx(4000 / 3)
    assert "no memory left" in broken["missing"]


def test_a_program_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE", 1.0)
    (row,) = time_all([program("hanging", HANGING)], time.monotonic() - 1)
    assert row["missing"] == "no time was left"
    (row,) = time_all([program("hanging", HANGING)], time.monotonic() + 0.1)
    assert row["missing"] == "it was not compiled in time"


def test_everything_asked_for_is_timed():
    found = jobs(SIZES, "python update.py")
    assert len(found) == len({(job.group, job.name) for job in found}) == 14 + 2 + 14 + len(SEEDS) + 14 + 4
    assert [job.updates for job in found if job.group == "seeds"] == list(SEEDS)
    assert jobs(["1m"], "python update.py")[-3].command == ("python", "update.py", "--size", "1m", "--obs", "image")
    assert not any(job.group == "yardstick" for job in jobs(SIZES, None))


def test_the_page():
    row = {"group": "size", "name": "1m vector", "ms": 2.0, "ms_quartiles": [1.9, 2.2], "updates_per_s": 500.0}
    report = {
        "machine": {"device": "1 x H", "jax": "0.11"},
        "seconds": 400.0,
        "tests": {"finished": True, "result": "14 passed in 60s"},
        "precision": {
            "loss_gaps_bfloat16": {"loss/dyn": 0.002, "loss/rew": 0.01},
            "product_tflops": {"bfloat16": 600.0},
        },
        "rows": [row | {"compile_s": 30.0, "gflop": 300.0}, {"group": "size", "name": "400m image", "missing": "a\nb"}],
        "launches": [
            {"name": "1m vector", "launches": 566, "launched": 580, "us_per_launch": 3.5},
            {"name": "1m image", "missing": "no time was left"},
        ],
        "learning": {"seconds": 100.0, "finished": False, "episodes": 900, "score_of_last_100": 2.5},
    }
    page = markdown(report)
    assert "| size | 1m vector | 2.00 | 1.90 to 2.20 | 500.0 | 30 | 150.0 | 25 % |" in page
    assert "| size | 400m image | missing: b |" in page
    assert "1m vector: 566 launches in the program, 580 in a trace, 3.50 us each." in page
    assert "1m image: no launches counted, no time was left." in page
    assert "14 passed" in page and "1.0e-02 (loss/rew)" in page
    assert "until the time was up, 100 s: 900 episodes, mean score of the last 100: 2.50 of 3" in page
