"""What a traced program costs before it is compiled: floating-point operations, and the most bytes alive at once.

Both walk the jaxpr. XLA's own count of operations (`Lowered.cost_analysis`) counts the body of a loop once, however
often it runs; our updates spend most of their time in loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import core

#: Operations that only rename, repeat or regroup numbers: a compiler gives their results no memory.
VIEWS = {"broadcast_in_dim", "copy", "expand_dims", "iota", "reshape", "squeeze", "stop_gradient"}
#: Elementwise operations that a compiler prefers to repeat within each operation that reads their result.
CHEAP = {
    *("abs", "add", "add_any", "and", "clamp", "convert_element_type", "eq", "ge", "gt", "is_finite", "le", "lt"),
    *("max", "min", "mul", "ne", "neg", "not", "or", "select_n", "sign", "square", "sub"),
}
#: Elementwise operations that it does once, fused into the operation that reads the result if there is only one.
COSTLY = {
    *("cos", "div", "erf", "exp", "exp2", "expm1", "floor", "integer_pow", "log", "log1p", "logistic", "pow", "rem"),
    *("round", "rsqrt", "shift_left", "shift_right_logical", "sin", "sqrt", "tanh", "xor"),
}
#: Operations that read every number of their input.
READERS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin", "cumsum", "sort"}


def flops(jaxpr: core.Jaxpr) -> float:
    """Floating-point operations of one run of the program: loops times their lengths, of branches the most expensive,
    kernels as they say, products with padding counted too. Loops of unknown length count as one iteration."""
    return sum(_flops(equation) for equation in needed(jaxpr))


def needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The operations whose results are read; traced programs have others, which compilers leave out."""
    read, found = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or read & set(equation.outvars):
            found.append(equation)
            read |= {v for v in equation.invars if isinstance(v, core.Var)}
    return found[::-1]


def _flops(equation: core.JaxprEqn) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        return parameters["length"] * flops(parameters["jaxpr"].jaxpr)
    if name == "pallas_call":
        return parameters["cost_estimate"].flops
    inner = [flops(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if inner:
        return max(inner) if name == "cond" else sum(inner)
    written = sum(_size(variable) for variable in equation.outvars)
    if name in PRODUCTS:
        return 2 * written * PRODUCTS[name](equation)
    if name in READERS:
        return sum(_size(variable) for variable in equation.invars)
    return written if name in CHEAP | COSTLY else 0


def _contracted(equation: core.JaxprEqn) -> int:
    """Multiplications for each number of a matrix product."""
    (left, _), _ = equation.params["dimension_numbers"]
    return math.prod(_shape(equation.invars[0])[axis] for axis in left)


def _window(equation: core.JaxprEqn) -> int:
    """Multiplications for each number of a convolution, including those with padding but not those with the zeros
    between the numbers of a dilated input."""
    shape, spec = _shape(equation.invars[1]), equation.params["dimension_numbers"].rhs_spec
    return math.prod(shape) // shape[spec[0]] // math.prod(equation.params["lhs_dilation"])


PRODUCTS: dict[str, Callable[[core.JaxprEqn], int]] = {"dot_general": _contracted, "conv_general_dilated": _window}


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Most bytes that the program holds beyond its inputs and outputs, in the order in which it was traced.

    To imitate a compiler: views take no memory, most elementwise results take none either, and a loop holds one
    iteration. An estimate; docs/planning.md says how far off it was.
    """
    equations = needed(jaxpr)
    given = {v for v in (*jaxpr.invars, *jaxpr.constvars)}
    kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    sources = _sources(equations, kept)
    last: dict[Any, int] = {}
    for index, equation in enumerate(equations):
        if sources.keys() & set(equation.outvars):  # computed where it is read
            continue
        for variable in equation.invars:
            for source in _resolve(variable, sources):
                last[source] = index
    dying: dict[int, list[Any]] = {}
    for variable, index in last.items():
        if variable not in given and variable not in kept:
            dying.setdefault(index, []).append(variable)
    live = peak = 0
    for index, equation in enumerate(equations):
        fresh = [v for v in equation.outvars if v in last and v not in kept and v not in sources]
        live += sum(_bytes(v) for v in fresh)
        peak = max(peak, live + max((peak_bytes(inner) for inner in inner_jaxprs(equation)), default=0))
        live -= sum(_bytes(v) for v in dying.get(index, ()))
    return peak


def _sources(equations: list[core.JaxprEqn], kept: set[Any]) -> dict[Any, list[Any]]:
    """Variables without memory, each with what it is computed from."""
    readers: dict[Any, int] = {}
    for equation in equations:
        for variable in {v for v in equation.invars if isinstance(v, core.Var)}:
            readers[variable] = readers.get(variable, 0) + 1
    found: dict[Any, list[Any]] = {}
    for equation in equations:
        if len(equation.outvars) != 1:
            continue
        result, name = equation.outvars[0], equation.primitive.name
        fused = name in VIEWS | CHEAP or (name in COSTLY and readers.get(result) == 1)
        if fused and result not in kept:
            found[result] = [v for v in equation.invars if isinstance(v, core.Var)]
    return found


def _resolve(variable: Any, sources: dict[Any, list[Any]]) -> Iterator[Any]:
    """What must be in memory for a variable to be read."""
    if not isinstance(variable, core.Var):
        return
    pending, seen = [variable], set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in sources:
            pending += sources[one]
        else:
            yield one


def inner_jaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs inside an operation: a jit, a loop, branches, a custom derivative."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def _bytes(variable: Any) -> int:
    """Bytes of a variable; keys of random streams count as their raw data."""
    aval = variable.aval
    return _size(variable) * getattr(aval.dtype, "itemsize", 8)


def tree_bytes(shapes: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, in a tree."""
    import jax

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
