"""Every transition against its spaces: what an environment may never return."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dreamer.envs.interface import Transition, TransitionError, batch_fields
from dreamer.types import Space, Spaces

#: Says whether a value of the right shape and dtype is one of the space's, and the words for what is.
Test = tuple[Callable[[Any], bool], str]


class TransitionCheck:
    """Raises TransitionError for a transition that does not fit; costs a few microseconds.

    Checked are the keys, every shape and dtype, that rewards and vectors are finite, that class indices are in range,
    and that an episode begins with `reset` and nowhere else. Pixels are uint8, whose every value is one.
    """

    def __init__(self, observations: Spaces) -> None:
        fields = batch_fields(observations)
        tests: dict[str, Test] = {"reward": (_is_finite, "a finite number")}
        tests |= {key: test for key, space in observations.items() if (test := _test(space)) is not None}
        self._keys = fields.keys()
        self._rows = [(key, shape, dtype, tests.get(key)) for key, (shape, dtype) in fields.items()]

    def __call__(self, result: Transition, first: bool) -> None:
        """`first`: whether it is the answer to `reset`."""
        if result.keys() != self._keys:
            raise TransitionError(
                f"expected the transition keys {sorted(self._keys)}, got {sorted(result)}; "
                "correct the environment's observation_spaces or its transitions"
            )
        for key, shape, dtype, test in self._rows:
            value = result[key]
            if not isinstance(value, (np.ndarray, np.generic)):
                value = np.asarray(value)
            if value.shape != shape or value.dtype != dtype:
                raise TransitionError(
                    f"expected {key!r} of shape {shape} and dtype {dtype}, got {value.shape} and {value.dtype}; "
                    "correct the environment's observation_spaces or its transitions"
                )
            if test is not None and not test[0](value):
                raise TransitionError(f"expected {key!r} to be {test[1]}, got {value}; correct the environment")
        if bool(result["is_first"]) != first:
            raise TransitionError(
                f"expected is_first to be {first} from {'reset' if first else 'step'}, got {not first}; "
                "an episode begins with reset and nowhere else"
            )


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
    # The sum of squares is several times faster, and infinite for large finite numbers too: those are looked at again.
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())
