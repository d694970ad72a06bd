"""A loop over time as one kernel of a GPU: the state stays in registers, time runs inside.

A loop of XLA launches every operation of every step. Where the weights that it reads are few, the launches take much
longer than the arithmetic; then one kernel that does all steps, started once, is many times as fast. The rows of a
batch do not know each other, so the kernel runs once for every `parts.ROWS` of them, side by side on the GPU's
multiprocessors, and no two of these have to wait for each other. It is made from the traced step, whatever that
computes (Pallas, for its Triton compiler); `parts` has the values inside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend import core

from dreamer.parts import ROWS, Parts, StepInParts, Stored, UnsuitedError, columns, parts_of

Values = Sequence[Any]
Step = Callable[[Values, Values], tuple[Values, Values]]
#: Features in a part: the first that the shapes of a step allow.
WIDTHS = (64, 32, 16)
#: Products of parts in a step, beyond which a loop is better off as several kernels. Each reads a piece of the weights:
#: 256 of them, in bfloat16, are 2 MB, for which one multiprocessor takes 20 us, at about 100 GB/s.
MOST_PIECES = 256


def loop_in_one_kernel(
    step: Step, state: Values, inputs: Values, length: int, reverse: bool, interpret: bool = False
) -> tuple[list[Any], list[Any]]:
    """`jax.lax.scan` of a step over lists of arrays: state (M, ...), inputs (length, M, ...).

    interpret: run the kernel on a CPU, slowly, as tests do. UnsuitedError if the step cannot be one kernel.
    """
    traced = jax.make_jaxpr(step)(list(state), [x[0] for x in inputs])
    batches = {x.shape[:1] for x in (*state, *(x[0] for x in inputs))}
    if not state or len(batches) != 1 or batches == {()}:
        raise UnsuitedError("arrays without rows")
    reason = UnsuitedError()
    for width in WIDTHS:
        try:
            return _Kernel(traced, width, len(state), length, reverse).run(list(state), list(inputs), interpret)
        except UnsuitedError as error:
            reason = error
    raise reason


class _Kernel:
    """One traced step, made into a kernel with parts of `width` features."""

    def __init__(self, traced: core.ClosedJaxpr, width: int, states: int, length: int, reverse: bool) -> None:
        self._jaxpr, self._constants, self._width = traced.jaxpr, traced.consts, width
        self._states, self._length, self._reverse = states, length, reverse
        self._batch = traced.jaxpr.invars[0].aval.shape[0]
        products = [one for one in traced.jaxpr.eqns if one.primitive.name == "dot_general"]
        self._weights = {v for one in products for v in one.invars if v in traced.jaxpr.constvars}
        if sum(v.aval.size for v in self._weights) > MOST_PIECES * width**2:
            raise UnsuitedError("too many weights")
        #: For those who read compiled programs: steps, and bytes of weights read in each.
        self._name = f"loop_{length}_{sum(v.aval.size * v.aval.dtype.itemsize for v in self._weights)}"

    def run(self, state: list[Any], inputs: list[Any], interpret: bool) -> tuple[list[Any], list[Any]]:
        """The last state, and the outputs of all steps."""
        shapes, width = [v.aval for v in self._jaxpr.outvars], self._width
        rows = -(-self._batch // ROWS) * ROWS
        constants = [
            self._padded(x, (x.ndim - 2, x.ndim - 1)) if v in self._weights else self._flat(x, 1)
            for v, x in zip(self._jaxpr.constvars, self._constants, strict=True)
        ]

        def result(shape: Any, each: bool) -> jax.ShapeDtypeStruct:
            kind = jnp.int8 if shape.dtype == jnp.bool_ else shape.dtype
            size = columns(math.prod(shape.shape[1:]), width)
            return jax.ShapeDtypeStruct((*([self._length] if each else []), rows, size), kind)

        def body(*refs: Any) -> None:
            self._body(*refs)

        body.__name__ = self._name  # by which newer versions of JAX call the kernel
        kernel = pl.pallas_call(
            body,
            out_shape=[result(shape, i >= self._states) for i, shape in enumerate(shapes)],
            grid=(rows // ROWS,),
            interpret=interpret,
            compiler_params=None if interpret else triton.CompilerParams(num_warps=8, num_stages=1),
            name=self._name,
        )
        found = kernel(*constants, *(self._flat(x, 1) for x in state), *(self._flat(x, 2) for x in inputs))

        def shaped(x: jax.Array, shape: Any) -> jax.Array:
            x = x[..., : self._batch, : math.prod(shape.shape[1:])]
            return x.reshape(*x.shape[:-2], *shape.shape).astype(shape.dtype)

        every = [shaped(x, shape) for x, shape in zip(found, shapes, strict=True)]
        return every[: self._states], every[self._states :]

    def _padded(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        extra = [(0, columns(n, self._width) - n if i in axes else 0) for i, n in enumerate(x.shape)]
        return jnp.pad(x, extra) if any(n for _, n in extra) else x

    def _flat(self, x: jax.Array, leading: int) -> jax.Array:
        """Features flat behind `leading` dimensions, the rows last among these and a multiple of `ROWS`."""
        x = x.astype(jnp.int8) if x.dtype == jnp.bool_ else x
        x = self._padded(x.reshape(*x.shape[:leading], -1), [leading])
        missing = 0 if x.shape[-2] == 1 else -x.shape[-2] % ROWS
        return jnp.pad(x, [(0, 0)] * (leading - 1) + [(0, missing), (0, 0)]) if missing else x

    def _body(self, *refs: Any) -> None:
        """All steps of the rows of this copy."""
        jaxpr, states = self._jaxpr, self._states
        variables = [*jaxpr.constvars, *jaxpr.invars]
        stored = {v: Stored(ref, v.aval.shape, v.aval.dtype) for v, ref in zip(variables, refs, strict=False)}
        results, carried, rows = refs[len(variables) :], jaxpr.invars[:states], pl.ds(pl.program_id(0) * ROWS, ROWS)
        stored |= {v: dataclasses.replace(stored[v], moves=True) for v in jaxpr.invars[states:]}
        kinds = [v.aval.dtype for v in carried]

        def kept(value: Parts, kind: Any) -> list[jax.Array]:
            return [part.astype(kind) for part in value.parts]

        def step(turn: jax.Array, state: list[list[jax.Array]]) -> list[list[jax.Array]]:
            now = StepInParts(self._width, self._batch, rows, self._length - 1 - turn if self._reverse else turn)
            found = now.evaluate(jaxpr, stored | dict(zip(carried, map(parts_of, carried, state), strict=True)))
            for ref, value in zip(results[states:], found[states:], strict=True):
                now.write(ref, value)
            after = [kept(value, kind) for value, kind in zip(found, kinds, strict=False)]
            if [[x.shape for x in parts] for parts in after] != [[x.shape for x in parts] for parts in state]:
                raise UnsuitedError("states of other parts")
            return after

        before = StepInParts(self._width, self._batch, rows, None)
        first = [kept(before.whole(stored[v], v.aval.shape[1:]), kind) for v, kind in zip(carried, kinds, strict=True)]
        last = jax.lax.fori_loop(0, self._length, step, first)
        for ref, v, parts in zip(results[:states], carried, last, strict=True):
            before.write(ref, parts_of(v, parts))
