"""Episodes spelled out by hand: rewards and flags through wrappers, repeat, time limits and automatic resets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dm_env
import numpy as np
import pytest
from fake_envs import Script, Scripted

from dreamer.env_config import EnvConfig, ToyConfig
from dreamer.envs import Batch, make_env, make_vector_env, summary, transition
from dreamer.types import Space

# Ends: by itself after three actions; at a time limit after one; both at once after two.
WIN: Script = [(1.0, False, False), (2.0, False, False), (3.0, True, False)]
LIMIT: Script = [(5.0, False, True)]
BOTH: Script = [(0.5, False, False), (-1.0, True, True)]

F, T = False, True


def play(workers: str, make: Callable[[int, int], Any], steps: int, num_envs: int = 1, **options: Any) -> list[Batch]:
    """Reset, then `steps` steps; the action of step t is t % 5 for every environment."""
    env = make_vector_env("scripted", EnvConfig(workers=workers, **options), num_envs, 0, True, make)
    batches = [env.reset()]
    for step in range(steps):
        env.step_async({"action": np.full(num_envs, step % 5, np.int32)})
        batches.append(env.step_wait())
    env.close()
    return batches


def column(batches: list[Batch], key: str, env: int = 0) -> list:
    return [batch[key][env].tolist() for batch in batches]


@pytest.mark.parametrize("workers", ["inline", "process"])
def test_terminal_end_time_limit_and_both_at_once(workers):
    batches = play(workers, lambda index, seed: Scripted(WIN, LIMIT, BOTH), steps=9)
    # step                                       0  1  2  3  | 0  1  | 0  1  2  | 0
    assert column(batches, "reward") == [0, 1, 2, 3, 0, 5, 0, 0.5, -1, 0]
    assert column(batches, "is_first") == [T, F, F, F, T, F, T, F, F, T]
    assert column(batches, "is_last") == [F, F, F, T, F, T, F, F, T, F]
    assert column(batches, "is_terminal") == [F, F, F, T, F, F, F, F, T, F]
    # What was seen: [episode, step, action that led here]. The actions 3, 0 and 3 at last steps were not executed.
    assert column(batches, "vector") == [
        [0, 0, -1], [0, 1, 0], [0, 2, 1], [0, 3, 2],
        [1, 0, -1], [1, 1, 4],
        [2, 0, -1], [2, 1, 1], [2, 2, 2],
        [3, 0, -1],
    ]  # fmt: skip


def test_repeat_sums_rewards_and_stops_at_the_end():
    batches = play("inline", lambda index, seed: Scripted(WIN), steps=3, gym={"repeat": 2})
    assert column(batches, "reward") == [0, 3, 3, 0]
    assert column(batches, "is_last") == [F, F, T, F]
    assert column(batches, "is_terminal") == [F, F, T, F]
    assert column(batches, "vector") == [[0, 0, -1], [0, 2, 0], [0, 3, 1], [1, 0, -1]]


def test_time_limit_is_last_but_not_terminal():
    batches = play("inline", lambda index, seed: Scripted(WIN, BOTH), steps=5, time_limit=2)
    # WIN is cut after two actions; BOTH ends by itself just then, and stays terminal.
    assert column(batches, "reward") == [0, 1, 2, 0, 0.5, -1]
    assert column(batches, "is_first") == [T, F, F, T, F, F]
    assert column(batches, "is_last") == [F, F, T, F, F, T]
    assert column(batches, "is_terminal") == [F, F, F, F, F, T]


class Countdown:
    """A user's own environment with our interface; ends (terminal) after `length` actions."""

    def __init__(self, length: int) -> None:
        self.observation_spaces = {"left": Space("discrete", (), (length + 1,)), "log/double": Space("vector", ())}
        self.action_spaces = {"action": Space("vector", (2,))}
        self.length = length

    def reset(self) -> dict:
        self.left = self.length
        return transition(self._observation(), is_first=True)

    def step(self, action: dict) -> dict:
        self.left -= 1
        return transition(self._observation(), float(action["action"].sum()), F, self.left == 0, self.left == 0)

    def render(self) -> None:
        return None

    def close(self) -> None:
        self.left = 0

    def _observation(self) -> dict:
        return {"left": np.int32(self.left), "log/double": np.float32(2 * self.left)}


@pytest.mark.parametrize("workers", ["inline", "process"])
def test_own_environment_from_a_closure(workers):
    length = 2
    env = make_vector_env("own", EnvConfig(workers=workers), 2, 0, True, lambda index, seed: Countdown(length))
    batches = [env.reset()]
    for _ in range(3):
        env.step_async({"action": np.array([[0.25, 0.5], [1.0, 1.0]], np.float32)})
        batches.append(env.step_wait())
    assert env.render() is None
    env.close()
    assert column(batches, "left") == [2, 1, 0, 2]
    assert column(batches, "log/double") == [4, 2, 0, 4]
    assert column(batches, "reward", 0) == [0, 0.75, 0.75, 0]
    assert column(batches, "reward", 1) == [0, 2, 2, 0]
    assert column(batches, "is_terminal") == [F, F, T, F]


