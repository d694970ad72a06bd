"""`dreamer envs check`: good environments pass, and every way of being bad is told in its words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import numpy as np
import pytest
from fake_envs import Nested

from dreamer import cli
from dreamer.env_config import GymConfig
from dreamer.envs import make_env, transition
from dreamer.envs.audit import Report, audit
from dreamer.envs.audit import edges as edge_actions
from dreamer.envs.audit_table import rows
from dreamer.envs.interface import Env, TaskError
from dreamer.envs.suites.gym import GymEnv
from dreamer.types import Space

STEPS = 60


class Fine:
    """Breaks no rule: a counter of steps, over after ten."""

    def __init__(self, seed: int = 0) -> None:
        self.observation_spaces = {
            "image": Space("image", (4, 4, 3)),
            "vector": Space("vector", (2,)),
            "discrete": Space("discrete", (), (11,)),
        }
        self.action_spaces = {"action": Space("discrete", (), (3,))}
        self.rng = np.random.default_rng(seed)
        self.time = 0

    def reset(self) -> dict[str, Any]:
        self.time = 0
        return self.changed(transition(self.observed(), is_first=True))

    def step(self, action: Any) -> dict[str, Any]:
        self.time += 1
        return self.changed(transition(self.observed(), 1.0, is_last=self.time == 10, is_terminal=self.time == 10))

    def observed(self) -> dict[str, Any]:
        image = np.full((4, 4, 3), 25 * self.time, np.uint8)
        return {"image": image, "vector": self.rng.random(2, np.float32), "discrete": np.array(self.time, np.int32)}

    def changed(self, result: dict[str, Any]) -> dict[str, Any]:
        """The place for a subclass to spoil it."""
        return result

    def get_state(self) -> Any:
        return self.time, self.rng.bit_generator.state

    def set_state(self, state: Any) -> None:
        self.time, self.rng.bit_generator.state = state

    def render(self) -> Any:
        return np.full((4, 4, 3), self.time, np.uint8)

    def close(self) -> None:
        self.time = 0


def spoiled(**changes: Any) -> Callable[[int], Env]:
    """`Fine` with some of its entries or methods replaced; an entry may be a function of the environment."""

    class Bad(Fine):
        def changed(self, result: dict[str, Any]) -> dict[str, Any]:
            for key, value in changes.items():
                if key not in methods:
                    result[key] = value(self) if callable(value) else value
            return {key: value for key, value in result.items() if value is not None}

    methods = {key: value for key, value in changes.items() if hasattr(Fine, key)}
    for name, method in methods.items():
        setattr(Bad, name, method)
    return Bad


SHARED = np.zeros(2, np.float32)


def reused(env: Fine) -> np.ndarray:
    SHARED[:] = env.time
    return SHARED


def late(env: Fine) -> np.ndarray:
    """Writes to the array of the step before, which is another one."""
    if hasattr(env, "kept"):
        env.kept += 1
    env.kept = np.zeros(2, np.float32)
    return env.kept


def writes_to_action(env: Fine, action: Any) -> dict[str, Any]:
    action["action"][...] = 0
    return Fine.step(env, action)


def refuses_two(env: Fine, action: Any) -> dict[str, Any]:
    if env.time == 0 and int(action["action"]) == 2:
        raise ValueError("cannot begin with 2")
    return Fine.step(env, action)


def fails_at_5(env: Fine, action: Any) -> dict[str, Any]:
    if env.time == 5:
        raise ZeroDivisionError("at five")
    return Fine.step(env, action)


BAD = {
    "missing": (spoiled(vector=None), "lacks 'vector'"),
    "extra": (spoiled(other=np.zeros(1)), "has 'other', which is in no space"),
    "shape": (spoiled(vector=np.zeros(3, np.float32)), "'vector' has the shape (3,), its space says (2,)"),
    "dtype": (spoiled(vector=np.zeros(2)), "'vector' has the dtype float64, its space says float32"),
    "reward dtype": (spoiled(reward=0), "'reward' has the dtype int64"),
    "nan": (spoiled(vector=lambda env: np.full(2, np.nan, np.float32)), "'vector' holds nan"),
    "infinite reward": (
        spoiled(reward=lambda env: np.float32(np.inf * env.time if env.time else 0)),
        "'reward' holds inf",
    ),
    "class": (
        spoiled(discrete=lambda env: np.array(11, np.int32)),
        "'discrete' holds the class 11, its space has 0 to 10",
    ),
    "dark": (spoiled(image=np.ones((4, 4, 3), np.uint8)), "no pixel of 'image' is brighter than 1"),
    "first reward": (spoiled(reward=np.float32(1)), "the first transition has the reward 1.0"),
    "not first": (spoiled(is_first=np.False_), "reset returns a transition without is_first"),
    "first again": (spoiled(is_first=np.True_), "step returns a transition with is_first"),
    "over at once": (spoiled(is_last=np.True_), "an episode is over before its first action"),
    "terminal at once": (spoiled(is_terminal=np.True_), "is_terminal on the answer to reset"),
    "reuse": (spoiled(vector=reused), "'vector' is the same array at every step"),
    "late": (spoiled(vector=late), "'vector' changed after it was returned"),
    "action": (spoiled(step=writes_to_action), "step writes to the action"),
    "edge": (spoiled(step=refuses_two), "it rejects the highest action"),
    "raises": (spoiled(step=fails_at_5), "it raised ZeroDivisionError: at five"),
    "render": (spoiled(render=lambda env: np.zeros((4, 4), np.uint8)), "render returns uint8 (4, 4)"),
    "random": (
        spoiled(vector=lambda env: np.random.random(2).astype(np.float32)),
        "equal seeds and actions give different episodes: 'vector' differs at step 0",
    ),
}


def test_a_good_one_has_no_violations():
    report = audit(Fine, STEPS)
    assert report.violations == () and report.repeats == "" and report.state == ""
    assert report.steps == STEPS and report.scores == (10.0,) * 6 and report.lengths == (10,) * 6
    assert report.wall_rate > 0 and report.cpu_rate > 0


@pytest.mark.parametrize("name", BAD)
def test_every_violation_is_told(name):
    make, words = BAD[name]
    report = audit(make, STEPS)
    assert any(words in line for line in report.violations), report.violations


def test_only_what_is_wrong_is_told():
    for name in ("nan", "first again", "reuse", "late", "action", "render", "shape", "dtype"):
        report = audit(BAD[name][0], STEPS)
        assert len(report.violations) == 1, (name, report.violations)


def test_the_first_step_and_the_count_are_told():
    report = audit(spoiled(vector=lambda env: np.full(2, np.nan if env.time == 3 else 0, np.float32)), STEPS)
    assert report.violations == ("'vector' holds nan: numbers must be finite (step 3, 6 times)",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"get_state": lambda env: 0, "set_state": lambda env, state: None}, "is another one"),
        ({"restorable": False}, "says itself"),
    ],
)
def test_states_that_are_not_exact_are_told_but_no_violation(changes, words):
    cls: Any = type("Stateful", (Fine,), changes)
    report = audit(cls, STEPS)
    assert words in report.state and report.violations == ()


class Raw(gymnasium.Env):
    """A Gymnasium environment that is fine."""

    observation_space: gs.Space = gs.Box(-2, 2, (2,))
    action_space: gs.Space = gs.Box(0, 3, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observed(), {}

    def step(self, action: Any) -> Any:
        return self.observed(), 0.5, False, False, {}

    def observed(self) -> Any:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


def raw(**members: Any) -> Callable[[int], Env]:
    cls: Any = type("Spoiled", (Raw,), members)
    return lambda seed: GymEnv(cls(), GymConfig(), seed, cls)


RAW = {
    "bounds": (
        raw(observed=lambda env: np.array([0, 2.5], np.float32)),
        "observation 'vector' holds 2.5 at [1], outside of the -2 to 2 of the observation space",
    ),
    "dtype": (
        raw(observed=lambda env: np.zeros(2)),
        "'vector' has the dtype float64, the observation space says float32",
    ),
    "class": (
        raw(observation_space=gs.Discrete(3), observed=lambda env: 3),
        "'discrete' is the int 3, which is not in Discrete(3)",
    ),
    "shape": (raw(observed=lambda env: np.zeros(3, np.float32)), "has the shape (3,), the observation space says (2,)"),
    "pixels": (
        raw(observation_space=gs.Box(0, 255, (4, 4, 3), np.uint8), observed=lambda env: np.full((4, 4, 3), 256.0)),
        "expected pixels from 0 to 255 in observation 'image', got float64 from 256 to 256",
    ),
    "key": (
        raw(observation_space=gs.Dict({"a": gs.Discrete(2)}), observed=lambda env: {"b": 1}),
        "the observation has no 'a'",
    ),
    "reset": (raw(reset=lambda env, **rest: np.zeros(2, np.float32)), "not (observation, info)"),
    "four": (
        raw(step=lambda env, action: (env.observed(), 0.0, False, {})),
        "step returns a tuple of 4, not (observation",
    ),
    "reward": (raw(step=lambda env, action: (env.observed(), np.zeros(1), False, False, {})), "not a number"),
    "flag": (raw(step=lambda env, action: (env.observed(), 0.0, 0, False, {})), "terminated is the int 0"),
    "info": (
        raw(step=lambda env, action: (env.observed(), 0.0, False, False, None)),
        "the NoneType None as info, not a dict",
    ),
    "nan reward": (raw(step=lambda env, action: (env.observed(), np.nan, False, False, {})), "'reward' holds nan"),
}


def test_a_good_gymnasium_environment_has_no_violations():
    for cls in (Raw, Nested):
        report = audit(lambda seed, cls=cls: GymEnv(cls(), GymConfig(), seed, cls), STEPS)
        assert report.violations == () and report.state == ""


@pytest.mark.parametrize("name", RAW)
def test_gymnasium_s_own_rules(name):
    make, words = RAW[name]
    report = audit(make, STEPS)
    assert any(words in line for line in report.violations), report.violations


class Refuses(Raw):
    """Fails wherever it is told to."""

    where = "nowhere"
    error: type[BaseException] = RuntimeError

    def fail(self, place: str) -> None:
        if place == self.where:
            raise self.error("as told")

    def __init__(self) -> None:
        self.fail("construct")

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.fail("reset")
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        self.fail("step")
        return super().step(action)

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, AttributeError, StopIteration])
@pytest.mark.parametrize("where", ["reset", "step", "close"])
def test_whatever_it_raises_and_wherever_is_told(where, error):
    cls: Any = type("Fails", (Refuses,), {"where": where, "error": error})
    report = audit(lambda seed: GymEnv(cls(), GymConfig(), seed, cls), 5)
    words = f"it raised {error.__name__}: as told (test_envs_check.py, line "
    assert any(words in line for line in report.violations), report.violations
    assert report.steps == (5 if where == "close" else 0) and list(map(str, rows(report)))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_what_cannot_be_made_is_one_line(error):
    cls: Any = type("Fails", (Refuses,), {"where": "construct", "error": error})
    with pytest.raises(
        TaskError, match=rf"^expected an environment that can be made, it raised {error.__name__}: as told"
    ):
        audit(lambda seed: GymEnv(cls(), GymConfig(), seed, cls), 5)


def test_what_no_agent_can_be_made_for_is_told(capsys):
    """What training refuses for its networks' sake, the check knows."""
    code, out, _ = run(capsys, "py_test_envs_check:TwoCameras", "--steps", "3", "--configs", "debug")
    assert code == 1 and "no agent can be made for it: expected images of one size" in out
    asked: list[Any] = []
    assert audit(Fine, 3, lambda *spaces: asked.append(spaces)).violations == ()
    assert asked == [(Fine().observation_spaces, Fine().action_spaces)]


