"""Promised returns beside real ones: counted by hand, and printed for a run that a planner collected."""

from __future__ import annotations

import numpy as np
import pytest
from fake_envs import Scripted
from tiny_runs import lines, same, tiny_config

import dreamer
from dreamer.run.evaluate import evaluate_run
from dreamer.run.promises import followed
from dreamer.run.training import train
from dreamer.saves.checkpoint import Checkpointer
from dreamer.terminal import Console

MPPI = {"planner__name": "mppi", "planner__candidates": 8, "planner__elites": 4, "planner__rounds": 1}


def test_real_returns_follow_to_the_end_of_the_episode():
    """One environment: a terminal episode, then one cut by a time limit, then one that goes on."""
    steps = {
        "reward": np.array([[0, 1, 2, 0, 4, 0, 8]], np.float32),
        "is_last": np.array([[0, 0, 1, 0, 1, 0, 0]], bool),
        "is_terminal": np.array([[0, 0, 1, 0, 0, 0, 0]], bool),
    }
    promised = np.array([[9, 9, 9, 9, 16, 9, 9]], float)
    returns, known = followed(steps, promised, 0.5)
    np.testing.assert_array_equal(known, [[1, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(returns[known], [1 + 0.5 * 2, 2, 4 + 0.5 * 16])


def _play(index: int, seed: int) -> Scripted:
    return Scripted([(1.0, False, False)] * 6 + [(1.0, True, False)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that a planner collects, in two parts, and one without a stop."""
    folder = tmp_path_factory.mktemp("planned")
    options = {"run__checkpoint_every": 40, **MPPI}
    for name, parts in (("parts", (80, 120)), ("whole", (120,))):
        for steps in parts:
            assert train(tiny_config(logdir=str(folder / name), run__agent_steps=steps, **options)) == 0
    return folder


def test_a_run_with_a_planner_goes_on_as_if_it_had_not_stopped(run):
    found = [Checkpointer(run / name, read_only=True).restore() for name in ("parts", "whole")]
    assert "planned" in found[0][2]["replay"]["fields"]
    assert same(found[0][1]["params"], found[1][1]["params"])
    scores = [[line["episode/score"] for line in lines(run / name / "scores.jsonl")] for name in ("parts", "whole")]
    assert scores[0] == scores[1] and scores[0]


def test_an_evaluation_compares_promises_for_planner_and_policy(run, capsys):
    assert evaluate_run(run / "whole", 2, console=Console(width=150)) == 0
    printed = capsys.readouterr().out
    assert "planner: " in printed and "critic: " in printed and " real, gap " in printed
    assert evaluate_run(run / "whole", 2, console=Console(width=150), planner={"planner.name": "null"}) == 0
    printed = capsys.readouterr().out
    assert "planner: " not in printed and "critic: " in printed


def test_an_agent_is_loaded_with_a_planner_of_choice(run):
    for planner, carried in ((None, True), ("null", False), ({"name": "mcts", "simulations": 2}, False)):
        agent = dreamer.Agent.load(run / "whole", planner=planner)
        space = agent._agent.observations
        seen = {key: np.zeros(value.shape, value.dtype) for key, value in space.items()}
        assert int(agent.act(seen if len(seen) > 1 else next(iter(seen.values())))) in range(3)
        assert ("plan" in agent._carry) == carried
