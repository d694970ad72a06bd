"""Checks what an environment declares, and every transition against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dreamer.envs.interface import TaskError, Transition, TransitionError, batch_fields, shown
from dreamer.types import LOG_PREFIX, TAKEN, Space, Spaces, visible

#: Whether a value of the right shape and dtype is in the space, and the words for what would be.
Test = tuple[Callable[[Any], bool], str]

#: Most numbers that all vectors and choices of an observation, or of an action, may have together: each has its own
#: weights in the first layer.
MOST_NUMBERS = 2**20


def check_spaces(observations: Spaces, actions: Spaces) -> None:
    """TaskError, naming the key, for spaces in which no agent could be trained, whatever its configuration."""
    for kind, spaces in (("observation", observations), ("action", actions)):
        if not isinstance(spaces, Mapping) or not all(isinstance(space, Space) for space in spaces.values()):
            raise TaskError(
                f"expected {kind}_spaces to be a dict of dreamer.types.Space by name, got {shown(spaces)}; "
                "correct the environment"
            )
        for key, space in spaces.items():
            _check_name(kind, key)
            _check_space(kind, key, space)
        _check_width(kind, visible(spaces))
    both = sorted(set(observations) & set(actions))
    if both:
        raise TaskError(
            f"expected names that are not both an observation and an action, got {both}; rename them in the environment"
        )
    if not visible(observations):
        raise TaskError(
            f"expected an observation that the agent can see, got {sorted(observations) or 'none'}; declare one"
            f" (names that begin with {LOG_PREFIX} are only logged)"
        )
    if not actions:
        raise TaskError("expected an action to choose, got an action space without any; declare one")


def _check_name(kind: str, key: Any) -> None:
    if not isinstance(key, str) or not key.isprintable() or not key.strip() or key.startswith("_"):
        raise TaskError(
            f"expected {kind} names of printable text that do not begin with an underscore, got {key!r}; "
            "rename it in the environment"
        )
    if key in TAKEN:
        raise TaskError(
            f"expected {kind} names other than {', '.join(TAKEN)}, got [{key!r}], which is {TAKEN[key]}; "
            "rename it in the environment"
        )
    if kind == "action" and key.startswith(LOG_PREFIX):
        raise TaskError(f"expected action names that do not begin with {LOG_PREFIX}, got {key!r}; rename it")


def _check_space(kind: str, key: str, space: Space) -> None:
    if not all(side > 0 for side in space.shape) or not all(count > 0 for count in space.classes or ()):
        raise TaskError(
            f"expected at least one number, or one class to choose, in every {kind}, got an empty one: {key!r} is "
            f"{shown(space)}; leave it out or correct its size"
        )
    if space.kind != "image":
        return
    if kind == "action":
        raise TaskError(f"expected actions that are vectors or discrete, got the image {key!r}; declare a vector")
    if _channels_first(*space.shape):
        raise TaskError(
            f"expected images as (height, width, channels), got {space.shape} for observation {key!r}; "
            "move the channels to the end with gymnasium.wrappers.TransformObservation: np.moveaxis(image, 0, -1)"
        )


def _channels_first(first: int, second: int, third: int) -> bool:
    """Whether an image of this shape looks like (channels, height, width), possibly of several frames."""
    return third > 4 and (first <= 4 or first < min(second, third) or second == third != first)


def _check_width(kind: str, spaces: Spaces) -> None:
    widths = {key: space.flat_width for key, space in spaces.items() if space.kind != "image"}
    if sum(widths.values()) > MOST_NUMBERS:
        widest = max(widths, key=lambda key: widths[key])
        raise TaskError(
            f"expected at most {MOST_NUMBERS:,} numbers and classes in an {kind}, got {sum(widths.values()):,}, most "
            f"of them in {widest!r}; declare images as uint8 (height, width, channels), or make it smaller"
        )


class TransitionCheck:
    """Raises TransitionError for a transition that does not fit; costs a few microseconds.

    It checks the keys, every shape and dtype, that rewards and vectors are finite, that class indices are in range, and
    that an episode begins with `reset` and nowhere else. For pixels every value of uint8 is valid.
    """

    def __init__(self, observations: Spaces) -> None:
        fields = batch_fields(observations)
        tests: dict[str, Test] = {"reward": (_is_finite, "a finite number")}
        tests |= {key: test for key, space in observations.items() if (test := _test(space)) is not None}
        self._keys = fields.keys()
        self._rows = [(key, shape, dtype, tests.get(key)) for key, (shape, dtype) in fields.items()]

    def __call__(self, result: Transition, first: bool) -> None:
        """`first`: whether it is the answer to `reset`."""
        if not isinstance(result, Mapping):
            raise TransitionError(
                f"expected a dict as the transition, got {shown(result)}; make it with dreamer.envs.transition"
            )
        if result.keys() != self._keys:
            raise TransitionError(
                f"expected the transition keys {sorted(self._keys)}, got {sorted(map(str, result))}; "
                "correct the environment's observation_spaces or its transitions"
            )
        for key, shape, dtype, test in self._rows:
            value = result[key]
            if not isinstance(value, (np.ndarray, np.generic)):
                value = _as_array(key, value)
            if value.shape != shape or value.dtype != dtype:
                raise TransitionError(
                    f"expected {key!r} of shape {shape} and dtype {dtype}, got {value.shape} and {value.dtype}; "
                    "correct the environment's observation_spaces or its transitions"
                )
            if test is not None and not test[0](value):
                got = " ".join(str(value).split())
                raise TransitionError(f"expected {key!r} to be {test[1]}, got {got}; correct the environment")
        if bool(result["is_first"]) != first:
            raise TransitionError(
                f"expected is_first to be {first} from {'reset' if first else 'step'}, got {not first}; "
                "an episode begins with reset and nowhere else"
            )


def _as_array(key: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise TransitionError(
            f"expected {key!r} to be an array, got {shown(value)}; correct the environment"
        ) from error


def _test(space: Space) -> Test | None:
    if space.kind == "vector":
        return (_all_finite, "finite everywhere") if space.shape else (_is_finite, "a finite number")
    if space.classes is None:
        return None
    if space.shape == ():
        count = space.classes[0]
        return lambda value: 0 <= int(value) < count, f"from 0 to {count - 1}"
    counts = np.array(space.classes).reshape(space.shape)
    return lambda value: bool(((value >= 0) & (value < counts)).all()), f"from 0 to below {counts.tolist()}"


def _is_finite(value: Any) -> bool:
    return math.isfinite(value)


def _all_finite(value: np.ndarray) -> bool:
    flat = value.ravel()
    # The sum of squares is several times faster, but also infinite for large finite numbers: those are checked again.
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())
