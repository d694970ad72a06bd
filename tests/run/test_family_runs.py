"""Runs of the family's presets: they learn, report, save, go on as if they had never stopped, are dreamt in, and bear
what DreamerV3 bears."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from failing_env import Failing, Rounds
from tiny_runs import QUIET, eight_devices, lines, same, share_agents

import dreamer
from dreamer.presets import load_config
from dreamer.run.training import train
from dreamer.saves.checkpoint import Checkpointer

SEARCH = {"planner.horizon": 2, "planner.candidates": 8, "planner.rounds": 2, "planner.elites": 3}
EVOLUTION = {"population": 4, "rollouts": 2, "every": 7, "after": 5}
PRESETS: dict[str, dict[str, Any]] = {
    "dreamer_v2": {"actor_critic.slow_every": 3}, "dreamer_v1": {}, "planet": SEARCH,
    "muzero": {"loss.objective": ["value_equivalence", "probe"], "planner.simulations": 4,
               "actor_critic.simulations": 4},
    "r2dreamer": {"loss.objective": ["redundancy_reduction", "probe"]},
    "world_models": {f"actor_critic.evolution.{name}": value for name, value in EVOLUTION.items()},
}  # fmt: skip


def run(name: str, logdir: Path, steps: int, **more: Any) -> int:
    """Train a preset's method in the debug preset's size, up to this step."""
    options = QUIET | PRESETS[name] | {"run.agent_steps": steps, "run.checkpoint_every": 60, "run.report_every": 60}
    return dreamer.train(load_config([name, "debug"], options | {"logdir": str(logdir)} | more))


def end(logdir: Path) -> tuple[Any, dict[str, Any]]:
    _, state, meta = Checkpointer(logdir, read_only=True).restore()
    return state, meta


@pytest.mark.parametrize("name", [name if name == "dreamer_v1" else pytest.param(name, marks=pytest.mark.slow)
                                  for name in PRESETS])  # fmt: skip
def test_a_run_goes_on_as_if_it_had_not_stopped(name, tmp_path, monkeypatch):
    share_agents(monkeypatch)
    assert run(name, tmp_path / "whole", 120) == 0
    for steps in (60, 120):
        assert run(name, tmp_path / "parts", steps) == 0
    (whole, meta), (parts, _) = end(tmp_path / "whole"), end(tmp_path / "parts")
    assert meta["agent_steps"] == 120 and whole["updates"] > 20
    assert same(whole, parts)
    written = {key for line in lines(tmp_path / "whole" / "metrics.jsonl") for key in line}
    assert {"eval/score", "train/loss/dyn", "report/imagined_error/image"} <= written
    assert ("train/loss/policy" in written) == (name not in ("planet", "muzero", "world_models"))
    env = gymnasium.make("dreamer.dream_env:Dream-v0", logdir=str(tmp_path / "whole"), disable_env_checker=True)
    first, _ = env.reset(seed=0)
    after, reward, *_ = env.step(1)
    assert first.shape == after.shape == (16, 16, 3) and np.isfinite(reward)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_seeds_share_an_update(name, tmp_path):
    assert run(name, tmp_path / "both", 80, **{"run.seeds": 2, "run.report_every": None}) == 0
    one, other = (end(tmp_path / "both" / f"seed_{seed}")[0]["params"] for seed in (0, 1))
    assert not same(one["world_model"], other["world_model"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_failing_environment_costs_an_episode(name, tmp_path, capsys):
    options = QUIET | PRESETS[name] | {"run.agent_steps": 80, "run.log_every": 80, "logdir": str(tmp_path / "run")}
    options |= {"env.num_envs": 2, "env.workers": "inline", "env.restart_seconds": 0.01, "run.eval_every": None,
                "run.final_eval": False}  # fmt: skip
    make = lambda index, seed: Failing("raise", tmp_path / "once") if index == 1 else Rounds()  # noqa: E731
    assert train(load_config([name, "debug"], options), make) == 0
    assert "ZeroDivisionError: as told" in capsys.readouterr().out
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("env/failures_sum", 0) for row in found) == 1 and found[-1]["updates"] > 0
    # Whole episodes are on record, all of the healthy environment's and all but the cut one of the other.
    assert [row["episode/score"] for row in lines(tmp_path / "run" / "scores.jsonl")] == [7.0] * 9


@pytest.mark.slow
def test_an_update_on_several_devices_is_that_of_one(tmp_path):
    program = Path(__file__).resolve().parents[1] / "sharded_updates.py"
    subprocess.run([sys.executable, program, tmp_path, *PRESETS], env=eight_devices(), check=True)
    arrays = dict(np.load(tmp_path / "arrays.npz"))
    for name in PRESETS:
        expected = {key.split("/", 2)[2]: value for key, value in arrays.items() if key.startswith(f"{name}/one/")}
        assert len(expected) > 50
        for mesh in ("data", "both"):
            for key, value in expected.items():
                found, atol = arrays[f"{name}/{mesh}/{key}"], 2e-4 if ".momentum." in key else 1e-5
                np.testing.assert_allclose(found, value, rtol=1e-4, atol=atol, err_msg=f"{name} {mesh} {key}")
