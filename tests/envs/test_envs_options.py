"""Options that wrap any environment, on episodes spelled out by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamer.config import Config
from dreamer.env_config import EnvConfig
from dreamer.envs import Env, EnvError, TaskError, frames_per_step, make_env, make_vector_env, transition
from dreamer.envs.interface import restorable
from dreamer.envs.options import OPTIONS, wrap
from dreamer.types import Space

F, T = False, True
STEP = {"action": np.int32(0)}


class Painted:
    """Shows given images (all of one size), then ends; reward of step t is t, `log/step` is t. Keeps its actions."""

    def __init__(self, *images: np.ndarray, terminal: bool = True) -> None:
        self.images = images
        self.terminal = terminal
        self.observation_spaces = {"camera": Space("image", images[0].shape), "log/step": Space("vector", ())}
        self.action_spaces = {"action": Space("discrete", (), (5,))}
        self.actions: list[int] = []
        self.position = 0

    def reset(self) -> dict:
        self.position = 0
        return transition(self._observation(), is_first=True)

    def step(self, action: dict) -> dict:
        self.position += 1
        self.actions.append(int(action["action"]))
        last = self.position == len(self.images) - 1
        return transition(self._observation(), float(self.position), F, last, last and self.terminal)

    def render(self) -> np.ndarray:
        return self.images[self.position]

    def close(self) -> None:
        self.position = 0

    def get_state(self) -> int:
        return self.position

    def set_state(self, state: int) -> None:
        self.position = state

    def _observation(self) -> dict:
        return {"camera": self.images[self.position], "log/step": np.float32(self.position)}


def flat(level: int, shape: tuple[int, int, int] = (4, 6, 3)) -> np.ndarray:
    return np.full(shape, level, np.uint8)


def wrapped(env: Env, seed: int = 0, **options: Any) -> Env:
    return wrap(env, EnvConfig(**options), seed, 1)


def episode(env: Env, steps: int, actions: list[int] | None = None) -> list[dict]:
    return [env.reset(), *(env.step({"action": np.int32(a)}) for a in actions or [0] * steps)]


def column(steps: list[dict], key: str) -> list:
    return [step[key].tolist() for step in steps]


def test_without_options_the_environment_is_not_wrapped():
    env = Painted(flat(0))
    assert wrapped(env) is env


def test_repeat_sums_rewards_and_stops_at_the_end():
    inner = Painted(*map(flat, range(6)))
    steps = episode(wrapped(inner, repeat=2), 3, actions=[4, 1, 3])
    # steps taken inside:  1 2 | 3 4 | 5 (the end)
    assert column(steps, "reward") == [0, 1 + 2, 3 + 4, 5]
    assert column(steps, "log/step") == [0, 2, 4, 5]
    assert [step["camera"][0, 0, 0] for step in steps] == [0, 2, 4, 5]
    assert column(steps, "is_first") == [T, F, F, F]
    assert column(steps, "is_last") == [F, F, F, T]
    assert column(steps, "is_terminal") == [F, F, F, T]
    assert inner.actions == [4, 4, 1, 1, 3]


def test_repeat_and_time_limit_count_agent_steps():
    steps = episode(wrapped(Painted(*map(flat, range(9))), repeat=3, time_limit=2), 2)
    assert column(steps, "reward") == [0, 1 + 2 + 3, 4 + 5 + 6]
    assert column(steps, "is_last") == [F, F, T]
    assert column(steps, "is_terminal") == [F, F, F]


def test_frames_are_counted_with_the_one_repeat_there_is():
    def frames(task, **options):
        return frames_per_step(task, Config(task=task, env=options).env)

    assert frames("toy_catch", repeat=3) == 3
    assert frames("crafter_reward", repeat=2, atari={"repeat": 8}) == 2
    assert frames("atari100k_pong", atari={"repeat": 8}) == 8
    assert frames("dmc_walker_walk", dmc={"repeat": 2}) == frames("dmc_walker_walk", repeat=2) == 2
    assert frames("dmlab_rooms_watermaze") == 4
    assert frames("gym_CartPole-v1", gym={"repeat": 5}) == frames("py_x:y", gym={"repeat": 5}) == 5
    assert frames("my_task", gym={"repeat": 5}) == frames("my_task", repeat=5) == 5
    assert frames("bsuite_catch/0", gym={"repeat": 4}) == 1


def test_repeats_never_multiply():
    own = {"atari": {}, "dmc": {"dmc": {"repeat": 4}}, "gym": {"gym": {"repeat": 4}}}
    for task in ("atari_pong", "dmc_cartpole_balance", "gym_CartPole-v1"):
        with pytest.raises(TaskError, match="in one place, got env.repeat 2 beside the 4"):
            make_env(task, EnvConfig(repeat=2, **own[task.partition("_")[0]]), seed=0)


@pytest.mark.parametrize("task", ["dmc_cartpole_balance", "gym_CartPole-v1"])
def test_either_repeat_is_the_same(task):
    suite = task.partition("_")[0]
    rng = np.random.default_rng(0)
    general, own = (make_env(task, EnvConfig(**options), 3) for options in ({"repeat": 2}, {suite: {"repeat": 2}}))
    pairs = [(general.reset(), own.reset())]
    while not pairs[-1][0]["is_last"] and len(pairs) < 20:
        action = {key: space.sample(rng) for key, space in own.action_spaces.items()}
        pairs.append((general.step(action), own.step(action)))
    for one, two in pairs:
        assert all(np.array_equal(one[key], two[key]) for key in two if key != "reward")
        np.testing.assert_allclose(one["reward"], two["reward"], rtol=1e-6)


def test_gymnasiums_repeat_is_not_for_other_environments():
    make = lambda index, seed: Painted(flat(0), flat(1))  # noqa: E731
    with pytest.raises(TaskError, match="set env.repeat instead"):
        make_vector_env("own", EnvConfig(gym={"repeat": 2}), 1, 0, True, make)


def test_resize_is_bilinear_and_leaves_the_rest():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (12, 20, 3), dtype=np.uint8) for _ in range(2)]
    env = wrapped(Painted(*images), resize=(5, 7))
    assert env.observation_spaces == {"camera": Space("image", (5, 7, 3)), "log/step": Space("vector", ())}
    for step, image in zip(episode(env, 1), images, strict=True):
        expected = np.array(Image.fromarray(image).resize((7, 5), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(step["camera"], expected)
    assert env.render() is images[1], "people see the environment's own picture"


def test_grayscale_weighs_colours_and_leaves_gray_alone():
    image = flat(0)
    image[0, 0], image[0, 1], image[0, 2], image[0, 3] = (100, 0, 0), (0, 100, 0), (0, 0, 100), (255, 255, 255)
    env = wrapped(Painted(image, image), grayscale=True)
    assert env.observation_spaces["camera"] == Space("image", (4, 6, 1))
    # 29.9, 58.7, 11.4 and 255, rounded down
    assert env.reset()["camera"][0, :5, 0].tolist() == [29, 58, 11, 255, 0]
    gray = flat(7, (4, 6, 1))
    assert wrapped(Painted(gray), grayscale=True).reset()["camera"] is gray


def test_noise_has_its_deviation_its_bounds_and_its_seed():
    inner = Painted(flat(128, (64, 64, 3)), flat(0, (64, 64, 3)))
    middle, dark = (step["camera"] for step in episode(wrapped(inner, seed=3, frame_noise=10.0), 1))
    assert abs(middle.mean() - 128) < 0.5 and abs(middle.std() - 10) < 0.5
    # Half of the noise is cut off at black: what is left has the mean sigma / sqrt(2 pi).
    assert abs(dark.mean() - 10 / np.sqrt(2 * np.pi)) < 0.25 and (dark == 0).mean() > 0.45
    again = episode(wrapped(inner, seed=3, frame_noise=10.0), 1)
    other = episode(wrapped(inner, seed=4, frame_noise=10.0), 1)
    np.testing.assert_array_equal(again[0]["camera"], middle)
    assert not np.array_equal(other[0]["camera"], middle)
    assert not np.array_equal(inner.images[0], middle), "the environment's own image stays clean"


def test_resize_then_gray_then_noise():
    """Noise comes last: its deviation is not smoothed by resizing, and each pixel is in one channel."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 1] = 200
    env = wrapped(Painted(image), resize=(20, 30), grayscale=True, frame_noise=5.0)
    seen = env.reset()["camera"]
    assert seen.shape == (20, 30, 1) == env.observation_spaces["camera"].shape
    assert abs(seen.mean() - 117) < 1 and abs(seen.std() - 5) < 0.7


