"""From Gymnasium's spaces to ours and back.

Nested Dict and Tuple spaces become flat keys joined by ``/`` (a tuple's parts are numbered). Observations of a single
space have the key ``image``, ``vector`` or ``discrete``; actions have the key ``action``, or ``action/...`` if nested.
`return_values.py` converts a single value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium.spaces as gs
import numpy as np

from dreamer.envs.interface import TaskError, TransitionError, shown
from dreamer.envs.return_values import (
    MisfitError,
    as_classes,
    as_mask,
    as_pixels,
    as_vector,
    check_no_picture,
    misshapen,
)
from dreamer.types import ACTION_MASK, Space

#: Bounds this large mean "unbounded": rescaling [-1, 1] to them would make no sense.
LARGE = 1e9
SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these"

#: Dict keys and tuple positions that lead to a part of a nested space.
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One elementary space inside a nested one.

    path     Dict keys and tuple positions that lead to it.
    convert  Observations: Gymnasium's value to ours. Actions: ours to Gymnasium's.
    """

    key: str
    path: Path
    space: Space
    convert: Callable[[Any], Any]


def observation_leaves(space: gs.Space) -> list[Leaf]:
    """The flat observation. TaskError for spaces that the agent cannot see."""
    leaves = []
    for path, part in _walk(space, ()):
        name = joined(path)
        kind = _lookup(OBSERVATIONS, part, f"observation {name!r}" if name else "the observation")
        ours, convert = (_observe_mask if name == ACTION_MASK else kind)(part, name)
        leaves.append(Leaf(name or ours.kind, path, ours, convert))
    check_distinct("observation", [(leaf.key, leaf.path) for leaf in leaves])
    return leaves


def action_leaves(space: gs.Space) -> list[Leaf]:
    """The flat action. TaskError for spaces that the agent cannot act in."""
    leaves = []
    for path, part in _walk(space, ()):
        key = joined(("action", *path))
        ours, convert = _lookup(ACTIONS, part, f"{key!r}")(part, key)
        leaves.append(Leaf(key, path, ours, convert))
    check_distinct("action", [(leaf.key, leaf.path) for leaf in leaves])
    return leaves


def joined(path: Path) -> str:
    """The name of a part of a nested space. TaskError if a part of it is empty."""
    if "" in path:
        raise TaskError(f"expected names of at least one character in a Dict space, got an empty one in {path}; rename")
    return "/".join(map(str, path))


def check_distinct(what: str, parts: Iterable[tuple[str, Path]]) -> None:
    """TaskError if two parts of a nested space, as (name, path), have the same name."""
    found: dict[str, Path] = {}
    for name, path in parts:
        if name in found:
            raise TaskError(
                f"expected parts of the {what} with names that differ when joined by slashes, got {name!r} twice: from "
                f"{found[name]} and from {path}; rename one of them"
            )
        found[name] = path


def flatten(leaves: Sequence[Leaf], value: Any) -> dict[str, np.ndarray]:
    """Gymnasium's observation as ours, in arrays of its own. TransitionError, naming the key, for a misfit."""
    return {leaf.key: converted(leaf.key, leaf.convert, part_of(value, leaf.path, leaf.key)) for leaf in leaves}


def part_of(value: Any, path: Path, key: str, declared: str = "observation_space") -> Any:
    """The part of a nested observation. TransitionError, naming what `declared` it, if it is missing."""
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError, ValueError) as error:  # ValueError: a numpy array indexed by a name
            got = f"the keys {sorted(map(str, value))}" if isinstance(value, Mapping) else shown(value)
            raise TransitionError(
                f"expected an observation with {key!r}, as the {declared} promises, got {got}; correct the "
                f"environment's {declared} or what it returns"
            ) from error
    return value


def converted(key: str, convert: Callable[[Any], Any], value: Any, declared: str = "observation_space") -> Any:
    """The value in our form. TransitionError, naming the key, for a value that is not as `declared`."""
    try:
        return convert(value)
    except MisfitError as error:
        raise TransitionError(
            f"expected observation {key!r} {error}; correct the environment's {declared} or what it returns"
        ) from error


def surplus(space: gs.Space, value: Any, path: Path = ()) -> list[str]:
    """Names in a nested observation that are not in its space."""
    if not isinstance(space, gs.Dict) or not isinstance(value, Mapping):
        parts = enumerate(space.spaces) if isinstance(space, gs.Tuple) else ()
        return [name for place, part in parts for name in surplus(part, value[place], (*path, place))]
    found = ["/".join(map(str, (*path, key))) for key in value if key not in space.spaces]
    return found + [n for key, part in space.spaces.items() for n in surplus(part, value[key], (*path, key))]


