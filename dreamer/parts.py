"""Values inside of a kernel of a GPU, made of parts, and a traced step computed with them.

Triton wants arrays of two dimensions whose sizes are powers of two, and cannot cut or join them. So a value is made of
*parts*, rows by `width` features, side by side, and each part is computed where it is asked for: cutting and joining
only say where a part is found, and a product is a sum of products of parts with pieces of the weights, which are read
where they are needed::

    deter (rows, 512)    8 parts (rows, 64)       a group of the block-linear layer is a part
    stoch (rows, 32, 4)  2 parts (rows, 64)       16 variables in each
    kernel (512, 64)     read as 8 pieces (64, 64)

A part is asked for by a number of Python's, where a kernel computes all parts, or by one that the kernel itself works
out, where every copy of it computes its own.
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

#: Operations that compute every number from those in its place.
_ELEMENTWISE = set(
    "add add_any sub mul div neg abs sign max min square sqrt rsqrt integer_pow exp log log1p expm1 tanh logistic "
    "eq ne lt le gt ge and or not select_n convert_element_type stop_gradient copy".split()
)
#: Parts that are read at once in each trip of a kernel's loop; as many or fewer need no loop.
_AT_ONCE = 2

#: A number of Python's, or one that the kernel works out.
Number = Any


class UnsuitedError(Exception):
    """This loop cannot be, or had better not be, made into such kernels."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Parts side by side that are computed alike: ``part(group, i)`` for i < count."""

    count: int
    part: Callable[[Number, Number], jax.Array]

    def cut(self, start: int, count: int) -> Run:
        return self if count == self.count else Run(count, lambda group, i: self.part(group, i + start))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Groups of parts of so many columns; of a group, how many parts are computed alike, run by run."""

    width: int
    groups: int
    counts: tuple[int, ...]

    @property
    def number(self) -> int:
        return self.groups * sum(self.counts)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A value that is computed, in float32 where the program says bfloat16: it is rounded where it is stored.

    shape: of a row's features; parts: (rows, width) each, of which `used` columns mean something; order: where the
    traced program's array has the rows (0) and features (1, ...); single: values of one column that parts are computed
    from.
    """

    shape: tuple[int, ...]
    width: int
    groups: int
    runs: tuple[Run, ...]
    order: tuple[int, ...] = ()
    single: tuple[Parts, ...] = ()

    @property
    def layout(self) -> Layout:
        return Layout(self.width, self.groups, tuple(run.count for run in self.runs))

    @property
    def used(self) -> int:
        return math.prod(self.shape) // self.layout.number

    @property
    def every(self) -> list[jax.Array]:
        """All parts, one after the other."""
        return [run.part(group, i) for group in range(self.groups) for run in self.runs for i in range(run.count)]

    def turned(self, permutation: Sequence[int]) -> Parts:
        order = self.order or tuple(range(len(self.shape) + 1))
        after = tuple(order[i] for i in permutation)
        return dataclasses.replace(self, order=() if after == tuple(sorted(after)) else after)

    def laid_out(self, layout: Layout) -> Parts:
        """The same parts, grouped otherwise."""
        if self.layout == layout:
            return self
        total = sum(layout.counts)
        if (self.width, self.layout.number) != (layout.width, layout.number):
            raise UnsuitedError("other parts")
        if self.groups == layout.groups:
            return dataclasses.replace(self, runs=_refined(self.runs, layout.counts))
        if len(self.runs) > 1:
            raise UnsuitedError("other groups of what was joined")
        count, part = self.runs[0].count, self.runs[0].part

        def found(group: Number, i: Number) -> jax.Array:
            at = i if isinstance(group, int) and group == 0 else group * total + i
            return part(*divided_by(at, count)) if self.groups > 1 else part(0, at)

        whole = dataclasses.replace(self, groups=layout.groups, runs=(Run(total, found),))
        return whole.laid_out(layout)

    def grouped(self, groups: int) -> Parts:
        """The same parts in so many groups, which must be whole parts."""
        if self.groups == groups:
            return self
        if self.layout.number % groups:
            raise UnsuitedError("parts across groups")
        return self.laid_out(Layout(self.width, groups, (self.layout.number // groups,)))


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in the GPU's memory. shape: the traced program's, rows first unless it is a matrix of weights; t: which
    of many, if there are."""

    ref: Any
    shape: tuple[int, ...]
    kind: jnp.dtype
    weights: bool = False
    t: Any = None


def _which(t: Any) -> list[Any]:
    return [] if t is None else [t]


def divided_by(number: Number, by: int) -> tuple[Number, Number]:
    """Quotient and rest of a number that is not negative."""
    if isinstance(number, int):
        return divmod(number, by)
    return jax.lax.div(number, jnp.int32(by)), jax.lax.rem(number, jnp.int32(by))


def _refined(runs: Sequence[Run], counts: Sequence[int]) -> tuple[Run, ...]:
    """The same runs, cut into shorter ones."""
    found, rest, start = [], list(runs), 0
    for count in counts:
        if not rest or rest[0].count - start < count:
            raise UnsuitedError("parts across a joint")
        found.append(rest[0].cut(start, count))
        start += count
        if start == rest[0].count:
            rest, start = rest[1:], 0
    return tuple(found)


def _finest(layouts: Sequence[Layout]) -> Layout:
    """Runs that end wherever those of one of the layouts do."""
    ends = sorted({sum(layout.counts[: i + 1]) for layout in layouts for i in range(len(layout.counts))})
    counts = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return dataclasses.replace(layouts[0], counts=counts)


def _raised(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def _stretched(x: jax.Array, each: int) -> jax.Array:
    """Every column `each` times: (rows, width) -> (rows, width * each)."""
    return jnp.broadcast_to(x[..., None], (*x.shape, each)).reshape(x.shape[0], -1)


class StepInParts:
    """What one step computes for some rows, in parts of `width` features.

    batch: rows of the whole batch; rows: of this copy, `many` of them, as Pallas slices an array.
    """

    def __init__(self, width: int, batch: int, rows: Any, many: int) -> None:
        self.width, self.batch, self.rows, self.many = width, batch, rows, many
        # What was computed, by what it is and which part, so that it is done once. Inside of a kernel's loops and
        # branches everything that was computed outside is known, but not the other way round.
        self._known: list[dict[Any, Any]] = [{}]

    def evaluate(self, equations: Sequence[Any], values: dict[Any, Any]) -> None:
        """Adds the results of equations of the step's program to the values of its variables."""
        for equation in equations:
            results = self._evaluate(equation, [value_of(v, values) for v in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that the kernel runs in a loop or under a condition."""

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            self._known.append({})
            try:
                return function(*arguments)
            finally:
                self._known.pop()

        return run

    def write(self, ref: Any, t: Any, value: Parts, n: Number, part: jax.Array) -> None:
        """Store one part of a value, the n-th, in an array of the GPU's memory; t: which of many, None for a single."""
        if value.used < value.width and value.layout.number > 1:
            raise UnsuitedError("columns between parts that mean nothing")
        ref[(*_which(t), self.rows, pl.ds(n * value.width, value.width))] = part.astype(ref.dtype)

    def whole(self, value: Any, shape: tuple[int, ...]) -> Parts:
        """A value stretched to these features, in parts of its own."""
        layout = self._layout(shape, [value])
        fitted = self._fit(value, shape, layout)
        size = (self.many, layout.width)
        return self._made(shape, layout, lambda x: jnp.broadcast_to(_raised(jnp.asarray(x)), size), [fitted])

    def listed(self, shape: tuple[int, ...], parts: Sequence[jax.Array]) -> Parts:
        """A value whose parts are at hand."""
        layout = self.layout(shape)
        each = layout.counts[0]
        run = Run(each, lambda group, i: _raised(parts[group * each + i]))
        return Parts(shape, layout.width, layout.groups, (run,))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How a value with these features is laid out if nothing asks for another way."""
        size = math.prod(shape)
        if size <= self.width:
            return Layout(columns(size, self.width), 1, (1,))
        if size % self.width:
            raise UnsuitedError("features")
        groups = math.prod(shape[:-1]) if shape[-1] % self.width == 0 else 1
        return Layout(self.width, groups, (size // self.width // groups,))

    def _layout(self, shape: tuple[int, ...], values: Sequence[Any]) -> Layout:
        """Of a value with these features that is made of others."""
        same = [value.layout for value in values if isinstance(value, Parts) and value.shape == shape]
        if same:
            alike = [one for one in same if _sizes(one) == _sizes(same[0])]
            return _finest(alike)
        for value in values:
            if isinstance(value, Parts) and math.prod(value.shape) > 1 and value.shape[:-1] == shape[:-1]:
                return dataclasses.replace(value.layout, width=value.width * shape[-1])
        return self.layout(shape)

    def _made(
        self, shape: tuple[int, ...], layout: Layout, compute: Callable[..., jax.Array], operands: Sequence[Any]
    ) -> Parts:
        """A value each of whose parts is computed from those of operands with the same layout, or from numbers."""
        of = [x.runs if isinstance(x, Parts) else None for x in operands]

        def run(place: int, count: int) -> Run:
            def part(group: Number, i: Number) -> jax.Array:
                pairs = zip(of, operands, strict=True)
                return compute(*(x if runs is None else runs[place].part(group, i) for runs, x in pairs))

            return Run(count, self._once(part))

        single = {id(one): one for x in operands if isinstance(x, Parts) for one in x.single}
        runs = tuple(run(place, count) for place, count in enumerate(layout.counts))
        made = Parts(shape, layout.width, layout.groups, runs, (), tuple(single.values()))
        return dataclasses.replace(made, single=(made,)) if math.prod(shape) == 1 and single else made

    def _once(self, part: Callable[[Number, Number], jax.Array]) -> Callable[[Number, Number], jax.Array]:
        """The same, computed the first time only."""

        def known(group: Number, i: Number) -> jax.Array:
            at = (known, *(x if isinstance(x, int) else id(x) for x in (group, i)))
            for scope in self._known:
                if at in scope:
                    return scope[at][0]
            result = part(group, i)
            self._known[-1][at] = result, group, i  # an `id` is another's once its object is gone
            return result

        return known

    def _fit(self, value: Any, shape: tuple[int, ...], layout: Layout) -> Any:
        """A value in this layout, whose parts can be stretched to (rows, width), or a number."""
        if isinstance(value, Stored):
            return self._load(value, shape, layout)
        if not isinstance(value, Parts):
            return value
        if value.order:
            raise UnsuitedError("rows that do not come first")
        each = shape[-1] if shape else 1
        if math.prod(value.shape) == 1:
            return _repeated(value, layout)
        if math.prod(value.shape) * each == math.prod(shape) and value.shape[-1] == 1:
            value = self._made(value.shape, value.layout, lambda x: _stretched(x, each), [value])
            value = dataclasses.replace(value, width=value.width * each)
        elif value.shape != shape:
            raise UnsuitedError("a stretch")
        return value.laid_out(layout)

    def _load(self, stored: Stored, shape: tuple[int, ...], layout: Layout) -> Parts:
        own, each, width = stored.shape[1:], shape[-1] if shape else 1, layout.width
        at = (*_which(stored.t), pl.ds(0, 1) if stored.shape[0] == 1 else self.rows)

        def read(start: Number, count: int) -> jax.Array:
            if count & (count - 1):
                raise UnsuitedError("columns that are no power of two")
            x = stored.ref[(*at, pl.ds(start, count))]
            return x != 0 if stored.kind == jnp.bool_ else _raised(x)

        def made(read: Callable[[Number], jax.Array]) -> Parts:
            total = sum(layout.counts)
            run = Run(total, self._once(lambda group, i: read(group * total + i)))
            return Parts(own, width, layout.groups, (run,)).laid_out(layout)

        if math.prod(own) == math.prod(shape):
            return made(lambda i: read(i * width, width))
        if math.prod(own) == 1:
            column = Parts(own, 1, 1, (Run(1, self._once(lambda group, i: read(0, 1))),))
            return _repeated(dataclasses.replace(column, single=(column,)), layout)
        if width % each:
            raise UnsuitedError("a stretch of what is stored")
        several = width // each
        if own[-1:] == (1,) and own[:-1] == shape[:-1]:
            return made(lambda i: _stretched(read(i * several, several), each))
        if math.prod(own) == each:

            def copies(i: Number) -> jax.Array:
                x = read(0, each)
                return jnp.broadcast_to(x[:, None, :], (x.shape[0], several, each)).reshape(x.shape[0], -1)

            return made(copies)
        raise UnsuitedError("a stretch of what is stored")

    # Operations

    def _evaluate(self, equation: Any, operands: list[Any]) -> list[Parts]:
        name, params, shapes = equation.primitive.name, equation.params, [v.aval.shape for v in equation.outvars]
        if name == "dot_general":
            return [self._product(*operands, **params)]
        if name == "transpose" and not (isinstance(operands[0], Stored) and operands[0].weights):
            x = operands[0] if isinstance(operands[0], Parts) else self.whole(operands[0], operands[0].shape[1:])
            return [x.turned(params["permutation"])]
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
            return [self._summed_up(values[0]) if name == "cumsum" else self._reduced(values[0], *_REDUCTIONS[name])]
        if name not in _ELEMENTWISE:
            raise UnsuitedError(name)
        return [self._elementwise(equation, operands)]

    def _elementwise(self, equation: Any, operands: list[Any]) -> Parts:
        output, name = equation.outvars[0].aval, equation.primitive.name
        layout = self._layout(output.shape[1:], operands)
        fitted = [self._fit(x, output.shape[1:], layout) for x in operands]
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

        return self._made(output.shape[1:], layout, compute, fitted)

    def _reshaped(self, value: Any, shape: tuple[int, ...]) -> Parts:
        if isinstance(value, Parts) and not value.order:
            if math.prod(value.shape) == math.prod(shape):
                return dataclasses.replace(value, shape=shape)
            if value.shape == shape[:-1]:
                value = dataclasses.replace(value, shape=(*value.shape, 1))
        return self.whole(value, shape)

    def _product(self, left: Any, right: Any, dimension_numbers: Any, **_: Any) -> Parts:
        """A row's features, one group of them for each matrix if there are several, times stored matrices."""
        first = isinstance(right, Stored) and right.weights
        x, weights = (left, right) if first else (right, left)
        (of_x, along), (groups_of_x, groups_of_weights) = (pair if first else pair[::-1] for pair in dimension_numbers)
        if not (isinstance(weights, Stored) and weights.weights) or (isinstance(x, Stored) and x.weights):
            raise UnsuitedError("product of two values")
        if isinstance(x, Stored):
            x = self.whole(x, x.shape[1:])
        order, rank = x.order or tuple(range(len(x.shape) + 1)), len(weights.shape)
        if [order[i] for i in of_x] != [len(x.shape)] or [order[i] for i in groups_of_x] != [*range(1, len(x.shape))]:
            raise UnsuitedError("product over other than the last features")
        if tuple(groups_of_weights) != tuple(range(rank - 2)) or rank > 3:
            raise UnsuitedError("matrices whose groups do not come first")
        across = along[0] == rank - 1  # the matrix is (outputs, inputs)
        outputs, groups = weights.shape[-2 if across else -1], math.prod(x.shape[:-1])
        if x.width < 16:
            raise UnsuitedError("parts narrower than a product's")
        x = x.grouped(groups)
        layout = self.layout((outputs,))
        kind = weights.ref.dtype
        exact = kind if kind == jnp.float64 else jnp.float32
        precision = jax.lax.Precision.HIGHEST if kind == exact else None
        numbers = (((1,), (1 if across else 0,)), ((), ()))
        operand = self._made(x.shape, x.layout, lambda part: _only_used(part, x.used, 0).astype(kind), [x])

        def total(group: Number, n: Number) -> jax.Array:
            found, start = jnp.zeros((self.many, layout.width), exact), 0
            for one in x.single:
                one.every  # noqa: B018  once, before the loop
            for run in operand.runs:

                def add(k: Number, found: jax.Array, run: Run = run, start: int = start) -> jax.Array:
                    at = (pl.ds((start + k) * x.width, x.width), pl.ds(n * layout.width, layout.width))
                    matrix = [np.int32(group) if isinstance(group, int) else group] if rank == 3 else []
                    piece = weights.ref[(*matrix, *(at[::-1] if across else at))]
                    return found + jax.lax.dot_general(run.part(group, k), piece, numbers, precision, exact)

                found, start = self._counted(run.count, isinstance(n, int), add, found), start + run.count
            return found

        shape = (groups, outputs) if rank == 3 else (outputs,)
        made = Parts(shape, layout.width, groups if rank == 3 else 1, (Run(layout.counts[0], self._once(total)),))
        found = (0, len(shape)) if first else (len(shape), 0)
        return dataclasses.replace(made, order=(1, *found) if rank == 3 else found).turned(range(rank))

    def _counted(self, count: int, unrolled: bool, add: Callable[[Number, Any], Any], first: Any) -> Any:
        """``add(i, ...)`` for i < count, each after the other: in the program, or in a loop of the kernel."""
        several = count if unrolled or count <= _AT_ONCE else math.gcd(count, _AT_ONCE)
        turn = lambda i, found: functools.reduce(lambda x, k: add(i * several + k, x), range(several), found)  # noqa: E731
        return turn(0, first) if several == count else jax.lax.fori_loop(0, count // several, self.inside(turn), first)

    def _reduced(
        self, value: Parts, reduce: Callable[..., Any], combine: Callable[..., Any], neutral: float
    ) -> Parts:  # fmt: skip
        """Over the last features."""
        *shape, each = value.shape
        used, width = value.used, value.width
        if each == 1:
            return dataclasses.replace(value, shape=tuple(shape))
        if each >= used and each % used == 0:
            groups = math.prod(shape)
            by_group = value.grouped(groups)
            column = lambda x: reduce(_only_used(x, used, neutral), axis=1, keepdims=True)  # noqa: E731
            own = self._made(value.shape, by_group.layout, column, [by_group])

            def total(_: Number, i: Number) -> jax.Array:
                return functools.reduce(combine, [run.part(i, k) for run in own.runs for k in range(run.count)])

            made = Parts(tuple(shape), 1, 1, (Run(groups, self._once(total)),), (), value.single)
            return dataclasses.replace(made, single=(made,)) if groups == 1 else made
        if width % each:
            raise UnsuitedError("a reduction over a piece of a part")
        layout = dataclasses.replace(value.layout, width=width // each)
        return self._made(
            tuple(shape), layout, lambda x: reduce(x.reshape(x.shape[0], -1, each), axis=2), [value]
        )  # fmt: skip

    def _summed_up(self, value: Parts) -> Parts:
        """The cumulative sum along the last features."""
        each = value.shape[-1]
        if value.used < each or (value.used > each and value.width % each):
            raise UnsuitedError("a cumulative sum over several parts")
        inner = (1, value.width) if value.used == each else (value.width // each, each)
        compute = lambda x: jax.lax.cumsum(x.reshape(x.shape[0], *inner), 2).reshape(x.shape)  # noqa: E731
        return self._made(value.shape, value.layout, compute, [value])


# Arrays around a kernel


def in_parts(widths: Sequence[int], attempt: Callable[[int], Any]) -> Any:
    """What `attempt` makes with parts of so many features, the first of the widths that the shapes of a step allow."""
    reason = UnsuitedError()
    for width in widths:
        try:
            return attempt(width)
        except UnsuitedError as error:
            reason = error
    raise reason


def padded(x: jax.Array, axes: Sequence[int], width: int) -> jax.Array:
    """Zeros behind the features of some axes, to full parts."""
    extra = [(0, columns(n, width) - n if i in axes else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, extra) if any(n for _, n in extra) else x


def flat(x: jax.Array, leading: int, width: int, rows: int) -> jax.Array:
    """Features flat behind `leading` dimensions, the rows last among these and, unless there is one, so many."""
    x = x.astype(jnp.int8) if x.dtype == jnp.bool_ else x
    x = padded(x.reshape(*x.shape[:leading], -1), [leading], width)
    missing = 0 if x.shape[-2] == 1 else rows - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (leading - 1) + [(0, missing), (0, 0)]) if missing else x


def flat_result(shape: Any, leading: Sequence[int], width: int, rows: int) -> jax.ShapeDtypeStruct:
    """The array that a kernel writes for a value of this shape (batch, ...) and dtype."""
    kind = jnp.int8 if shape.dtype == jnp.bool_ else shape.dtype
    return jax.ShapeDtypeStruct((*leading, rows, columns(math.prod(shape.shape[1:]), width)), kind)


def unflat(x: jax.Array, shape: Any) -> jax.Array:
    """A kernel's result (..., rows, columns) as the value (..., batch, ...) that it is."""
    x = x[..., : shape.shape[0], : math.prod(shape.shape[1:])]
    return x.reshape(*x.shape[:-2], *shape.shape).astype(shape.dtype)


def value_of(variable: Any, values: dict[Any, Any]) -> Any:
    return variable.val if isinstance(variable, core.Literal) else values[variable]


def columns(size: int, width: int) -> int:
    """Columns of an array with this many features: those of its parts, at least."""
    return size if size == 1 or size > width else max(16, 1 << (size - 1).bit_length())


def _sizes(layout: Layout) -> tuple[int, int, int]:
    return layout.width, layout.groups, sum(layout.counts)


def _repeated(column: Parts, layout: Layout) -> Parts:
    """A value of one column wherever a part is asked for."""
    only = column.runs[0].part
    runs = tuple(Run(count, lambda group, i: only(0, 0)[:, :1]) for count in layout.counts)
    return dataclasses.replace(column, width=layout.width, groups=layout.groups, runs=runs)


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


def _cut(value: Parts, shapes: Sequence[tuple[int, ...]]) -> list[Parts]:
    """The last features cut before some of them."""
    groups = math.prod(value.shape[:-1])
    if any(shape[-1] % value.width for shape in shapes):
        raise UnsuitedError("a cut through a part")
    value, start, found = value.grouped(groups), 0, []
    for shape in shapes:
        count = shape[-1] // value.width
        found.append(dataclasses.replace(value, shape=shape, runs=_between(value.runs, start, count)))
        start += count
    return found


def _between(runs: Sequence[Run], start: int, count: int) -> tuple[Run, ...]:
    """`count` parts from `start` on."""
    found, end = [], start + count
    for run in runs:
        first, last = max(start, 0), min(end, run.count)
        if first < last:
            found.append(run.cut(first, last - first))
        start, end = start - run.count, end - run.count
    return tuple(found)


def _joined(values: Sequence[Parts], shape: tuple[int, ...]) -> Parts:
    """The last features of several values, one after the other."""
    width, groups = values[0].width, math.prod(shape[:-1])
    if any(value.width != width or value.shape[-1] % width for value in values):
        raise UnsuitedError("parts of different width")
    same = [value.grouped(groups) for value in values]
    single = tuple(one for value in values for one in value.single)
    return Parts(shape, width, groups, tuple(run for value in same for run in value.runs), (), single)
