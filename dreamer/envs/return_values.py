"""Converts what a third-party environment returns, value by value: checked, in an array of its own.

Nothing is made to fit: a picture declared as something else, pixels in another unit, classes that do not exist, text
for a number are errors that say what came. `MisfitError` has only the middle of the sentence; whoever knows the name of
the value completes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dreamer.envs.interface import TaskError, TransitionError, shown

#: From this side length on, something of three or more dimensions is a picture rather than a grid of numbers: if it is
#: from 0 to 255, if it has up to four channels, and otherwise.
PICTURE_SIDES = {"bytes": 8, "channels": 16, "any": 24}
#: The largest number that float32 holds.
LARGEST = float(np.finfo(np.float32).max)


#: What Gymnasium's methods return.
RESET = ("observation", "info")
STEP = ("observation", "reward", "terminated", "truncated", "info")


class MisfitError(Exception):
    """A value that is not what its space says: "of shape (3,), got (4,)"."""


def parts_of(method: str, names: Sequence[str], answer: Any) -> Sequence[Any]:
    """The parts of what Gymnasium's `reset` or `step` returned. TransitionError for anything else."""
    parts = answer if isinstance(answer, tuple | list) else ()
    if len(parts) == len(names) and isinstance(parts[-1], Mapping | None):
        return parts
    if len(parts) == len(names):
        got = f"{shown(parts[-1])} as info"
    else:
        got = f"a {type(answer).__name__} of {len(parts)}" if parts else shown(answer)
    old = len(parts) == 4 if method == "step" else not parts and answer is not None
    raise TransitionError(
        f"expected {method} to return ({', '.join(names)}), as Gymnasium's interface has it, got {got}"
        f"{', as the old interface of Gym had it' if old else ''}; correct the environment"
    )


def as_pixels(value: Any, what: str) -> np.ndarray:
    """A uint8 copy of an image of any dtype. TransitionError for values that uint8 would wrap around, and for images
    from 0 to 1, which would be black."""
    try:
        image = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise TransitionError(f"expected pixels in {what}, got {shown(value)}; correct the environment") from error
    if image.dtype == np.uint8 or not image.size:
        return image.astype(np.uint8)
    if image.dtype.kind not in "biuf":
        raise TransitionError(f"expected pixels in {what}, got {shown(value)}; correct the environment")
    low, high = image.min(), image.max()
    dark = image.dtype.kind in "bf" and 0 < high <= 1
    if dark or not (low >= 0 and high <= 255):  # nor NaN
        remedy = "scale its images to 0 ... 255: (255 * image).astype(np.uint8)" if dark else "correct the environment"
        raise TransitionError(
            f"expected pixels from 0 to 255 in {what}, got {image.dtype} from {low:g} to {high:g}; {remedy}"
        )
    return image.astype(np.uint8)


def check_no_picture(shape: tuple[int, ...], dtype: np.dtype, bounds: tuple[float, float], what: str) -> None:
    """TaskError for what would be a vector of thousands of numbers but looks like a picture by its shape and bounds."""
    if len(shape) < 2 or not _is_picture(shape, bounds):
        return
    size = int(np.prod(shape))
    frames = "frames side by side as channels, " if len(shape) > 3 else ""
    scale = "(255 * image).astype(np.uint8)" if bounds == (0, 1) else "image.astype(np.uint8)"
    raise TaskError(
        f"expected images as uint8 from 0 to 255 of shape (height, width, channels), got {dtype} {shape} from "
        f"{bounds[0]:g} to {bounds[1]:g} for {what}, which would be a vector of {size:,} numbers; convert them with "
        f"gymnasium.wrappers.TransformObservation ({frames}{scale}), or reshape them to one dimension if they are no "
        "images"
    )


def _is_picture(shape: tuple[int, ...], bounds: tuple[float, float]) -> bool:
    *others, side, _ = sorted(shape)  # the two longest
    if not others:  # a matrix, or a gray picture
        return bounds in ((0, 1), (0, 255)) and side >= PICTURE_SIDES["any"]
    kind = "bytes" if bounds == (0, 255) else "channels" if others[0] <= 4 else "any"
    return side >= PICTURE_SIDES[kind]


def as_vector(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of this shape. MisfitError for anything else; numbers that are not finite pass."""
    array = _numbers(value, shape)
    if array.dtype.itemsize > 4 and array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes infinite, which is reported later
            return array.astype(np.float32)
    return array.astype(np.float32)


def as_classes(value: Any, shape: tuple[int, ...], start: Any, count: Any) -> np.ndarray:
    """int32 of this shape, counted from 0, for choices that begin at `start`. MisfitError for any but these `count`."""
    array = _numbers(value, shape)
    # Through float64: it holds every count exactly, and NaN and numbers beyond int64 match no choice.
    index = array.astype(np.float64) - start
    if not ((index >= 0) & (index < count) & (index == np.floor(index))).all():
        first, last = (" ".join(str(x).split()) for x in (np.asarray(start), np.asarray(start) + count - 1))
        raise MisfitError(f"as whole numbers from {first} to {last}, got {shown(value)}")
    return np.array(index, np.int32)


def as_mask(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """int32, flat: 1 for everything that is not 0."""
    return (_numbers(value, shape) != 0).astype(np.int32).flatten()


def as_reward(value: Any) -> float:
    """A number, which may come in an array. TransitionError, naming the reward, for anything else.

    NaN and infinity pass: they are reported with the transition.
    """
    array = _array(value)
    if array.dtype.kind not in "biuf" or array.size != 1:
        raise TransitionError(f"expected the reward to be one number, got {shown(value)}; correct the environment")
    number = float(array.reshape(()))
    if LARGEST < abs(number) < math.inf:
        raise TransitionError(
            f"expected a reward of at most {LARGEST:g} (float32), got {number:g}; correct the environment"
        )
    return number


def as_flag(value: Any, what: str) -> bool:
    """True or false, which may come as a number or in an array. TransitionError for anything else."""
    if isinstance(value, bool):
        return value
    array = _array(value)
    if array.dtype.kind not in "biuf" or array.size != 1:
        raise TransitionError(f"expected {what} to be true or false, got {shown(value)}; correct the environment")
    return bool(array.reshape(()))


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = value if isinstance(value, np.ndarray) else _array(value)
    if array.dtype.kind not in "biuf":
        raise MisfitError(f"to be numbers, got {shown(value)}")
    if array.shape != shape:
        if shape or array.size != 1:
            raise misshapen(shape, array.shape)
        array = array.reshape(())
    return array


def _array(value: Any) -> np.ndarray:
    """An array; one of objects if the value is not an array."""
    try:
        return np.asarray(value)
    except ValueError:  # rows of different lengths
        return np.array(None)


def misshapen(expected: tuple[int, ...], got: tuple[int, ...]) -> MisfitError:
    return MisfitError(f"of shape {expected}, as it is declared, got {got}")
