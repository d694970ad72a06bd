"""Damage done to whole runs: environments that fail, a disk that is full, files that are cut or changed.

What single workers do is in `test_faults_workers.py`, what single files do in `test_replay_persistence.py`.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing_env import Failing, Rounds
from replay_data import stored_steps
from tiny_runs import lines, share_agents, tiny_config

from dreamer.cli import main
from dreamer.run.loop import Run
from dreamer.run.schedule import SaveTimer
from dreamer.run.training import ENVIRONMENTS_FAILED, train
from dreamer.saves.checkpoint import Checkpointer, CheckpointWarning

#: No more than training.
BARE: dict[str, Any] = {"run__eval_every": None, "run__final_eval": False}


def train_until(steps: int, logdir: Path, **overrides: Any) -> int:
    """Train, or go on, with a checkpoint every 40 steps; the exit code."""
    options = {"run__checkpoint_every": 40} | BARE | overrides
    return train(tiny_config(logdir=str(logdir), run__agent_steps=steps, **options))


@pytest.fixture
def runs(monkeypatch):
    """The runs of a test, in order."""
    share_agents(monkeypatch)
    made: list[Run] = []
    build = Run._build
    monkeypatch.setattr(Run, "_build", lambda run, *shared: (made.append(run), build(run, *shared))[1])
    yield made


@pytest.mark.parametrize(
    ("trouble", "workers", "said"),
    [
        ("raise", "inline", "ZeroDivisionError: as told"),
        ("kill", "process", "signal"),
        ("block", "process", "no answer for 5 seconds"),
        ("nan reward", "inline", "reward"),
    ],
)
def test_a_failing_environment_costs_an_episode(trouble, workers, said, runs, tmp_path, capsys):
    logdir = tmp_path / "run"
    config = tiny_config(
        logdir=str(logdir), env__num_envs=2, env__workers=workers, env__timeout_seconds=5.0, env__restart_seconds=0.01,
        run__agent_steps=80, run__train_ratio=4, run__log_every=80, **BARE,
    )  # fmt: skip
    make = lambda index, seed: Failing(trouble, tmp_path / "once") if index == 1 else Rounds()  # noqa: E731
    assert train(config, make) == 0
    text = capsys.readouterr().out
    assert "environment 1" in text and "restarted" in text and said in text
    assert sum(row.get("env/failures_sum", 0) for row in lines(logdir / "metrics.jsonl")) == 1
    steps = stored_steps(runs[0].replay)
    healthy, failed = ({name: array[env] for name, array in steps.items()} for env in (0, 1))
    # Episodes have 8 stored steps. The second one of the failing environment was cut after its third.
    assert np.flatnonzero(healthy["is_last"]).tolist() == [7, 15, 23, 31, 39]
    assert np.flatnonzero(failed["is_last"]).tolist() == [7, 10, 18, 26, 34]
    assert np.flatnonzero(failed["is_terminal"]).tolist() == [7, 18, 26, 34]
    assert np.flatnonzero(failed["is_first"]).tolist() == [0, 8, 11, 19, 27, 35]
    # Whole episodes are on record, all of the other environment's and all but the cut one of this.
    assert [s["episode/score"] for s in lines(logdir / "scores.jsonl")] == [7.0] * 9


def test_an_environment_that_always_fails_stops_the_run_with_a_checkpoint(runs, tmp_path, capsys):
    config = tiny_config(
        logdir=str(tmp_path), env__num_envs=1, env__restart_seconds=0.0, env__failure_limit=2, run__agent_steps=1000,
        run__eval_every=None, run__train_ratio=4,
    )  # fmt: skip
    assert train(config, lambda index, seed: Failing("raise", None)) == ENVIRONMENTS_FAILED
    text = " ".join(capsys.readouterr().out.split())
    assert "stopped: expected at most 2 failures of environments within 10 minutes, got 3" in text
    step, _, meta = Checkpointer(tmp_path, read_only=True).restore()
    assert step == meta["agent_steps"] == runs[0].agent_steps == 33
    assert np.flatnonzero(stored_steps(runs[0].replay)["is_last"][0]).tolist() == [7, 10, 18, 21, 29, 32]


def test_an_environment_that_cannot_be_recreated_stops_the_run_with_a_checkpoint(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dreamer.envs.faults.TRIES", 3)
    config = tiny_config(
        logdir=str(tmp_path), env__num_envs=1, env__restart_seconds=0.0, env__failure_limit=None, run__agent_steps=1000,
        **BARE, run__train_ratio=4,
    )  # fmt: skip
    made: list[int] = []

    def make(index: int, seed: int) -> Rounds:
        made.append(seed)
        if len(made) > 1:
            raise ConnectionError("the game's server is gone")
        return Failing("raise", None)

    assert train(config, make) == ENVIRONMENTS_FAILED
    assert "the game's server is gone" in capsys.readouterr().out
    step, _, meta = Checkpointer(tmp_path, read_only=True).restore()
    assert (step, meta["exact"]) == (11, False)


def test_a_failing_evaluation_environment_is_recreated(runs, tmp_path):
    config = tiny_config(
        logdir=str(tmp_path / "run"), env__num_envs=1, env__restart_seconds=0.0, run__agent_steps=20,
        run__eval_every=20, run__eval_episodes=3, run__eval_envs=1, run__final_eval=False,
    )  # fmt: skip
    made: list[int] = []

    def make(index: int, seed: int) -> Rounds:
        made.append(seed)
        return Rounds() if len(made) == 1 else Failing("raise", tmp_path / "once")

    assert train(config, make) == 0
    (row,) = (r for r in lines(tmp_path / "run" / "metrics.jsonl") if "eval/score" in r)
    # Three whole episodes; the one that was cut is not among them.
    assert row["eval/score"] == 7.0 and row["eval/length"] == 7.0
    # Training's; evaluation's, tried at the start and made later with the same seed; the one after the failure.
    assert len(made) == 4 and len(set(made)) == 3


# A disk that is full


@pytest.fixture
def full_disk():
    """Call with True: no file can grow beyond a kilobyte any more; with False: as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (1024 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(runs, tmp_path, full_disk, monkeypatch, capsys):
    monkeypatch.setattr(SaveTimer, "RETRY_SECONDS", 0.0)
    at_full: list[tuple[int, int]] = []
    update = Run.update

    def watch(run: Run) -> None:
        if run.agent_steps == 100:
            run.checkpointer.wait()
            full_disk(True)
        if run.agent_steps == 160:
            with pytest.raises(OSError), (tmp_path / "more").open("wb") as file:  # noqa: PT011
                file.write(bytes(5000))
            step, state, _ = Checkpointer(tmp_path, read_only=True).restore()
            at_full.append((step, int(state["updates"])))
            full_disk(False)
        update(run)

    monkeypatch.setattr(Run, "update", watch)
    assert train_until(240, tmp_path, run__log_every=20) == 0
    assert "checkpoint failed" in capsys.readouterr().out
    assert at_full[0][0] == 80 and at_full[0][1] > 0
    # Soon after there was room again a checkpoint was there, and at the end nothing is missing.
    assert Checkpointer(tmp_path, read_only=True).latest() == 240
    steps = [r["agent_steps"] for r in lines(tmp_path / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(20, 241, 20))
    assert len(runs[0].replay) == 240
    monkeypatch.setattr(Run, "update", update)
    assert train_until(260, tmp_path, run__log_every=20) == 0
    assert len(runs[1].replay) == 260


# Files that were changed


@pytest.fixture
def two_checkpoints(runs, tmp_path):
    """A logdir with checkpoints at steps 80 and 120."""
    assert train_until(120, tmp_path / "run", run__checkpoint_every=80) == 0
    runs.clear()
    return tmp_path / "run"


@pytest.mark.parametrize("newest", ["checkpoints/*/meta.json", "replay/*"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(newest, two_checkpoints, runs):
    """All ways of damage are in `test_damage.py`."""
    path = max(two_checkpoints.glob(newest), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(CheckpointWarning, match=f"{120:012d} is damaged and was skipped"):
        assert train_until(160, two_checkpoints) == 0
    assert len(runs[0].replay) == runs[0].agent_steps == 160
    assert Checkpointer(two_checkpoints, read_only=True).steps()[-1] == 160
    # Every episode is there once: 24 stored steps each, of either environment.
    assert np.flatnonzero(stored_steps(runs[0].replay)["is_last"][0]).tolist() == [23, 47, 71]
    scores = lines(two_checkpoints / "scores.jsonl")
    assert len(scores) == 6 and [score["step"] for score in scores] == sorted(score["step"] for score in scores)


def test_a_config_of_another_version_is_refused_by_name(two_checkpoints, capsys):
    before = {path: path.read_bytes() for path in two_checkpoints.rglob("*") if path.is_file()}
    path = two_checkpoints / "config.yaml"
    path.write_text(path.read_text().replace("train_ratio:", "replay_ratio:"))
    assert main(["train", "--logdir", str(two_checkpoints)]) == 2
    error = capsys.readouterr().err
    assert "unknown option run.replay_ratio" in error and "Traceback" not in error
    path.write_bytes(before[path])
    assert {path: path.read_bytes() for path in two_checkpoints.rglob("*") if path.is_file()} == before


def test_state_of_another_user_is_not_read(two_checkpoints, monkeypatch, capsys):
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert main(["train", "--logdir", str(two_checkpoints), "--run.platform", "cpu"]) == 2
    assert "expected a file of the user who resumes the run" in capsys.readouterr().err
