"""Gymnasium environments are restored exactly where a trial shows that they can be, and are known where they cannot."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import numpy as np
import pytest
from gymnasium.utils import EzPickle
from test_envs_state import Case, check

from dreamer.env_config import EnvConfig, GymConfig
from dreamer.envs import make_env
from dreamer.envs.interface import EnvError, restorable
from dreamer.envs.suites.gym import GymEnv

GOOD = [
    "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1", "CliffWalking-v1",
    "fake_envs:Nested-v0", "InvertedPendulum-v5", "Hopper-v5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures_of_mujoco(monkeypatch):
    """This machine may have no OpenGL, which MuJoCo tells with warnings."""
    monkeypatch.setattr("dreamer.envs.suites.gym._dark", {"gymnasium.envs.mujoco"})


class Walk(gymnasium.Env):
    """A random walk that ends beyond 5. What later steps depend on is for subclasses to hide."""

    observation_space = gs.Box(-np.inf, np.inf, (2,))
    action_space = gs.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.speed = 0.0, 0.5
        return self.observed(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.place += self.speed * (2 * action - 1) + 0.3 * self.chance()
        return self.observed(), self.place, abs(self.place) > 5, False, {}

    def chance(self) -> float:
        return float(self.np_random.normal())

    def observed(self) -> np.ndarray:
        return np.array([self.place, self.speed], np.float32)


class MadeAnew(Walk, EzPickle):
    """Its pickle is the recipe to make it: from there it would begin again."""

    def __init__(self, length: int = 3) -> None:
        EzPickle.__init__(self, length)
        self.length = length
        self.place, self.speed = 0.0, 0.5


class Global(Walk):
    def chance(self) -> float:
        return float(np.random.normal())


class GlobalPython(Walk):
    def chance(self) -> float:
        return random.random()


class Hidden(Walk):
    """The walk is inside an object that no pickle can hold, as with a simulator in another language."""

    def __init__(self) -> None:
        moved = 0.0

        def play() -> Any:
            nonlocal moved
            while True:
                moved += 0.1
                yield moved

        self.simulator = play()

    def chance(self) -> float:
        return next(self.simulator)


class WithMethods(Hidden):
    """The same, but it offers the way."""

    def __init__(self) -> None:
        self.skipped = 0
        super().__init__()

    def chance(self) -> float:
        self.skipped += 1
        return next(self.simulator)

    def get_state(self) -> Any:
        return self.place, self.speed, self.skipped, self.np_random

    def set_state(self, state: Any) -> None:
        self.place, self.speed, skipped, self.np_random = state
        Hidden.__init__(self)
        self.skipped = 0
        for _ in range(skipped):
            self.chance()


class ForgetfulMethods(WithMethods):
    def get_state(self) -> Any:
        return self.place, self.speed, 0, self.np_random


class WithOwnPickle(Hidden):
    """A pickle that is exact, but no attribute is."""

    def __init__(self) -> None:
        self.skipped = 0
        super().__init__()

    chance = WithMethods.chance

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "simulator"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hidden.__init__(self)
        vars(self).update(state)
        for _ in range(self.skipped):
            next(self.simulator)


class Slow(Walk):
    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        sum(range(1_000_000))
        return super().step(action)


class Stateless(Walk):
    """Forgets its place in a pickle, but nobody sees that for a while: later steps depend on it all the same."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Unpicklable(Walk):
    """Holds something that stays where it is, such as a window, which looks at what moves."""

    def __init__(self) -> None:
        self.track = {"place": 0.0}
        self.window = Window(self.track)
        self.render_mode = "rgb_array"

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        result = super().step(action)
        self.track["place"] = self.place
        return result

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), int(20 * abs(self.window.track["place"])) % 256, np.uint8)


class Window:
    def __init__(self, track: dict[str, float]) -> None:
        self.track = track

    def __reduce__(self) -> Any:
        raise TypeError("a window cannot be pickled")


def gym_env(make: Callable[[], gymnasium.Env], seed: int = 0) -> GymEnv:
    return GymEnv(make(), GymConfig(), seed, make)


