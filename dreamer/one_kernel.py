"""A loop over time as one kernel of a GPU: the state stays in registers, time runs inside.

A loop of XLA launches every operation of every step. Where the weights that it reads are few, the launches take much
longer than the arithmetic; then one kernel that does all steps, started once, is many times as fast. The rows of a
batch do not know each other, so the kernel runs once for every `ROWS` of them, side by side on the GPU's
multiprocessors, and no two of these have to wait for each other. It is made from the traced step, whatever that
computes (Pallas, for its Triton compiler); `parts` has the values inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend import core

from dreamer.parts import (
    Parts,
    StepInParts,
    Stored,
    UnsuitedError,
    flat,
    flat_result,
    in_parts,
    padded,
    unflat,
    value_of,
)  # fmt: skip

Values = Sequence[Any]
Step = Callable[[Values, Values], tuple[Values, Values]]
#: Rows of a batch in one copy of the kernel: as few as the GPU's matrix units take.
ROWS = 16
#: Products of parts in a step, beyond which a loop is better off as several kernels. Each reads a piece of the weights:
#: 256 of them, in bfloat16, are 2 MB, for which one multiprocessor takes 20 us, at about 100 GB/s.
MOST_PIECES = 256


def loop_in_one_kernel(
    step: Step, state: Values, inputs: Values, length: int, reverse: bool, interpret: bool = False
) -> tuple[list[Any], list[Any]]:
    """`jax.lax.scan` of a step over lists of arrays: state (M, ...), inputs (length, M, ...).

    interpret: run the kernel on a CPU, slowly, as tests do. UnsuitedError if the step cannot be one kernel.
    """
    traced = traced_step(step, state, inputs)

    def attempt(width: int) -> tuple[list[Any], list[Any]]:
        return _Kernel(traced, width, len(state), length, reverse).run(list(state), list(inputs), interpret)

    return in_parts((64, 32, 16), attempt)


def traced_step(step: Step, state: Values, inputs: Values) -> core.ClosedJaxpr:
    """A step's program; UnsuitedError where arrays do not have the same rows."""
    batches = {x.shape[:1] for x in (*state, *(x[0] for x in inputs))}
    if not state or len(batches) != 1 or batches == {()}:
        raise UnsuitedError("arrays without rows")
    return jax.make_jaxpr(step)(list(state), [x[0] for x in inputs])


def weights_of(jaxpr: core.Jaxpr) -> set[Any]:
    """The constants of a program that values are multiplied by as matrices."""
    products = [one for one in jaxpr.eqns if one.primitive.name == "dot_general"]
    return {v for one in products for v in one.invars if v in jaxpr.constvars}


def cost_of_products(products: float, bytes_read: float) -> pl.CostEstimate:
    """Of a kernel with so many multiplications of rows by weights; what else it does costs little."""
    return pl.CostEstimate(flops=round(2 * products), transcendentals=0, bytes_accessed=round(bytes_read))


class _Kernel:
    """One traced step, made into a kernel with parts of `width` features."""

    def __init__(self, traced: core.ClosedJaxpr, width: int, states: int, length: int, reverse: bool) -> None:
        self._jaxpr, self._constants, self._width = traced.jaxpr, traced.consts, width
        self._states, self._length, self._reverse = states, length, reverse
        self._batch = traced.jaxpr.invars[0].aval.shape[0]
        self._weights = weights_of(traced.jaxpr)
        weights = sum(v.aval.size for v in self._weights)
        if weights > MOST_PIECES * width**2:
            raise UnsuitedError("too many weights")
        read = sum(v.aval.size * v.aval.dtype.itemsize for v in self._weights)
        #: For those who read compiled programs: steps, and bytes of weights read in each.
        self._name = f"loop_{length}_{read}"
        self._cost = cost_of_products(length * self._batch * weights, length * read)

    def run(self, state: list[Any], inputs: list[Any], interpret: bool) -> tuple[list[Any], list[Any]]:
        """The last state, and the outputs of all steps."""
        shapes, width = [v.aval for v in self._jaxpr.outvars], self._width
        rows = -(-self._batch // ROWS) * ROWS
        constants = [
            padded(x, (x.ndim - 2, x.ndim - 1), width) if v in self._weights else flat(x, 1, width, rows)
            for v, x in zip(self._jaxpr.constvars, self._constants, strict=True)
        ]

        def body(*refs: Any) -> None:
            self._body(*refs)

        body.__name__ = self._name  # by which newer versions of JAX call the kernel
        kernel = pl.pallas_call(
            body,
            out_shape=[
                flat_result(shape, [self._length] if i >= self._states else [], width, rows)
                for i, shape in enumerate(shapes)
            ],
            grid=(rows // ROWS,),
            interpret=interpret,
            compiler_params=None if interpret else triton.CompilerParams(num_warps=8, num_stages=1),
            name=self._name,
            cost_estimate=self._cost,
        )
        before = [flat(x, 1, width, rows) for x in state]
        found = kernel(*constants, *before, *(flat(x, 2, width, rows) for x in inputs))
        every = [unflat(x, shape) for x, shape in zip(found, shapes, strict=True)]
        return every[: self._states], every[self._states :]

    def _body(self, *refs: Any) -> None:
        """All steps of the rows of this copy."""
        jaxpr, states = self._jaxpr, self._states
        variables, carried = [*jaxpr.constvars, *jaxpr.invars], jaxpr.invars[:states]
        results, rows = refs[len(variables) :], pl.ds(pl.program_id(0) * ROWS, ROWS)
        kinds = [v.aval.dtype for v in carried]

        def stored(t: Any) -> dict[Any, Stored]:
            moving = set(jaxpr.invars[states:])
            return {
                v: Stored(ref, v.aval.shape, v.aval.dtype, v in self._weights, t if v in moving else None)
                for v, ref in zip(variables, refs, strict=False)
            }

        def write(now: StepInParts, ref: Any, value: Parts, t: Any = None) -> None:
            for n, part in enumerate(value.every):
                now.write(ref, t, value, n, part)

        def kept(value: Parts, kind: Any) -> list[jax.Array]:
            return [part.astype(kind) for part in value.every]

        def step(turn: jax.Array, state: list[list[jax.Array]]) -> list[list[jax.Array]]:
            now = StepInParts(self._width, self._batch, rows, ROWS)
            t = self._length - 1 - turn if self._reverse else turn
            of_state = {v: now.listed(v.aval.shape[1:], x) for v, x in zip(carried, state, strict=True)}
            values = stored(t) | of_state
            now.evaluate(jaxpr.eqns, values)
            found = [now.whole(value_of(v, values), v.aval.shape[1:]) for v in jaxpr.outvars]
            for ref, value in zip(results[states:], found[states:], strict=True):
                write(now, ref, value, t)
            after = [kept(value, kind) for value, kind in zip(found, kinds, strict=False)]
            if [[x.shape for x in parts] for parts in after] != [[x.shape for x in parts] for parts in state]:
                raise UnsuitedError("states of other parts")
            return after

        before, given = StepInParts(self._width, self._batch, rows, ROWS), stored(None)
        first = [kept(before.whole(given[v], v.aval.shape[1:]), v.aval.dtype) for v in carried]
        last = jax.lax.fori_loop(0, self._length, step, first)
        for ref, v, parts in zip(results[:states], carried, last, strict=True):
            write(before, ref, before.listed(v.aval.shape[1:], parts))
