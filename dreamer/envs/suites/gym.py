"""Any Gymnasium environment: by id (``gym_CartPole-v1``, ``gym_my_package:MyEnv-v0``) or as an object."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from dreamer.env_config import EnvConfig, GymConfig
from dreamer.envs.interface import EnvError, TaskError, Transition, TransitionError, as_rgb, transition
from dreamer.envs.options import resize
from dreamer.envs.restore_check import restore_failure
from dreamer.envs.return_values import RESET, STEP, as_flag, as_pixels, as_reward, parts_of
from dreamer.envs.spaces import Leaf, action_leaves, flatten, observation_leaves, surplus, unflatten
from dreamer.envs.suites.gym_state import WAYS, layers
from dreamer.envs.suites.packages import own_module
from dreamer.envs.workers.fence import fenced
from dreamer.envs.wrappers import share
from dreamer.types import ACTION_MASK, Space, Spaces, mask_space


class GymEnv:
    """A Gymnasium environment behind our interface. ``terminated`` is terminal, ``truncated`` a time limit.

    again  Makes another environment like `env`, on which to try whether it can be restored; None: it counts as not
           restorable. Equal values stand for equal environments.
    """

    def __init__(
        self, env: gymnasium.Env, config: GymConfig, seed: int, again: Callable[[], gymnasium.Env] | None = None
    ) -> None:
        if env.render_mode == "rgb_array":
            # Pictures go to arrays, so SDL, which many environments draw with, need not look for a screen.
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        self._env = env
        self._config = config
        self._again = again
        self.way: str | None = None  # which of `WAYS` saves it; None: the one found by trying
        self._seed: int | None = seed % 2**31
        self._first_observation = True
        self._images: dict[str, np.ndarray] = {}
        _check_reset(env)
        self._action_space = _declared(env, "action_space")
        self._act = action_leaves(self._action_space)
        self._observation_space: Any = None
        self._see: list[Leaf] = []
        if not config.render:
            self._observation_space = _declared(env, "observation_space")
            self._see = observation_leaves(self._observation_space)
        self.action_spaces = {leaf.key: leaf.space for leaf in self._act}
        self.observation_spaces = {leaf.key: self._resized(leaf.space) for leaf in self._see}
        if config.render:
            self._need_rendering()
            env.reset(seed=self._seed)  # most renderers need a state
            height, width = config.size or _declared_picture(self._rendered)
            self.observation_spaces = {"image": Space("image", (height, width, 3))}
        if config.info_mask:
            self.observation_spaces[ACTION_MASK] = _info_mask_space(self.action_spaces)

    def reset(self) -> Transition:
        observation, info = parts_of("reset", RESET, self._env.reset(seed=self._seed))
        self._seed = None  # later episodes continue the environment's own random stream
        return transition(self._observe(observation, info), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        choice = unflatten(self._action_space, self._act, action)
        total = 0.0
        for _ in range(self._config.repeat):
            observation, reward, *ends, info = parts_of("step", STEP, self._env.step(choice))
            total += as_reward(reward)
            terminal, cut = (as_flag(value, name) for value, name in zip(ends, STEP[2:4], strict=True))
            if terminal or cut:
                break
        return transition(self._observe(observation, info), total, is_last=terminal or cut, is_terminal=terminal)

    @property
    def restorable(self) -> bool:
        """Whether it can be restored: tried on environments made for this, once per process, for a few seconds."""
        return self._proven()[0] is not None

    @property
    def why_not_restorable(self) -> str:
        """What the trial found, in words; empty if it is restorable."""
        return self._proven()[1]

    def get_state(self) -> dict[str, Any]:
        way, reason = self._proven() if self.way is None else (self.way, "")
        if way is None:
            raise EnvError(f"expected an environment that can be restored, got one that cannot: {reason}")
        return {
            "way": way,
            "env": WAYS[way].save(self._env),
            "seed": self._seed,
            "images": {key: image.copy() for key, image in self._images.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._env = WAYS[state["way"]].load(self._env, state["env"])
        self._seed = state["seed"]
        self._images = {key: image.copy() for key, image in state["images"].items()}

    def render(self) -> np.ndarray | None:
        """The first image observation, else the environment's own picture if it can make one."""
        for image in self._images.values():
            return as_rgb(image)
        kind = type(self._env.unwrapped).__module__.rpartition(".")[
            0
        ]  # all environments of a package draw in the same way
        if self._env.render_mode != "rgb_array" or kind in _dark:
            return None
        try:
            return fenced(self._rendered)
        except Exception:  # whatever a graphics driver raises; the observation does not need it
            _dark.add(kind)
            return None

    def put_between(self, wrap: Callable[[gymnasium.Env], gymnasium.Env]) -> None:
        """Puts a wrapper around the Gymnasium environment, such as one that watches it."""
        self._env = wrap(self._env)

    def close(self) -> None:
        self._env.close()

    def _proven(self) -> tuple[str | None, str]:
        """(the first of the `WAYS` that restores it exactly, or None; why none does)."""
        if self._again is None:
            return None, "a second one to try it on cannot be made"
        key = self._again, repr(self._config)
        if key not in _proofs:
            _proofs[key] = self._find_way(self._again)
        return _proofs[key]

    def _find_way(self, again: Callable[[], gymnasium.Env]) -> tuple[str | None, str]:
        reasons = []
        made = [self._env]

        def new() -> gymnasium.Env:
            env = again()
            if any(share(env, one) for one in made):
                raise EnvError("a second one to try it on cannot be made: what makes it gives the same object again")
            made.append(env)
            return env

        for way in [name for name, row in WAYS.items() if row.fits(self._env)]:

            def other(seed: int, way: str = way) -> GymEnv:
                env = GymEnv(new(), self._config, seed)
                env.way = way
                return env

            reason = restore_failure(other)
            if reason is None:
                return way, ""
            reasons.append(f"by its {way}: {reason}")
        return None, "; ".join(reasons)

    def _observe(self, observation: Any, info: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        flat = {"image": self._rendered()} if self._config.render else flatten(self._see, observation)
        if self._first_observation and (unknown := surplus(self._observation_space, observation)):
            raise TransitionError(
                f"expected what the observation space says, got {unknown} too; declare them there, or leave them out "
                "of what reset and step return"
            )
        self._first_observation = False
        for key, space in self.observation_spaces.items():
            if space.kind == "image":
                flat[key] = self._images[key] = resize(flat[key], (space.shape[0], space.shape[1]))
        if self._config.info_mask:
            flat[ACTION_MASK] = _info_mask(info, self.observation_spaces[ACTION_MASK])
        return flat

    def _resized(self, space: Space) -> Space:
        if space.kind != "image" or self._config.size is None:
            return space
        return Space("image", (*self._config.size, space.shape[-1]))

    def _rendered(self) -> np.ndarray:
        """uint8 (H, W, 3), as the environment draws it. TransitionError if that is no picture."""
        image = as_pixels(self._env.render(), "the rendered image")
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or 0 in image.shape:
            raise TransitionError(
                f"expected a rendered image of shape (height, width, 3), got {image.shape}; correct the environment"
            )
        return as_rgb(image[..., :3])

    def _need_rendering(self) -> None:
        if self._env.render_mode != "rgb_array":
            raise TaskError(
                f"expected an environment with render_mode='rgb_array' for --env.gym.render true, "
                f"got {self._env.render_mode!r}; observe its own observation: --env.gym.render false"
            )


def _declared(env: gymnasium.Env, name: str) -> Any:
    """One of the environment's two spaces. TaskError if it has none."""
    try:
        return getattr(env, name)
    except AttributeError as error:
        raise TaskError(
            f"expected a gymnasium.Env with an {name}, got none ({error}); set it in the class or its constructor"
        ) from error


def _declared_picture(draw: Callable[[], np.ndarray]) -> tuple[int, int]:
    """Height and width of the images that an environment draws. TaskError if it draws none."""
    try:
        height, width, _ = draw().shape
    except TransitionError as error:
        raise TaskError(str(error)) from error
    return height, width


def _check_reset(env: gymnasium.Env) -> None:
    """TaskError if the environment, or a wrapper around it, does not take the seed that `reset` is given."""
    for layer in layers(env):
        try:
            taken = inspect.signature(layer.reset).parameters
        except (TypeError, ValueError):  # a C function has no signature to read
            continue
        if "seed" not in taken and all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in taken.values()):
            raise TaskError(
                f"expected reset(self, *, seed=None, options=None) in {type(layer).__name__}, as Gymnasium's interface "
                f"has it, got reset({', '.join(map(str, taken.values()))}); let it take the seed, and return "
                "(observation, info)"
            )


