"""Several processes: what each is told, what they agree on, and two that train together on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import tiny_config

from dreamer.config import Config
from dreamer.presets import ConfigError
from dreamer.run import distributed
from dreamer.run.factories import replay_capacity
from dreamer.run.shares import check_processes, own_key, own_seed
from dreamer.run.signals import StopRequest
from dreamer.saves.checkpoint import Checkpointer, CheckpointError

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def process_1_of_2(monkeypatch):
    """As if this were the second of two processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)


def config(**options: object) -> Config:
    return tiny_config(logdir="runs/shared", **options)


# What each is told


def test_options_that_belong_together():
    with pytest.raises(ConfigError, match="--run.coordinator HOST:PORT beside"):
        distributed.join(config(run__processes=2).run)
    with pytest.raises(ConfigError, match="--run.processes and --run.process_id beside .* localhost:1; .* auto"):
        distributed.join(config(run__coordinator="localhost:1", run__processes=2).run)
    distributed.join(config().run)
    assert not jax.distributed.is_initialized()


def test_a_process_alone_has_everything():
    whole = config()
    assert distributed.own_part(whole) is whole
    assert own_seed(7) == 7
    key = np.array([1, 2], np.uint32)
    assert own_key(key) is key
    check_processes(1)


@pytest.mark.usefixtures("process_1_of_2")
def test_a_process_among_others_records_nothing_and_draws_its_own():
    whole = config(log__jsonl=True, log__videos=True, run__eval_every=10)
    own = distributed.own_part(whole)
    assert Path(own.logdir) == Path("runs/shared/process_1").absolute()
    assert not (own.log.jsonl or own.log.tensorboard or own.log.videos or own.run.final_eval)
    assert own.run.eval_every is None
    assert dataclasses.replace(own, logdir=whole.logdir, log=whole.log, run=whole.run) == whole
    assert len({own_seed(7), own_seed(7, restarts=1), 7}) == 3
    assert not np.array_equal(own_key(np.array([1, 2], np.uint32)), [1, 2])
    # Half of the environments, and room for half of the steps.
    assert replay_capacity(config(run__agent_steps=100, env__num_envs=4, replay__capacity=1000)) == 52


@pytest.mark.usefixtures("process_1_of_2")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"env__num_envs": 3}, "env.num_envs to be a multiple of the 2 processes, got 3"),
        ({"run__batch_size": 3}, "run.batch_size to be a multiple of the 2 processes, got 3"),
        ({"run__checkpoint_keep": 1}, "run.checkpoint_keep 2 or more"),
        ({"run__seeds": 2}, "run.seeds null"),
        ({"logdir": ""}, "--logdir"),
    ],
)
def test_a_run_that_cannot_be_shared(options, says):
    with pytest.raises(ConfigError, match=says):
        distributed.own_part(tiny_config(**{"logdir": "runs/shared"} | options))


@pytest.mark.usefixtures("process_1_of_2")
def test_a_checkpoint_of_other_processes():
    with pytest.raises(ConfigError, match="expected 4 processes, .* got 2: .* --from_checkpoint"):
        check_processes(4)


# What they agree on


def others(monkeypatch: pytest.MonkeyPatch, *answers: list) -> None:
    """What the other process gives, question by question."""
    waiting = [np.array(answer) for answer in answers]
    monkeypatch.setattr(distributed, "everyone", lambda own: np.stack([own, waiting.pop(0)]))


def test_agreement(monkeypatch):
    request = StopRequest()
    agreed = distributed.Agreement(request)
    others(monkeypatch, [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0])
    agreed.reach(False, False, save=True)
    assert (bool(agreed), agreed.failed, agreed.broken, agreed.save) == (False, False, None, True)
    agreed.reach(False, False, save=False)
    assert bool(agreed) and agreed.requested
    agreed.reach(False, False, save=False)
    assert not agreed and agreed.failed
    agreed.reach(False, False, save=False)
    assert agreed.broken == 1
    request.signal = signal.SIGTERM
    agreed.reach(False, True, save=False)
    assert agreed and agreed.broken == 0


def saved(folder: Path, *steps: int) -> str:
    with Checkpointer(folder, keep=5) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"weight": np.arange(3)}, {})
    return str(folder)


def padded(*steps: int) -> list[int]:
    return [*steps, *[-1] * (64 - len(steps))]


def test_the_newest_checkpoint_that_all_have(monkeypatch, tmp_path):
    folder = saved(tmp_path, 10, 20, 30)
    others(monkeypatch, padded(10, 20), [1])
    assert distributed.common_step(folder) == 20
    others(monkeypatch, padded(10, 20), [0], [1])  # the other's is damaged
    assert distributed.common_step(folder) == 10
    others(monkeypatch, padded(40))
    with pytest.raises(CheckpointError, match="same step in every process"):
        distributed.common_step(folder)
    others(monkeypatch, padded())
    assert distributed.common_step(str(tmp_path / "none")) is None


# Two processes on this machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def pair(logdir: Path, *options: str) -> Iterator[list[subprocess.Popen]]:
    """Two processes that train together; killed in the end if they still run."""
    port = free_port()
    command = [sys.executable, str(TESTS / "sharded_run.py"), "--task", "gym_CartPole-v1", "--logdir", str(logdir)]
    command += ["--run.batch_size=4", "--run.checkpoint_every=40", "--run.final_eval=false", "--run.eval_every=null"]
    command += [f"--run.coordinator=127.0.0.1:{port}", "--run.processes=2", *options]
    started = [subprocess.Popen([*command, f"--run.process_id={process}"], cwd=TESTS) for process in range(2)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def meta(folder: Path) -> dict:
    return Checkpointer(folder, read_only=True).restore(parts=())[2]


@pytest.mark.slow
def test_two_processes_train_stop_and_resume(tmp_path):
    folders = [tmp_path, tmp_path / "process_1"]
    with pair(tmp_path, "--run.agent_steps=1_000_000") as processes:
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and "train/opt/loss" in metrics.read_text()):
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.1)
        os.kill(processes[1].pid, signal.SIGTERM)  # one is asked, both stop
        assert [process.wait(300) for process in processes] == [0, 0]
    found = [meta(folder) for folder in folders]
    steps = found[0]["agent_steps"]
    assert steps == found[1]["agent_steps"] > 0 and found[0]["updates"] == found[1]["updates"] > 0
    assert [one["processes"] for one in found] == [2, 2]
    with pair(tmp_path, f"--run.agent_steps={steps + 60}") as processes:
        assert [process.wait(600) for process in processes] == [0, 0]
    found = [meta(folder) for folder in folders]
    assert [one["agent_steps"] for one in found] == [steps + 60] * 2
    # Weights and records are process 0's, replay is everyone's: other environments saw other things.
    assert Checkpointer(folders[0], read_only=True).restore()[1]["updates"] == found[0]["updates"]
    assert Checkpointer(folders[1], read_only=True).restore()[1] == {}
    assert not (folders[1] / "metrics.jsonl").exists() and not (folders[1] / "scores.jsonl").exists()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/opt/loss"] for line in lines if "train/opt/loss" in line}
    assert min(losses) <= steps < max(losses) and np.isfinite(list(losses.values())).all()
    assert found[0]["replay"] != found[1]["replay"]