@pytest.mark.parametrize("task", GOOD)
def test_what_follows_is_the_same(task):
    case = Case(f"gym_{task}", limit=None)
    env = case.make(0)
    assert restorable(env)
    env.close()
    check(case)


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (Walk, "attributes"),
        (MadeAnew, "attributes"),
        (WithMethods, "methods"),
        (WithOwnPickle, "pickle"),
        (Unpicklable, "attributes"),
        (Stateless, "attributes"),
        (lambda: gymnasium.wrappers.TimeLimit(Walk(), 7), "attributes"),
        (lambda: gymnasium.wrappers.TimeLimit(WithMethods(), 7), "methods"),
        (lambda: gymnasium.wrappers.FrameStackObservation(Walk(), 3), "attributes"),
        (lambda: gymnasium.wrappers.NormalizeObservation(Walk()), "attributes"),
    ],
)
def test_a_way_is_found(make, way):
    env, other = gym_env(make, 1), gym_env(make, 2)
    assert restorable(env) and env.why_not_restorable == ""
    env.reset(), other.reset()
    for _ in range(4):
        env.step({"action": np.int32(1)})
    state = env.get_state()
    assert state["way"] == way
    other.set_state(pickle.loads(pickle.dumps(state)))
    for action in (1, 0, 0):
        one, two = env.step({"action": np.int32(action)}), other.step({"action": np.int32(action)})
        assert np.array_equal(one["vector"], two["vector"]) and one["is_last"] == two["is_last"]
    assert np.array_equal(np.asarray(env.render()), np.asarray(other.render()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Global, ["another one"]),
        (GlobalPython, ["another one"]),
        (Hidden, ["by its attributes", "by its pickle", "generator"]),
        (ForgetfulMethods, ["by its methods: 'reward'", "by its attributes"]),
    ],
)
def test_what_cannot_be_restored_is_known(make, words):
    env = gym_env(make)
    assert not restorable(env)
    assert all(word in env.why_not_restorable for word in words), env.why_not_restorable
    with pytest.raises(EnvError, match="cannot"):
        env.get_state()


def test_a_slow_one_counts_as_one_that_cannot(monkeypatch):
    monkeypatch.setattr("dreamer.envs.restore_check.CPU_SECONDS", 0.1)
    env = gym_env(Slow)
    assert not restorable(env)
    assert "too slow" in env.why_not_restorable


def test_a_recipe_for_making_is_no_state():
    """Tried alone, the pickle of an EzPickle environment is found out."""
    from dreamer.envs.restore_check import restore_failure

    def make(seed: int) -> GymEnv:
        env = gym_env(MadeAnew, seed)
        env.way = "pickle"
        return env

    assert "another one" in (restore_failure(make) or "")


def test_without_a_second_one_nothing_is_proven():
    assert not restorable(GymEnv(Walk(), GymConfig(), 0))


def test_the_proof_is_made_once_and_leaves_random_streams_alone():
    made = []

    def make() -> gymnasium.Env:
        made.append(1)
        np.random.random(), random.random()
        return Walk()

    env, plain = gym_env(make, 5), gym_env(Walk, 5)
    np.random.seed(0), random.seed(0)
    expected = np.random.random(), random.random()
    np.random.seed(0), random.seed(0)
    env.reset(), plain.reset()
    assert restorable(env) and restorable(gym_env(make))
    # One for each of the two environments, two for the check.
    assert len(made) == 4
    np.random.seed(0), random.seed(0)
    assert restorable(gym_env(lambda: Walk()))
    assert (np.random.random(), random.random()) == expected
    for _ in range(5):
        one, two = (each.step({"action": np.int32(1)})["vector"] for each in (env, plain))
        assert np.array_equal(one, two)


def test_time_limits_and_options_ask_the_environment_inside():
    env = make_env("gym_CartPole-v1", EnvConfig(time_limit=5), 0)
    assert restorable(env)
    hidden = make_env("py_test_envs_state_gym:Hidden", EnvConfig(time_limit=5), 0)
    assert not restorable(hidden)
