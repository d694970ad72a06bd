"""Atari's native vector environment against the single emulators of `atari.py`, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreamer.env_config import EnvConfig
from dreamer.envs import Batch, EnvError, TaskError, make_vector_env


def play(task: str, steps: int, action: int | None = None, native: bool = True, **atari: Any) -> list[Batch]:
    """Equal actions in either kind of environment; None: a fixed random sequence."""
    config = EnvConfig(workers="inline", atari={"noops": 0, "native": native, **atari})
    env = make_vector_env(task, config, 2, seed=0, training=True)
    rng = np.random.default_rng(0)
    batches = [env.reset()]
    for _ in range(steps):
        chosen = rng.integers(env.action_spaces["action"].classes[0], size=2) if action is None else [action] * 2
        env.step_async({"action": np.array(chosen, np.int32)})
        batches.append(env.step_wait())
    env.close()
    return batches


def flags(batches: list[Batch]) -> dict[str, np.ndarray]:
    return {key: np.array([batch[key] for batch in batches]) for key in batches[0] if key != "image"}


@pytest.mark.parametrize("repeat", [3, 4])
@pytest.mark.parametrize("lives", [False, True])
def test_rewards_and_ends_equal_the_single_emulators(lives, repeat):
    """Without no-ops and sticky actions both are deterministic: several games of Breakout, in which lives are lost."""
    options = {"terminal_on_life_loss": lives, "repeat": repeat}
    ours = flags(play("atari_breakout", 330, action=None, native=False, **options))
    native = flags(play("atari_breakout", 330, action=None, **options))
    assert ours["is_last"].any(0).all() and ours["reward"].any()
    assert (ours["is_terminal"] & ~ours["is_last"]).any() == lives
    for key, values in ours.items():
        np.testing.assert_array_equal(native[key], values, err_msg=key)


def test_rewards_are_not_clipped():
    rewards = flags(play("atari_ms_pacman", 120, action=3))["reward"]
    assert rewards.max() >= 10


def test_time_limit_is_not_terminal():
    story = flags(play("atari_pong", 7, action=0, max_frames=10))  # 4 + 4 + 2 frames
    assert story["is_last"][:, 0].tolist() == [False, False, False, True, False, False, False, True]
    assert story["is_first"][:, 0].tolist() == [True, False, False, False, True, False, False, False]
    assert not story["is_terminal"].any()


@pytest.mark.parametrize("gray", [False, True])
def test_pictures_are_nearly_the_protocols(gray):
    ours, native = (play("atari_pong", 30, native=kind, gray=gray)[-1]["image"] for kind in (False, True))
    assert ours.shape == native.shape
    assert np.abs(ours.astype(int) - native.astype(int)).mean() < 6


def test_pooling_that_it_does_not_have_is_an_error():
    for options in ({"pooling": 3}, {"repeat": 1, "pooling": 2}):
        with pytest.raises(TaskError, match="env.atari.pooling"):
            play("atari_pong", 0, **options)


def test_an_action_out_of_range_is_an_error():
    """ale-py itself would wait for ever."""
    with pytest.raises(EnvError, match="actions from 0 to 5"):
        play("atari_pong", 1, action=6)
