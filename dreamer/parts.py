"""Values inside of a kernel of a GPU, as lists of parts, and a traced step computed with them.

Triton wants arrays of two dimensions whose sizes are powers of two, and cannot cut or join them. So a value is a list
of *parts*, rows by `width` features, side by side: cutting and joining are done to the list, and a product is a sum of
products of parts with pieces of the weights, which are read where they are needed::

    deter (rows, 512)    8 parts (rows, 64)       a group of the block-linear layer is a part
    stoch (rows, 32, 4)  2 parts (rows, 64)       16 variables in each
    kernel (512, 64)     read as 8 pieces (64, 64)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.extend import core

#: Rows of a batch in one copy of the kernel: as few as the GPU's matrix units take.
ROWS = 16
#: Operations that compute every number from those in its place.
_ELEMENTWISE = set(
    "add add_any sub mul div neg abs sign max min square sqrt rsqrt integer_pow exp log log1p expm1 tanh logistic "
    "eq ne lt le gt ge and or not select_n convert_element_type stop_gradient copy".split()
)


class UnsuitedError(Exception):
    """This loop cannot be, or had better not be, a single kernel."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A value that was computed, in float32 where the program says bfloat16: it is rounded where it is stored.

    shape: of a row's features; parts: (`ROWS`, width) each, of which `used` columns mean something; order: where the
    traced program's array has the rows (0) and features (1, ...).
    """

    shape: tuple[int, ...]
    parts: Sequence[jax.Array]
    order: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    @property
    def used(self) -> int:
        return math.prod(self.shape) // len(self.parts)

    def turned(self, permutation: Sequence[int]) -> Parts:
        order = self.order or tuple(range(len(self.shape) + 1))
        after = tuple(order[i] for i in permutation)
        return Parts(self.shape, self.parts, () if after == tuple(sorted(after)) else after)


def parts_of(variable: Any, parts: Sequence[jax.Array]) -> Parts:
    return Parts(variable.aval.shape[1:], [_raised(x) for x in parts])


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in the GPU's memory. shape: the traced program's, rows first; moves: whether each step has its own."""

    ref: Any
    shape: tuple[int, ...]
    kind: jnp.dtype
    moves: bool = False


