"""Options that change any environment, whatever its suite: one wrapper for each, applied by `wrap` alone.

Each forwards the state of what it wraps, so an environment that can be restored still can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from PIL import Image

from dreamer.env_config import EnvConfig
from dreamer.envs.checks import check_spaces
from dreamer.envs.interface import Env, TaskError, Transition, TransitionError
from dreamer.envs.suites.atari import GRAY
from dreamer.envs.wrappers import TimeLimit, Wrapper
from dreamer.types import ACTION_MASK, UNSCALED_REWARD, Space, masks_actions

#: Keeps the noise apart from everything else that an environment draws with the same seed.
NOISE_STREAM = 1


class Repeat(Wrapper):
    """Takes each action `count` times, or until the episode ends.

    Rewards are summed; the observation, `log/` keys included, is the last one. Terminal if any of the steps was.
    """

    def __init__(self, env: Env, count: int) -> None:
        super().__init__(env)
        self.count = count

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        reward, terminal = 0.0, False
        for _ in range(self.count):
            result = self.env.step(action)
            reward += float(result["reward"])
            terminal = terminal or bool(result["is_terminal"])
            if result["is_last"]:
                break
        return {**result, "reward": np.float32(reward), "is_terminal": np.bool_(terminal)}


class Images(Wrapper):
    """Changes every image of the observation. TaskError, naming `option`, if there is none."""

    def __init__(self, env: Env, option: str) -> None:
        super().__init__(env)
        self.images = sorted(key for key, space in env.observation_spaces.items() if space.kind == "image")
        if not self.images:
            raise TaskError(
                f"expected an environment with images for {option}, got the observations "
                f"{sorted(env.observation_spaces)}; leave the option out"
            )

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, C) to what the agent sees instead; the given array is not written to."""
        raise NotImplementedError

    def seen(self, result: Transition) -> Transition:
        return {**result, **{key: self.image(np.asarray(result[key])) for key in self.images}}


class Resize(Images):
    """Images of another height and width, bilinear."""

    def __init__(self, env: Env, size: tuple[int, int]) -> None:
        super().__init__(env, "env.resize")
        self.size = size
        for key in self.images:
            self.observation_spaces[key] = Space("image", (*size, env.observation_spaces[key].shape[-1]))

    def image(self, image: np.ndarray) -> np.ndarray:
        return resize(image, self.size)


class Grayscale(Images):
    """One channel, 0.299 R + 0.587 G + 0.114 B rounded down; images that already have one channel stay as they are."""

    def __init__(self, env: Env) -> None:
        super().__init__(env, "env.grayscale")
        for key in self.images:
            height, width, channels = env.observation_spaces[key].shape
            if channels not in (1, 3):
                raise TaskError(
                    f"expected images of 1 or 3 channels for env.grayscale, got {channels} in {key!r}; "
                    "leave the option out"
                )
            self.observation_spaces[key] = Space("image", (height, width, 1))

    def image(self, image: np.ndarray) -> np.ndarray:
        return image if image.shape[-1] == 1 else (image @ GRAY // 1000).astype(np.uint8)[..., None]


class FrameNoise(Images):
    """Gaussian noise of standard deviation `level`, in pixel levels, on what the agent sees; pictures stay clean.

    The noise has a random stream of its own, which continues across episodes and is part of the state.
    """

    def __init__(self, env: Env, level: float, seed: int) -> None:
        super().__init__(env, "env.frame_noise")
        self.level = np.float32(level)
        self.rng = np.random.default_rng([NOISE_STREAM, seed])

    def image(self, image: np.ndarray) -> np.ndarray:
        noise = self.level * self.rng.standard_normal(image.shape, np.float32)
        return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)

    def get_state(self) -> Any:
        return self.rng.bit_generator.state, super().get_state()

    def set_state(self, state: Any) -> None:
        self.rng.bit_generator.state, inside = state
        super().set_state(inside)


class RewardScale(Wrapper):
    """The learner's reward times `factor`. The original goes to `types.UNSCALED_REWARD`, which scores sum."""

    def __init__(self, env: Env, factor: float) -> None:
        super().__init__(env)
        self.factor = np.float32(factor)
        self.observation_spaces[UNSCALED_REWARD] = Space("vector", ())

    def seen(self, result: Transition) -> Transition:
        reward = np.float32(result["reward"])
        return {**result, UNSCALED_REWARD: reward, "reward": self.factor * reward}


class MaskCheck(Wrapper):
    """Ensures that there is always an action to take: TransitionError where a mask forbids all of them.

    On the last step of an episode such a mask becomes one that allows all; no action is executed there.
    """

    def seen(self, result: Transition) -> Transition:
        mask = np.asarray(result[ACTION_MASK])
        if mask.any():
            return result
        if not result["is_last"]:
            raise TransitionError(
                f"expected an {ACTION_MASK} that allows at least one action, got all of {mask.size} forbidden before "
                "the episode's last step; correct the environment's mask"
            )
        return {**result, ACTION_MASK: np.ones_like(mask)}


#: Options of `EnvConfig` and their wrappers, the innermost first. Images are resized before they lose their colours
#: (which saves work), and get their noise last; a time limit counts agent steps.
OPTIONS: Mapping[str, Callable[[Env, EnvConfig, int], Env]] = {
    "repeat": lambda env, config, seed: Repeat(env, config.repeat),
    "resize": lambda env, config, seed: Resize(env, cast("tuple[int, int]", config.resize)),
    "grayscale": lambda env, config, seed: Grayscale(env) if config.grayscale else env,
    "frame_noise": lambda env, config, seed: FrameNoise(env, cast(float, config.frame_noise), seed),
    "reward_scale": lambda env, config, seed: RewardScale(env, config.reward_scale),
    "time_limit": lambda env, config, seed: TimeLimit(env, cast(int, config.time_limit)),
}
OFF = EnvConfig()


def wrap(env: Env, config: EnvConfig, seed: int, own_repeat: int) -> Env:
    """The environment with every wrapper that the configuration asks for.

    seed        That of the environment; the stream of the noise is derived from it.
    own_repeat  The action repeat that it already has, by an option of its suite.

    Every environment passes through here: TaskError for spaces that no agent can be trained in, or for an option that
    does not fit the environment.
    """
    check_spaces(env.observation_spaces, env.action_spaces)
    if config.repeat > 1 and own_repeat > 1:
        raise TaskError(
            f"expected an action repeat in one place, got env.repeat {config.repeat} beside the {own_repeat} of the "
            "suite's own option; leave env.repeat out and set env.SUITE.repeat"
        )
    try:
        masked = masks_actions(env.observation_spaces, env.action_spaces)
    except ValueError as error:
        raise TaskError(str(error)) from error
    if masked:
        if max(config.repeat, own_repeat) > 1:
            raise TaskError(
                f"expected no action repeat where the environment masks actions ({ACTION_MASK}), because an allowed "
                "action may be forbidden when it is repeated; pass --env.repeat 1 (or env.SUITE.repeat 1)"
            )
        env = MaskCheck(env)
    for option in chosen(config):
        env = OPTIONS[option](env, config, seed)
    return env


def chosen(config: EnvConfig) -> list[str]:
    """Names of the options in this file that are on, the innermost first."""
    return [name for name in OPTIONS if getattr(config, name) != getattr(OFF, name)]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, C) to another height and width, bilinear, channel by channel."""
    if image.shape[:2] == size:
        return image
    height, width = size
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    return np.stack([np.array(c.resize((width, height), Image.Resampling.BILINEAR)) for c in channels], -1)
