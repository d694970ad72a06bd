"""A loop over time whose steps are a few kernels of a GPU, one for each product that has to wait for another.

XLA launches a kernel for every product of a step, and others for the norms, activations and draws between. Here a step
is cut where a product, or a sum over all features, needs every feature of what another product gave::

    kernel 1    three products of the state and the action
    kernel 2    their norms and activations; the block-linear product
    kernel 3    its norm and activation; the product of the gates; the gates; the next deter
    ...

Every copy of a kernel makes one part of the results for some rows of the batch. What lies between two products it
computes itself, for as many features as its product reads: again and again the same in every copy, which costs less
than another launch. States and outputs of all steps are written where they stay. The kernels are made from the traced
step, whatever that computes (Pallas, for its Triton compiler); `parts` has the values inside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend import core

from dreamer.one_kernel import Step, Values, cost_of_products, traced_step, weights_of
from dreamer.parts import (
    Parts,
    StepInParts,
    Stored,
    UnsuitedError,
    divided_by,
    flat,
    flat_result,
    in_parts,
    padded,
    unflat,
    value_of,
)  # fmt: skip

#: Rows in one copy of a kernel: at least as many as the GPU's matrix units take.
_FEWEST_ROWS, _MOST_ROWS = 16, 64
#: Rows times weights of a step, beyond which the GPU is busy with products, for which a library needs less than half
#: the time of these kernels: then fewer launches do not make up for it.
MOST_PRODUCTS = 8_000_000_000


def loop_in_few_kernels(
    step: Step, state: Values, inputs: Values, length: int, reverse: bool, interpret: bool = False
) -> tuple[list[Any], list[Any]]:
    """`jax.lax.scan` of a step over lists of arrays: state (M, ...), inputs (length, M, ...).

    interpret: run the kernels on a CPU, slowly, as tests do. UnsuitedError if the step cannot be a few kernels, or had
    better not.
    """
    traced = traced_step(step, state, inputs)
    if state[0].shape[0] * sum(v.aval.size for v in weights_of(traced.jaxpr)) > MOST_PRODUCTS:
        raise UnsuitedError("many products")

    def attempt(width: int) -> tuple[list[Any], list[Any]]:
        return _Kernels(_by_parts(traced, width), width, len(state), length, reverse, interpret).run(state, inputs)

    # Where there are few rows, a step waits for weights: with narrow parts, more copies of a kernel share in reading.
    return in_parts((32, 64, 16) if state[0].shape[0] <= _FEWEST_ROWS else (64, 32, 16), attempt)


# --- Cutting a step ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One kernel: what it writes, in lists of what is made of the same products; the weights that each list takes, in
    numbers; all equations; what it reads."""

    written: tuple[tuple[Any, ...], ...]
    weights: tuple[float, ...]
    equations: tuple[Any, ...]
    read: tuple[Any, ...]


def _by_parts(traced: core.ClosedJaxpr, width: int) -> core.ClosedJaxpr:
    """The same program, which reduces many features part by part first, so that each part can be where it was made."""

    def run(*values: Any) -> list[Any]:
        known = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        known |= dict(zip(traced.jaxpr.invars, values, strict=True))
        for equation in traced.jaxpr.eqns:
            operands = [value_of(v, known) for v in equation.invars]
            parameters = equation.primitive.get_bind_params(equation.params)
            if _reduces_last(equation) and (x := operands[0]).shape[-1] > width:
                if x.shape[-1] % width:
                    raise UnsuitedError("features")
                x = x.reshape(*x.shape[:-1], -1, width)
                operands = [equation.primitive.bind(x, **parameters | {"axes": (x.ndim - 1,)})]
            results = equation.primitive.bind(*operands, **parameters)
            results = results if equation.primitive.multiple_results else [results]
            known.update(zip(equation.outvars, results, strict=True))
        return [value_of(v, known) for v in traced.jaxpr.outvars]

    return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in traced.jaxpr.invars))


def _reduces_last(equation: Any) -> bool:
    x = equation.invars[0].aval if equation.primitive.name in ("reduce_sum", "reduce_max") else None
    return x is not None and x.ndim > 1 and equation.params["axes"] == (x.ndim - 1,)