def test_dmc_ends_at_its_time_limit_without_terminal():
    """1000 control steps are 4 agent steps of 300: the last one is shorter."""
    env = make_env("dmc_cartpole_balance", EnvConfig(dmc={"repeat": 300}), seed=0)
    steps = [env.reset()]
    for _ in range(4):
        steps.append(env.step({"action": np.zeros(1, np.float32)}))
    assert [bool(step["is_last"]) for step in steps] == [F, F, F, F, T]
    assert not any(step["is_terminal"] for step in steps)
    assert [bool(step["is_first"]) for step in steps] == [T, F, F, F, F]
    assert 50 < steps[1]["reward"] <= 300 and steps[4]["reward"] <= 100
    env.close()


@pytest.mark.parametrize(("discount", "terminal"), [(0.0, True), (1.0, False)])
def test_dmc_is_terminal_only_with_discount_0(discount, terminal, monkeypatch):
    env = make_env("dmc_cartpole_balance", EnvConfig(dmc={"repeat": 4}), seed=0)
    env.reset()
    inner = env._env
    observation = inner.task.get_observation(inner.physics)
    kinds = iter(
        [dm_env.transition(0.25, observation), dm_env.TimeStep(dm_env.StepType.LAST, 0.5, discount, observation)]
    )
    monkeypatch.setattr(inner, "step", lambda action: next(kinds))
    step = env.step({"action": np.zeros(1, np.float32)})
    assert (step["reward"], step["is_last"], step["is_terminal"]) == (0.75, True, terminal)
    env.close()


def test_crafter_dies_terminal(monkeypatch):
    env = make_env("crafter_reward", EnvConfig(), seed=0)
    env.reset()
    noop = {"action": np.int32(0)}
    assert not env.step(noop)["is_last"]
    player = env._env._player
    player.health = 0
    step = env.step(noop)
    assert step["is_last"] and step["is_terminal"]
    first = env.reset()
    assert first["is_first"] and first["reward"] == 0 and first["log/achievement_collect_wood"] == 0
    env._env._length = 2
    env.step(noop)
    step = env.step(noop)
    assert step["is_last"] and not step["is_terminal"]


def test_crafter_rewards_achievements_once_and_logs_them():
    scores = {}
    for name in ("reward", "noreward"):
        env = make_env(f"crafter_{name}", EnvConfig(), seed=0)
        env.reset()
        player = env._env._player
        player.achievements["collect_wood"] = 2
        step = env.step({"action": np.int32(0)})
        again = env.step({"action": np.int32(0)})
        assert step["log/achievement_collect_wood"] == again["log/achievement_collect_wood"] == 2
        assert step["log/reward"] == 1 and again["log/reward"] == 0
        scores[name] = float(step["reward"]), float(again["reward"])
    assert scores == {"reward": (1.0, 0.0), "noreward": (0.0, 0.0)}


def test_crafter_score_is_the_geometric_mean_of_success_rates():
    """Reached in all, in one of two, and in no episode, however often; means and other logs do not count."""
    one = {"achievement_wood/max": 7.0, "achievement_coal/max": 0.0, "achievement_iron/max": 0.0, "reward/max": 1.0}
    two = {"achievement_wood/max": 1.0, "achievement_coal/max": 2.0, "achievement_iron/max": 0.0, "reward/max": 1.0}
    ignored = {"achievement_wood/mean": 0.1}
    expected = (101 * 51 * 1) ** (1 / 3) - 1
    assert summary("crafter_reward", [one | ignored, two | ignored]) == {"crafter_score": pytest.approx(expected)}
    assert summary("crafter_reward", []) == summary("toy_catch", [one]) == {}


def test_catch_is_a_game_of_skill():
    """Following the ball catches all of them; running away catches none. Two balls: 15 steps, rewards at 7 and 15."""
    for chase, score in ((True, 1.0), (False, -1.0)):
        env = make_env("toy_catch", EnvConfig(toy=ToyConfig(balls=2)), seed=1)
        for _ in range(20):
            steps = [env.reset()]
            while not steps[-1]["is_last"]:
                ball, paddle = _find(steps[-1]["image"])
                toward = 0 if ball < paddle[0] else 2 if ball > paddle[-1] else 1
                away = 2 if ball < 4 else 0
                steps.append(env.step({"action": np.int32(toward if chase else away)}))
            rewards = [float(step["reward"]) for step in steps]
            assert rewards == [0] * 7 + [score] + [0] * 7 + [score]
            assert [bool(step["is_terminal"]) for step in steps] == [F] * 15 + [T]


def _find(image: np.ndarray) -> tuple[int, list[int]]:
    """Columns (0 to 7) of the ball and of the paddle, from the pixels at the middle of each cell."""
    cells = image[2::4, 2::4].astype(int)
    ball = np.argwhere((cells[..., 0] > 200) & (cells[..., 1] > 150))[0][1]
    paddle = np.flatnonzero((cells[-1, :, 1] > 150) & (cells[-1, :, 0] < 100)).tolist()
    return int(ball), paddle or [int(ball)]
