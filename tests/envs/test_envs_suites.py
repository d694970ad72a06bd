"""The suites of optional packages beyond their contract: protocols, ends, exact state, engines that leave no trace."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from waiting import alive, until

from dreamer.env_config import EnvConfig
from dreamer.envs import Env, TaskError, check_task, list_tasks, make_env, registry
from dreamer.envs.interface import Restorable, Transition, restorable
from dreamer.envs.restore_check import difference, restore_failure
from dreamer.envs.suites.bsuite import EXPERIMENTS
from dreamer.envs.suites.packages import part
from dreamer.envs.suites.procgen import TIME_LIMITS
from dreamer.envs.suites.seeded import SeededEpisodes
from dreamer.presets import load_config
from dreamer.types import Space

needs_procgen = pytest.mark.skipif(importlib.util.find_spec("procgen") is None, reason="procgen-mirror is missing")


def act(choice: int) -> dict[str, np.ndarray]:
    return {"action": np.array(choice, np.int32)}


def play(env: Env, choices: Iterable[int]) -> list[Transition]:
    """A new episode: its transitions until these actions or the episode end."""
    results = [env.reset()]
    for choice in choices:
        results.append(env.step(act(choice)))
        if results[-1]["is_last"]:
            break
    return results


def maker(task: str, **options: Any) -> Callable[[int], Env]:
    return lambda seed: make_env(task, EnvConfig(**options), seed)


def the_end(results: list[Transition]) -> tuple[int, bool, bool]:
    """Actions, is_last and is_terminal of the last transition."""
    return len(results) - 1, bool(results[-1]["is_last"]), bool(results[-1]["is_terminal"])


# --- Seeded episodes ---------------------------------------------------------------------------


class Walk:
    """A random walk; its state cannot be saved."""

    observation_spaces = {"vector": Space("vector", ())}
    action_spaces = {"action": Space("discrete", (), (3,))}

    def begin(self, seed):
        self.rng = np.random.default_rng(seed)
        self.place = self.rng.normal()
        return self.here(is_first=True)

    def step(self, action):
        self.place += int(action["action"]) * self.rng.normal()
        return self.here()

    def here(self, is_first=False):
        flags = {"is_first": np.bool_(is_first), "is_last": np.bool_(False), "is_terminal": np.bool_(False)}
        return {"vector": np.float32(self.place), "reward": np.float32(0), **flags}

    def render(self):
        return None

    def close(self):
        pass


def test_seeded_episodes_come_back_to_where_they_were():
    assert restore_failure(lambda seed: SeededEpisodes(Walk(), seed)) is None


def test_seeded_episodes_differ_and_are_saved_before_the_first_one_too():
    env, other = SeededEpisodes(Walk(), 1), SeededEpisodes(Walk(), 2)
    other.reset()
    other.set_state(env.get_state())
    places = [env.reset()["vector"] for _ in range(3)]
    assert len(set(places)) == 3
    assert [other.reset()["vector"] for _ in range(3)] == places


# --- BSuite ------------------------------------------------------------------------------------


def test_bsuite_has_every_id_of_the_package():
    from bsuite import sweep

    assert list_tasks()["bsuite"] == [f"bsuite_{name}" for name in sorted(sweep.SWEEP, key=ordered)]
    with pytest.raises(TaskError, match="nearest: bsuite_catch/1"):
        check_task("bsuite_catch/199")


def ordered(name: str) -> tuple[str, int]:
    experiment, index = name.split("/")
    return experiment, int(index)


def test_bsuite_catch_as_its_rules_say():
    """10 rows, 5 columns, the paddle in the last row: 9 moves decide, +1 or -1, and missing costs a regret of 2."""
    env = make_env("bsuite_catch/0", EnvConfig(), seed=0)
    assert env.observation_spaces["vector"].shape == (50,) and env.action_spaces["action"].classes == (3,)
    for episode, catch in enumerate([True, True, False, True]):
        board = env.reset()["vector"].reshape(10, 5)
        ball = int(board[0].argmax())
        if catch:
            moves = [0] * max(2 - ball, 0) + [2] * max(ball - 2, 0)
        else:
            moves = [2, 2] if ball < 2 else [0, 0]
        results = [env.step(act(move)) for move in [*moves, *[1] * (9 - len(moves))]]
        assert [float(r["reward"]) for r in results] == [0.0] * 8 + [1.0 if catch else -1.0]
        assert [bool(r["is_terminal"]) for r in results] == [False] * 8 + [True]
        assert results[-1]["log/episodes_left"] == 10_000 - episode - 1
        assert results[-1]["log/total_regret"] == (0 if episode < 2 else 2)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if not name.startswith("mnist")])
def test_bsuite_experiments_can_be_restored(experiment):
    assert restore_failure(maker(f"bsuite_{experiment}/{EXPERIMENTS[experiment] - 1}"), bounded=False) is None


def test_bsuite_mnist_needs_its_data(monkeypatch):
    """The real data come over a network; the adapter is tried on stand-ins and on the failure to fetch them."""
    from bsuite.utils import datasets

    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_mnist", fail)
    with pytest.raises(TaskError, match="bsuite_mnist/0: no network"):
        make_env("bsuite_mnist/0", EnvConfig(), seed=0)
    rng = np.random.default_rng(0)
    data = (rng.integers(256, size=(40, 28, 28), dtype=np.uint8), rng.integers(10, size=40))
    monkeypatch.setattr(datasets, "load_mnist", lambda *_: (data, data))
    for task in ("bsuite_mnist/0", "bsuite_mnist_noise/3", "bsuite_mnist_scale/3"):
        assert restore_failure(maker(task)) is None
        assert the_end(play(make_env(task, EnvConfig(), 0), [1])) == (1, True, True)


# --- MiniGrid ----------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["partial", "full"])
def test_minigrid_shows_what_the_package_s_own_wrappers_show(view):
    """At a size that needs no scaling: 7 or 6 cells of 8 pixels."""
    from minigrid import wrappers

    size = (56, 56) if view == "partial" else (48, 48)
    env = make_env("minigrid_DoorKey-6x6-v0", EnvConfig(minigrid={"view": view, "size": size}), seed=0)
    theirs = gymnasium.make("MiniGrid-DoorKey-6x6-v0", highlight=False)
    theirs = (wrappers.RGBImgPartialObsWrapper if view == "partial" else wrappers.RGBImgObsWrapper)(theirs, tile_size=8)
    for _ in range(2):
        ours = env.reset()["image"]
        assert np.array_equal(ours, theirs.reset(seed=env.get_state()["episode"])[0]["image"])
        for choice in (1, 2, 0, 2, 2):
            assert np.array_equal(env.step(act(choice))["image"], theirs.step(choice)[0]["image"])


def test_minigrid_goal_is_terminal_and_the_time_limit_is_not():
    env = make_env("minigrid_Empty-5x5-v0", EnvConfig(), seed=0)
    forward, right, left = 2, 1, 0
    solved = play(env, [forward, forward, right, forward, forward])
    assert the_end(solved) == (5, True, True)
    assert solved[-1]["reward"] == pytest.approx(1 - 0.9 * 5 / 100)
    assert the_end(play(env, [left] * 200)) == (100, True, False)


@pytest.mark.parametrize("world", ["DoorKey-8x8-v0", "Dynamic-Obstacles-6x6-v0", "ObstructedMaze-1Dlhb-v0"])
def test_minigrid_can_be_restored(world):
    assert restore_failure(maker(f"minigrid_{world}"), bounded=False) is None


@pytest.mark.slow
def test_every_minigrid_world_can_be_made_and_restored():
    found = {task: restore_failure(maker(task), bounded=False) for task in list_tasks()["minigrid"]}
    assert {task: why for task, why in found.items() if why is not None} == {}


def test_minigrid_names():
    with pytest.raises(TaskError, match="nearest: minigrid_DoorKey-8x8-v0"):
        check_task("minigrid_DoorKey-8x8")


# --- ViZDoom -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doom():
    env = make_env("vizdoom_take_cover", EnvConfig(), seed=0)
    yield env
    env.close()


def test_vizdoom_every_tic_alive_gives_one_and_death_is_terminal(doom):
    episodes = [play(doom, [0] * 2100) for _ in range(3)]
    for episode in episodes:
        length, last, terminal = the_end(episode)
        assert 60 < length < 2100 and last and terminal, "standing still is deadly within seconds"
        assert sum(r["reward"] for r in episode) == length
        assert np.array_equal(episode[-1]["image"], episode[-2]["image"]), "there is no picture of the end"
    assert len({len(episode) for episode in episodes}) > 1, "the seed of an episode matters"


def test_vizdoom_actions_stay_left_right(doom):
    """Side steps move the view in opposite ways: played back and forth, it comes home; standing, it stays."""
    still, left, right = (play(doom, [choice] * 8)[-1]["image"].astype(int) for choice in (0, 1, 2))
    assert abs(left - still).mean() > 1 < abs(right - still).mean() and abs(left - right).mean() > 1


def test_vizdoom_time_limit_is_not_terminal():
    env = make_env("vizdoom_take_cover", EnvConfig(vizdoom={"max_tics": 12}), seed=0)
    assert the_end(play(env, [0] * 99)) == (12, True, False)
    env.close()


def test_vizdoom_can_be_restored():
    assert restore_failure(maker("vizdoom_take_cover"), bounded=False) is None


def doom_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("ViZDoom")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /dev/shm")
def test_vizdoom_killed_leaves_no_engine_no_shared_memory_and_no_files(tmp_path):
    """Killed, so that nothing can tidy up; the engine goes by itself."""
    assert shutil.which("setpriv"), "part of util-linux"
    before = doom_memory()
    script = (
        "import sys, time\nfrom dreamer.env_config import EnvConfig\nfrom dreamer.envs import make_env\n"
        "env = make_env('vizdoom_take_cover', EnvConfig(), 0)\nenv.reset()\nprint('up', flush=True)\ntime.sleep(100)"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    folder = tmp_path / "here"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=folder, env=environ)
    assert process.stdout.readline() == b"up\n"
    engines = Path(f"/proc/{process.pid}/task/").glob("*/children")
    (engine,) = {int(pid) for task in engines for pid in task.read_text().split()}
    process.kill()
    process.communicate()
    until(lambda: not alive(engine), 10, "the end of the engine")
    assert doom_memory() <= before
    assert list(folder.iterdir()) == []


# --- Memory Maze -------------------------------------------------------------------------------


def test_memory_maze_can_be_restored(tmp_path, monkeypatch, caplog):
    """The whole check takes a minute and is among the slow tests; this goes back in one and the same instance.

    Its libraries say nothing at each reset, on the screen or in files.
    """
    monkeypatch.chdir(tmp_path)
    env = make_env("memorymaze_9x9", EnvConfig(memorymaze={"size": 32}), seed=0)
    assert isinstance(env, Restorable) and restorable(env)
    play(env, [1, 4])
    state = env.get_state()
    after = [env.step(act(choice)) for choice in (3, 1, 1)]
    env.set_state(state)
    assert [difference(env.step(act(choice)), result) for choice, result in zip((3, 1, 1), after, strict=True)] == [
        None
    ] * 3
    assert env.action_spaces["action"].classes == (6,) and not after[-1]["is_last"]
    assert caplog.records == [] and list(tmp_path.iterdir()) == []
    env.close()


@pytest.mark.slow
def test_memory_maze_survives_the_whole_proof():
    assert restore_failure(maker("memorymaze_9x9"), bounded=False) is None


@pytest.mark.slow
def test_memory_maze_ends_by_its_time_limit():
    env = make_env("memorymaze_9x9", EnvConfig(memorymaze={"size": 16}), seed=0)
    assert the_end(play(env, [1] * 1001)) == (1000, True, False)
    env.close()


# --- Procgen -----------------------------------------------------------------------------------


@needs_procgen
def test_procgen_has_every_game_and_knows_its_clock():
    """The clock is read where the library keeps it: in a saved game, after the two random streams and four numbers."""
    library = part("procgen", "env")
    assert list(TIME_LIMITS) == library.ENV_NAMES
    for game, limit in TIME_LIMITS.items():
        (state,) = make_env(f"procgen_{game}", EnvConfig(), 0).get_state()["game"]
        place, streams = 0, 0
        while streams < 2:  # texts of hundreds of numbers, each after its length
            (length,) = struct.unpack_from("<i", state, place)
            text = state[place + 4 : place + 4 + 64]
            if 5000 < length < 8000 and set(text) <= set(b"0123456789 "):
                streams, place = streams + 1, place + 4 + length
            else:
                place += 1
        reward, done, complete, action, clock = struct.unpack_from("<f4i", state, place)
        assert (reward, done, complete) == (0, 1, 0)
        assert clock == limit, game


@needs_procgen
@pytest.mark.parametrize("game", TIME_LIMITS)
def test_procgen_games_can_be_restored(game):
    assert restore_failure(maker(f"procgen_{game}"), bounded=False) is None


@needs_procgen
def test_procgen_large_pictures_can_be_restored():
    one, two = (make_env("procgen_heist", EnvConfig(procgen={"size": (96, 96)}), seed) for seed in (1, 2))
    play(one, [7, 1, 5])
    two.reset()
    two.set_state(one.get_state())
    assert np.array_equal(one.render(), two.render())
    for choice in (3, 7, 7, 5):
        assert difference(one.step(act(choice)), two.step(act(choice))) is None


@needs_procgen
def test_procgen_the_clock_is_no_terminal_end_and_losing_is():
    stay = 4
    env = make_env("procgen_leaper", EnvConfig(), seed=0)
    assert the_end(play(env, [stay] * 600)) == (500, True, False), "nothing happens at the edge of the road"
    env = make_env("procgen_starpilot", EnvConfig(), seed=0)
    for _ in range(3):
        episode = play(env, [stay] * 1000)
        length, last, terminal = the_end(episode)
        assert length < 1000 and last and terminal
        assert np.array_equal(episode[-1]["image"], episode[-2]["image"]), "not the next episode's first picture"


@needs_procgen
def test_procgen_one_level_again_and_again():
    """Levels are drawn from those allowed; the first picture tells them apart."""
    one = make_env("procgen_maze", EnvConfig(procgen={"levels": 1, "start_level": 3}), seed=0)
    other = make_env("procgen_maze", EnvConfig(procgen={"levels": 1, "start_level": 3}), seed=1)
    first = one.reset()["image"]
    one.step(act(7))
    assert np.array_equal(one.reset()["image"], first) and np.array_equal(other.reset()["image"], first)
    free = make_env("procgen_maze", EnvConfig(), seed=0)
    assert len({play(free, [7])[0]["image"].tobytes() for _ in range(4)}) == 4


# --- All of them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "side"),
    [("minigrid", 64), ("vizdoom", 64), ("carracing", 64), pytest.param("procgen", 96, marks=needs_procgen)],
)
def test_presets_show_the_images_they_say(preset, side):
    config = load_config([preset])
    env = make_env(config.task, config.env, seed=0)
    assert env.observation_spaces["image"].shape == (side, side, 3)
    env.close()


def test_a_missing_package_names_every_command(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    commands = "pip install 'dreamer[procgen]' && pip install --no-deps procgen-mirror gym3"
    with pytest.raises(TaskError) as caught:
        check_task("procgen_coinrun")
    assert commands in str(caught.value)
    for task in ("bsuite_catch/0", "minigrid_DoorKey-8x8-v0", "memorymaze_9x9", "vizdoom_take_cover"):
        with pytest.raises(TaskError, match="pip install"):
            check_task(task)


def test_parts_of_packages_leave_the_front_door_shut(tmp_path, monkeypatch):
    package = tmp_path / "heavy_front"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('too much')")
    (package / "inside.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(tmp_path)
    assert part("heavy_front", "inside").VALUE == 3
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        part("no_such_package", "inside")
