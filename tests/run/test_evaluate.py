"""Trained weights at play: `dreamer eval`, and `Agent` in somebody else's program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import jax
import numpy as np
import pytest
from fake_envs import Script, Scripted
from tiny_runs import share_agents, tiny_config

import dreamer
from dreamer.cli import main
from dreamer.envs import TaskError
from dreamer.presets import load_config
from dreamer.run.collector import Collector
from dreamer.run.evaluate import as_evaluation, evaluate_run
from dreamer.run.factories import evaluation_envs, training_envs
from dreamer.run.loaded_agent import load_agent
from dreamer.saves.checkpoint import Checkpointer

ROUND: Script = [(0.0, False, False)] * 4 + [(1.0, True, False)]


class Reach(gymnasium.Env):
    """Continuous, with bounds of its own: pays the first action coordinate, ends after five steps."""

    observation_space = gs.Box(-np.inf, np.inf, (3,))

    def __init__(self) -> None:
        self.action_space = gs.Box(np.array([10.0, -1.0], np.float32), np.array([30.0, 0.0], np.float32))
        self.position = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action} is out of bounds")
        self.position += 1
        return self._observation(), float(action[0]), False, self.position == 5, {}

    def _observation(self) -> np.ndarray:
        return self.np_random.normal(size=3).astype(np.float32)


gymnasium.register("Reach-v0", entry_point=Reach)


@dataclasses.dataclass
class Trained:
    logdir: Path
    task: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few updates in an environment; evaluated, so that there are best weights."""
    runs: dict[str, Trained] = {}

    def train(task: str) -> Trained:
        if task not in runs:
            logdir = tmp_path_factory.mktemp("trained") / "run"
            options = {"run.agent_steps": 50, "run.eval_every": 50, "run.final_eval": False}
            names = {name.replace(".", "__"): value for name, value in options.items()}
            make = (lambda index, seed: Scripted(ROUND)) if task == "own" else None
            assert dreamer.train(tiny_config(task=task, logdir=str(logdir), **names), make_env=make) == 0
            runs[task] = Trained(logdir, task)
        return runs[task]

    return train


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    share_agents(monkeypatch)


def scores_in(text: str, task: str) -> list[str]:
    """The row of a task in the printed table: episodes, mean, std, min, max."""
    row = next(line for line in text.splitlines() if task in line and "│" in line)
    return [cell.strip() for cell in row.split("│")[2:7]]


def test_eval_prints_the_scores(trained, capsys):
    run = trained("gym_Reach-v0")
    capsys.readouterr()
    assert main(["eval", str(run.logdir), "--episodes", "3", "--platform", "cpu"]) == 0
    episodes, mean, _, low, high = scores_in(capsys.readouterr().out, "gym_Reach-v0")
    assert episodes == "3"
    assert 50 <= float(low) <= float(mean) <= float(high) <= 150


def test_eval_seeds(trained, capsys):
    """The same seed gives the same scores; another one others, with sampled actions too."""
    run = trained("gym_Reach-v0")

    def play(*options: str) -> list[str]:
        capsys.readouterr()
        assert main(["eval", str(run.logdir), "--episodes", "2", "--platform", "cpu", *options]) == 0
        return scores_in(capsys.readouterr().out, run.task)

    assert play() == play()
    assert play("--seed", "5") == play("--seed", "5") != play()
    sampled = play("--policy", "sample", "--seed", "5")
    assert sampled == play("--policy", "sample", "--seed", "5")
    assert sampled != play("--seed", "5")


def test_no_video_without_images(trained, tmp_path, capsys):
    run = trained("gym_Reach-v0")
    assert main(["eval", str(run.logdir), "--episodes", "1", "--video", str(tmp_path / "x.gif")]) == 0
    assert "no video: gym_Reach-v0 gives no images" in capsys.readouterr().out
    assert not (tmp_path / "x.gif").exists()


def test_eval_of_an_own_environment(trained, capsys):
    run = trained("own")
    assert evaluate_run(str(run.logdir), 2, make_env=lambda index, seed: Scripted(ROUND)) == 0
    assert "│        2 │    1 │" in capsys.readouterr().out
    assert main(["eval", str(run.logdir), "--episodes", "2"]) == 2
    error = capsys.readouterr().err
    assert "environment function of its own" in error and "make_env=FUNCTION" in error


