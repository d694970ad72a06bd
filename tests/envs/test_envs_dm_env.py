"""Environments of dm_env: every kind of spec, and episodes spelled out by hand."""

from __future__ import annotations

from typing import Any

import dm_env
import numpy as np
import pytest
from dm_env import specs

from dreamer.env_config import EnvConfig
from dreamer.envs import EnvError, TaskError, make_env, make_vector_env
from dreamer.envs.suites.dm_env import DmEnv
from dreamer.envs.vector import adopt
from dreamer.types import Space

F, T = False, True
FIRST, MID, LAST = dm_env.StepType.FIRST, dm_env.StepType.MID, dm_env.StepType.LAST


class Played(dm_env.Environment):
    """Plays (reward, discount) pairs, the last of an episode LAST. Keeps the actions it was given."""

    observation: Any = specs.Array((2,), np.float64, "vector")
    action: Any = specs.DiscreteArray(4)

    def __init__(self, *episodes: list[tuple[float, float]], value: Any = None) -> None:
        self.episodes = episodes
        self.value = value
        self.episode, self.position = -1, 0
        self.actions: list[Any] = []
        self.closed = False

    def reset(self) -> dm_env.TimeStep:
        self.episode, self.position = self.episode + 1, 0
        return dm_env.TimeStep(FIRST, None, None, self._observe())

    def step(self, action: Any) -> dm_env.TimeStep:
        self.actions.append(action)
        steps = self.episodes[self.episode % len(self.episodes)]
        reward, discount = steps[self.position]
        self.position += 1
        return dm_env.TimeStep(LAST if self.position == len(steps) else MID, reward, discount, self._observe())

    def observation_spec(self) -> Any:
        return self.observation

    def action_spec(self) -> Any:
        return self.action

    def close(self) -> None:
        self.closed = True

    def _observe(self) -> Any:
        return np.array([self.episode, self.position], np.float64) if self.value is None else self.value


def make_played(seed: int) -> Played:
    """For the Python path in a test below."""
    return Played([(float(seed >= 0), 1.0)] * 3)


