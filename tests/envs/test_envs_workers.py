"""Worker processes and what goes wrong: errors that say what to do, and no process or memory left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
from fake_envs import Imports, Nested, Scripted, Spaced
from waiting import alive, until

from dreamer.env_config import EnvConfig
from dreamer.envs import (
    EnvError,
    InlineVectorEnv,
    ProcessVectorEnv,
    TaskError,
    check_task,
    list_suites,
    make_env,
    make_vector_env,
)
from dreamer.process import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [(1.0, False, False)] * 50
WORKERS = ["inline", "process"]


def own(make: Any, workers: str, num_envs: int = 2) -> InlineVectorEnv | ProcessVectorEnv:
    return make_vector_env("own", EnvConfig(workers=workers, restart_seconds=0), num_envs, 0, True, make)


def step(env: Any, action: int = 0) -> dict[str, np.ndarray]:
    env.step_async({"action": np.full(env.num_envs, action, np.int32)})
    return env.step_wait()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("atary_pong", ["suite_name", "toy, atari", "atari_pong"]),
        ("pong", ["suite_name", "'pong'"]),
        ("toy_cach", ["nearest: toy_catch"]),
        ("atari100k_james_bond", ["nearest: jamesbond"]),
        ("dmc_cartpole_swngup", ["nearest: dmc_cartpole_swingup", "dreamer envs"]),
        ("dmc_lqr_2_1", ["expected a task of the suite 'dmc'"]),
        ("crafter_rewrd", ["crafter_reward"]),
        ("gym_CartPol-v1", ["CartPole"]),
        ("gym_CartPole-v77", ["CartPole-v77", "v1"]),
        ("gym_no_such_package:My-v0", ["importable module 'no_such_package'", "install"]),
    ],
)
def test_unknown_tasks_name_the_nearest(task, words):
    for attempt in (lambda: check_task(task), lambda: make_env(task, EnvConfig(), 0)):
        with pytest.raises(TaskError) as error:
            attempt()
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(("task", "extra"), [("crafter_reward", "crafter"), ("dmc_walker_walk", "dmc")])
def test_a_missing_package_names_the_extra(task, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskError, match=rf"pip install 'dreamer\[{extra}\]'"):
        check_task(task)


@pytest.mark.parametrize("workers", WORKERS)
def test_closed_environments_say_so(workers):
    env = own(lambda index, seed: Scripted(SCRIPT), workers)
    env.reset()
    env.close()
    with pytest.raises(EnvError, match="closed"):
        step(env)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_environment_that_cannot_be_made(workers):
    def broken(index: int, seed: int) -> Any:
        raise FileNotFoundError(f"level {index}")

    with pytest.raises(EnvError, match="own, environment 0 failed: FileNotFoundError: level 0"):
        own(broken, workers)
    with pytest.raises(TaskError, match=r"expected make_env\(index, seed\) to return a gymnasium.Env.* got str"):
        own(lambda index, seed: "nothing", workers)
    with pytest.raises(TaskError, match="expected equal spaces in all environments"):
        own(lambda index, seed: Scripted(SCRIPT) if index else Nested(), workers)
    unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    with pytest.raises(TaskError, match="^expected finite action bounds"):
        own(lambda index, seed: Spaced(unbounded, unbounded), workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_calls_out_of_order_and_wrong_actions(workers):
    env = own(lambda index, seed: Scripted(SCRIPT), workers)
    env.reset()
    with pytest.raises(EnvError, match="step_async before step_wait"):
        env.step_wait()
    with pytest.raises(EnvError, match="one row per environment"):
        env.step_async({"action": np.zeros(3, np.int32)})
    with pytest.raises(EnvError, match="expected actions of shapes"):
        env.step_async({"move": np.zeros(2, np.int32)})
    assert step(env)["reward"].tolist() == [1, 1]
    env.close()


def test_what_cannot_be_pickled_is_refused_with_a_way_out():
    lock = threading.Lock()

    def make(index: int, seed: int) -> Scripted:
        with lock:
            return Scripted(SCRIPT)

    with pytest.raises(TaskError, match="--env.workers inline"):
        own(make, "process")
    own(make, "inline").close()


@pytest.fixture
def process_env():
    env = own(lambda index, seed: Scripted(SCRIPT), "process")
    assert isinstance(env, ProcessVectorEnv)
    env.reset()
    yield env
    env.close()


def test_a_worker_killed_before_its_first_transition_is_an_error_that_names_it():
    env = own(lambda index, seed: Scripted(SCRIPT), "process")
    os.kill(env._workers[1].pid, signal.SIGKILL)
    with pytest.raises(EnvError, match=r"own, environment 1: its worker process ended .* exit code -9"):
        env.reset()
    with pytest.raises(EnvError, match="closed"):
        env.reset()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_signals_to_stop_reach_no_worker(process_env, number):
    """They often go to the whole tree of processes, among them the server that workers come from; the run's own
    process decides what then happens."""
    pids = [worker.pid for worker in process_env._workers.values()]
    server = psutil.Process(pids[0]).ppid()
    for pid in (*pids, server):
        os.kill(pid, number)
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(server).wait(0.1)
    assert step(process_env)["reward"].tolist() == [1, 1]
    assert process_env.take_faults() == [] and [worker.pid for worker in process_env._workers.values()] == pids


def test_close_ends_all_workers():
    env = own(lambda index, seed: Scripted(SCRIPT), "process", num_envs=3)
    pids = [worker.pid for worker in env._workers.values()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    env.step_async({"action": np.zeros(3, np.int32)})  # even with a step under way
    env.close()
    env.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_import_neither_jax_nor_the_main_script():
    env = own(lambda index, seed: Imports(SCRIPT), "process")
    assert env.reset()["vector"].tolist() == [[0, 0, 0]] * 2
    env.close()


def test_workers_see_the_environment_variables_of_now(monkeypatch):
    class Reads(Scripted):
        def _observation(self, action: int) -> np.ndarray:
            return np.full(3, float(os.environ.get("LEVEL_OF_TEST", "0")), np.float32)

    monkeypatch.setenv("LEVEL_OF_TEST", "7")
    env = own(lambda index, seed: Reads(SCRIPT), "process")
    assert env.reset()["vector"].tolist() == [[7, 7, 7]] * 2
    env.close()


def test_slow_suites_get_processes_and_fast_ones_none():
    config = EnvConfig()
    slow = {name for name, suite in list_suites().items() if suite.process(config)}
    assert slow == {"atari", "atari100k", "crafter", "minigrid", "memorymaze", "vizdoom", "minecraft", "dmlab"}
    assert list_suites()["dmc"].process(EnvConfig(dmc={"pixels": True}))
    assert list_suites()["procgen"].process(EnvConfig(procgen={"size": (96, 96)}))
    alone = make_vector_env("atari_pong", config, 1, 0, True)
    assert isinstance(alone, InlineVectorEnv), "one environment gains nothing from a process"
    alone.close()
    several = make_vector_env("atari_pong", config, 2, 0, True)
    assert isinstance(several, ProcessVectorEnv)
    several.close()


MAIN = """
import sys
import gymnasium, numpy as np
from dreamer.env_config import EnvConfig
from dreamer.envs import make_vector_env