def _info_mask_space(actions: Spaces) -> Space:
    try:
        return mask_space(actions)
    except ValueError as error:
        raise TaskError(f"{error}; or pass --env.gym.info_mask false") from error


def _info_mask(info: Mapping[str, Any] | None, space: Space) -> np.ndarray:
    """int32 (actions,), 1 where info["action_mask"] is not 0. TransitionError if it is missing or of wrong length."""
    mask = np.asarray((info or {}).get(ACTION_MASK, ()))
    if mask.shape != space.shape:
        raise TransitionError(
            f"expected info[{ACTION_MASK!r}] with one entry per action, shape {space.shape}, for "
            f"--env.gym.info_mask true, got shape {mask.shape}; it must be there after every reset and step"
        )
    return (mask != 0).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Again:
    """Makes the environment of an id; equal instances make equal environments."""

    name: str
    kwargs: dict[str, Any] = dataclasses.field(compare=False)
    written: str

    def __call__(self) -> gymnasium.Env:
        return gymnasium.make(self.name, disable_env_checker=True, **self.kwargs)


#: Packages whose environments failed to draw in this process; OpenGL libraries may crash it on another try.
_dark: set[str] = set()
#: Results of the trials, by (again, options): the way that restores such an environment, or None, and why not.
_proofs: dict[Any, tuple[str | None, str]] = {}