def test_eval_in_another_environment_is_refused(trained):
    run = trained("own")
    with pytest.raises(TaskError, match="expected the actions that the agent was trained with"):
        evaluate_run(str(run.logdir), 2, make_env=lambda index, seed: Reach())


def test_what_is_known_of_a_task():
    assert as_evaluation(tiny_config(), [1.0]).best == 3
    assert as_evaluation(tiny_config(task="atari100k_pong"), [14.6]).normalized == pytest.approx(1.0, abs=0.01)
    assert as_evaluation(tiny_config(task="make_env"), [1.0]).best is None


def test_evaluation_environments_have_other_seeds_than_training():
    given: dict[str, list[int]] = {"training": [], "restarted": [], "evaluation": [], "other": []}

    def note(name: str) -> Callable[[int, int], gymnasium.Env]:
        return lambda index, seed: (given[name].append(seed), Scripted(ROUND))[1]

    config = tiny_config(env__num_envs=3)
    training_envs(config, 0, note("training"))
    training_envs(config, 1, note("restarted"))
    evaluation_envs(config, note("evaluation"), 3)
    evaluation_envs(config, note("other"), 3, seed=9)
    seeds = [seed for one in given.values() for seed in one]
    assert len(seeds) == len(set(seeds)) == 12


# Agent


def act_through(agent: dreamer.Agent, env: gymnasium.Env, seed: int, episodes: int) -> list[float]:
    scores = []
    for _ in range(episodes):
        observation, over, score = env.reset(seed=seed if not scores else None)[0], False, 0.0
        agent.reset()
        while not over:
            observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
            score, over = score + float(reward), terminated or truncated
        scores.append(score)
    return scores


def test_agent_plays_as_evaluation_does(trained):
    run = trained("gym_Reach-v0")
    config = load_config([run.logdir / "config.yaml"])
    agent, params, key = load_agent(config)
    seeds: list[int] = []
    envs = evaluation_envs(config, lambda index, seed: (seeds.append(seed), Reach())[1], 1)
    collector = Collector(agent, envs, key, "eval", sample=False)
    expected: list[float] = []
    while len(expected) < 3:
        collector.act(params)
        expected += [episode.score for episode in collector.wait()]
    env = gymnasium.make("Reach-v0")
    scores = act_through(dreamer.Agent.load(run.logdir, env), env, seeds[0] % 2**31, 3)
    assert scores == pytest.approx(expected)


def test_agent_uses_the_best_weights(trained, tmp_path):
    run = trained("gym_Reach-v0")
    checkpointer = Checkpointer(run.logdir, read_only=True)
    _, best, _ = checkpointer.restore_best()
    _, params, _ = load_agent(load_config([run.logdir / "config.yaml"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), best["params"])


def test_actions_without_an_environment_are_the_agents_own(trained):
    run = trained("gym_Reach-v0")
    observation = np.array([0.5, -1.0, 2.0])
    bare = dreamer.Agent.load(run.logdir).act(observation)
    named = dreamer.Agent.load(run.logdir).act({"vector": observation})
    own = dreamer.Agent.load(run.logdir, Reach()).act(observation)
    assert bare.shape == (2,) and (np.abs(bare) <= 1).all()
    np.testing.assert_array_equal(bare, named)
    np.testing.assert_allclose(own, [20 + 10 * bare[0], -0.5 + 0.5 * bare[1]], rtol=1e-5)


def test_sampled_actions_differ(trained):
    agent = dreamer.Agent.load(trained("gym_Reach-v0").logdir, sample=True)
    actions = [agent.act(np.ones(3), first=True) for _ in range(3)]
    assert not np.array_equal(actions[0], actions[1])


def test_an_environment_with_other_spaces_is_refused(trained):
    run = trained("gym_Reach-v0")
    with pytest.raises(ValueError, match="expected an environment with the actions of training"):
        dreamer.Agent.load(run.logdir, Scripted(ROUND))
