"""Any Gymnasium environment: by id (``gym_CartPole-v1``, ``gym_my_package:MyEnv-v0``) or as an object."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from PIL import Image

from dreamer.config import EnvConfig, GymConfig
from dreamer.envs.interface import EnvError, TaskError, Transition, as_rgb, check_spaces, transition
from dreamer.envs.spaces import action_leaves, flatten, observation_leaves, unflatten
from dreamer.types import Space


class GymEnv:
    """A Gymnasium environment behind our interface. ``terminated`` is terminal, ``truncated`` a time limit."""

    def __init__(self, env: gymnasium.Env, config: GymConfig, seed: int) -> None:
        if env.render_mode == "rgb_array":
            # Pictures go to arrays: SDL, which many environments draw with, need not look for a screen.
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        self._env = env
        self._config = config
        self._seed: int | None = seed % 2**31
        self._first_observation = True
        self._images: dict[str, np.ndarray] = {}
        self._act = action_leaves(env.action_space)
        self._see = [] if config.render else observation_leaves(env.observation_space)
        self.action_spaces = {leaf.key: leaf.space for leaf in self._act}
        self.observation_spaces = {leaf.key: self._resized(leaf.space) for leaf in self._see}
        if config.render:
            self._need_rendering()
            env.reset(seed=self._seed)  # most renderers need a state
            height, width = config.size or self._rendered().shape[:2]
            self.observation_spaces = {"image": Space("image", (height, width, 3))}
        check_spaces(self.observation_spaces, self.action_spaces)

    def reset(self) -> Transition:
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None  # later episodes go on with the environment's own random stream
        return transition(self._observe(observation), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        choice = unflatten(self._env.action_space, self._act, action)
        total = 0.0
        for _ in range(self._config.repeat):
            observation, reward, terminated, truncated, _ = self._env.step(choice)
            total += float(reward)
            if terminated or truncated:
                break
        over = bool(terminated or truncated)
        return transition(self._observe(observation), total, is_last=over, is_terminal=bool(terminated))

    def render(self) -> np.ndarray | None:
        """The first image observation, else the environment's own picture if it can make one."""
        for image in self._images.values():
            return as_rgb(image)
        if self._env.render_mode != "rgb_array":
            return None
        try:
            return self._rendered()
        except gymnasium.error.DependencyNotInstalled:
            return None

    def close(self) -> None:
        self._env.close()

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        flat = {"image": self._rendered()} if self._config.render else flatten(self._see, observation)
        if self._first_observation:
            self._check(flat)
            self._first_observation = False
        for key, space in self.observation_spaces.items():
            if space.kind == "image":
                flat[key] = self._images[key] = _resize(flat[key], space.shape)
        return flat

    def _check(self, flat: Mapping[str, np.ndarray]) -> None:
        for leaf in self._see:
            if flat[leaf.key].shape != leaf.space.shape:
                raise EnvError(
                    f"expected observation {leaf.key!r} of shape {leaf.space.shape}, as the observation space says, "
                    f"got {flat[leaf.key].shape}; correct the environment's observation_space"
                )

    def _resized(self, space: Space) -> Space:
        if space.kind != "image" or self._config.size is None:
            return space
        return Space("image", (*self._config.size, space.shape[-1]))

    def _rendered(self) -> np.ndarray:
        """uint8 (H, W, 3), as the environment draws it."""
        return np.array(self._env.render(), np.uint8)[..., :3]

    def _need_rendering(self) -> None:
        if self._env.render_mode != "rgb_array":
            raise TaskError(
                f"expected an environment with render_mode='rgb_array' for --env.gym.render true, "
                f"got {self._env.render_mode!r}; observe its own observation: --env.gym.render false"
            )


def _resize(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W, C) to another height and width, bilinear, channel by channel."""
    if image.shape == shape:
        return image
    size = (shape[1], shape[0])
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    return np.stack([np.array(c.resize(size, Image.Resampling.BILINEAR)) for c in channels], -1)


def make(name: str, config: EnvConfig, seed: int) -> GymEnv:
    """`name` is a Gymnasium id; with ``module:id`` the module is imported first, which registers the id."""
    kwargs = dict(config.gym.kwargs)
    try:
        if "rgb_array" in _render_modes(name):
            kwargs.setdefault("render_mode", "rgb_array")
        env = gymnasium.make(name, disable_env_checker=True, **kwargs)
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError, TypeError) as error:  # TypeError: kwargs
        raise TaskError(f"could not make gym_{name} with {kwargs}: {error}") from error
    try:
        return GymEnv(env, config.gym, seed)
    except TaskError:
        env.close()
        raise


def _render_modes(name: str) -> Sequence[str]:
    entry = check(name).entry_point
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    return getattr(creator, "metadata", {}).get("render_modes", ())


def check(name: str) -> EnvSpec:
    """Gymnasium's entry for the id, its module imported first if one is named. TaskError if there is none."""
    module, _, env_id = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(env_id)
    except ModuleNotFoundError as error:
        raise TaskError(f"expected an importable module {module!r} for gym_{name} ({error}); install it") from error
    except gymnasium.error.Error as error:
        raise TaskError(f"expected a Gymnasium id after gym_, got {name!r}: {error}") from error


def tasks() -> Sequence[str]:
    """Ids that Gymnasium itself registers; any other registered id works too."""
    return tuple(gymnasium.registry)
