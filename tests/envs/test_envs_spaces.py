"""Gymnasium's spaces become ours: every kind, value by value."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as gs
import numpy as np
import pytest
from fake_envs import Nested, Spaced

from dreamer.env_config import EnvConfig, GymConfig
from dreamer.envs import EnvError, TaskError
from dreamer.envs.options import wrap
from dreamer.envs.spaces import action_leaves, flatten, observation_leaves, unflatten
from dreamer.envs.suites.gym import GymEnv
from dreamer.types import Space

ANY = gs.Discrete(2)


def observed(space: gs.Space, value: Any) -> tuple[dict[str, Space], dict[str, list]]:
    leaves = observation_leaves(space)
    flat = flatten(leaves, value)
    for leaf in leaves:
        assert (flat[leaf.key].shape, flat[leaf.key].dtype) == (leaf.space.shape, leaf.space.dtype)
    return {leaf.key: leaf.space for leaf in leaves}, {key: array.tolist() for key, array in flat.items()}


def acted(space: gs.Space, **action: Any) -> tuple[dict[str, Space], Any]:
    leaves = action_leaves(space)
    ours = {leaf.key: np.asarray(action[leaf.key.replace("/", "_")], leaf.space.dtype) for leaf in leaves}
    value = unflatten(space, leaves, ours)
    assert space.contains(value), value
    return {leaf.key: leaf.space for leaf in leaves}, value


def test_observed_boxes():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert observed(gs.Box(0, 255, (2, 3, 3), np.uint8), image) == (
        {"image": Space("image", (2, 3, 3))},
        {"image": image.tolist()},
    )
    assert observed(gs.Box(0, 255, (2, 3), np.uint8), image[..., 0])[0] == {"image": Space("image", (2, 3, 1))}
    # Small whole numbers are no pixels, and one or four dimensions are no image.
    assert observed(gs.Box(0, 2, (3, 3), np.uint8), np.ones((3, 3), np.uint8))[0] == {"vector": Space("vector", (3, 3))}
    assert observed(gs.Box(0, 255, (4,), np.uint8), np.ones(4, np.uint8))[0] == {"vector": Space("vector", (4,))}
    assert observed(gs.Box(-1, 1, (), np.float64), 0.5) == ({"vector": Space("vector", ())}, {"vector": 0.5})
    assert observed(gs.Box(-9, 9, (2,), np.int64), np.array([-3, 7])) == (
        {"vector": Space("vector", (2,))},
        {"vector": [-3.0, 7.0]},
    )


def test_float_images_are_cast_and_never_wrap_around():
    space = gs.Box(0, 255, (2, 3, 3), np.uint8)
    assert observed(space, np.full((2, 3, 3), 254.9))[1] == {"image": np.full((2, 3, 3), 254).tolist()}
    for value in (-0.5, -1, 255.5, 300, np.nan, np.inf):
        image = np.full((2, 3, 3), 7.0)
        image[0, 0, 0] = value
        with pytest.raises(EnvError, match=r"expected pixels from 0 to 255 in observation 'image', got float64 from"):
            observed(space, image)
    with pytest.raises(EnvError, match="'camera', got int64 from 0 to 256"):
        observed(gs.Dict({"camera": space}), {"camera": np.arange(18).reshape(2, 3, 3) * 256 // 17})


def test_observed_discrete_kinds_begin_at_zero():
    assert observed(gs.Discrete(4, start=-2), -2) == ({"discrete": Space("discrete", (), (4,))}, {"discrete": 0})
    assert observed(gs.Discrete(4, start=-2), np.int64(1))[1] == {"discrete": 3}
    many = gs.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 1], [0, -4]])
    assert observed(many, np.array([[2, 1], [3, -1]])) == (
        {"discrete": Space("discrete", (2, 2), (2, 3, 4, 5))},
        {"discrete": [[1, 0], [3, 3]]},
    )
    assert observed(gs.MultiBinary(3), np.array([1, 0, 1], np.int8)) == (
        {"discrete": Space("discrete", (3,), (2, 2, 2))},
        {"discrete": [1, 0, 1]},
    )


def test_observed_nested():
    space = gs.Tuple((gs.Discrete(3), gs.Dict({"a": gs.Box(0, 1, (2,)), "b": gs.Tuple((gs.Discrete(2),))})))
    spaces, values = observed(space, (2, {"a": np.array([0.5, 1.0], np.float32), "b": (1,)}))
    assert values == {"0": 2, "1/a": [0.5, 1.0], "1/b/0": 1}
    assert spaces["1/a"] == Space("vector", (2,))


def test_acted_boxes_are_rescaled_and_clipped():
    space = gs.Box(np.array([0.0, -2.0, 5.0], np.float32), np.array([1.0, 6.0, 5.5], np.float32))
    for ours, theirs in (([-1, -1, -1], [0, -2, 5]), ([0, 0, 0], [0.5, 2, 5.25]), ([1, 9, -9], [1, 6, 5])):
        spaces, value = acted(space, action=ours)
        assert spaces == {"action": Space("vector", (3,))}
        assert value.tolist() == theirs
    whole = gs.Box(0, 4, (5,), np.int32)
    assert acted(whole, action=[-1, -0.6, 0, 0.6, 1])[1].tolist() == [0, 1, 2, 3, 4]
    awkward = np.float32(0.1), np.float32(0.7)  # bounds whose float32 and float64 differ
    assert acted(gs.Box(*awkward, (2,)), action=[-1, 1])[1].tolist() == [awkward[0], awkward[1]]


def test_acted_discrete_kinds_begin_where_the_space_does():
    assert acted(gs.Discrete(3, start=5), action=0) == ({"action": Space("discrete", (), (3,))}, 5)
    assert acted(gs.MultiDiscrete([2, 5], start=[1, 0]), action=[1, 4])[1].tolist() == [2, 4]
    spaces, value = acted(gs.MultiBinary((1, 2)), action=[[0, 1]])
    assert spaces == {"action": Space("discrete", (1, 2), (2, 2))} and value.tolist() == [[0, 1]]


def test_acted_nested():
    space = gs.Dict({"gear": gs.Discrete(2), "arms": gs.Tuple((gs.Box(0, 1, (1,)), gs.Discrete(3)))})
    spaces, value = acted(space, action_gear=1, action_arms_0=[0.0], action_arms_1=2)
    assert set(spaces) == {"action/gear", "action/arms/0", "action/arms/1"}
    assert value["gear"] == 1 and value["arms"][0].tolist() == [0.5] and value["arms"][1] == 2


def test_nested_environment_has_all_keys():
    env = GymEnv(Nested(), GymConfig(size=(24, 20)), 0)
    assert env.observation_spaces == {
        "camera": Space("image", (24, 20, 3)),
        "gray": Space("image", (24, 20, 1)),
        "grid": Space("vector", (2, 2)),
        "number": Space("vector", ()),
        "mode": Space("discrete", (), (4,)),
        "parts/0": Space("discrete", (2, 2), (2, 3, 4, 5)),
        "parts/1/bits": Space("discrete", (3,), (2, 2, 2)),
    }
    assert set(env.action_spaces) == {
        "action/gear", "action/hands/0", "action/hands/1", "action/keys", "action/whole",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (gs.Box(0, 1, (2,)), gs.Box(-np.inf, np.inf, (2,)), ["finite action bounds", "unbounded", "RescaleAction"]),
        (gs.Box(0, 1, (2,)), gs.Box(0, np.inf, (2,)), ["finite action bounds"]),
        (gs.Box(0, 1, (2,)), gs.Box(-3e38, 3e38, (2,)), ["finite action bounds"]),
        (gs.Text(5), ANY, ["Box, Discrete, MultiDiscrete", "the observation", "Text"]),
        (gs.Dict({"a": gs.Sequence(ANY)}), ANY, ["observation 'a'", "Sequence"]),
        (ANY, gs.Tuple((ANY, gs.Text(3))), ["'action/1'", "Text"]),
        (gs.Box(0, 255, (4, 84, 84), np.uint8), ANY, ["(height, width, channels)", "TransformObservation"]),
        (gs.Dict({"reward": gs.Box(0, 1, (2,))}), ANY, ["['reward']", "rename"]),
        (gs.Dict({"action": gs.Box(0, 1, (2,))}), ANY, ["['action']", "rename"]),
    ],
)
def test_spaces_that_cannot_work_say_why(observation, action, words):
    with pytest.raises(TaskError) as error:
        wrap(GymEnv(Spaced(observation, action), GymConfig(), 0), EnvConfig(), 0, 1)
    for word in words:
        assert word in str(error.value)
