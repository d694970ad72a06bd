"""Stopping and going on: nothing is lost, nothing is counted twice, and what cannot go on says why."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from replay_data import stored_steps
from tiny_runs import lines, newest, same, share_agents
from waiting import until

from dreamer.cli import main
from dreamer.envs import InlineVectorEnv
from dreamer.presets import load_config
from dreamer.run.loop import Run
from dreamer.saves.checkpoint import Checkpointer

FOREVER = 10_000_000
OPTIONS = (
    "--run.checkpoint_every", "40", "--run.eval_every", "null", "--run.report_every", "null",
    "--replay.capacity", "100000",
)  # fmt: skip


@dataclasses.dataclass
class Stopped:
    """A run that got SIGTERM in the middle, from the command line."""

    logdir: Path
    code: int
    output: str
    refused_code: int
    refused: str


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run without an end in sight is stopped after a while; meanwhile the same command is given once more."""
    logdir = tmp_path_factory.mktemp("runs") / "a run"
    arguments = ["--configs", "debug", *OPTIONS, "--run.agent_steps", str(FOREVER), "--logdir", str(logdir)]
    command = [sys.executable, "-W", "error", "-m", "dreamer", "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            until(lambda: newest(logdir, "updates") >= 60, 600, "60 updates", process)
            second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    return Stopped(logdir, process.returncode, output, second.returncode, second.stdout + second.stderr)


@pytest.fixture
def copy(stopped, tmp_path):
    """The stopped run's folder, to go on in."""
    return Path(shutil.copytree(stopped.logdir, tmp_path / "copy"))


@dataclasses.dataclass
class Resumed:
    """What a run that goes on begins with."""

    run: Run
    steps: tuple[int, int]
    state: Any
    schedule: dict
    replay_length: int
    stats: dict
    everything: dict[str, np.ndarray]
    counter: int
    display: dict


@pytest.fixture
def resume(monkeypatch):
    """Goes on in this process with the run in a folder; what it begins with is looked at before its loop."""
    share_agents(monkeypatch)
    loop = Run.loop

    def go_on(logdir: Path, *options: str, code: int = 0) -> Resumed:
        found: list[Resumed] = []

        def look(run: Run, stop: Any) -> None:
            found.append(
                Resumed(
                    run,
                    (run.agent_steps, run.updates),
                    jax.device_get(run.learner.state),
                    run.schedule.state(),
                    len(run.replay),
                    run.replay.stats(),
                    stored_steps(run.replay),
                    run.collector.counter,
                    run.display.state(),
                )
            )
            loop(run, stop)

        monkeypatch.setattr(Run, "loop", look)
        assert main(["train", "--logdir", str(logdir), "--run.platform", "cpu", *options]) == code
        return found[0]

    return go_on


def checkpoint(logdir: Path) -> tuple[int, Any, dict]:
    return Checkpointer(logdir, read_only=True).restore()


def end_after(stopped: Stopped, steps: int) -> tuple[str, str]:
    """Options that let the stopped run end `steps` agent steps later."""
    return "--run.agent_steps", str(checkpoint(stopped.logdir)[0] + steps)


def test_sigterm_saves_and_says_how_to_go_on(stopped):
    assert stopped.code == 0, stopped.output
    assert f"resume with: dreamer train --logdir {shlex.quote(str(stopped.logdir))}" in stopped.output
    step, state, meta = checkpoint(stopped.logdir)
    assert step == meta["agent_steps"]
    # A stop changes no record: what was averaged since the last line is averaged further after the resume.
    last = lines(stopped.logdir / "metrics.jsonl")[-1]
    assert last["agent_steps"] == step // 40 * 40
    assert int(state["updates"]) == meta["updates"] >= 60


def test_a_logdir_in_use_is_refused(stopped):
    assert stopped.refused_code == 2
    assert "in use by a live run (pid " in stopped.refused
    assert "Traceback" not in stopped.refused


def test_counters_optimizer_and_return_scale_go_on(stopped, copy, resume, capsys):
    step, state, meta = checkpoint(stopped.logdir)
    begun = resume(copy, *end_after(stopped, 40))
    assert begun.steps == (step, meta["updates"])
    assert same(begun.state, state)
    assert float(begun.state["return_scale"]["high"]) != 0
    counts = [int(x) for path, x in jax.tree_util.tree_leaves_with_path(begun.state["opt"]) if "count" in str(path)]
    assert counts and set(counts) == {meta["updates"]}
    assert begun.schedule == meta["schedule"]
    assert begun.counter == step // 2
    assert begun.display == meta["episodes"]
    assert len(begun.display["recent"]) == min(20, len(lines(stopped.logdir / "scores.jsonl")))

    # And 40 steps later everything has moved on by as much: one update a step.
    later, after, meta_after = checkpoint(copy)
    assert (later, meta_after["updates"]) == (step + 40, meta["updates"] + 40)
    assert int(after["updates"]) == meta["updates"] + 40
    assert meta_after["schedule"]["start"] == meta["schedule"]["start"]
    assert f"Resuming at agent step {step:,}" in capsys.readouterr().out


def test_replay_goes_on(stopped, copy, resume):
    step, _, meta = checkpoint(stopped.logdir)
    begun = resume(copy, *end_after(stopped, 40))
    assert begun.replay_length == step
    assert begun.stats["inserts"] == step
    assert begun.stats["sequences"] == 2 * (meta["updates"] + 1)
    # Nothing was cut: episodes go on where they were.
    stored = begun.everything
    assert not stored["is_last"][:, -1].any() or step // 2 % 24 == 0
    ends = np.flatnonzero(stored_steps(begun.run.replay)["is_last"][0])
    assert (np.diff(ends) == 24).all()


@pytest.fixture
def forgetful(monkeypatch):
    """Environments that could be saved when the run was stopped cannot be restored now."""
    monkeypatch.setattr(InlineVectorEnv, "restorable", False)


@pytest.mark.usefixtures("forgetful")
def test_environments_that_cannot_be_restored_begin_anew(stopped, copy, resume):
    step = checkpoint(stopped.logdir)[0]
    begun = resume(copy, *end_after(stopped, 40))
    # What they were in the middle of is over, but not terminal.
    stored = begun.everything
    assert stored["is_last"][:, -1].all()
    assert stored["is_first"].any(1).all()
    ends = np.flatnonzero(stored["is_last"][0])
    assert (np.diff(ends[:-1]) == 24).all()
    assert len(begun.run.replay) == step + 40
    after = stored_steps(begun.run.replay)
    assert after["is_first"][:, step // 2].all()
    np.testing.assert_array_equal(after["image"][:, : step // 2], stored["image"])


def test_records_go_on_without_gaps_or_repeats(stopped, copy, resume):
    before = (copy / "scores.jsonl").read_text()
    # As if it had been killed some time after its last checkpoint.
    with (copy / "scores.jsonl").open("a") as file:
        file.write('{"step": 99999999, "episode/score": 3.0, "episode/length": 23}\n')
    resume(copy, *end_after(stopped, 100))
    after = (copy / "scores.jsonl").read_text()
    assert after.startswith(before)
    assert "99999999" not in after
    steps = [s["step"] for s in lines(copy / "scores.jsonl")]
    assert steps == sorted(steps) and len(steps) > len(before.splitlines())
    # Every episode is on record once and whole, the one that the stop fell into included.
    assert {s["episode/length"] for s in lines(copy / "scores.jsonl")} == {23}
    steps = [m["agent_steps"] for m in lines(copy / "metrics.jsonl")]
    assert steps == sorted(steps)


@pytest.mark.usefixtures("forgetful")
def test_training_environments_do_not_repeat_themselves_after_a_resume(stopped, copy, resume):
    begun = resume(copy, *end_after(stopped, 60))
    images = stored_steps(begun.run.replay)["image"]
    step = checkpoint(stopped.logdir)[0]
    again = images[:, step // 2 : step // 2 + 24]
    assert not np.array_equal(images[:, :24], again)


def test_a_finished_run_is_finished_until_it_is_given_more_steps(stopped, copy, resume, capsys):
    start = checkpoint(stopped.logdir)[0]
    resume(copy, *end_after(stopped, 20))
    state = checkpoint(copy)[1]
    again = resume(copy)
    assert again.steps[0] == start + 20
    assert same(checkpoint(copy)[1], state)
    capsys.readouterr()
    longer = resume(copy, *end_after(stopped, 60))
    assert f"run.agent_steps: {start + 20} -> {start + 60}" in capsys.readouterr().out
    assert longer.replay_length == start + 20
    assert longer.run.agent_steps == start + 60
    assert longer.run.updates == longer.steps[1] + 40


def test_options_that_may_change_are_shown(stopped, copy, resume, capsys):
    _, total = end_after(stopped, 20)
    resume(copy, "--run.agent_steps", total, "--run.log_every", "7")
    text = capsys.readouterr().out
    assert "Resuming with changed options" in text
    assert f"run.agent_steps: {FOREVER} -> {total}" in text
    assert "run.log_every: 40 -> 7" in text
    assert load_config([copy / "config.yaml"]).run.log_every == 7


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [("model.units", "12", "model.units: 8 -> 12"), ("run.train_ratio", "32", "run.train_ratio: 16.0 -> 32.0")],
)
def test_options_that_may_not_change_are_refused(stopped, option, value, shown, capsys):
    before = {path: path.stat().st_mtime_ns for path in stopped.logdir.rglob("*") if path.is_file()}
    assert main(["train", "--logdir", str(stopped.logdir), f"--{option}", value]) == 2
    error = capsys.readouterr().err
    assert shown in error and "cannot change on resume" in error
    assert {path: path.stat().st_mtime_ns for path in stopped.logdir.rglob("*") if path.is_file()} == before


def test_every_checkpoint_damaged_is_an_error(stopped, copy, capsys):
    for folder in (copy / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{")
    assert main(["train", "--logdir", str(copy), "--run.platform", "cpu"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_ctrl_c_is_a_clean_stop_as_well(stopped, copy, resume, monkeypatch):
    step = checkpoint(stopped.logdir)[0]
    wait, left = Run.update, iter(range(100))

    def interrupt(run: Run) -> None:
        wait(run)
        if next(left) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "update", interrupt)
    resume(copy)
    assert checkpoint(copy)[0] == step + 12
