"""Environments that are not what they declare, or declare what cannot be trained in: each is told at the first look."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import dm_env
import gymnasium
import gymnasium.spaces as gs
import numpy as np
import pytest
from dm_env import specs

from dreamer.env_config import EnvConfig
from dreamer.envs import TaskError, make_vector_env, transition
from dreamer.envs.checks import MOST_NUMBERS, check_spaces
from dreamer.envs.interface import TransitionError
from dreamer.envs.return_values import as_pixels
from dreamer.envs.spaces import flatten, observation_leaves
from dreamer.types import TAKEN, Space

VECTOR = gs.Box(-1, 1, (2,))
CHOICE = gs.Discrete(2)


class Raw(gymnasium.Env):
    """What its members say; every step has the reward 1."""

    observation_space: Any = VECTOR
    action_space: Any = CHOICE

    def seen(self) -> Any:
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        return self.seen(), 1.0, False, False, {}


def first_look(kind: type, **options: Any) -> dict[str, np.ndarray]:
    """The first step of an environment of this class, as training comes to see it."""
    env = make_vector_env("own", EnvConfig(workers="inline", **options), 1, 0, True, lambda index, seed: kind())
    try:
        env.reset()
        env.step_async({key: space.zeros()[None] for key, space in env.action_spaces.items()})
        return env.step_wait()
    finally:
        env.close()


def refused(kind: type, *words: str, **options: Any) -> None:
    with pytest.raises(TaskError) as error:
        first_look(kind, **options)
    message = str(error.value)
    assert message.startswith("expected ") and "\n" not in message and all(word in message for word in words), message


def changed(**members: Any) -> type:
    return type("Changed", (Raw,), members)


def box(shape: tuple[int, ...], low: float, high: float, dtype: Any = np.float32) -> gs.Box:
    return gs.Box(low, high, shape, dtype)


# --- Pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (box((12, 64, 64), 0, 255, np.uint8), ["(height, width, channels)", "(12, 64, 64)", "np.moveaxis"]),
        (box((8, 84, 84), 0, 255, np.uint8), ["(8, 84, 84)"]),
        (box((48, 32, 32), 0, 255, np.uint8), ["(48, 32, 32)"]),
        (box((1, 64, 48), 0, 255, np.uint8), ["(1, 64, 48)"]),
        (box((4, 84, 84, 3), 0, 255, np.uint8), ["uint8 (4, 84, 84, 3)", "84,672 numbers", "frames side by side"]),
        (box((84, 84, 3), 0, 1), ["float32 (84, 84, 3) from 0 to 1", "(255 * image).astype(np.uint8)"]),
        (box((84, 84, 3), 0, 255), ["from 0 to 255", "21,168 numbers", "(image.astype(np.uint8))"]),
        (box((3, 64, 64), -1, 1), ["(3, 64, 64) from -1 to 1", "reshape them to one dimension"]),
        (box((64, 64, 1), -np.inf, np.inf, np.float64), ["float64 (64, 64, 1)"]),
        (box((84, 84, 12), 0, 1), ["(84, 84, 12)"]),
        (box((84, 84), 0, 1), ["(84, 84)"]),
        (box((32, 32, 3), 0, 10, np.uint8), ["uint8 (32, 32, 3) from 0 to 10"]),
        (box((9, 9, 3), 0, 255, np.int64), ["int64 (9, 9, 3)"]),
        (box((64, 64, 3), 0, 1, np.bool_), ["bool (64, 64, 3)"]),
    ],
)
def test_pictures_in_another_form_are_no_vectors(space, words):
    refused(changed(observation_space=space), "'image'" if "moveaxis" in str(words) else "observation", *words)
    refused(changed(observation_space=gs.Dict({"camera": space})), "'camera'", *words)


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (box((64, 64, 12), 0, 255, np.uint8), "image"),
        (box((64, 64, 3), 0, 255, np.uint8), "image"),
        (box((7, 7, 20), 0, 255, np.uint8), "image"),
        (box((64, 64), 0, 255, np.uint8), "image"),
        (box((1, 1, 3), 0, 255, np.uint8), "image"),
        (box((2, 200), 0, 255, np.uint8), "image"),
        (box((10, 10, 4), 0, 1, np.bool_), "vector"),
        (box((10, 10, 10), 0, 1), "vector"),
        (box((15, 15, 3), 0, 1), "vector"),
        (box((19, 19, 17), 0, 1), "vector"),
        (box((7, 7, 3), 0, 10, np.uint8), "vector"),
        (box((2, 3, 4), -1, 1), "vector"),
        (box((100, 30), -np.inf, np.inf), "vector"),
        (box((128,), 0, 255, np.uint8), "vector"),
    ],
)
def test_what_is_an_image_and_what_a_grid_stays_one(space, kind):
    kept = changed(observation_space=space)
    assert first_look(kept)[kind].shape == (
        1,
        *space.shape,
        *([1] if kind == "image" and len(space.shape) == 2 else []),
    )


@pytest.mark.parametrize("image", [np.linspace(0, 1, 48), np.ones(48) > 0, np.ones(48), np.full(48, 0.5, np.float16)])
def test_pixels_from_0_to_1_are_not_cut_to_black(image):
    class Dark(Raw):
        observation_space = box((4, 4, 3), 0, 255, np.uint8)

        def seen(self) -> Any:
            return image.reshape(4, 4, 3)

    refused(Dark, "pixels from 0 to 255 in observation 'image'", "to 1" if image.max() == 1 else "0.5", "255 * image")


def test_black_and_bright_floats_and_small_whole_numbers_are_pixels():
    for image in (np.zeros((2, 2)), np.full((2, 2), 1.5), np.ones((2, 2), np.uint8), np.ones((2, 2), np.int64)):
        assert as_pixels(image, "it").tolist() == image.astype(np.uint8).tolist()
    for nothing in (None, "x", [[1], [2, 3]], np.array(["a"])):
        with pytest.raises(TransitionError, match="expected pixels in it, got"):
            as_pixels(nothing, "it")


def test_an_image_of_another_layout_is_not_read_row_by_row():
    """It has as many pixels."""
    picture = changed(
        observation_space=box((6, 4, 3), 0, 255, np.uint8), seen=lambda self: np.zeros((3, 6, 4), np.uint8)
    )
    refused(picture, "'image' of shape (6, 4, 3)", "got (3, 6, 4)")
    for shape in ((6, 4), (6, 4, 1)):
        for other in ((6, 4), (6, 4, 1)):
            leaves = observation_leaves(box(shape, 0, 255, np.uint8))
            assert flatten(leaves, np.zeros(other, np.uint8))["image"].shape == (6, 4, 1)


@pytest.mark.parametrize(
    ("picture", "shape"), [(np.ones((4, 6)), None), ([], None), (None, None), (np.full((4, 6), 9, np.uint8), (4, 6, 3))]
)
def test_what_is_rendered_must_be_a_picture(picture, shape):
    class Drawn(Raw):
        render_mode = "rgb_array"

        def render(self) -> Any:
            return picture

    if shape is None:
        refused(
            Drawn, "the rendered image" if picture is None or len(picture) else "a rendered image", gym={"render": True}
        )
    else:
        assert first_look(Drawn, gym={"render": True})["image"].shape == (1, *shape)


# --- Names and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"a": gs.Dict({"b": VECTOR}), "a/b": VECTOR}, ["'a/b' twice", "('a', 'b')", "('a/b',)"]),
        ({"a": gs.Tuple((CHOICE,)), "a/0": CHOICE}, ["'a/0' twice"]),
        ({1: VECTOR, "1": VECTOR}, ["'1' twice"]),
        ({"": VECTOR}, ["at least one character"]),
        ({"a": gs.Dict({"": VECTOR})}, ["at least one character", "('a', '')"]),
    ],
)
def test_parts_with_one_name_are_refused(space, words):
    space = gs.Dict(space)
    refused(changed(observation_space=space), *words)
    refused(changed(action_space=space), words[0].replace("'a/", "'action/a/").replace("'1'", "'action/1'"))


def test_names_that_differ_are_kept_whatever_their_kind():
    space = gs.Dict({7: VECTOR, "a/b": CHOICE, "a": gs.Dict({"c": CHOICE}), "priority": VECTOR, "é [x] ~": VECTOR})
    found = first_look(
        changed(observation_space=space, action_space=gs.Dict({"x/y": CHOICE, "x": gs.Tuple((VECTOR,))}))
    )
    assert {"7", "a/b", "a/c", "priority", "é [x] ~"} <= set(found)


@pytest.mark.parametrize("name", [*TAKEN, " ", "_x", "__class__", "a\nb", "\ud800"])
def test_names_that_are_taken_or_unfit_are_refused(name):
    refused(changed(observation_space=gs.Dict({"x": VECTOR, name: VECTOR})), f"{name!r}", "rename")
    spaces = {"x": Space("vector", (2,))}, {name: Space("vector", (2,))}
    with pytest.raises(TaskError, match="rename"):
        check_spaces(*spaces)


@pytest.mark.parametrize(
    ("observations", "actions", "words"),
    [
        (gs.Dict({}), CHOICE, "an observation that the agent can see, got none"),
        (gs.Tuple(()), CHOICE, "an observation that the agent can see, got none"),
        (gs.Dict({"log/x": VECTOR}), CHOICE, "an observation that the agent can see, got ['log/x']"),
        (gs.Dict({"a": gs.Box(0, 1, (0,)), "b": VECTOR}), CHOICE, "got an empty one: 'a'"),
        (gs.Box(0, 255, (0, 8, 3), np.uint8), CHOICE, "got an empty one: 'vector'"),
        (gs.MultiDiscrete([]), CHOICE, "got an empty one: 'discrete'"),
        (VECTOR, gs.Dict({}), "got an action space without any"),
        (VECTOR, gs.Tuple(()), "got an action space without any"),
        (VECTOR, gs.Box(0, 1, (0,)), "got an empty one: 'action'"),
        (VECTOR, gs.Discrete(2**40), "numbers and classes in an action"),
        (gs.Box(-1, 1, (MOST_NUMBERS + 1,)), CHOICE, "1,048,577"),
    ],
)
def test_empty_and_enormous_spaces_are_refused(observations, actions, words):
    refused(changed(observation_space=observations, action_space=actions), words)


def test_spaces_that_were_changed_after_they_were_made():
    for name, value, words in (("n", 0, "got an empty one"), ("n", -3, "got an empty one")):
        space = gs.Discrete(3)
        setattr(space, name, value)
        refused(changed(action_space=space), words)
        refused(changed(observation_space=space), words)
    space = gs.Box(-1, 1, (2,))
    space.low[:] = np.nan
    refused(changed(action_space=space), "finite action bounds")
    space.low[:], space.high[:] = 1, 0
    refused(changed(action_space=space), "finite action bounds", "the lower below the upper")


def test_an_action_without_a_choice_is_one():
    for space in (
        gs.Discrete(1),
        gs.Box(2, 2, (2,)),
        gs.Box(0, 1, (2,), np.bool_),
        gs.Dict({"a": CHOICE, "b": gs.Dict({})}),
    ):
        first_look(changed(action_space=space))


def test_own_environments_are_looked_at_too():
    vector, choice = {"x": Space("vector", (2,))}, {"action": Space("discrete", (), (2,))}
    for spaces, words in (
        (({"x": (2,)}, choice), "observation_spaces to be a dict of dreamer.types.Space"),
        ((None, choice), "observation_spaces to be a dict"),
        ((vector, [Space("vector", (2,))]), "action_spaces to be a dict"),
        (({3: Space("vector", (2,))}, choice), "names of printable text"),
        ((vector, {"log/x": Space("vector", (2,))}), "do not begin with log/"),
        ((vector, {"a": Space("image", (8, 8, 3))}), "got the image 'a'"),
        ((vector, vector), "not both an observation and an action"),
        (({"x": Space("image", (3, 64, 64))}, choice), "(height, width, channels)"),
        (({"x": Space("discrete", (2,), (2, 0))}, choice), "got an empty one"),
    ):
        with pytest.raises(TaskError) as error:
            check_spaces(*spaces)
        assert words in str(error.value)
    check_spaces({**vector, "log/x": Space("vector", ())}, choice)


# --- Gymnasium's interface ---------------------------------------------------------------------


def with_step(*result: Any) -> type:
    return changed(step=lambda self, action: result)


SEEN = np.zeros(2, np.float32)
CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "old reset": ({"reset": lambda self, seed=None: SEEN}, ["reset to return (observation, info)", "old interface"]),
    "no reset": ({"reset": lambda self, seed=None: None}, ["(observation, info)", "got None; "]),
    "no info": ({"reset": lambda self, seed=None: (SEEN, 3)}, ["got 3 as info"]),
    "no seed": (
        {"reset": lambda self: (SEEN, {})},
        ["reset(self, *, seed=None, options=None) in Changed", "got reset()"],
    ),
    "no spaces": ({"observation_space": None}, ["the observation, got None", "gymnasium.spaces"]),
    "no actions": ({"action_space": None}, ["'action', got None"]),
    "plain dict": ({"observation_space": {"a": VECTOR}}, ["got {'a': Box(", "make it with gymnasium.spaces"]),
    "missing": (
        {"observation_space": gs.Dict({"a": VECTOR, "b": VECTOR}), "seen": lambda self: {"a": SEEN}},
        ["an observation with 'b'", "got the keys ['a']"],
    ),
    "nothing there": ({"observation_space": gs.Dict({"a": VECTOR}), "seen": lambda self: None}, ["'a'", "got None"]),
    "too short": ({"observation_space": gs.Tuple((VECTOR, VECTOR)), "seen": lambda self: (SEEN,)}, ["with '1'"]),
    "surplus": (
        {"observation_space": gs.Dict({"a": gs.Dict({"b": VECTOR})}), "seen": lambda self: {"a": {"b": SEEN, "c": 1}}},
        ["got ['a/c'] too", "declare them"],
    ),
    "shape": ({"seen": lambda self: np.zeros(3)}, ["'vector' of shape (2,)", "got (3,)"]),
    "ragged": ({"seen": lambda self: [[1], [2, 3]]}, ["'vector' to be numbers, got [[1], [2, 3]]"]),
    "text": ({"seen": lambda self: ["1", "2"]}, ["'vector' to be numbers, got ['1', '2']"]),
    "none": ({"seen": lambda self: None}, ["'vector' to be numbers, got None"]),
    "nan": ({"seen": lambda self: [np.nan, 0]}, ["'vector' to be finite everywhere, got [nan 0.]"]),
    "beyond float32": (
        {"seen": lambda self: np.array([0, 1e300])},
        ["'vector' to be finite everywhere, got [ 0. inf]"],
    ),
    "class": ({"observation_space": gs.Discrete(3, start=5), "seen": lambda self: 8}, ["from 5 to 7, got 8"]),
    "fraction": (
        {"observation_space": gs.Discrete(3), "seen": lambda self: 1.5},
        ["whole numbers from 0 to 2, got 1.5"],
    ),
    "no class": ({"observation_space": gs.Discrete(3), "seen": lambda self: np.nan}, ["from 0 to 2, got nan"]),
    "wraps": (
        {"observation_space": gs.MultiDiscrete([2, 3]), "seen": lambda self: np.array([2**32, 0])},
        ["from [0 0] to [1 2], got array([4294967296, 0])"],
    ),
    "bits": ({"observation_space": gs.MultiBinary(2), "seen": lambda self: [2, 0]}, ["from 0 to 1, got [2, 0]"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_declared_is_told_at_the_first_look(name):
    members, words = CHANGES[name]
    refused(changed(**members), *words)


STEPS: dict[str, tuple[tuple, list[str]]] = {
    "four": ((SEEN, 1.0, False, {}), ["step to return (observation, reward,", "got a tuple of 4", "old interface"]),
    "six": ((SEEN, 1.0, False, False, {}, 1), ["got a tuple of 6"]),
    "info": ((SEEN, 1.0, False, False, 0), ["got 0 as info"]),
    "reward none": ((SEEN, None, False, False, {}), ["the reward to be one number, got None"]),
    "reward text": ((SEEN, "1.0", False, False, {}), ["the reward to be one number, got '1.0'"]),
    "rewards": ((SEEN, [1.0, 2.0], False, False, {}), ["the reward to be one number, got [1.0, 2.0]"]),
    "reward object": ((SEEN, 10**400, False, False, {}), ["the reward to be one number"]),
    "reward nan": ((SEEN, np.nan, False, False, {}), ["'reward' to be a finite number, got nan"]),
    "reward large": ((SEEN, 1e300, False, False, {}), ["float32", "got 1e+300"]),
    "terminated": ((SEEN, 1.0, None, False, {}), ["terminated to be true or false, got None"]),
    "truncated": ((SEEN, 1.0, False, "False", {}), ["truncated to be true or false, got 'False'"]),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_shows_in_the_first_step_is_told_there(name):
    result, words = STEPS[name]
    refused(with_step(*result), *words)
    refused(with_step(*result), *words, gym={"repeat": 2})


@pytest.mark.parametrize("reward", [np.array([0.5]), np.float64(0.5), [0.5], np.array([[0.5]], np.float16)])
def test_a_reward_in_an_array_counts_as_its_number(reward):
    found = first_look(with_step(SEEN, reward, np.bool_(False), np.array([0]), {}), gym={"repeat": 3})
    assert found["reward"].tolist() == [1.5] and not found["is_last"][0]


def test_what_does_no_harm_is_borne():
    for result in ([SEEN, 1, 1, 0.0, None], (SEEN.tolist(), True, False, np.array([True]), {})):
        assert first_look(with_step(*result))["is_last"][0]
    for kind in (
        changed(reset=lambda self, seed=None: (SEEN, None)),
        changed(reset=lambda self, **rest: [SEEN, {}]),
        changed(metadata=None),
        changed(metadata={"render_modes": None}, render_mode=3),
        changed(observation_space=CHOICE, seen=lambda self: np.array([1.0])),
    ):
        first_look(kind)


def test_a_wrapper_that_does_not_take_the_seed_is_named():
    class Forgets(gymnasium.Wrapper):
        def reset(self) -> Any:
            return self.env.reset()

    refused(lambda: Forgets(Raw()), "in Forgets")


def test_spaces_that_are_missing_or_fail_say_so():
    class Without(Raw):
        def __init__(self) -> None:
            self.kept = 1

        @property
        def action_space(self) -> Any:
            return self.nothing

    refused(Without, "an action_space, got none", "'nothing'")
    bare = type("Bare", (gymnasium.Env,), {"reset": Raw.reset, "step": Raw.step})
    refused(bare, "an action_space, got none")


def test_the_old_package_is_recognised():
    old = types.new_class("Box", (), {}, lambda body: body.update(__module__="gym.spaces.box"))
    refused(changed(observation_space=old()), "not with the old package gym")
    env = types.new_class("Old", (), {}, lambda body: body.update(__module__="gym.core"))
    with pytest.raises(TaskError, match="got Old, an environment of the old package gym; derive it from gymnasium.Env"):
        first_look(env)


def test_later_failures_are_no_mistakes_of_the_user():
    """Whoever has taken one good step is recreated when it returns garbage."""

    class Later(Raw):
        steps = 0

        def step(self, action: Any) -> Any:
            type(self).steps += 1
            return self.seen(), None if self.steps == 2 else 1.0, False, False, {}

    env = make_vector_env("own", EnvConfig(restart_seconds=0), 1, 0, True, lambda index, seed: Later())
    env.reset()
    for _ in range(2):
        assert env.take_faults() == []
        env.step_async({"action": np.zeros(1, np.int32)})
        env.step_wait()
    assert [fault.kind for fault in env.take_faults()] == ["garbage"]
    env.close()


def test_workers_tell_the_same_line():
    lines = []
    for workers in ("inline", "process"):
        env = make_vector_env("own", EnvConfig(workers=workers), 2, 0, True, lambda index, seed: OldStep())
        env.reset()
        env.step_async({"action": np.zeros(2, np.int32)})
        with pytest.raises(TaskError) as error:
            env.step_wait()
        lines.append(str(error.value))
        env.close()
    assert lines[0] == lines[1] and "old interface" in lines[0]


class OldStep(Raw):
    def step(self, action: Any) -> Any:
        return self.seen(), 1.0, False, {}


def test_what_is_returned_is_copied():
    """An environment may go on writing to its arrays."""
    kept = {"vector": np.zeros(2, np.float32), "image": np.zeros((4, 4, 3), np.uint8), "bits": np.zeros(2, np.int8)}
    space = {"vector": VECTOR, "image": box((4, 4, 3), 0, 255, np.uint8), "bits": gs.MultiBinary(2)}
    flat = flatten(observation_leaves(gs.Dict(space)), kept)
    for array in kept.values():
        array[...] = 1
    assert all(not array.any() for array in flat.values())


# --- Other interfaces --------------------------------------------------------------------------


class Stepped(dm_env.Environment):
    observation: Any = specs.BoundedArray((2,), np.float32, -1, 1)
    action: Any = specs.DiscreteArray(2)
    reward: Any = 1.0
    value: Any = SEEN

    def reset(self) -> dm_env.TimeStep:
        return dm_env.restart(self.value)

    def step(self, action: Any) -> dm_env.TimeStep:
        return dm_env.TimeStep(dm_env.StepType.MID, self.reward, 1.0, self.value)

    def observation_spec(self) -> Any:
        return self.observation

    def action_spec(self) -> Any:
        return self.action


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"observation": specs.BoundedArray((64, 64, 3), np.float32, 0, 1)}, ["float32 (64, 64, 3)", "(255 * image)"]),
        ({"observation": specs.BoundedArray((4, 64, 64, 3), np.uint8, 0, 255)}, ["frames side by side"]),
        ({"observation": specs.BoundedArray((3, 64, 64), np.uint8, 0, 255)}, ["np.moveaxis"]),
        ({"observation": {"a": {"b": specs.Array((), float)}, "a/b": specs.Array((), float)}}, ["'a/b' twice"]),
        ({"action": {"a": [specs.DiscreteArray(2)], "a/0": specs.DiscreteArray(2)}}, ["'action/a/0' twice"]),
        ({"observation": {}}, ["an observation that the agent can see"]),
        ({"observation": {"stoch": specs.Array((), float)}}, ["['stoch'], which is a latent"]),
        ({"observation": {"a": specs.Array((2,), float)}, "value": {"b": SEEN}}, ["with 'a'", "got the keys ['b']"]),
        ({"value": np.zeros(3)}, ["of shape (2,)", "observation_spec"]),
        (
            {"observation": specs.BoundedArray((2, 2, 3), np.uint8, 0, 255), "value": np.full((2, 2, 3), 0.5)},
            ["pixels"],
        ),
        ({"observation": specs.DiscreteArray(3), "value": 3}, ["from 0 to 2, got 3"]),
        ({"reward": None}, ["the reward to be one number, got None"]),
    ],
)
def test_dm_env_is_looked_at_in_the_same_way(members, words):
    refused(type("Changed", (Stepped,), members), *words)


def test_a_dm_env_reward_in_an_array_counts_as_its_number():
    assert first_look(type("Changed", (Stepped,), {"reward": np.array([0.5])}))["reward"].tolist() == [0.5]


def test_own_transitions_must_be_dicts():
    class Ours:
        observation_spaces = {"x": Space("vector", (2,))}
        action_spaces = {"action": Space("discrete", (), (2,))}
        answer: Callable[[], Any] = staticmethod(lambda: transition({"x": SEEN}, is_first=True))

        def reset(self) -> Any:
            return self.answer()

        def step(self, action: Any) -> Any:
            return None

        def render(self) -> None:
            return None

        def close(self) -> None:
            self.closed = True

    refused(Ours, "a dict as the transition, got None")
    for answer, words in (
        ({"x": SEEN}, "expected the transition keys ['is_first'"),
        (transition({"x": [[1], [2, 3]]}, is_first=True), "'x' to be an array"),
    ):
        refused(type("Bad", (Ours,), {"answer": staticmethod(lambda answer=answer: answer)}), words)
