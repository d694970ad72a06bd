"""Environments of other people: by a Python path, by a file, by the entry point of an installed package."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamer.env_config import EnvConfig
from dreamer.envs import TaskError, check_task, list_tasks, make_env, make_vector_env
from dreamer.envs.interface import restorable

FILE = """
import gymnasium, numpy as np
import beside
from dreamer.envs import transition
from dreamer.types import Space


class Coin(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, sides=2, render_mode=None):
        self.sides, self.render_mode = sides, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return int(self.np_random.integers(self.sides)), beside.REWARD, False, False, {}

    def render(self):
        return np.full((4, 6, 3), 9, np.uint8)


class Ours:
    def __init__(self, name, config, seed):
        self.text = f"{name} {config.time_limit} {seed}"
        self.observation_spaces = {"vector": Space("vector", (1,))}
        self.action_spaces = {"action": Space("vector", (1,))}

    def reset(self):
        return transition({"vector": np.zeros(1, np.float32)}, is_first=True)

    def step(self, action):
        return transition({"vector": np.ones(1, np.float32)}, 2.0)

    def render(self):
        return None

    def close(self):
        pass


def coin(seed):
    return Coin(1 + seed)


def nothing():
    return 3


number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Holds my_envs.py and what it imports; the working folder."""
    (tmp_path / "my_envs.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("REWARD = 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    return tmp_path


def test_a_file_and_a_module_name_the_same_class(folder):
    for task in (f"py_{folder / 'my_envs.py'}:Coin", "py_my_envs.py:Coin", "py_./my_envs.py:coin", "py_my_envs:Coin"):
        check_task(task)
        env = make_env(task, EnvConfig(), seed=1)
        assert env.action_spaces["action"].classes == (2,)
        assert env.reset()["is_first"] and env.step({"action": np.int32(1)})["reward"] == 0.5
        assert restorable(env)
        picture = env.render()
        assert (picture is None) == task.endswith("coin")  # a class is asked for pictures
        env.close()


def test_arguments_and_options_arrive(folder):
    env = make_env("py_my_envs:Coin", EnvConfig(gym={"kwargs": {"sides": 1}, "repeat": 3}), seed=1)
    env.reset()
    assert env.step({"action": np.int32(1)})["reward"] == 1.5
    assert env._env.sides == 1
    assert make_env("py_my_envs:coin", EnvConfig(), seed=3)._env.sides == 4
    ours = make_env("py_my_envs:Ours", EnvConfig(time_limit=7), seed=3)
    assert ours.env.text == "my_envs:Ours 7 3"
    assert not restorable(ours)


def test_workers_find_the_file_too(folder):
    env = make_vector_env("py_my_envs.py:Coin", EnvConfig(workers="process"), 2, 0, True)
    env.reset()
    env.step_async({"action": np.ones(2, np.int32)})
    assert env.step_wait()["reward"].tolist() == [0.5, 0.5]
    env.close()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("py_my_envs", ["py_module:NAME", "py_file.py:NAME", "py_my_envs"]),
        ("py_no_such_module:A", ["'no_such_module'", "install it"]),
        ("py_no/such.py:A", ["no/such.py"]),
        ("py_my_envs:Con", ["'Con'", "which has none"]),
        ("py_my_envs:number", ["class or function", "int"]),
    ],
)
def test_mistakes_in_the_name_are_told_without_making_anything(folder, task, words):
    with pytest.raises(TaskError) as error:
        check_task(task)
    assert all(word in str(error.value) for word in words), error.value


def test_what_comes_must_be_an_environment(folder):
    with pytest.raises(TaskError, match=r"expected a gymnasium.Env or .* for py_my_envs:nothing.*got int"):
        make_env("py_my_envs:nothing", EnvConfig(), 0)
    with pytest.raises(TaskError, match="with.*'size'"):
        make_env("py_my_envs:Coin", EnvConfig(gym={"kwargs": {"size": 1}}), 0)
    with pytest.raises(TaskError, match=r"env.gym.repeat only for a gymnasium.Env"):
        make_env("py_my_envs:Ours", EnvConfig(gym={"repeat": 2}), 0)


def test_an_installed_package_brings_suites(folder):
    """In another process, because the packages of a process are looked through once."""
    info = folder / "my_games-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-games\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dreamer.envs]\nmygames = my_envs:Ours\ncoins = my_envs:Coin\nlost = no_such_module:make\n"
    )
    script = (
        "from dreamer.envs import *; from dreamer.env_config import EnvConfig\n"
        "assert make_env('mygames_maze', EnvConfig(), 5).text == 'maze None 5'\n"
        "assert make_env('coins_any', EnvConfig(), 5).action_spaces['action'].classes == (2,)\n"
        "assert 'mygames' in list_suites() and list_tasks()['mygames'] == []\n"
        "try: check_task('lost_x')\n"
        "except TaskError as error: assert 'install the package again' in str(error), error\n"
        "try: check_task('mygame_x')\n"
        "except TaskError as error: assert 'mygames' in str(error), error\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "mygames" not in list_tasks()
