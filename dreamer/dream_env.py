"""A run's world model as a Gymnasium environment, for any other program to play or to train in::

    env = gymnasium.make("dreamer.dream_env:Dream-v0", logdir="runs/mine")
    envs = gymnasium.make_vec("dreamer.dream_env:Dream-v0", num_envs=16, logdir="runs/mine")

An episode begins where one in the run's replay did, or in a recorded episode, and goes on in imagination: observations
are decoded, rewards predicted, its end is drawn from the continue head. The real environment is never asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium import spaces as gs
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dreamer.dreaming import Dreams, Glimpse
from dreamer.envs.interface import as_rgb
from dreamer.presets import run_config
from dreamer.records.drawing import COLORS, Axes, Page
from dreamer.run.dream_starts import Starts, load_dreams, recorded_starts, replayed_starts
from dreamer.types import Space, Spaces

FPS = 15
_DRAWN = {"render_modes": ["rgb_array"], "render_fps": FPS}


def gym_space(space: Space) -> gs.Space:
    """One of our spaces as Gymnasium's; vectors have no bounds."""
    if space.kind == "image":
        return gs.Box(0, 255, space.shape, np.uint8)
    if space.classes is None:
        return gs.Box(-np.inf, np.inf, space.shape, np.float32)
    return gs.MultiDiscrete(np.reshape(space.classes, space.shape)) if space.shape else gs.Discrete(space.classes[0])


def _action_space(space: Space) -> gs.Space:
    return gs.Box(-1, 1, space.shape, np.float32) if space.classes is None else gym_space(space)


def _nested(parts: Mapping[str, gs.Space]) -> gs.Space:
    """A single space as it is, several as a Dict."""
    return next(iter(parts.values())) if len(parts) == 1 else gs.Dict(dict(parts))


class _Stage:
    """N dreams of one run, their states and random streams, and how they look from Gymnasium."""

    def __init__(self, logdir: Path | str, episode: Path | str | None, time_limit: int | None, count: int) -> None:
        config = run_config(logdir)
        self.dreams: Dreams = load_dreams(config)
        self.starts: Starts = (
            replayed_starts(self.dreams, config.logdir) if episode is None else recorded_starts(self.dreams, episode)
        )
        if time_limit is not None and time_limit < 1:
            raise ValueError(f"expected a time_limit of at least one step, or None, got {time_limit}")
        self.limit = self.starts.longest if time_limit is None else time_limit
        self.seen, self.acted = self.dreams.observations, self.dreams.agent.actions
        self.observation_space = _nested({key: gym_space(space) for key, space in self.seen.items()})
        self.action_space = _nested({key: _action_space(space) for key, space in self.acted.items()})
        self._states = self.dreams.blank(count)
        self._index, self._seeds = np.zeros(count, np.int32), np.zeros(count, np.uint32)
        self._idle = {key: np.zeros((count, *space.shape), space.dtype) for key, space in self.acted.items()}
        #: Steps taken by each dream since it began.
        self.steps = np.zeros(count, np.uint32)

    def begin(self, index: int, rng: np.random.Generator, start: int | None) -> None:
        """Dream number `index` begins with the next step: at this start, or at one that is drawn."""
        if start is not None and not (isinstance(start, int | np.integer) and 0 <= start < len(self.starts)):
            raise ValueError(f"expected the option start from 0 to {len(self.starts) - 1}, got {start!r}")
        drawn, seed = rng.integers(self.starts.drawn), rng.integers(2**32, dtype=np.uint32)
        self._index[index], self._seeds[index] = drawn if start is None else start, seed
        self.steps[index] = 0

    def step(self, actions: Mapping[str, np.ndarray] | None, begins: np.ndarray) -> Glimpse:
        """Every dream one step on, or at its beginning where `begins` (N,); on the host."""
        chosen = self._idle if actions is None else actions
        counts = np.where(begins, 0, self.steps + 1).astype(np.uint32)
        self._states, glimpse = self.dreams.step(
            self.starts.states, self._states, chosen, begins, self._index, self._seeds, counts
        )
        self.steps = counts
        return jax.device_get(glimpse)

    @property
    def cut(self) -> np.ndarray:
        """Which dreams have reached the time limit, (N,)."""
        return self.steps >= self.limit

    def named(self, value: Any, leading: tuple[int, ...]) -> dict[str, np.ndarray]:
        """An action as other programs give it, by name, (*leading, *shape). ValueError if it does not fit."""
        parts = {next(iter(self.acted)): value} if len(self.acted) == 1 else value
        if not isinstance(parts, Mapping) or parts.keys() != self.acted.keys():
            raise ValueError(f"expected an action with the parts {', '.join(self.acted)}, got {value!r}")
        return {key: _checked_action(key, parts[key], space, leading) for key, space in self.acted.items()}

    def told(self, observation: Mapping[str, np.ndarray]) -> Any:
        """An observation as other programs take it, in arrays of their own."""
        parts = {key: _as_told(observation[key], space) for key, space in self.seen.items()}
        return next(iter(parts.values())) if len(parts) == 1 else parts


def _as_told(value: np.ndarray, space: Space) -> Any:
    """Gymnasium counts in int64; a single choice is no array."""
    return np.array(value, np.int64)[()] if space.kind == "discrete" else np.array(value)


def _checked_action(key: str, value: Any, space: Space, leading: tuple[int, ...]) -> np.ndarray:
    array, shape = np.asarray(value), (*leading, *space.shape)
    if array.shape != shape or array.dtype.kind not in ("iu" if space.classes else "iuf"):
        raise ValueError(f"expected {key!r} as {space.kind} of shape {shape}, got {array.dtype} {array.shape}")
    if space.classes is None:
        return np.clip(array, -1, 1).astype(np.float32)
    if ((array < 0) | (array >= np.reshape(space.classes, space.shape))).any():
        raise ValueError(f"expected classes below {space.classes} in {key!r}, got {array.tolist()}")
    return array.astype(np.int32)


