"""From Gymnasium's spaces to ours and back.

Nested Dict and Tuple spaces become flat keys joined by ``/`` (a tuple's parts are numbered). Observations of a single
space have the key ``image``, ``vector`` or ``discrete``; actions have the key ``action``, or ``action/...`` if nested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium.spaces as gs
import numpy as np

from dreamer.envs.interface import TaskError, TransitionError
from dreamer.types import ACTION_MASK, Space

#: Bounds this large mean "unbounded": rescaling [-1, 1] to them would be senseless.
LARGE = 1e9
SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One elementary space inside a nested one.

    path     Dict keys and tuple positions that lead to it.
    convert  Observations: Gymnasium's value to ours. Actions: ours to Gymnasium's.
    """

    key: str
    path: tuple[str | int, ...]
    space: Space
    convert: Callable[[Any], Any]


def observation_leaves(space: gs.Space) -> list[Leaf]:
    """The flat observation. TaskError for spaces that the agent cannot see."""
    leaves = []
    for path, part in _walk(space, ()):
        name = "/".join(map(str, path))
        kind = _lookup(OBSERVATIONS, part, f"observation {name!r}" if name else "the observation")
        ours, convert = (_observe_mask if name == ACTION_MASK else kind)(part, name)
        leaves.append(Leaf(name or ours.kind, path, ours, convert))
    return leaves


def action_leaves(space: gs.Space) -> list[Leaf]:
    """The flat action. TaskError for spaces that the agent cannot act in."""
    leaves = []
    for path, part in _walk(space, ()):
        key = "/".join(("action", *map(str, path)))
        ours, convert = _lookup(ACTIONS, part, f"{key!r}")(part, key)
        leaves.append(Leaf(key, path, ours, convert))
    return leaves


def flatten(leaves: list[Leaf], value: Any) -> dict[str, np.ndarray]:
    """Gymnasium's observation as ours."""
    flat = {}
    for leaf in leaves:
        part = value
        for step in leaf.path:
            part = part[step]
        flat[leaf.key] = leaf.convert(part)
    return flat


def unflatten(space: gs.Space, leaves: list[Leaf], action: Mapping[str, np.ndarray]) -> Any:
    """Our action as Gymnasium's."""
    values = {leaf.path: leaf.convert(action[leaf.key]) for leaf in leaves}
    return _build(space, (), values)


