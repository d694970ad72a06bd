"""`dreamer bench` beyond the update: what is asked for, what is measured, tables and comparisons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from tiny_runs import share_agents, tiny_config

from dreamer.bench import bench_loop, measuring
from dreamer.bench.bench_env import ALONE, bench_env
from dreamer.bench.bench_planning import bench_planning
from dreamer.bench.bench_play import bench_play
from dreamer.bench.bench_replay import bench_replay
from dreamer.bench.bench_update import bench_policy
from dreamer.bench.measuring import Report, figure, read_report, save_report, show, take_turns
from dreamer.cli import main
from dreamer.commands import bench
from dreamer.planner_config import PlannerConfig
from dreamer.presets import load_config
from dreamer.schema import ConfigError

MACHINE = {"processor": "a fast one", "cores": "2", "device": "1 x cpu (cpu)", "python": "3", "jax": "1"}
MACHINE |= {"jaxlib": "1", "dreamer": "0"}


def report(ms: float = 10.0, part: str = "policy", **changes: Any) -> Report:
    rows = {"one": {**figure("ms", [ms - 1, ms, ms + 1]), "share": 0.925, "where": "here"}}
    return Report(part, {"rounds": 3}, ("ms", "share", "where", "missing"), rows, "a note", MACHINE | changes)


# Tables, files, comparisons


def test_medians_and_quartiles():
    assert figure("ms", [5, 1, 3, 2, 4]) == {"ms": 3, "ms_quartiles": [2, 4]}
    assert figure("ms", [7]) == {"ms": 7, "ms_quartiles": [7, 7]}
    assert figure("ms", []) == {}


def test_contenders_take_turns():
    order: list[str] = []
    contenders: dict[str, Callable[[], int]] = {
        name: lambda name=name: (order.append(name), len(order))[1] for name in ("a", "b")
    }
    assert take_turns(contenders, 2) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]


def test_a_report_names_the_machine_and_shows_median_and_spread(capsys):
    show(report())
    text = capsys.readouterr().out
    assert "a fast one, 2 cores; 1 x cpu (cpu); python 3, jax 1" in text
    assert "10" in text and "9.50..10.50" in text and "92%" in text and "a note" in text
    assert " x" not in text.replace("1 x cpu", "")


def test_ratios_stand_beside_the_figures_of_another_report(capsys, tmp_path):
    save_report(tmp_path / "other.json", report(20.0, jax="0.9"))
    other = read_report(tmp_path / "other.json", "policy")
    assert other == dataclasses.replace(report(20.0, jax="0.9"), columns=list(report().columns))
    show(report(), other)
    text = capsys.readouterr().out
    assert "0.50 x" in text and "1.00 x" in text
    assert "not the same machine: jax 0.9 there, 1 here" in text
    assert "not the same request" not in text


@pytest.mark.parametrize("content", [None, "{", "{}", '{"part": "loop", "request": {}, "columns": [], "rows": {}}'])
def test_what_is_no_report_of_this_part_is_refused(tmp_path, content):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="--compare: expected"):
        read_report(file, "policy")


def test_the_machine_is_named():
    found = measuring.machine()
    assert {"processor", "cores", "device", "system", "python", "jax", "dreamer", "numpy"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
    assert "cpu" in found["device"]


# The command


def test_every_part_takes_the_options_of_a_run(monkeypatch, tmp_path):
    seen: list[tuple[Any, ...]] = []
    for part, module in (("policy", "update"), ("replay", "replay"), ("env", "env"), ("loop", "loop")):
        measure = lambda *arguments, part=part: (seen.append(arguments), report(part=part))[1]  # noqa: E731
        monkeypatch.setattr(f"dreamer.bench.bench_{module}.bench_{part}", measure)
    file = tmp_path / "out.json"
    assert main(["bench", "policy", "--envs", "1", "8", "--rounds", "2", "--json", str(file)]) == 0
    assert main(["bench", "env", "--configs", "debug", "--env.num_envs", "3", "--steps", "5"]) == 0
    assert main(["bench", "replay", "--task", "toy_catch", "--capacity", "100"]) == 0
    assert main(["bench", "loop", "--configs", "debug", "--train-ratios", "8", "2", "--seconds", "1"]) == 0
    assert main(["bench", "policy", "--compare", str(file)]) == 0
    policy, env, replay, loop, again = seen
    assert policy == (load_config(["quickstart"]), [1, 8], 2) and again == (load_config(["quickstart"]), None, 15)
    assert env == (load_config(["debug"], {"env.num_envs": 3}), 15, 5)
    assert replay == (load_config([], {"task": "toy_catch"}), 100, 100, None)
    assert loop == ({"toy_catch": load_config(["debug"])}, [8.0, 2.0], 1.0, 5)
    assert json.loads(file.read_text())["part"] == "policy"


def test_the_loop_is_measured_on_three_suites_unless_told_otherwise():
    configs = bench.loop_configs(["--env.num_envs", "2"])
    assert [config.task for config in configs.values()] == ["toy_catch", "atari100k_pong", "dmc_cartpole_swingup"]
    assert all(config.env.num_envs == 2 for config in configs.values())


@pytest.mark.parametrize(
    "line", ["update --seed 1", "policy 3", "plan --planners mppy", "env --configs", "loop --train-ratios x", "nothing"]
)
def test_mistakes_end_in_one_line(line, capsys):
    assert main(["bench", *line.split()]) == 2
    assert "dreamer: error:" in capsys.readouterr().err


# Measuring, small


def test_the_policy_is_measured_for_every_number_of_environments(monkeypatch):
    monkeypatch.setattr("dreamer.bench.bench_update.CALLS", 2)
    found = bench_policy(tiny_config(), [2, 1], rounds=3)
    assert list(found.rows) == ["1 environment", "2 environments"]
    for count, row in enumerate(found.rows.values(), 1):
        low, high = row["ms_quartiles"]
        assert 0 < low <= row["ms"] <= high and row["first_call_s"] > 0
        np.testing.assert_allclose(row["steps_per_s"], count * 1e3 / row["ms"])


def test_replay_is_measured_beside_plain_copying(tmp_path):
    found = bench_replay(tiny_config(), rounds=3, capacity=200, folder=tmp_path)
    operations = ("draw a batch", "add a step", "write latents")
    assert list(found.rows) == [f"{storage}: {what}" for storage in ("host", "disk") for what in operations]
    assert all(row["ms"] > 0 and row["plain_ms"] > 0 and row["ratio"] > 0 for row in found.rows.values())
    assert not any(tmp_path.iterdir())


def test_environments_are_measured_by_where_they_run():
    before = psutil.Process().num_threads()
    atari = load_config(["atari100k"], {"env.num_envs": 2})
    found = bench_env(atari, rounds=2, steps=4)
    assert list(found.rows) == [ALONE, "inline", "process", "native"]
    assert all(row["steps_per_s"] > 0 and row["steps_per_cpu_s"] > 0 for row in found.rows.values())
    assert found.rows[ALONE]["speed_ratio"] == found.rows[ALONE]["cpu_speed_ratio"] == 1
    assert psutil.Process().num_threads() <= before
    assert list(bench_env(tiny_config(env__num_envs=1), rounds=2, steps=4).rows) == ["inline", "process"]


@pytest.mark.parametrize(("ratio", "together"), [(4, 1), pytest.param(32, 2, marks=pytest.mark.slow)])
def test_the_loop_is_measured_beside_its_parts(monkeypatch, ratio, together):
    share_agents(monkeypatch)
    config = tiny_config(run__updates_per_dispatch=together)
    found = bench_loop.bench_loop({"tiny": config}, [ratio], seconds=0.5, rounds=2)
    ((name, row),) = found.rows.items()
    assert name == f"tiny, train ratio {ratio:g}"
    assert "which share the cores of this CPU" in found.note
    # Batches of 2 x 8, two environments: each pass owes an eighth of the ratio in updates.
    np.testing.assert_allclose(row["updates_per_pass"], ratio / 8, atol=0.2 if ratio == 4 else 0)
    np.testing.assert_allclose(row["agent_steps_per_s"], 2e3 / row["pass_ms"], rtol=0.2)
    bound = row["policy_ms"] + row["envs_ms"] + row["updates_per_pass"] * row["update_ms"]
    np.testing.assert_allclose(row["bound_per_s"], 2e3 / bound, rtol=0.2)
    assert row["share"] > 0.05 and row["cpu_share"] > 0.05


@pytest.mark.parametrize(("shared", "bound"), [(True, 2 + 5 + 9), (False, 2 + 9)])
def test_the_bound_on_an_accelerator_is_the_slower_of_environments_and_updates(monkeypatch, shared, bound):
    monkeypatch.setattr(bench_loop, "cores_are_shared", lambda: shared)
    both = lambda ms: np.array([ms, 10 * ms])  # noqa: E731
    before = bench_loop.Cost(both(1), both(4), {1: both(2)})
    cost = before.mean(bench_loop.Cost(both(3), both(6), {1: both(4), 2: both(6)}))
    line = bench_loop.line_of(np.array([100.0, 4000.0]), 10, {1: 10, 2: 10}, cost)
    # Policy 2, environments 5, updates alone 3, two together 6.
    assert line["bound_ms"] == bound and line["pass_ms"] == 10
    assert line["bound_cpu_ms"] == 160 and line["pass_cpu_ms"] == 400
    assert line["updates_per_pass"] == 3 and line["update_ms"] == 3


def test_decisions_are_measured_by_who_takes_them_and_for_how_many(monkeypatch):
    budgets = {"policy": PlannerConfig(), "mcts 2": PlannerConfig(name="mcts", simulations=2)}
    monkeypatch.setattr(
        "dreamer.bench.bench_planning.BUDGETS", budgets | {"dream_mpc": PlannerConfig(name="dream_mpc")}
    )
    found = bench_planning(tiny_config(), [1, 2], 2, None)
    names = [f"{who}, {count}" for who in ("policy", "mcts 2") for count in ("1 environment", "2 environments")]
    assert list(found.rows) == names  # dream_mpc cannot act here
    assert all(row["ms"] > 0 and row["cpu_ms"] >= 0 and row["first_call_s"] > 0 for row in found.rows.values())
    assert list(bench_planning(tiny_config(), [1], 1, ["policy"]).rows) == names[:1]


# Frames of the page


def test_frames_are_measured_by_who_acts():
    found = bench_play(tiny_config(), ("person", "policy"), rounds=2, frames=30)
    assert list(found.rows) == ["person", "policy"] and found.request["frames"] == 30
    for row in found.rows.values():
        assert row["ms"] > 0 and row["frames_per_s"] == pytest.approx(1e3 / row["ms"], rel=0.5)
    with pytest.raises(ConfigError, match="--actors: expected some of person, policy, .*mcts, got nobody"):
        bench_play(tiny_config(), ("person", "nobody"), rounds=1, frames=1)
