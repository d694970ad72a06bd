"""Scans that leave to the loop only what needs the step before; everything else is done for all steps at once.

A scan written plainly computes a step's every operation in the loop, keeps every number that the backward pass needs,
step by step, and there adds to the gradient of every weight in each step. On an accelerator each of these is a launch
of a kernel, 64 times and more. But most of them do not depend on the step before: what reads the inputs alone, such as
random numbers; once all states are known, every activation; once all cotangents are known, every weight's gradient::

    forward     inputs ----all steps at once----> what they give        loop: states
    backward    states ----all steps at once----> activations           loop: cotangents of the states
                both ------all steps at once----> gradients of weights and inputs

What may leave the loop is found in the traced program (a jaxpr), so that a step is written as if there were no loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from dreamer import features, kernels

Values = Sequence[Any]
Step = Callable[[Any, Any], tuple[Any, Any]]
#: Operations that call an inner program, and those that also say how it is to be differentiated.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call"}


def plain_scan(step: Step, state: Any, inputs: Any, length: int, remat: bool) -> Any:
    body = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(body, state, inputs, length=length)[1]


@kernels.rewrite(plain=plain_scan, on=kernels.accelerator)
def scan(step: Step, state: Any, inputs: Any, length: int, remat: bool) -> Any:
    """``state, outputs = step(state, inputs)`` along inputs (length, ...): the outputs of all steps (length, ...).

    remat: recompute the steps in the backward pass, which this form always does.
    """
    first = jax.tree.map(lambda x: x[0], inputs)
    traced, (_, shapes) = jax.make_jaxpr(step, return_shape=True)(state, first)
    loop = _Loop(traced.jaxpr, len(jax.tree.leaves(state)), length, step.__qualname__.split(".<locals>")[0])
    outputs = loop.run(traced.consts, jax.tree.leaves(state), jax.tree.leaves(inputs))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def over_time(
    step: Callable[[Any, Any, jax.Array | None], tuple[Any, Any]],
    state: Any,
    sequences: Any,
    key: jax.Array | None,
    remat: bool = False,
) -> Any:
    """``state, outputs = step(state, inputs, key)`` along sequences (B, T, ...); the outputs of all steps, (B, T, ...).

    Every step gets its own part of `key`. remat: recompute the steps in the backward pass.
    """
    length = jax.tree.leaves(sequences)[0].shape[1]
    keys = None if key is None else jax.random.split(key, length)
    with features.in_scans():
        inputs = features.time_first(sequences), keys
        one = functools.wraps(step)(lambda state, inputs: step(state, *inputs))
        return features.time_second(scan(one, features.enter(state), inputs, length, remat))


def in_several_kernels(step: Step, state: Values, inputs: Values, length: int, reverse: bool) -> tuple[Any, Any]:
    return jax.lax.scan(step, state, inputs, length=length, reverse=reverse)


@kernels.rewrite(plain=in_several_kernels, on=kernels.one_gpu)
def in_few_kernels(step: Step, state: Values, inputs: Values, length: int, reverse: bool) -> tuple[Any, Any]:
    """`jax.lax.scan` of a step over lists of arrays, each step as a few kernels if it has few rows."""
    return _own_kernels("few", in_several_kernels, step, state, inputs, length, reverse)


@kernels.rewrite(plain=in_few_kernels, on=kernels.one_gpu)
def in_one_kernel(step: Step, state: Values, inputs: Values, length: int, reverse: bool) -> tuple[Any, Any]:
    """`jax.lax.scan` of a step over lists of arrays, as one kernel if the step's weights are few enough."""
    return _own_kernels("one", in_few_kernels, step, state, inputs, length, reverse)


def _own_kernels(how: str, otherwise: Callable[..., Any], *loop: Any) -> tuple[Any, Any]:
    """A loop by kernels of our own, or otherwise if it is not suited to them."""
    # Not at the top: Pallas takes a quarter of a second to load, and only GPUs need it. Its Triton compiler is to leave
    # JAX one day.
    try:
        from dreamer.few_kernels import UnsuitedError, loop_in_few_kernels
        from dreamer.one_kernel import loop_in_one_kernel
    except ImportError:
        return in_several_kernels(*loop)
    try:
        return (loop_in_one_kernel if how == "one" else loop_in_few_kernels)(*loop)
    except UnsuitedError:
        return otherwise(*loop)