def _raised(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def _stretched(x: jax.Array, each: int) -> jax.Array:
    """Every column `each` times: (rows, width) -> (rows, width * each)."""
    return jnp.broadcast_to(x[..., None], (*x.shape, each)).reshape(x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class StepInParts:
    """What one step computes for the rows of this copy, in parts of `width` features.

    batch: rows of the whole batch; t: where the step finds its own part of what moves with time, None before the first.
    """

    width: int
    batch: int
    rows: Any
    t: Any

    def write(self, ref: Any, value: Parts) -> None:
        if value.used < value.width and len(value.parts) > 1:
            raise UnsuitedError("columns between parts that mean nothing")
        for i, part in enumerate(value.parts):
            at = (*([] if self.t is None else [self.t]), self.rows, pl.ds(i * value.width, value.width))
            ref[at] = part.astype(ref.dtype)

    def evaluate(self, jaxpr: Any, values: dict[Any, Any]) -> list[Parts]:
        """The results of the step's program."""
        read = lambda v: v.val if isinstance(v, core.Literal) else values[v]  # noqa: E731
        for equation in jaxpr.eqns:
            results = self._evaluate(equation, [read(v) for v in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [self.whole(read(v), v.aval.shape[1:]) for v in jaxpr.outvars]

    def whole(self, value: Any, shape: tuple[int, ...]) -> Parts:
        """A value stretched to these features, in parts of its own."""
        number, width = self._divided(shape, [value])
        parts = self._fit(value, shape, number, width)
        return Parts(shape, [jnp.broadcast_to(x, (ROWS, width)) for x in parts])

    def _divided(self, shape: tuple[int, ...], values: Sequence[Any]) -> tuple[int, int]:
        """Number and width of the parts of a value with these features that is made of others."""
        for value in values:
            if isinstance(value, Parts) and value.shape == shape:
                return len(value.parts), value.width
        for value in values:
            if isinstance(value, Parts) and math.prod(value.shape) > 1 and value.shape[:-1] == shape[:-1]:
                return len(value.parts), value.width * shape[-1]
        size = math.prod(shape)
        if size > self.width and size % self.width:
            raise UnsuitedError("features")
        return (1, columns(size, self.width)) if size <= self.width else (size // self.width, self.width)

    def _fit(self, value: Any, shape: tuple[int, ...], number: int, width: int) -> list[Any]:
        """A value as this many parts, each of which can be stretched to (`ROWS`, width)."""
        if isinstance(value, Stored):
            return self._load(value, shape, number, width)
        if not isinstance(value, Parts):
            return [value] * number
        if value.order:
            raise UnsuitedError("rows that do not come first")
        parts, each = value.parts, shape[-1] if shape else 1
        if math.prod(value.shape) == 1:
            return [parts[0][:, :1]] * number
        if math.prod(value.shape) * each == math.prod(shape) and value.shape[-1] == 1:
            parts = [_stretched(x, each) for x in parts]
        elif value.shape != shape:
            raise UnsuitedError("a stretch")
        if (len(parts), parts[0].shape[1]) != (number, width):
            raise UnsuitedError("other parts")
        return list(parts)

    def _load(self, stored: Stored, shape: tuple[int, ...], number: int, width: int) -> list[Any]:
        own, each = stored.shape[1:], shape[-1] if shape else 1
        at = (*([self.t] if stored.moves else []), pl.ds(0, 1) if stored.shape[0] == 1 else self.rows)

        def read(start: int, count: int) -> jax.Array:
            if count & (count - 1):
                raise UnsuitedError("columns that are no power of two")
            x = stored.ref[(*at, pl.ds(start, count))]
            return x != 0 if stored.kind == jnp.bool_ else _raised(x)

        if math.prod(own) == math.prod(shape):
            return [read(i * width, width) for i in range(number)]
        if math.prod(own) == 1:
            return [read(0, 1)] * number
        if width % each:
            raise UnsuitedError("a stretch of what is stored")
        if own[-1:] == (1,) and own[:-1] == shape[:-1]:
            return [_stretched(read(i * width // each, width // each), each) for i in range(number)]
        if math.prod(own) == each:
            x = read(0, each)
            return [jnp.broadcast_to(x[:, None, :], (x.shape[0], width // each, each)).reshape(x.shape[0], -1)] * number
        raise UnsuitedError("a stretch of what is stored")

    # Operations

    def _evaluate(self, equation: Any, operands: list[Any]) -> list[Parts]:
        name, params, shapes = equation.primitive.name, equation.params, [v.aval.shape for v in equation.outvars]
        if name == "dot_general":
            return [self._product(*operands, **params)]
        if name == "transpose" and isinstance(operands[0], Parts):
            return [operands[0].turned(params["permutation"])]
        if any(shape[:1] != (self.batch,) for shape in shapes):
            raise UnsuitedError(name)
        if name in ("reshape", "squeeze", "broadcast_in_dim"):
            return [self._reshaped(operands[0], shapes[0][1:])]
        before = [v.aval.shape[1:] for v in equation.invars]
        last = next((params[key] for key in ("axis", "dimension") if key in params), params.get("axes", [None])[0])
        if name in ("split", "concatenate", "cumsum", *_REDUCTIONS):
            if last != len(before[0]) or len(params.get("axes", [0])) > 1:
                raise UnsuitedError(f"{name} of other than the last features")
            values = [self.whole(x, shape) for x, shape in zip(operands, before, strict=True)]
            if name == "split":
                return _cut(values[0], [shape[1:] for shape in shapes])
            if name == "concatenate":
                return [_joined(values, shapes[0][1:])]
            return [_summed_up(values[0]) if name == "cumsum" else _reduced(values[0], *_REDUCTIONS[name])]
        if name not in _ELEMENTWISE:
            raise UnsuitedError(name)
        return [self._elementwise(equation, operands)]

    def _elementwise(self, equation: Any, operands: list[Any]) -> Parts:
        output, name = equation.outvars[0].aval, equation.primitive.name
        number, width = self._divided(output.shape[1:], operands)
        fitted = [self._fit(x, output.shape[1:], number, width) for x in operands]
        kind = jnp.float32 if output.dtype in (jnp.bfloat16, jnp.float16) else output.dtype

        def compute(*arrays: Any) -> jax.Array:
            if name in ("stop_gradient", "copy"):
                return arrays[0]
            if name == "convert_element_type":
                return arrays[0].astype(kind)
            floats = [x for x in arrays if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]
            arrays = tuple(x if isinstance(x, jax.Array) else _literal(x, floats) for x in arrays)
            shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in arrays))
            arrays = tuple(jnp.broadcast_to(x, shape) if jnp.ndim(x) else x for x in arrays)
            return equation.primitive.bind(*arrays, **equation.primitive.get_bind_params(equation.params))

        return Parts(output.shape[1:], [compute(*arrays) for arrays in zip(*fitted, strict=True)])

    def _reshaped(self, value: Any, shape: tuple[int, ...]) -> Parts:
        if isinstance(value, Parts) and not value.order:
            if math.prod(value.shape) == math.prod(shape):
                return Parts(shape, value.parts)
            if value.shape == shape[:-1]:
                value = Parts((*value.shape, 1), value.parts)
        return self.whole(value, shape)

    def _product(self, left: Any, right: Any, dimension_numbers: Any, **_: Any) -> Parts:
        """A row's features, one group of them for each matrix if there are several, times stored matrices."""
        first = isinstance(left, Parts)
        x, weights = (left, right) if first else (right, left)
        if not isinstance(x, Parts) or not isinstance(weights, Stored):
            raise UnsuitedError("product of two values")
        (of_x, along), (groups_of_x, groups_of_weights) = (pair if first else pair[::-1] for pair in dimension_numbers)
        order, rank = x.order or tuple(range(len(x.shape) + 1)), len(weights.shape)
        if [order[i] for i in of_x] != [len(x.shape)] or [order[i] for i in groups_of_x] != [*range(1, len(x.shape))]:
            raise UnsuitedError("product over other than the last features")
        if tuple(groups_of_weights) != tuple(range(rank - 2)) or rank > 3:
            raise UnsuitedError("matrices whose groups do not come first")
        across = along[0] == rank - 1  # the matrix is (outputs, inputs)
        outputs, groups = weights.shape[-2 if across else -1], math.prod(x.shape[:-1])
        number, width = self._divided((outputs,), [])
        if len(x.parts) % groups or x.width < 16:
            raise UnsuitedError("parts across groups")
        pieces = len(x.parts) // groups
        kind = weights.ref.dtype
        exact = kind if kind == jnp.float64 else jnp.float32
        precision = jax.lax.Precision.HIGHEST if kind == exact else None
        rows = [_only_used(part, x.used, 0).astype(kind) for part in x.parts]

        def total(g: int, n: int) -> jax.Array:
            found = jnp.zeros((ROWS, width), exact)
            for k in range(pieces):
                at = (pl.ds(k * x.width, x.width), pl.ds(n * width, width))
                piece = weights.ref[(*([np.int32(g)] if rank == 3 else []), *(at[::-1] if across else at))]
                numbers = (((1,), (1 if across else 0,)), ((), ()))
                found += jax.lax.dot_general(rows[g * pieces + k], piece, numbers, precision, exact)
            return found

        shape = (groups, outputs) if rank == 3 else (outputs,)
        parts = Parts(shape, [total(g, n) for g in range(groups) for n in range(number)])
        found = (0, len(shape)) if first else (len(shape), 0)
        return dataclasses.replace(parts, order=(1, *found) if rank == 3 else found).turned(range(rank))


def columns(size: int, width: int) -> int:
    """Columns of an array with this many features: those of its parts, at least."""
    return size if size == 1 or size > width else max(16, 1 << (size - 1).bit_length())


def _literal(value: Any, floats: Sequence[jax.Array]) -> Any:
    """A number of the program, as the kernel computes with it."""
    return np.asarray(value, floats[0].dtype)[()] if floats else value


def _only_used(part: jax.Array, used: int, other: Any) -> jax.Array:
    if used == part.shape[1]:
        return part
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, part.shape, 1) < used, part, jnp.asarray(other, part.dtype))


#: How parts are reduced and combined, and what leaves both as they are.
_REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "reduce_sum": (jnp.sum, jnp.add, 0),
    "reduce_max": (jnp.max, jnp.maximum, -math.inf),
}


def _reduced(
    value: Parts, reduce: Callable[..., Any], combine: Callable[..., Any], neutral: float
) -> Parts:  # fmt: skip
    """Over the last features."""
    *shape, each = value.shape
    if each == 1:
        return Parts(tuple(shape), value.parts)
    if each >= value.used and each % value.used == 0:
        own = [reduce(_only_used(x, value.used, neutral), axis=1, keepdims=True) for x in value.parts]
        several = each // value.used
        groups = [own[i : i + several] for i in range(0, len(own), several)]
        return Parts(tuple(shape), [functools.reduce(combine, group) for group in groups])
    if value.width % each:
        raise UnsuitedError("a reduction over a piece of a part")
    return Parts(tuple(shape), [reduce(x.reshape(ROWS, -1, each), axis=2) for x in value.parts])


def _summed_up(value: Parts) -> Parts:
    """The cumulative sum along the last features."""
    each = value.shape[-1]
    if value.used < each or (value.used > each and value.width % each):
        raise UnsuitedError("a cumulative sum over several parts")
    groups = (ROWS, 1, value.width) if value.used == each else (ROWS, value.width // each, each)
    return Parts(value.shape, [jax.lax.cumsum(x.reshape(groups), 2).reshape(x.shape) for x in value.parts])


def _cut(value: Parts, shapes: Sequence[tuple[int, ...]]) -> list[Parts]:
    """The last features cut before some of them."""
    if any(shape[-1] % value.width for shape in shapes):
        raise UnsuitedError("a cut through a part")
    start, along = 0, value.shape[-1] // value.width
    found: list[Parts] = []
    for shape in shapes:
        end = start + shape[-1] // value.width
        found.append(Parts(shape, [x for i, x in enumerate(value.parts) if start <= i % along < end]))
        start = end
    return found


def _joined(values: Sequence[Parts], shape: tuple[int, ...]) -> Parts:
    """The last features of several values, one after the other."""
    width = values[0].width
    if any(value.width != width or value.shape[-1] % width for value in values):
        raise UnsuitedError("parts of different width")
    found: list[jax.Array] = []
    for group in range(math.prod(shape[:-1])):
        for value in values:
            along = value.shape[-1] // width
            found += value.parts[group * along : (group + 1) * along]
    return Parts(shape, found)