class Mine(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.ones(1, np.float32), offset + action, False, False, {}

offset = 3
env = make_vector_env("mine", EnvConfig(workers="process"), 2, 0, True, lambda index, seed: Mine())
env.reset()
env.step_async({"action": np.array([0, 1], np.int32)})
print(env.step_wait()["reward"].tolist(), *[worker.pid for worker in env._workers.values()], flush=True)
"""


def start(tmp_path: Path, code: str) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(code)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(script)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, cwd=tmp_path
    )


def test_a_plain_script_needs_no_main_guard_and_leaves_nothing(tmp_path):
    """Classes of the script reach the workers, the exit without close() is quiet, and no worker outlives it."""
    process = start(tmp_path, MAIN)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert out.startswith("[3.0, 4.0]")
    until(lambda: not any(alive(int(word)) for word in out.split("]")[1].split()), 20, "the end of the workers")


def test_an_error_in_the_script_does_not_hang_it(tmp_path):
    process = start(tmp_path, MAIN + "\nraise KeyError('the script failed')\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "the script failed" in err
    until(lambda: not any(alive(int(word)) for word in out.split("]")[1].split()), 20, "the end of the workers")


def run(code: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, **environ})


def test_environments_import_nothing_heavy():
    heavy = ("jax", "flax", "dm_control", "mujoco", "crafter")
    result = run(f"import sys, dreamer.envs; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_a_missing_renderer_names_the_packages():
    code = """
from dreamer.env_config import EnvConfig
from dreamer.envs import TaskError, make_env
env = make_env("dmc_cartpole_swingup", EnvConfig(), 0)
env.reset()
assert env.render() is None  # the state needs no renderer
try:
    make_env("dmc_cartpole_swingup", EnvConfig(dmc={"pixels": True}), 0)
except TaskError as error:
    print(error)
"""
    result = run(code, MUJOCO_GL="disabled")
    for word in ("libegl1", "libosmesa6", "MUJOCO_GL=disabled", "--env.dmc.pixels false"):
        assert word in result.stdout, result.stderr
