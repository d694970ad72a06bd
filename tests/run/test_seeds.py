"""Many seeds at once: each of them is what it would be alone, and none touches another."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from fake_envs import Script, Scripted
from tiny_runs import lines, same, share_agents, tiny_config

import dreamer
from dreamer.cli import main
from dreamer.envs import env_seed
from dreamer.replay import Replay
from dreamer.run.seeds import MappedAgent, common_step, seed_configs
from dreamer.saves.checkpoint import Checkpointer, CheckpointError

COUNT = 3
STEPS = 80
ROUND: Script = [(0.0, False, False)] * 4 + [(1.0, True, False)]
OTHER: Script = [(0.0, False, False)] * 4 + [(-3.0, True, False)]


#: Compiled once for all tests of a process.
mapped = functools.cache(MappedAgent)


def group(logdir: Path, **overrides: Any) -> Any:
    given = {"run__seeds": COUNT, "run__agent_steps": STEPS, "run__log_every": 1, "run__checkpoint_every": 40}
    return tiny_config(**{**given, "logdir": str(logdir), "seed": 5, **overrides})


def alone(logdir: Path, seed: int, **overrides: Any) -> Any:
    return group(logdir, run__seeds=None, seed=seed, **overrides)


def checkpoint(logdir: Path) -> tuple[Any, dict[str, Any]]:
    _, state, meta = Checkpointer(logdir, read_only=True).restore()
    return state, meta


def updates(logdir: Path) -> list[dict[str, float]]:
    records = lines(logdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k.startswith("train/")} for r in records if "train/opt/loss" in r]


@pytest.fixture(autouse=True)
def shared_agents(monkeypatch):
    share_agents(monkeypatch)
    monkeypatch.setattr("dreamer.run.seeds.MappedAgent", mapped)


@pytest.fixture
def drawn(monkeypatch):
    """(replay by order of building, rows) of every selection of this process."""
    found: list[tuple[int, np.ndarray]] = []
    replays: list[Replay] = []
    select = Replay.select

    def spy(self: Replay, size: int) -> Any:
        if not any(self is one for one in replays):
            replays.append(self)
        selection = select(self, size)
        index = next(i for i, one in enumerate(replays) if one is self)
        found.append((index, np.stack([selection.env, selection.row])))
        return selection

    monkeypatch.setattr(Replay, "select", spy)
    return found


def test_seeds_are_configured_as_the_runs_they_are(tmp_path):
    configs = seed_configs(group(tmp_path))
    assert [one.seed for one in configs] == [5, 6, 7]
    assert [Path(one.logdir).name for one in configs] == ["seed_5", "seed_6", "seed_7"]
    assert all(one.run.seeds is None for one in configs)


def test_each_seed_is_what_it_is_alone(tmp_path, drawn):
    assert dreamer.train(group(tmp_path / "group")) == 0
    together = list(drawn)
    for index, seed in enumerate((5, 6, 7)):
        drawn.clear()
        assert dreamer.train(alone(tmp_path / "alone" / str(seed), seed)) == 0
        rows = [rows for one, rows in together if one == index]
        assert len(rows) == len(drawn) > STEPS / 2
        assert all(np.array_equal(ours, theirs) for ours, (_, theirs) in zip(rows, drawn, strict=True))
        mine, its = tmp_path / "group" / f"seed_{seed}", tmp_path / "alone" / str(seed)
        (state, meta), (own, own_meta) = checkpoint(mine), checkpoint(its)
        assert np.array_equal(state["key"], own["key"]) and int(state["updates"]) == int(own["updates"]) > 0
        assert meta["schedule"] == own_meta["schedule"]
        first, first_alone = updates(mine)[0], updates(its)[0]
        assert first.keys() == first_alone.keys()
        for name, value in first_alone.items():
            np.testing.assert_allclose(first[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    losses = [updates(tmp_path / "group" / f"seed_{seed}")[0]["train/opt/loss"] for seed in (5, 6, 7)]
    assert len(set(losses)) == COUNT


def test_a_disturbed_seed_leaves_the_others_as_they_are(tmp_path):
    disturbed = {env_seed(6, training=True, index=index) for index in range(8)}

    def make(scripts: tuple[Script, Script]) -> Callable[[int, int], gymnasium.Env]:
        return lambda index, seed: Scripted(scripts[seed in disturbed])

    states = {}
    for name, scripts in (("calm", (ROUND, ROUND)), ("disturbed", (ROUND, OTHER))):
        assert dreamer.train(group(tmp_path / name), make_env=make(scripts)) == 0
        states[name] = [checkpoint(tmp_path / name / f"seed_{seed}")[0] for seed in (5, 6, 7)]
    assert [same(a, b) for a, b in zip(*states.values(), strict=True)] == [True, False, True]


def test_a_group_goes_on_exactly_from_the_step_that_all_have(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert dreamer.train(group(whole)) == 0
    assert dreamer.train(group(parts, run__agent_steps=40)) == 0
    behind = tmp_path / "seed_6 at 40"
    shutil.copytree(parts / "seed_6", behind)
    assert dreamer.train(group(parts, run__agent_steps=60)) == 0
    # As if it had been killed after seed 5 had saved and before seed 6 had.
    shutil.rmtree(parts / "seed_6")
    shutil.copytree(behind, parts / "seed_6")
    assert common_step([parts / f"seed_{seed}" for seed in (5, 6, 7)]) == 40
    assert dreamer.train(group(parts)) == 0
    for seed in (5, 6, 7):
        (ours, _), (theirs, _) = checkpoint(parts / f"seed_{seed}"), checkpoint(whole / f"seed_{seed}")
        assert same(ours, theirs)
        assert updates(parts / f"seed_{seed}") == updates(whole / f"seed_{seed}")


def test_no_common_step_is_told(tmp_path):
    assert common_step([tmp_path / "seed_0", tmp_path / "seed_1"]) is None
    assert dreamer.train(group(tmp_path, run__seeds=2, run__agent_steps=20)) == 0
    shutil.rmtree(tmp_path / "seed_6" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"same step in every run, found seed_5: \[.*20\], seed_6: \[\]"):
        dreamer.train(group(tmp_path, run__seeds=2))


def test_a_seed_is_evaluated_and_gone_on_with_alone(tmp_path, capsys):
    assert dreamer.train(group(tmp_path, run__seeds=2, run__agent_steps=40)) == 0
    assert "2 agents in one process, every one as above: seed_5, seed_6" in " ".join(capsys.readouterr().out.split())
    assert main(["eval", str(tmp_path / "seed_6"), "--episodes", "2", "--platform", "cpu"]) == 0
    assert "Evaluation" in capsys.readouterr().out
    assert main(["train", "--logdir", str(tmp_path / "seed_6"), "--run.agent_steps", "60"]) == 0
    assert checkpoint(tmp_path / "seed_6")[1]["agent_steps"] == 60


def test_several_updates_in_one_dispatch(tmp_path):
    assert dreamer.train(group(tmp_path, run__updates_per_dispatch=2, env__num_envs=2, run__agent_steps=60)) == 0
    counts = [int(checkpoint(tmp_path / f"seed_{seed}")[0]["updates"]) for seed in (5, 6, 7)]
    assert counts[0] > 10 and counts == counts[:1] * COUNT