def _stages(jaxpr: core.Jaxpr, values: dict[Any, Any]) -> list[_Stage]:
    """The kernels that compute a step's results, in turn. values: of all variables, not computed."""
    # When a value is there: 2k, part by part where kernel k makes it; 2k + 1, wherever it is asked for after kernel k.
    when: dict[Any, int] = dict.fromkeys([*jaxpr.constvars, *jaxpr.invars], 1)
    maker: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        time = max([1, *(when[v] for v in _variables(equation))])
        if equation.primitive.name == "dot_general":
            time = time // 2 * 2 + 2
        elif _reduces_last(equation) and _several_parts(values[equation.invars[0]]):
            time |= 1
        when.update(dict.fromkeys(equation.outvars, time))
        maker |= dict.fromkeys(equation.outvars, equation)

    def kept(v: Any) -> list[Any]:
        """What is stored for v: its rows first, not a wider copy of its numbers, and not joined."""
        name, of = maker[v].primitive.name, [x for x in _variables(maker[v]) if when[x] == when[v] and x in maker]
        narrow = name == "convert_element_type" and maker[v].invars[0].aval.dtype.itemsize < v.aval.dtype.itemsize
        if (
            v not in jaxpr.outvars
            and of
            and (narrow or name == "concatenate" or (name == "transpose" and values[v].order))
        ):
            return [one for x in of for one in kept(x)]
        return [v]

    used_later = {
        v: None for one in jaxpr.eqns for v in _variables(one)
        if v in maker and when[v] % 2 == 0 and when[one.outvars[0]] > when[v]
    }  # fmt: skip
    stored = dict.fromkeys([*(v for v in jaxpr.outvars if v in maker), *(one for v in used_later for one in kept(v))])
    kernel = {v: (when[v] + 1) // 2 for v in stored}
    return [_stage(k, kernel, when, maker, values) for k in sorted(set(kernel.values()))]


def _stage(
    number: int, kernel: dict[Any, int], when: dict[Any, int], maker: dict[Any, Any], values: dict[Any, Any]
) -> _Stage:
    """The kernel of this number. kernel: of each stored value; when: each value is there; maker: its equation."""
    pieces: dict[Any, dict[Any, float]] = {}
    equations: dict[int, Any] = {}
    read: dict[Any, None] = {}

    def visit(v: Any) -> dict[Any, float]:
        """The products of this kernel, or pieces of them, that v is made of, and how many weights each takes."""
        if v not in maker or kernel.get(v, number) < number:
            read[v] = None
            return {}
        if v not in pieces:
            made = maker[v]
            found = {piece: size for x in _variables(made) for piece, size in visit(x).items()}
            if made.primitive.name == "dot_general" and when[v] == 2 * number:
                found = {v: sum(x.aval.size for x in made.invars if getattr(values[x], "weights", False))}
            elif made.primitive.name == "split" and found:
                found = {v: sum(found.values()) * v.aval.size / made.invars[0].aval.size}
            pieces[v] = found
            equations[id(made)] = made
        return pieces[v]

    lists: list[tuple[dict[Any, float], list[Any]]] = []
    for v in (v for v, k in kernel.items() if k == number):
        joined = visit(v), [v]
        for other in [one for one in lists if one[0].keys() & joined[0].keys()]:
            lists.remove(other)
            joined = joined[0] | other[0], [*other[1], *joined[1]]
        lists.append(joined)
    weights = tuple(sum(found.values()) for found, _ in lists)
    return _Stage(tuple(tuple(one) for _, one in lists), weights, tuple(equations.values()), tuple(read))


def _variables(equation: Any) -> list[Any]:
    return [v for v in equation.invars if not isinstance(v, core.Literal)]


def _several_parts(value: Any) -> bool:
    """Whether the last features are more than one part."""
    return isinstance(value, Parts) and value.layout.number > math.prod(value.shape[:-1])


# --- Running it ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """What some copies of a kernel write, from the first on: one part each of these values.

    weights: that a copy reads, in numbers.
    """

    written: tuple[Any, ...]
    first: int
    copies: int
    weights: float


class _Kernels:
    """One traced step, made into kernels with parts of `width` features, and the loop around them.

    The results of all steps are arrays that the loop carries. A state is the result of the step before, so the array of
    a state has one more, which the loop begins with.
    """

    def __init__(
        self, traced: core.ClosedJaxpr, width: int, states: int, length: int, reverse: bool, interpret: bool
    ) -> None:
        jaxpr = traced.jaxpr
        self._jaxpr, self._constants, self._width, self._length = jaxpr, traced.consts, width, length
        self._reverse, self._interpret = reverse, interpret
        self._carried, self._moving = jaxpr.invars[:states], jaxpr.invars[states:]
        self._weights, self._batch = weights_of(jaxpr), jaxpr.invars[0].aval.shape[0]
        self._bytes = max([0, *(v.aval.dtype.itemsize for v in self._weights)])
        self._many = min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (self._batch - 1).bit_length()))
        self._tiles = -(-self._batch // self._many)
        made = {v for one in jaxpr.eqns for v in one.outvars}
        if any(isinstance(v, core.Literal) or v not in made.union(jaxpr.invars) for v in jaxpr.outvars):
            raise UnsuitedError("a constant result")
        if len(made.intersection(jaxpr.outvars[:states])) < states:
            raise UnsuitedError("states that no step makes")
        self._results = [v for v in dict.fromkeys(jaxpr.outvars) if v in made]
        #: The state's results by its variables before the step.
        self._next = dict(zip(self._carried, jaxpr.outvars, strict=False))
        everything = {v: self._stored(v, v.aval, 0) for v in (*jaxpr.constvars, *jaxpr.invars)}
        self._in_parts().evaluate(jaxpr.eqns, everything)
        self._stages = [(stage, self._tasks(stage)) for stage in _stages(jaxpr, everything)]

    def run(self, state: Values, inputs: Values) -> tuple[list[Any], list[Any]]:
        """The last state, and the outputs of all steps."""
        width, rows, states = self._width, self._many * self._tiles, list(self._next.values())
        arrays = {
            v: padded(x, (x.ndim - 2, x.ndim - 1), width) if v in self._weights else flat(x, 1, width, rows)
            for v, x in zip(self._jaxpr.constvars, self._constants, strict=True)
        }
        arrays |= {v: flat(x, 2, width, rows) for v, x in zip(self._moving, inputs, strict=True)}
        begin = {v: flat(x, 1, width, rows) for v, x in zip(states, state, strict=True)}

        def empty(v: Any) -> jax.Array:
            shape = flat_result(v.aval, [self._length + (v in begin)], width, rows)
            x = jnp.zeros(shape.shape, shape.dtype)
            return x.at[self._length if self._reverse else 0].set(begin[v].astype(x.dtype)) if v in begin else x

        def step(turn: jax.Array, written: list[jax.Array]) -> list[jax.Array]:
            known = arrays | dict(zip(self._results, written, strict=True))
            for stage, tasks in self._stages:
                known |= self._launch(stage, tasks, jnp.reshape(turn, 1), known)
            return [known[v] for v in self._results]

        found = jax.lax.fori_loop(0, self._length, step, [empty(v) for v in self._results])
        every = dict(zip(self._results, found, strict=True))
        last = [unflat(every[v][0 if self._reverse else -1], v.aval) for v in states]
        earlier, later = slice(None, -1), slice(1, None)
        of_step, before = (earlier, later) if self._reverse else (later, earlier)

        def output(v: Any) -> jax.Array:
            if v in self._moving:
                return inputs[self._moving.index(v)]
            if v in self._next:
                return unflat(every[self._next[v]][before], v.aval)
            return unflat(every[v][of_step if v in begin else slice(None)], v.aval)

        return last, [output(v) for v in self._jaxpr.outvars[len(states) :]]

    def _in_parts(self, rows: Any = None) -> StepInParts:
        return StepInParts(self._width, self._batch, rows, self._many)

    def _stored(self, v: Any, ref: Any, t: Any) -> Stored:
        """A variable in memory at step t."""
        after = 0 if self._reverse else 1
        if v in self._next:
            place = t + 1 - after
        elif v in self._next.values():
            place = t + after
        else:
            place = t if v in self._moving or v in self._results else None
        return Stored(ref, v.aval.shape, v.aval.dtype, v in self._weights, place)

    def _evaluated(self, stage: _Stage, refs: Mapping[Any, Any], t: Any, now: StepInParts) -> dict[Any, Parts]:
        """What a kernel writes, not yet computed."""
        values = {v: self._stored(v, refs[self._next.get(v, v)], t) for v in stage.read}
        now.evaluate(stage.equations, values)
        return {v: now.whole(values[v], v.aval.shape[1:]) for one in stage.written for v in one}

    def _tasks(self, stage: _Stage) -> list[_Task]:
        """Who writes what."""
        shapes = {self._next.get(v, v): v.aval for v in stage.read}
        values, found, first = self._evaluated(stage, shapes, 0, self._in_parts()), [], 0
        for written, weights in zip(stage.written, stage.weights, strict=True):
            alike: dict[int, list[Any]] = {}
            for v in written:
                if len(values[v].runs) > 1:
                    raise UnsuitedError("a joined result")
                alike.setdefault(values[v].layout.number, []).append(v)
            for copies, together in alike.items():
                found.append(_Task(tuple(together), first, copies, weights / copies))
                first += copies
        return found

    def _launch(
        self, stage: _Stage, tasks: Sequence[_Task], turn: jax.Array, known: Mapping[Any, jax.Array]
    ) -> dict[Any, jax.Array]:
        """What a kernel writes. turn: of the loop (1,); known: what is in memory."""
        written = [v for one in stage.written for v in one]
        # The array with all steps of a state is read and written, and must not be passed twice.
        read = list(dict.fromkeys([*(self._next.get(v, v) for v in stage.read), *(v for v in written if v in known)]))

        def body(turn: Any, *refs: Any) -> None:
            outputs = dict(zip(written, refs[len(read) :], strict=True))
            t = self._length - 1 - turn[0] if self._reverse else turn[0]
            self._write(stage, tasks, t, dict(zip(read, refs, strict=False)), outputs)

        # For those who read compiled programs: bytes of weights that a copy reads.
        body.__name__ = name = f"step_{self._bytes * max(round(task.weights) for task in tasks)}"
        kernel = pl.pallas_call(
            body,
            out_shape=[
                jax.ShapeDtypeStruct(known[v].shape, known[v].dtype)
                if v in known
                else flat_result(v.aval, [], self._width, self._many * self._tiles)
                for v in written
            ],
            grid=(tasks[-1].first + tasks[-1].copies, self._tiles),
            input_output_aliases={1 + read.index(v): i for i, v in enumerate(written) if v in known},
            interpret=self._interpret,
            compiler_params=None if self._interpret else triton.CompilerParams(num_warps=4, num_stages=3),
            name=name,
            cost_estimate=cost_of_products(self._batch * sum(stage.weights), self._bytes * sum(stage.weights)),
        )
        return dict(zip(written, kernel(turn, *(known[v] for v in read)), strict=True))

    def _write(
        self, stage: _Stage, tasks: Sequence[_Task], t: Any, read: Mapping[Any, Any], written: Mapping[Any, Any]
    ) -> None:
        """One copy of a kernel."""
        rows, copy = pl.ds(pl.program_id(1) * self._many, self._many), pl.program_id(0)
        now = self._in_parts(rows)
        values = self._evaluated(stage, read, t, now)
        for task in tasks:

            def write(task: _Task = task) -> None:
                for v in task.written:
                    value, n = values[v], copy - task.first
                    run = value.runs[0]
                    group, i = divided_by(n, run.count) if value.groups > 1 else (0, n)
                    now.write(written[v], self._stored(v, None, t).t, value, n, run.part(group, i))

            if len(tasks) == 1:
                write()
            else:
                pl.when((copy >= task.first) & (copy < task.first + task.copies))(now.inside(write))
