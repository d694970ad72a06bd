"""Killed at any moment and started again: every later number is that of the run that was never stopped.

All runs are processes of their own, killed with SIGKILL. What is compared at the end: every weight and optimizer
moment, every record (times aside), every stored step with its latents, and the batches on their way.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from replay_data import stored_steps
from tiny_runs import lines, newest, same

from dreamer.presets import CONFIG_FILE, load_config
from dreamer.run.factories import make_agent, make_replay, spaces_from_json
from dreamer.run.resume import read_progress
from dreamer.saves import snapshot
from dreamer.saves.checkpoint import Checkpointer

TIMES = ("fps/", "time/", "system/")

#: Options of a run that takes part, by name: everything happens in it, several times.
RUNS: dict[str, tuple[str, ...]] = {
    "toy": ("--run.agent_steps", "600"),
    "processes": ("--run.agent_steps", "600", "--env.workers", "process"),
    "wrapped ring": ("--run.agent_steps", "600", "--replay.capacity", "200"),
    "atari": (
        "--task", "atari100k_breakout", "--env.atari.size", "16,16", "--env.atari.sticky", "0.25",
        "--run.agent_steps", "400", "--env.time_limit", "60",
    ),
    "dmc": ("--task", "dmc_cartpole_swingup", "--run.agent_steps", "400", "--env.time_limit", "50"),
}  # fmt: skip
COMMON = (
    "--configs", "debug", "--run.platform", "cpu", "--run.display", "false", "--log.videos", "true",
    "--run.checkpoint_every", "60", "--run.log_every", "14", "--run.eval_every", "160", "--run.report_every", "90",
    "--run.eval_policy", "sample", "--log.video_every", "200", "--run.final_eval", "true",
)  # fmt: skip


def start(name: str, logdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dreamer", "train", *COMMON, *RUNS[name], "--logdir", str(logdir)]
    with (logdir.parent / f"{logdir.name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(name: str, logdir: Path) -> None:
    code = start(name, logdir).wait(timeout=600)
    assert code == 0, (logdir.parent / f"{logdir.name}.log").read_text()


def kill(name: str, logdir: Path, choice: random.Random) -> None:
    """Start, or resume, the run and kill it: at a random step, or while a checkpoint is being written."""
    process = start(name, logdir)
    begin = newest(logdir, "agent_steps")
    target = begin + choice.randint(0, 160)
    while_saving = choice.random() < 0.4
    end = time.monotonic() + 300
    seen: set[str] = set()
    while process.poll() is None and time.monotonic() < end:
        if newest(logdir, "agent_steps") > target:
            if not while_saving:
                time.sleep(choice.uniform(0, 0.05))
                break
            partial = {path.name for path in (logdir / "checkpoints").glob(f"{snapshot.PARTIAL}*")} - seen
            if partial:
                break
        time.sleep(0.001)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0), (logdir.parent / f"{logdir.name}.log").read_text()


def records(logdir: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in lines(logdir / name)]


def contents(logdir: Path) -> tuple[int, Any, Any, Any, dict]:
    """(step, training state, loop, stored steps, statistics of replay) of the newest checkpoint."""
    config = load_config([str(logdir / CONFIG_FILE)], {"logdir": str(logdir)})
    found: list[Any] = []

    def load(meta: dict[str, Any], folder: Path) -> None:
        observations, actions = (spaces_from_json(meta[key]) for key in ("observations", "actions"))
        replay = make_replay(config, make_agent(config, observations, actions))
        replay.load(logdir / "replay", meta["replay"])
        found[:] = [replay, read_progress(folder).loop]

    step, state, _ = Checkpointer(logdir, read_only=True).restore(check=load)
    replay, loop = found
    return step, state, loop, stored_steps(replay), replay.stats()


def assert_equal_runs(logdir: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "scores.jsonl"):
        ours, theirs = records(logdir, name), records(reference, name)
        assert len(ours) == len(theirs) > 3
        for a, b in zip(ours, theirs, strict=True):
            assert a == b, {k: (a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k)}
    step, state, loop, stored, stats = contents(logdir)
    expected = contents(reference)
    assert step == expected[0]
    assert same(state, expected[1])
    assert same(stored, expected[3])
    assert stats == expected[4]
    assert same(loop["learner"]["waiting"], expected[2]["learner"]["waiting"])
    assert same(loop["collector"], expected[2]["collector"])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Runs that were never stopped, by name, made when first asked for."""

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            logdir = tmp_path_factory.mktemp("reference") / name.replace(" ", "-")
            finish(name, logdir)
            self[name] = logdir
            return logdir

    return Made()


def check(name: str, seed: int, kills: int, references: dict[str, Path], folder: Path) -> None:
    logdir = folder / f"{name.replace(' ', '-')}-{seed}"
    choice = random.Random(seed)
    for _ in range(kills):
        kill(name, logdir, choice)
    finish(name, logdir)
    assert_equal_runs(logdir, references[name])


def test_three_kills_change_no_number(references, tmp_path):
    check("toy", 0, 3, references, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["toy", "atari", "dmc"])
def test_random_kills_change_no_number(name, seed, references, tmp_path):
    check(name, seed + 1, 2, references, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", "wrapped ring"])
def test_kills_change_no_number_in_workers_and_small_rings(name, references, tmp_path):
    check(name, 100, 2, references, tmp_path)