def unflatten(space: gs.Space, leaves: Sequence[Leaf], action: Mapping[str, np.ndarray]) -> Any:
    """Our action as Gymnasium's."""
    values = {leaf.path: leaf.convert(action[leaf.key]) for leaf in leaves}
    return _build(space, (), values)


def rescale(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[-1, 1] to [low, high] in float64, clipped."""
    share = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
    return np.clip(low + share * (high - low), low, high)


def _walk(space: gs.Space, path: Path) -> Iterator[tuple[Path, gs.Space]]:
    if isinstance(space, gs.Dict):
        for key, part in space.spaces.items():
            yield from _walk(part, (*path, key))
    elif isinstance(space, gs.Tuple):
        for position, part in enumerate(space.spaces):
            yield from _walk(part, (*path, position))
    else:
        yield path, space


def _build(space: gs.Space, path: Path, values: Mapping[Path, Any]) -> Any:
    if isinstance(space, gs.Dict):
        return {key: _build(part, (*path, key), values) for key, part in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return tuple(_build(part, (*path, position), values) for position, part in enumerate(space.spaces))
    return values[path]


def _lookup(table: Mapping[type, Callable], space: Any, what: str) -> Callable:
    for kind, function in table.items():
        if isinstance(space, kind):
            return function
    remedy = "wrap the environment to convert it"
    if not isinstance(space, gs.Space):
        old = type(space).__module__.partition(".")[0] == "gym"
        remedy = "make it with gymnasium.spaces" + (", not with the old package gym" if old else "")
    raise TaskError(f"expected a space of {SUPPORTED} for {what}, got {shown(space)}; {remedy}")


Observed = tuple[Space, Callable[[Any], np.ndarray]]


def _observe_box(space: gs.Box, name: str) -> Observed:
    shape = space.shape
    bounds = (float(space.low.min()), float(space.high.max())) if space.low.size else (0.0, 0.0)
    if space.dtype == np.uint8 and len(shape) in (2, 3) and bounds == (0, 255):
        return as_picture(shape, f"observation {name or 'image'!r}")
    check_no_picture(shape, space.dtype, bounds, f"observation {name or 'vector'!r}")
    return Space("vector", shape), lambda value: as_vector(value, shape)


def as_picture(shape: tuple[int, ...], what: str) -> tuple[Space, Callable[[Any], np.ndarray]]:
    """The space of images declared as uint8 (H, W, C) or (H, W), and the conversion of one."""
    ours = shape if len(shape) == 3 else (*shape, 1)
    shapes = {shape, ours, ours[:2] if ours[2] == 1 else ours}

    def convert(value: Any) -> np.ndarray:
        image = as_pixels(value, what)
        if image.shape not in shapes:
            raise misshapen(shape, image.shape)
        return image.reshape(ours)

    return Space("image", ours), convert


def _observe_discrete(space: gs.Discrete, name: str) -> Observed:
    start, count = int(space.start), int(space.n)
    return Space("discrete", (), (count,)), lambda value: as_classes(value, (), start, count)


def _observe_multi_discrete(space: gs.MultiDiscrete, name: str) -> Observed:
    ours = Space("discrete", space.shape, tuple(int(n) for n in space.nvec.flatten()))
    return ours, lambda value: as_classes(value, space.shape, space.start, space.nvec)


def _observe_multi_binary(space: gs.MultiBinary, name: str) -> Observed:
    ours = Space("discrete", space.shape, (2,) * int(np.prod(space.shape)))
    return ours, lambda value: as_classes(value, space.shape, 0, 2)


def _observe_mask(space: gs.Space, name: str) -> Observed:
    """Which actions are allowed, (actions,): those whose entry is not 0."""
    shape = space.shape or ()
    count = int(np.prod(shape, dtype=int))
    return Space("discrete", (count,), (2,) * count), lambda value: as_mask(value, shape)


def _act_box(space: gs.Box, key: str) -> tuple[Space, Callable]:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if not (np.abs(low) < LARGE).all() or not (np.abs(high) < LARGE).all() or not (low <= high).all():
        raise TaskError(
            f"expected finite action bounds, the lower below the upper, got the unbounded {shown(space)} for {key!r}; "
            "bound it with gymnasium.wrappers.RescaleAction or in the environment"
        )
    whole = space.dtype.kind in "iub"

    def convert(action: np.ndarray) -> np.ndarray:
        value = rescale(action, low, high)
        # The cast to a narrower float may round past a bound; clipping to the space's own bounds undoes that.
        return np.clip((np.rint(value) if whole else value).astype(space.dtype), space.low, space.high)

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