def rescale(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[-1, 1] to [low, high] in float64, clipped."""
    share = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
    return np.clip(low + share * (high - low), low, high)


def _walk(space: gs.Space, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], gs.Space]]:
    if isinstance(space, gs.Dict):
        for key, part in space.spaces.items():
            yield from _walk(part, (*path, key))
    elif isinstance(space, gs.Tuple):
        for position, part in enumerate(space.spaces):
            yield from _walk(part, (*path, position))
    else:
        yield path, space


def _build(space: gs.Space, path: tuple[str | int, ...], values: Mapping[tuple[str | int, ...], Any]) -> Any:
    if isinstance(space, gs.Dict):
        return {key: _build(part, (*path, key), values) for key, part in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return tuple(_build(part, (*path, position), values) for position, part in enumerate(space.spaces))
    return values[path]


def _lookup(table: Mapping[type, Callable], space: gs.Space, what: str) -> Callable:
    for kind, function in table.items():
        if isinstance(space, kind):
            return function
    raise TaskError(f"expected a space of {SUPPORTED} for {what}, got {space}; wrap the environment to convert it")


Observed = tuple[Space, Callable[[Any], np.ndarray]]


def _observe_box(space: gs.Box, name: str) -> Observed:
    pixels = space.dtype == np.uint8 and len(space.shape) in (2, 3) and space.low.min() == 0 and space.high.max() == 255
    if not pixels:
        return Space("vector", space.shape), lambda value: np.array(value, np.float32)
    shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
    if shape[0] <= 4 < shape[2]:
        raise TaskError(
            f"expected images as (height, width, channels), got {shape} for observation {name or 'image'!r}; "
            "move the channels to the end with gymnasium.wrappers.TransformObservation"
        )
    return Space("image", shape), lambda value: as_pixels(value, f"observation {name or 'image'!r}").reshape(shape)


def as_pixels(value: Any, what: str) -> np.ndarray:
    """A uint8 copy of an image of any dtype. TransitionError for a value that uint8 would wrap around."""
    image = np.asarray(value)
    if image.dtype != np.uint8 and image.size and not (image.min() >= 0 and image.max() <= 255):  # NaN neither
        raise TransitionError(
            f"expected pixels from 0 to 255 in {what}, got {image.dtype} from {image.min():g} to {image.max():g}; "
            "correct the environment, or scale its images to 0 ... 255"
        )
    return image.astype(np.uint8)


def _observe_discrete(space: gs.Discrete, name: str) -> Observed:
    start = int(space.start)
    return Space("discrete", (), (int(space.n),)), lambda value: np.array(int(value) - start, np.int32)


def _observe_multi_discrete(space: gs.MultiDiscrete, name: str) -> Observed:
    ours = Space("discrete", space.shape, tuple(int(n) for n in space.nvec.flatten()))
    return ours, lambda value: (np.asarray(value) - space.start).astype(np.int32)


def _observe_multi_binary(space: gs.MultiBinary, name: str) -> Observed:
    ours = Space("discrete", space.shape, (2,) * int(np.prod(space.shape)))
    return ours, lambda value: np.array(value, np.int32)


def _observe_mask(space: gs.Space, name: str) -> Observed:
    """Which actions are allowed, (actions,): whatever is not 0 is."""
    count = int(np.prod(space.shape or (), dtype=int))
    return Space("discrete", (count,), (2,) * count), lambda value: (np.asarray(value) != 0).astype(np.int32).flatten()


def _act_box(space: gs.Box, key: str) -> tuple[Space, Callable]:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if not (np.abs(low) < LARGE).all() or not (np.abs(high) < LARGE).all():
        raise TaskError(
            f"expected finite action bounds, got the unbounded {space} for {key!r}; "
            "bound it with gymnasium.wrappers.RescaleAction or in the environment"
        )
    integer = np.issubdtype(space.dtype, np.integer)

    def convert(action: np.ndarray) -> np.ndarray:
        value = rescale(action, low, high)
        # The cast to a narrower float may round past a bound, which clipping against the space's own bounds undoes.
        return np.clip((np.rint(value) if integer else value).astype(space.dtype), space.low, space.high)

    return Space("vector", space.shape), convert


def _act_discrete(space: gs.Discrete, key: str) -> tuple[Space, Callable]:
    return Space("discrete", (), (int(space.n),)), lambda action: space.start + space.dtype.type(action)


def _act_multi_discrete(space: gs.MultiDiscrete, key: str) -> tuple[Space, Callable]:
    ours = Space("discrete", space.shape, tuple(int(n) for n in space.nvec.flatten()))
    return ours, lambda action: (np.asarray(action) + space.start).astype(space.dtype)


def _act_multi_binary(space: gs.MultiBinary, key: str) -> tuple[Space, Callable]:
    ours = Space("discrete", space.shape, (2,) * int(np.prod(space.shape)))
    return ours, lambda action: np.asarray(action).astype(space.dtype)


OBSERVATIONS: dict[type, Callable] = {
    gs.Box: _observe_box,
    gs.Discrete: _observe_discrete,
    gs.MultiDiscrete: _observe_multi_discrete,
    gs.MultiBinary: _observe_multi_binary,
}
ACTIONS: dict[type, Callable] = {
    gs.Box: _act_box,
    gs.Discrete: _act_discrete,
    gs.MultiDiscrete: _act_multi_discrete,
    gs.MultiBinary: _act_multi_binary,
}