class TwoCameras(Raw):
    observation_space = gs.Dict({"a": gs.Box(0, 255, (8, 8, 3), np.uint8), "b": gs.Box(0, 255, (16, 16, 3), np.uint8)})

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        gymnasium.Env.reset(self, seed=seed)
        return self.observed(), {}

    def observed(self) -> Any:
        return {key: self.np_random.integers(0, 256, (side, side, 3), np.uint8) for key, side in (("a", 8), ("b", 16))}


def test_edges_are_the_bounds_and_every_choice():
    spaces = {"action": Space("discrete", (), (4,))}
    assert [int(action["action"]) for _, action in edge_actions(spaces)] == [0, 3, 1, 2]
    spaces = {"action/a": Space("vector", (2,)), "action/b": Space("discrete", (2,), (2, 5))}
    low, high = (action for _, action in edge_actions(spaces))
    assert low["action/a"].tolist() == [-1, -1] and low["action/b"].tolist() == [0, 0]
    assert high["action/a"].tolist() == [1, 1] and high["action/b"].tolist() == [1, 4]
    assert {value.dtype for value in (*low.values(), *high.values())} == {np.dtype(np.float32), np.dtype(np.int32)}


def test_memory_that_grows_is_measured():
    class Hoards(Fine):
        def changed(self, result: dict[str, Any]) -> dict[str, Any]:
            self.hoard = [*getattr(self, "hoard", []), np.ones(125_000)]  # 1 MB each step
            return result

    assert audit(Hoards, 100).growth == pytest.approx(1e9, rel=0.3)
    assert abs(audit(Fine, 100).growth) < 1e8


