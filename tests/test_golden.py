"""A run that an earlier state of this program has written goes on, plays and is plotted with this one.

`data/run_of_0.1.0.tar.xz` was made at commit 979a068, by `dreamer train --configs debug --run.agent_steps 120
--run.checkpoint_every 60 --run.log_every 20 --log.tensorboard false`: its checkpoint at step 60 and all that it logged.
It stays as it is.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import share_agents

import dreamer
from dreamer.cli import main

ARCHIVE = Path(__file__).parent / "fixtures" / "run_of_0.1.0.tar.xz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The logdir of the old run."""
    share_agents(monkeypatch)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def metrics(logdir: Path) -> dict[int, dict[str, float]]:
    """Training metrics by step."""
    lines = map(json.loads, (logdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "train/opt/loss" in line}


def test_it_goes_on_with_the_same_numbers(old):
    before = metrics(old)
    assert main(["train", "--logdir", str(old)]) == 0
    after = metrics(old)
    assert list(after) == list(before) == [40, 60, 80, 100, 120]
    names = [
        name for name in before[120] if name.startswith(("train/", "episode/")) or name in ("updates", "agent_steps")
    ]
    assert len(names) > 30
    for step in (80, 100, 120):
        for name in names:
            # Means over tens of updates of sums that are rounded otherwise.
            expected = pytest.approx(before[step][name], rel=1e-3, abs=1e-6)
            assert after[step][name] == expected, f"{name} at step {step}"


def test_it_plays_and_is_evaluated(old, capsys):
    agent = dreamer.Agent.load(old)
    action = agent.act({"image": np.zeros((16, 16, 3), np.uint8)}, first=True)
    assert int(action) in range(3)
    assert main(["eval", str(old), "--episodes", "2"]) == 0
    assert "toy_catch" in capsys.readouterr().out


def test_it_is_plotted_and_exported(old, tmp_path):
    assert main(["plot", str(old), "--out", str(tmp_path / "curves")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert main(["export", str(old), str(tmp_path / "episodes")]) == 0
    assert list((tmp_path / "episodes").iterdir())