def column(batches: list[dict], key: str) -> list:
    return [batch[key][0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", ["inline", "process"])
def test_a_discount_of_0_is_terminal_and_another_end_a_time_limit(workers):
    episodes = [(1.0, 1.0), (2.0, 0.0)], [(3.0, 0.5), (4.0, 0.9)]
    env = make_vector_env("own", EnvConfig(workers=workers), 1, 0, True, lambda index, seed: Played(*episodes))
    assert env.observation_spaces == {"vector": Space("vector", (2,))}
    assert env.action_spaces == {"action": Space("discrete", (), (4,))}
    batches = [env.reset()]
    for _ in range(6):
        env.step_async({"action": np.array([3], np.int32)})
        batches.append(env.step_wait())
    env.close()
    assert column(batches, "reward") == [0, 1, 2, 0, 3, 4, 0]
    assert column(batches, "is_first") == [T, F, F, T, F, F, T]
    assert column(batches, "is_last") == [F, F, T, F, F, T, F]
    assert column(batches, "is_terminal") == [F, F, T, F, F, F, F]
    assert column(batches, "vector") == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]


def test_options_apply():
    make = lambda index, seed: Played([(1.0, 1.0)] * 9)  # noqa: E731
    env = make_vector_env("own", EnvConfig(repeat=2, time_limit=2, reward_scale=0.5), 1, 0, True, make)
    batches = [env.reset()]
    for _ in range(2):
        env.step_async({"action": np.zeros(1, np.int32)})
        batches.append(env.step_wait())
    assert column(batches, "reward") == [0, 1, 1]
    assert column(batches, "is_last") == [F, F, T]
    env.close()
    with pytest.raises(TaskError, match="only for a gymnasium.Env"):
        make_vector_env("own", EnvConfig(gym={"repeat": 2}), 1, 0, True, make)


def test_by_a_python_path():
    env = make_env("py_test_envs_dm_env:make_played", EnvConfig(), seed=3)
    assert env.reset()["is_first"] and env.step({"action": np.int32(0)})["reward"] == 1
    env.close()


class Everything(Played):
    observation = {
        "camera": specs.BoundedArray((4, 5, 3), np.uint8, 0, 255),
        "depth": specs.Array((4, 5), np.uint8),
        "inner": ({"on": specs.Array((2,), np.bool_)}, specs.DiscreteArray(7)),
        "count": specs.BoundedArray((3,), np.int64, 0, 9),
        "mass": specs.Array((), np.float64),
    }
    action = {
        "turn": specs.BoundedArray((2,), np.float32, [-1.0, 0.0], [1.0, 10.0]),
        "press": [specs.DiscreteArray(3), specs.BoundedArray((2,), np.bool_, False, True)],
        "whole": specs.BoundedArray((), np.int32, 0, 4),
    }


def test_nested_specs_of_every_kind():
    camera = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    value = {
        "camera": camera,
        "depth": camera[..., 0],
        "inner": ({"on": np.array([True, False])}, np.int32(6)),
        "count": np.array([1, 2, 3]),
        "mass": 2.5,
    }
    inner = Everything([(1.0, 1.0)] * 3, value=value)
    env = DmEnv(inner)
    assert env.observation_spaces == {
        "camera": Space("image", (4, 5, 3)),
        "depth": Space("image", (4, 5, 1)),
        "inner/0/on": Space("discrete", (2,), (2, 2)),
        "inner/1": Space("discrete", (), (7,)),
        "count": Space("vector", (3,)),
        "mass": Space("vector", ()),
    }
    assert env.action_spaces == {
        "action/turn": Space("vector", (2,)),
        "action/press/0": Space("discrete", (), (3,)),
        "action/press/1": Space("discrete", (2,), (2, 2)),
        "action/whole": Space("vector", ()),
    }
    first = env.reset()
    for key, space in env.observation_spaces.items():
        assert (first[key].shape, first[key].dtype) == (space.shape, space.dtype), key
    np.testing.assert_array_equal(first["depth"][..., 0], camera[..., 0])
    assert first["inner/0/on"].tolist() == [1, 0] and first["inner/1"] == 6 and first["mass"] == 2.5
    assert env.render() is not None
    env.step(
        {
            "action/turn": np.array([-0.5, 5.0], np.float32),  # beyond the bounds: clipped
            "action/press/0": np.int32(2),
            "action/press/1": np.array([0, 1], np.int32),
            "action/whole": np.float32(0.4),
        }
    )
    (given,) = inner.actions
    assert given["turn"].tolist() == [-0.5, 10.0] and given["press"][0] == 2
    assert given["press"][1].tolist() == [False, True] and given["whole"] == 3  # 0.7 of the way from 0 to 4 is 2.8
    for name, part in (("turn", given["turn"]), ("whole", given["whole"])):
        inner.action[name].validate(part)
    env.close()
    assert inner.closed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": specs.StringArray(())}, "numbers or booleans"),
        ({"action": specs.Array((2,), np.float32)}, "finite bounds"),
        ({"action": specs.BoundedArray((2,), np.float32, -np.inf, 1.0)}, "finite bounds"),
        ({"observation": {"reward": specs.Array((2,), np.float32)}}, r"names other than reward.*got \['reward'\]"),
    ],
)
def test_what_cannot_be_played_says_why(change, message):
    kind = type("Changed", (Played,), change)
    with pytest.raises(TaskError, match=message):
        adopt(lambda index, seed: kind([(1.0, 1.0)]), EnvConfig(), 0, 0)


def test_several_rewards_are_refused():
    class Vector(Played):
        def reward_spec(self) -> Any:
            return specs.Array((2,), np.float32)

    with pytest.raises(TaskError, match="single number as reward"):
        DmEnv(Vector([(1.0, 1.0)]))


def test_observations_must_keep_to_their_spec():
    with pytest.raises(EnvError, match="observation_spec"):
        DmEnv(Played([(1.0, 1.0)], value=np.zeros(3))).reset()
