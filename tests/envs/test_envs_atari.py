"""Atari's protocol, frame by frame against a plain recomputation and against stored frames."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ale_py
import numpy as np
import pytest
from ale_py import roms
from PIL import Image

from dreamer.env_config import AtariConfig, EnvConfig
from dreamer.envs import human_normalized, list_tasks, make_env
from dreamer.envs.suites.atari import Atari

GOLDEN = Path(__file__).parents[1] / "fixtures" / "atari_golden.npz"
RGB = AtariConfig(noops=0)
GRAY = AtariConfig(noops=0, gray=True, size=(96, 96), actions="all")
SETTINGS = {"pong": RGB, "breakout": RGB, "ms_pacman": GRAY}


def actions(config: AtariConfig, count: int = 120) -> list[int]:
    """A fixed sequence, the same on every machine."""
    return [(7 * i + i * i // 5) % (18 if config.actions == "all" else 4) for i in range(count)]


def play(name: str, config: AtariConfig) -> tuple[list[np.ndarray], list[float]]:
    env = Atari(name, config, seed=0)
    steps = [env.reset()] + [env.step({"action": np.int32(action)}) for action in actions(config)]
    assert not any(step["is_last"] for step in steps)
    return [np.asarray(step["image"]) for step in steps], [float(step["reward"]) for step in steps]


def recompute(name: str, config: AtariConfig) -> tuple[list[np.ndarray], list[float]]:
    """The same observations and rewards, written down from the protocol's words, straight from the emulator."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(name))
    legal = list(ale.getLegalActionSet()) if config.actions == "all" else list(ale.getMinimalActionSet())
    ale.reset_game()
    raw, rewards, observations = [ale.getScreenRGB()], [0.0], []
    observations.append(preprocess(raw[0], raw[0], config))
    for action in actions(config):
        total = 0.0
        for _ in range(4):
            total += ale.act(legal[action])
            raw.append(ale.getScreenRGB())
        rewards.append(total)
        observations.append(preprocess(raw[-1], raw[-2], config))
    return observations, rewards


def preprocess(last: np.ndarray, before: np.ndarray, config: AtariConfig) -> np.ndarray:
    height, width = config.size
    small = np.asarray(Image.fromarray(np.where(last > before, last, before)).resize((width, height), Image.BILINEAR))
    if not config.gray:
        return small
    red, green, blue = (small[..., i].astype(np.float64) for i in range(3))
    # The small number keeps float errors from pushing whole results below themselves.
    return np.floor(0.299 * red + 0.587 * green + 0.114 * blue + 1e-6).astype(np.uint8)[..., None]


@pytest.mark.parametrize("name", SETTINGS)
def test_frames_follow_the_protocol(name):
    seen, rewards = play(name, SETTINGS[name])
    expected, expected_rewards = recompute(name, SETTINGS[name])
    assert rewards == expected_rewards
    for t, (one, two) in enumerate(zip(seen, expected, strict=True)):
        assert np.array_equal(one, two), f"frame {t}"


def test_frames_equal_the_stored_ones():
    """Stored: some frames of each game, and a hash of all of them, made once and looked at."""
    with np.load(GOLDEN) as golden:
        for name, config in SETTINGS.items():
            seen, rewards = play(name, config)
            picked = np.stack([seen[i] for i in golden["picked"]])
            assert np.array_equal(picked, golden[f"{name}_frames"])
            assert hashlib.sha256(np.stack(seen).tobytes()).hexdigest() == str(golden[f"{name}_hash"])
            assert rewards == golden[f"{name}_rewards"].tolist()


def test_noops_vary_and_stay_in_range():
    env = Atari("breakout", AtariConfig(noops=5), seed=0)
    counts = set()
    for _ in range(60):
        env.reset()
        counts.add(env._ale.getEpisodeFrameNumber())
    assert counts == {0, 1, 2, 3, 4, 5}


def test_time_limit_counts_frames_and_is_not_terminal():
    env = Atari("pong", AtariConfig(max_frames=10), seed=0)  # 4 + 4 + 2 frames
    for _ in range(2):
        env.reset()
        before = env._ale.getFrameNumber()
        steps = [env.step({"action": np.int32(0)}) for _ in range(3)]
        assert [bool(step["is_last"]) for step in steps] == [False, False, True]
        assert not any(step["is_terminal"] for step in steps)
        assert env._ale.getFrameNumber() - before == 10


def test_game_over_is_terminal_and_lost_lives_on_request():
    ends = {}
    for lives in (False, True):
        env = Atari("breakout", AtariConfig(noops=0, terminal_on_life_loss=lives), seed=0)
        steps = [env.reset()]
        while not steps[-1]["is_last"]:
            steps.append(env.step({"action": np.int32(1)}))  # serve again and again, never move
        assert steps[-1]["is_terminal"]
        ends[lives] = [step["is_terminal"] for step in steps].count(True)
    assert ends == {False: 1, True: 5}


def test_sticky_actions_follow_the_seed():
    def frames(sticky: float, seed: int) -> bytes:
        env = Atari("breakout", AtariConfig(noops=0, sticky=sticky, actions="all"), seed)
        env.reset()
        return b"".join(env.step({"action": np.int32(a)})["image"].tobytes() for a in actions(GRAY, 60))

    assert frames(0.0, 1) == frames(0.0, 2)
    assert frames(0.25, 1) == frames(0.25, 1)
    assert frames(0.25, 1) != frames(0.25, 2)
    assert frames(0.25, 1) != frames(0.0, 1)


def test_action_sets():
    for name, minimal in (("pong", 6), ("breakout", 4), ("freeway", 3)):
        assert Atari(name, AtariConfig(), 0).action_spaces["action"].classes == (minimal,)
        assert Atari(name, AtariConfig(actions="all"), 0).action_spaces["action"].classes == (18,)


def test_every_listed_game_loads():
    known = set(roms.get_all_rom_ids())
    assert {task.removeprefix("atari_") for task in list_tasks()["atari"]} <= known
    env = make_env("atari_tetris", EnvConfig(), 0)  # not one of the 57, but ale-py has it
    env.reset()


def test_human_normalized_scores():
    assert human_normalized("atari_pong", 14.6) == 1.0
    assert human_normalized("atari100k_pong", -20.7) == 0.0
    assert human_normalized("atari_breakout", 30.5 + 28.8) == pytest.approx(2.0)
    assert human_normalized("atari_skiing", -17098.1) == 0.0
    assert human_normalized("atari_tetris", 10) is None
    assert human_normalized("toy_catch", 3) is None