def test_the_reward_is_scaled_and_kept():
    env = wrapped(Painted(*map(flat, range(3))), reward_scale=0.25)
    assert env.observation_spaces["log/unscaled_reward"] == Space("vector", ())
    steps = episode(env, 2)
    assert column(steps, "reward") == [0, 0.25, 0.5]
    assert column(steps, "log/unscaled_reward") == [0, 1, 2]
    assert all(step[key].dtype == np.float32 for step in steps for key in ("reward", "log/unscaled_reward"))


class Masked(Painted):
    """Each step forbids all but the given actions."""

    def __init__(self, *masks: list[int]) -> None:
        super().__init__(*map(flat, range(len(masks))))
        self.masks = masks
        self.observation_spaces["action_mask"] = Space("discrete", (5,), (2,) * 5)

    def _observation(self) -> dict:
        return {**super()._observation(), "action_mask": np.array(self.masks[self.position], np.int32)}


def test_masks_pass_and_one_without_an_action_is_an_error_but_at_the_end():
    env = wrapped(Masked([0, 1, 0, 0, 0], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]))
    assert column(episode(env, 2), "action_mask") == [[0, 1, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]
    env = wrapped(Masked([0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]))
    env.reset()
    with pytest.raises(EnvError, match="allows at least one action"):
        env.step(STEP)


def test_a_mask_has_one_entry_per_action_of_the_one_discrete_action():
    wrong = Masked([1, 1, 1, 1])
    wrong.observation_spaces["action_mask"] = Space("discrete", (4,), (2,) * 4)
    with pytest.raises(TaskError, match="one entry per action, got .*shape=.4,"):
        wrapped(wrong)
    two = Masked([1, 1, 1, 1, 1])
    two.action_spaces["more"] = Space("vector", (1,))
    with pytest.raises(TaskError, match="a single discrete action where"):
        wrapped(two)


def test_masked_actions_are_not_repeated():
    with pytest.raises(TaskError, match="no action repeat"):
        wrapped(Masked([1, 1, 1, 1, 1]), repeat=2)


EVERY = {
    "repeat": 2, "resize": (3, 5), "grayscale": True, "frame_noise": 20.0, "reward_scale": 0.5, "time_limit": 4
}  # fmt: skip


def test_the_state_holds_the_noise_the_time_and_the_environments_own():
    """Save in the middle, go on; a second environment with that state sees the same to the last bit."""
    assert set(EVERY) == set(OPTIONS)
    images = [flat(level) for level in range(0, 250, 20)]
    one, two = wrapped(Painted(*images), 1, **EVERY), wrapped(Painted(*images), 2, **EVERY)
    assert restorable(one)
    episode(one, 2)
    state = pickle.dumps(one.get_state())
    ahead = [one.step(STEP), one.step(STEP), one.reset(), one.step(STEP)]
    episode(two, 3)
    two.set_state(pickle.loads(state))
    for expected, got in zip(ahead, [two.step(STEP), two.step(STEP), two.reset(), two.step(STEP)], strict=True):
        assert set(expected) == set(got)
        assert all(np.array_equal(expected[key], got[key]) for key in expected)
    assert ahead[1]["is_last"], "the time limit's count came along"
    assert np.array_equal(one.render(), two.render())


def test_a_saved_state_does_not_move_on():
    env = wrapped(Painted(*map(flat, range(5))), frame_noise=9.0)
    env.reset()
    state = env.get_state()
    kept = copy.deepcopy(state)
    env.step(STEP)
    assert state == kept


def test_wrappers_cannot_restore_what_cannot_be_restored():
    class Plain(Painted):
        restorable = False

    assert not restorable(wrapped(Plain(flat(0)), **EVERY))
    assert not restorable(wrapped(Plain(flat(0)), time_limit=3))


@pytest.mark.parametrize("options", [{"resize": (8, 8)}, {"grayscale": True}, {"frame_noise": 1.0}])
def test_image_options_need_images(options):
    with pytest.raises(TaskError, match=f"expected an environment with images for env.{next(iter(options))}"):
        make_env("gym_CartPole-v1", EnvConfig(**options), seed=0)


def test_gray_needs_colours():
    with pytest.raises(TaskError, match="1 or 3 channels for env.grayscale, got 4 in 'camera'"):
        wrapped(Painted(flat(0, (4, 4, 4))), grayscale=True)


def test_native_atari_takes_a_time_limit_only():
    for name, value in EVERY.items():
        config = EnvConfig(atari={"native": True}, **{name: value})
        if name == "time_limit":
            make_vector_env("atari_pong", config, 1, 0, True).close()
            continue
        with pytest.raises(TaskError, match=f"expected no wrappers with env.atari.native, got env.{name}"):
            make_vector_env("atari_pong", config, 1, 0, True)


def test_every_option_in_worker_processes():
    """From a task's name through processes: Catch, small, gray, noisy, two frames a step, half the reward."""
    config = {**EVERY, "time_limit": 30}
    batches = {}
    for workers in ("inline", "process"):
        env = make_vector_env("toy_catch", EnvConfig(workers=workers, **config), 2, 5, True)
        env.reset()
        batches[workers] = []
        for _ in range(12):
            env.step_async({"action": np.ones(2, np.int32)})
            batches[workers].append(env.step_wait())
        env.close()
    assert batches["inline"][0]["image"].shape == (2, 3, 5, 1)
    for one, two in zip(batches["inline"], batches["process"], strict=True):
        assert all(np.array_equal(one[key], two[key]) for key in one)
    rewards = np.array([batch["reward"] for batch in batches["inline"]])
    assert set(np.unique(rewards)) <= {-0.5, 0, 0.5} and rewards.any()
    # A game of 23 steps is 12 agent steps of two, the last one shorter.
    assert [bool(batch["is_last"][0]) for batch in batches["inline"]] == [F] * 11 + [T]