def make(name: str, config: EnvConfig, seed: int) -> GymEnv:
    """`name` is a Gymnasium id; with ``module:id`` the module is imported first, which registers the id."""
    kwargs = copy.deepcopy(config.gym.kwargs)  # the environment may change them
    try:
        if "rgb_array" in _render_modes(name):
            kwargs.setdefault("render_mode", "rgb_array")
        again = _Again(name, kwargs, repr(sorted(kwargs.items())))
        env = again()
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError, TypeError) as error:  # TypeError: kwargs
        raise TaskError(f"could not make gym_{name} with {kwargs}: {error}") from error
    try:
        return GymEnv(env, config.gym, seed, again)
    except TaskError:
        env.close()
        raise


def _render_modes(name: str) -> Sequence[str]:
    entry = check(name).entry_point
    creator = load_env_creator(entry) if isinstance(entry, str) else entry
    return render_modes(creator)


def old_gym(made: Any) -> str:
    """The end of an error message about something that is no environment: what to do if it is one of the old gym."""
    if all(base.__module__.partition(".")[0] != "gym" for base in type(made).__mro__):
        return ""
    return ", an environment of the old package gym; derive it from gymnasium.Env, or wrap it with the package shimmy"


def render_modes(creator: Any) -> Sequence[str]:
    """The render modes of this class of environments; none if it does not say, or if a function makes them."""
    metadata = getattr(creator, "metadata", None)
    return (metadata.get("render_modes") or ()) if isinstance(metadata, Mapping) else ()


def check(name: str) -> EnvSpec:
    """Gymnasium's entry for the id, its module imported first if one is named. TaskError if there is none."""
    module, _, env_id = name.rpartition(":")
    try:
        if module:
            own_module(module)
        return gymnasium.spec(env_id)
    except ModuleNotFoundError as error:
        raise TaskError(f"expected an importable module {module!r} for gym_{name} ({error}); install it") from error
    except gymnasium.error.Error as error:
        raise TaskError(f"expected a Gymnasium id after gym_, got {name!r}: {error}") from error


def tasks() -> Sequence[str]:
    """Ids that Gymnasium itself registers; any other registered id works too."""
    return tuple(gymnasium.registry)