def plain_recurrence(fixed: jax.Array, factor: jax.Array, last: jax.Array) -> jax.Array:
    """x[t] = fixed[t] + factor[t] x[t + 1], backwards from last = x[T]: (T, ...)."""

    def step(x: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        fixed, factor = inputs
        x = fixed + factor * x
        return x, x

    return jax.lax.scan(step, last, (fixed, factor), reverse=True)[1]


@kernels.rewrite(plain=plain_recurrence, on=kernels.accelerator)
def recurrence(fixed: jax.Array, factor: jax.Array, last: jax.Array) -> jax.Array:
    """`plain_recurrence` by halves: two steps are again one of this form, so log T rounds do for T steps."""

    def after(later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    fixed = fixed.at[-1].add(factor[-1] * last)
    return jax.lax.associative_scan(after, (fixed, factor), reverse=True)[0]


# --- A step, taken apart -------------------------------------------------------------------------


class _Loop:
    """A step as a jaxpr: its constants, which are weights; state and inputs; the next state and outputs.

    name: of the loops, for those who read compiled programs.
    """

    def __init__(self, jaxpr: core.Jaxpr, states: int, length: int, name: str) -> None:
        self._jaxpr, self._states, self._length, self._name = jaxpr, states, length, name

    def run(self, weights: Values, state: Values, inputs: Values) -> list[Any]:
        """The outputs of all steps."""

        @jax.custom_vjp
        def run(weights: Values, state: Values, inputs: Values) -> list[Any]:
            return self._forward(weights, state, inputs)[1]

        def keep(weights: Values, state: Values, inputs: Values) -> tuple[list[Any], Any]:
            states, outputs = self._forward(weights, state, inputs)
            before = [jnp.concatenate([start[None], after[:-1]]) for start, after in zip(state, states, strict=True)]
            return outputs, (weights, before, inputs)

        def back(kept: Any, slopes: Values) -> tuple[list[Any], ...]:
            weights, before, inputs = kept
            return self._backward(weights, before, inputs, slopes)

        run.defvjp(keep, back)
        return run(list(weights), list(state), list(inputs))

    def _step(self, weights: Values, state: Values, inputs: Values) -> tuple[list[Any], list[Any]]:
        found = _evaluate(self._jaxpr, weights, [*state, *inputs], _CALLS)
        return found[: self._states], found[self._states :]

    def _forward(self, weights: Values, state: Values, inputs: Values) -> tuple[list[Any], list[Any]]:
        """States after, and outputs of, all steps."""

        def step(state: Values, weights: Values, inputs: Values) -> tuple[list[Any], Any]:
            state, outputs = self._step(weights, state, inputs)
            return state, (state, outputs)

        with jax.named_scope(f"loop of {self._name}"):
            return _in_turn(step, state, (weights,), (inputs,), self._length)[1]

    def _backward(self, weights: Values, before: Values, inputs: Values, slopes: Values) -> tuple[list[Any], ...]:
        """Cotangents of weights, first state and inputs; None for what has none."""
        trained, given, wanted = _differentiable(weights), _differentiable(inputs), _differentiable(slopes)
        pulled = [slope for slope, want in zip(slopes, wanted, strict=True) if want]

        def scored(weights: Values, state: Values, inputs: Values) -> tuple[list[Any], list[Any]]:
            state, outputs = self._step(weights, state, inputs)
            return state, [output for output, want in zip(outputs, wanted, strict=True) if want]

        def back(slope: Values, weights: Values, inputs: Values, state: Values, of_outputs: Values) -> tuple:
            """Cotangents of the state before a step, from those of the state after it, which are noted."""
            pull = jax.vjp(lambda state: scored(weights, state, inputs), list(state))[1]
            return pull((list(slope), list(of_outputs)))[0], list(slope)

        last = [jnp.zeros(x.shape[1:], x.dtype) for x in before]
        with jax.named_scope(f"backward loop of {self._name}"):
            given_back = (inputs, before, pulled)
            of_first, of_states = _in_turn(back, last, (weights,), given_back, self._length, reverse=True)

        def all_steps(some_weights: Values, some_inputs: Values) -> tuple[list[Any], list[Any]]:
            every = jax.vmap(scored, in_axes=(None, 0, 0))
            return every(_put(weights, some_weights, trained), list(before), _put(inputs, some_inputs, given))

        pull = jax.vjp(all_steps, _take(weights, trained), _take(inputs, given))[1]
        of_weights, of_inputs = pull((of_states, pulled))
        nothing = lambda values: [None] * len(values)  # noqa: E731
        return _put(nothing(weights), of_weights, trained), of_first, _put(nothing(inputs), of_inputs, given)


def _in_turn(
    step: Callable[..., tuple[Any, Any]], state: Values, fixed: tuple, each: tuple, length: int, reverse: bool = False
) -> tuple[Any, Any]:
    """``state, outputs = step(state, *fixed, *each)`` along `each` (length, ...), as `jax.lax.scan`.

    Only operations that depend on the state are in the loop.
    """
    arguments = (list(state), *fixed, *jax.tree.map(lambda x: x[0], each))
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(*arguments)
    flat = lambda *values: _evaluate(traced.jaxpr, traced.consts, values, _CALLS | _CUSTOM)  # noqa: E731
    closed = jax.make_jaxpr(flat)(*jax.tree.leaves(arguments))
    jaxpr, equations = closed.jaxpr, _needed(closed.jaxpr)
    states, constant = len(jax.tree.leaves(state)), len(jax.tree.leaves(fixed))
    carried, still, moving = (
        jaxpr.invars[:states], jaxpr.invars[states : states + constant], jaxpr.invars[states + constant :]
    )  # fmt: skip

    late = _reached(equations, carried)
    early = [one for one in equations if not late.intersection(one.outvars)]
    # A state of one number, such as the zeros that an episode begins with, is made where it is read.
    filled = [one for one in early if one.primitive.name == "broadcast_in_dim"
              and isinstance(one.invars[0], core.Literal)
              and one.outvars[0].aval in [v.aval for v in carried]]  # fmt: skip
    inside = [*filled, *(one for one in equations if late.intersection(one.outvars))]
    changing = _reached(early, moving)
    read = {v for one in inside for v in one.invars if isinstance(v, core.Var)}
    read |= {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    own = {v for one in inside for v in one.outvars} | set(carried)
    given = [v for v in dict.fromkeys([*jaxpr.constvars, *jaxpr.invars, *(v for e in early for v in e.outvars)])
             if v in read and v not in own]  # fmt: skip

    def before(moved: Values) -> list[Any]:
        """What the loop reads of a step."""
        environment = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        environment |= dict(zip(still, jax.tree.leaves(fixed), strict=True)) | dict(zip(moving, moved, strict=True))
        _run(early, environment)
        return [environment[v] for v in given]

    values = jax.tree.leaves(each)
    axes = [0 if v in changing else None for v in given]
    found = jax.vmap(before, out_axes=axes)(values) if values else before(values)
    constants = {v: x for v, x, axis in zip(given, found, axes, strict=True) if axis is None}
    rows = [v for v in given if v in changing]

    def body(state: Values, row: Values) -> tuple[list[Any], list[Any]]:
        environment = constants | dict(zip(carried, state, strict=True)) | dict(zip(rows, row, strict=True))
        _run(inside, environment)
        outputs = [_read(environment, v) for v in jaxpr.outvars]
        return outputs[:states], outputs[states:]

    moved = [x for x, axis in zip(found, axes, strict=True) if axis == 0]
    state, outputs = in_one_kernel(body, jax.tree.leaves(state), moved, length, reverse)
    end, every = jax.tree.structure(shapes[0]), jax.tree.structure(shapes[1])
    return jax.tree.unflatten(end, state), jax.tree.unflatten(every, outputs)


# --- Jaxprs --------------------------------------------------------------------------------------


def _evaluate(jaxpr: core.Jaxpr, constants: Values, arguments: Values, calls: Collection[str]) -> list[Any]:
    """The results of a jaxpr, those of inner programs that `calls` names put in their places."""
    environment = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))
    _run(jaxpr.eqns, environment, calls)
    return [_read(environment, v) for v in jaxpr.outvars]


def _run(equations: Sequence[core.JaxprEqn], environment: dict[Any, Any], calls: Collection[str] = ()) -> None:
    """Put the results of equations into the environment."""
    for equation in equations:
        values = [_read(environment, v) for v in equation.invars]
        if equation.primitive.name in calls:
            inner = next(equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params)
            closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            results = _evaluate(closed.jaxpr, closed.consts, values, calls)
        else:
            given = equation.primitive.get_bind_params(equation.params)
            functions, parameters = ((), given) if isinstance(given, dict) else given  # by the version of JAX
            results = equation.primitive.bind(*functions, *values, **parameters)
            results = results if equation.primitive.multiple_results else [results]
        environment.update(zip(equation.outvars, results, strict=True))


def _read(environment: dict[Any, Any], variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else environment[variable]


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations whose results somebody reads."""
    read, found = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        if read.intersection(equation.outvars):
            found.append(equation)
            read.update(v for v in equation.invars if isinstance(v, core.Var))
    return found[::-1]


def _reached(equations: Sequence[core.JaxprEqn], sources: Sequence[core.Var]) -> set[core.Var]:
    """The sources and everything that depends on them."""
    found = set(sources)
    for equation in equations:
        if any(isinstance(v, core.Var) and v in found for v in equation.invars):
            found.update(equation.outvars)
    return found


# --- Lists of values -----------------------------------------------------------------------------


def _differentiable(values: Values) -> list[bool]:
    return [jnp.issubdtype(x.dtype, jnp.inexact) for x in values]


def _take(values: Values, chosen: Sequence[bool]) -> list[Any]:
    return [value for value, choose in zip(values, chosen, strict=True) if choose]


def _put(values: Values, others: Values, chosen: Sequence[bool]) -> list[Any]:
    """The values, those that are chosen replaced by others in order."""
    rest = iter(others)
    return [next(rest) if choose else value for value, choose in zip(values, chosen, strict=True)]