class DreamEnv(gymnasium.Env):
    """The dream of a run, registered as ``Dream-v0``.

    Observations and actions have the names and spaces of training, as a Dict, or bare where there is only one;
    continuous actions are in [-1, 1]. The option ``start`` of `reset` chooses the start by its number. Equal seeds and
    actions give equal episodes.
    """

    metadata = _DRAWN

    def __init__(
        self,
        logdir: Path | str,
        episode: Path | str | None = None,
        time_limit: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """logdir: of the run. episode: a recorded episode (.npz) in which dreams begin, in its first step unless the
        option ``start`` names another; None: like the episodes in the run's replay. time_limit: agent steps after which
        an episode is truncated; None: as many as the longest of these episodes had.

        ConfigError if it is not a run, has no decoder or no episode to begin like; CheckpointError without weights.
        """
        self._stage = _Stage(logdir, episode, time_limit, 1)
        self.observation_space, self.action_space = self._stage.observation_space, self._stage.action_space
        self.render_mode = render_mode
        self._shown: dict[str, np.ndarray] | None = None
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._stage.begin(0, self.np_random, _start(options))
        glimpse = self._stage.step(None, np.ones(1, bool))
        return self._observed(glimpse), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._over:
            raise ResetNeeded("expected an episode that goes on, got one that has not begun or is over; call reset()")
        named = {key: value[None] for key, value in self._stage.named(action, ()).items()}
        glimpse = self._stage.step(named, np.zeros(1, bool))
        ended, cut = bool(glimpse.ended[0]), bool(self._stage.cut[0])
        return self._observed(glimpse, ended or cut), float(glimpse.reward[0]), ended, cut and not ended, {}

    def render(self) -> np.ndarray | None:
        """The first image, uint8 (H, W, 3), or a chart of the numbers where there is none."""
        if self.render_mode is None or self._shown is None:
            return None
        return picture_of(self._shown, self._stage.seen)

    def _observed(self, glimpse: Glimpse, over: bool = False) -> Any:
        self._shown, self._over = {key: np.asarray(value[0]) for key, value in glimpse.observation.items()}, over
        return self._stage.told(self._shown)


class DreamVectorEnv(VectorEnv):
    """N dreams of a run stepped together, by ``gymnasium.make_vec``; the arguments of `DreamEnv`.

    Dream number i with `seed` is the `DreamEnv` with `seed + i`. One that is over begins again with the next step.
    """

    metadata = _DRAWN | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int,
        logdir: Path | str,
        episode: Path | str | None = None,
        time_limit: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs, self.render_mode = num_envs, render_mode
        self._stage = _Stage(logdir, episode, time_limit, num_envs)
        self.single_observation_space = self._stage.observation_space
        self.single_action_space = self._stage.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs = [seeding.np_random()[0] for _ in range(num_envs)]
        self._over: np.ndarray | None = None
        self._shown: dict[str, np.ndarray] = {}

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        for index, one in enumerate(seeds or ()):
            if one is not None:
                self._rngs[index] = seeding.np_random(one)[0]
        for index, rng in enumerate(self._rngs):
            self._stage.begin(index, rng, _start(options))
        self._shown = self._stage.step(None, np.ones(self.num_envs, bool)).observation
        self._over = np.zeros(self.num_envs, bool)
        return self._stage.told(self._shown), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._over is None:
            raise ResetNeeded("expected dreams that have begun, got none; call reset()")
        named, begins = self._stage.named(actions, (self.num_envs,)), self._over
        for index in np.flatnonzero(begins):
            self._stage.begin(int(index), self._rngs[index], None)
        glimpse = self._stage.step(named, begins)
        cut = self._stage.cut & ~glimpse.ended
        self._shown, self._over = glimpse.observation, glimpse.ended | cut
        told = self._stage.told(self._shown)
        return told, glimpse.reward.astype(np.float64), np.array(glimpse.ended), cut, {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """As `DreamEnv.render`, one picture for each dream."""
        if self.render_mode is None or not self._shown:
            return None
        each = ({key: value[i] for key, value in self._shown.items()} for i in range(self.num_envs))
        return tuple(picture_of(shown, self._stage.seen) for shown in each)


def _start(options: Mapping[str, Any] | None) -> int | None:
    """The option `start` of a reset. ValueError for others."""
    if unknown := sorted((options or {}).keys() - {"start"}):
        raise ValueError(f"expected no option but start, the number of a start, got {', '.join(unknown)}")
    return (options or {}).get("start")


def picture_of(observation: Mapping[str, np.ndarray], spaces: Spaces) -> np.ndarray:
    """An observation for people, uint8 (H, W, 3): its first image, or its numbers as bars where it has none."""
    for key, space in spaces.items():
        if space.kind == "image":
            return np.array(as_rgb(observation[key]))
    numbers = np.concatenate([np.ravel(observation[key]).astype(np.float64) for key in spaces])
    page, reach = Page(320, 240), max(1.0, float(np.abs(numbers).max(initial=0)))
    axes = Axes(
        page, (0, 0), (320, 240), "observation", "", ("number", ""), (-0.5, len(numbers) - 0.5), (-reach, reach)
    )
    axes.frame()
    for place, number in enumerate(numbers):
        axes.bar((place - 0.4, place + 0.4), (0, number), COLORS[0])
    return np.array(page.array())


gymnasium.register(
    "Dream-v0", entry_point="dreamer.dream_env:DreamEnv", vector_entry_point="dreamer.dream_env:DreamVectorEnv"
)
