"""Environments are restored exactly: what follows a restored state is what followed the saved one, to the bit."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.env_config import AtariConfig, EnvConfig
from dreamer.envs import list_tasks, make_env
from dreamer.envs.interface import Env, restorable


@dataclasses.dataclass(frozen=True)
class Case:
    """A task with its options. `limit`: a short time limit, so that the steps after the state see several episodes."""

    task: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: int | None = 25

    def make(self, seed: int) -> Env:
        return make_env(self.task, EnvConfig(time_limit=self.limit, **self.options), seed)


#: Tasks whose episodes differ in more than the physics: targets, terrain, gains, stages of a controller.
VARIED = [
    "cartpole_swingup", "finger_turn_hard", "fish_swim", "humanoid_walk", "manipulator_insert_peg", "point_mass_hard",
    "reacher_hard", "stacker_stack_2", "swimmer_swimmer6", "walker_walk",
]  # fmt: skip
CASES = {
    "toy": Case("toy_catch", limit=None),
    "toy-moving": Case("toy_catch", {"toy": {"background": "moving"}}, limit=None),
    "toy-gridworld": Case("toy_gridworld", limit=9),
    "toy-limited": Case("toy_catch", limit=9),
    "atari": Case("atari_pong"),
    "atari-sticky": Case("atari_breakout", {"atari": {"sticky": 0.25, "actions": "all", "pooling": 3}}),
    "atari100k": Case("atari100k_ms_pacman", {"atari": {"terminal_on_life_loss": True, "max_frames": 200}}, None),
    "crafter": Case("crafter_reward", limit=50),
    "dmc-repeat": Case("dmc_cheetah_run", {"dmc": {"repeat": 4}}),
    "dmc-pixels": Case("dmc_reacher_easy", {"dmc": {"pixels": True, "size": (32, 32)}}),
    **{f"dmc-{task}": Case(f"dmc_{task}") for task in VARIED},
}


def actions(env: Env, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{key: space.sample(rng) for key, space in env.action_spaces.items()} for _ in range(count)]


def run(env: Env, moves: list[dict[str, np.ndarray]], over: bool) -> tuple[list[dict[str, bytes]], bool]:
    """The transitions, each value as its bytes, and whether the last one ended an episode."""
    seen = []
    for move in moves:
        result = env.reset() if over else env.step(move)
        over = bool(result["is_last"])
        seen.append({key: np.asarray(value).tobytes() for key, value in result.items()})
    return seen, over


def picture(env: Env) -> bytes:
    image = env.render()
    return b"" if image is None else image.tobytes()


def saved_and_continued(case: Case) -> tuple[bytes, bool, bytes, list[dict[str, bytes]], bytes]:
    """(state after 37 steps, whether it ended an episode, picture there, the next 60 transitions, picture there)."""
    env = case.make(11)
    env.reset()
    _, over = run(env, actions(env, 37, seed=0), False)
    before = picture(env)
    state = pickle.dumps(env.get_state())
    seen, _ = run(env, actions(env, 60, seed=1), over)
    after = picture(env)
    env.close()
    return state, over, before, seen, after


def restored_and_continued(case: Case, state: bytes, over: bool) -> tuple[bytes, list[dict[str, bytes]], bytes]:
    """The same from an environment with another seed, itself in the middle of an episode, into which the state goes."""
    env = case.make(12)
    env.reset()
    run(env, actions(env, 5, seed=2), False)
    env.set_state(pickle.loads(state))
    before = picture(env)
    seen, _ = run(env, actions(env, 60, seed=1), over)
    after = picture(env)
    env.close()
    return before, seen, after


def check(case: Case) -> None:
    state, over, *expected = saved_and_continued(case)
    before, seen, after = restored_and_continued(case, state, over)
    for step, (one, two) in enumerate(zip(seen, expected[1], strict=True), 1):
        wrong = [key for key in two if one[key] != two[key]]
        assert one.keys() == two.keys() and not wrong, f"{wrong} differ {step} steps after restoring"
    assert before == expected[0] and after == expected[2], "the picture"


@pytest.mark.parametrize("name", CASES)
def test_what_follows_is_the_same(name):
    env = CASES[name].make(0)
    assert restorable(env)
    env.close()
    check(CASES[name])


@pytest.mark.slow
def test_terrain_is_restored_on_the_graphics_card():
    check(Case("dmc_quadruped_escape", {"dmc": {"pixels": True, "size": (32, 32)}}))


@pytest.mark.slow
@pytest.mark.parametrize("task", list_tasks()["dmc"] + list_tasks()["atari"])
def test_every_task(task):
    """With the ends of episodes; the Atari games also at Atari 100k's other options."""
    check(Case(task))
    if task.startswith("atari"):
        check(Case(task, {"atari": {"sticky": 0.25, "gray": True, "actions": "all"}}))


@pytest.mark.parametrize("name", ["atari-sticky", "dmc-finger_turn_hard"])
def test_another_process_goes_on(name, tmp_path):
    state, over, *expected = saved_and_continued(CASES[name])
    (tmp_path / "state").write_bytes(state)
    script = (
        "import pickle, sys, test_envs_state as t\n"
        f"state = open({str(tmp_path / 'state')!r}, 'rb').read()\n"
        f"sys.stdout.buffer.write(pickle.dumps(t.restored_and_continued(t.CASES[{name!r}], state, {over})))"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=here, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert list(pickle.loads(done.stdout)) == expected


@pytest.mark.parametrize("name", ["toy", "atari", "crafter", "dmc-walker_walk"])
def test_saving_changes_nothing_and_a_state_may_be_used_again(name):
    """A state is a copy: neither the environment it came from nor the one it goes into writes to it."""
    case = CASES[name]
    plain, saving = case.make(5), case.make(5)
    plain.reset(), saving.reset()
    moves = actions(plain, 20, seed=0)
    expected, _ = run(plain, moves, False)
    state = saving.get_state()
    kept = pickle.dumps(state)
    for _ in range(2):
        assert run(saving, moves, False)[0] == expected
        saving.set_state(state)
    assert pickle.dumps(state) == kept


def test_crafter_s_picture_takes_no_random_numbers():
    """At night Crafter draws noise from the world's own stream."""
    env, other = make_env("crafter_reward", EnvConfig(), 3), make_env("crafter_reward", EnvConfig(), 3)
    for one in (env, other):
        one.reset()
        one._env._step = 250  # night
    for move in actions(env, 10, seed=0):
        image = other.step(move)["image"]
        assert np.array_equal(env.step(move)["image"], image)
        assert np.array_equal(env.render(), image)


@pytest.mark.parametrize("game", ["breakout", "qbert"])
def test_an_emulator_is_restored_at_any_step(game):
    """Also where what the last frame left on the console's pins decides what the next one does: after a reset, or in
    the middle of a paddle's turn, once in some hundred steps."""
    config = EnvConfig(atari=AtariConfig(sticky=0.25, noops=0, size=(42, 32)))
    ours, other = (make_env(f"atari100k_{game}", config, seed) for seed in (1, 2))
    choose = np.random.default_rng(0)
    count = ours.action_spaces["action"].classes[0]
    ours.reset()
    other.reset()
    for _ in range(800):
        action = {"action": np.int32(choose.integers(count))}
        other.set_state(pickle.loads(pickle.dumps(ours.get_state())))
        result, expected = other.step(action), ours.step(action)
        assert all(np.array_equal(result[key], expected[key]) for key in expected)
        if expected["is_last"]:
            ours.reset()