def test_what_a_table_says():
    report: Report = audit(Fine, STEPS)
    said = dict(rows(report))
    assert said["observations"].splitlines()[0] == "image: image (4, 4, 3) uint8"
    assert said["actions"] == "action: discrete (), 3 classes"
    assert said["episodes"] == "6 ended, mean score 10, mean length 10 steps"
    assert said["state can be saved"].startswith("yes") and said["same under a seed"] == "yes"


# --- The command -------------------------------------------------------------------------------


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["envs", "check", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_reports_and_its_exit_code_tells(capsys):
    code, out, _ = run(capsys, "toy_catch", "--steps", "50", "--env.toy.balls", "1")
    assert code == 0 and "No violation found" in out and "50 agent steps" in out and "mean length 7 steps" in out
    code, out, _ = run(capsys, "py_test_envs_check:bad_one", "--steps", "20")
    assert code == 1 and "violations of the contract" in out and "holds nan" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("toy_katch", ["toy_catch"]),
        ("--steps 3", ["a task first"]),
        ("toy_catch --steps many", ["--steps", "whole number from 1"]),
        ("toy_catch --env.toy.bals 3", ["env.toy.balls"]),
        ("py_test_envs_check:nothing", ["'nothing'"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, line, words):
    code, out, err = run(capsys, *line.split())
    assert code == 2 and out == "" and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_help(capsys):
    assert run(capsys, "--help")[0] == 0 and run(capsys)[0] == 2


def bad_one(seed: int) -> Env:
    return BAD["nan"][0](seed)


def test_task_errors_pass_through():
    with pytest.raises(TaskError):
        audit(lambda seed: make_env("toy_nothing", None, seed), 5)
    assert "dreamer.envs.audit" in sys.modules


class Masked(Fine):
    """Allows only the action that is the number of the step, and insists on it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.observation_spaces = {**self.observation_spaces, "action_mask": Space("discrete", (3,), (2, 2, 2))}

    def step(self, action: Any) -> dict[str, Any]:
        if int(action["action"]) != self.time % 3:
            raise ValueError("forbidden")
        return super().step(action)

    def observed(self) -> dict[str, Any]:
        return {**super().observed(), "action_mask": np.eye(3, dtype=np.int32)[self.time % 3]}


def test_masks_are_respected():
    report = audit(Masked, STEPS)
    assert report.violations == () and report.state == "" and report.repeats == ""
