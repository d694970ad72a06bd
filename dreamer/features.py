"""Where the features of activations lie, so that no layer, distribution or loss has to know.

These are written for items with features: ``(..., F)``. Between programs and scans that is also how arrays lie, items
before features. Inside a scan the items come last, ``(..., F, M)``, as in y = Wx on paper: then groups of features lie
together, sums over features run along the items, and no block-linear layer moves its input. The numbers are the same.

`items_last` changes the order; everything else here asks for it. A distribution remembers the order in
which it was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

#: The axis of the features: items first, items last.
_FIRST, _LAST = -1, -2
_axis: ContextVar[int] = ContextVar("features_axis", default=_FIRST)
#: Whether scans put the items last.
_turns: ContextVar[bool] = ContextVar("features_turns", default=True)

Tree = TypeVar("Tree")


def axis() -> int:
    """The axis of the features, counted from the end."""
    return _axis.get()


def are_last() -> bool:
    """Whether items come first: (..., F)."""
    return _axis.get() == _FIRST


@contextlib.contextmanager
def items_last(turn: bool = True) -> Iterator[None]:
    """Inside, items come last; with `turn` false they stay first."""
    token = _axis.set(_LAST if turn else _FIRST)
    try:
        yield
    finally:
        _axis.reset(token)


@contextlib.contextmanager
def scans_turn(turn: bool) -> Iterator[None]:
    """Inside, `in_scans` puts the items last, or leaves them first."""
    token = _turns.set(turn)
    try:
        yield
    finally:
        _turns.reset(token)


def in_scans() -> contextlib.AbstractContextManager[None]:
    """How a scan wants its items to lie."""
    return items_last(_turns.get())


def enter(tree: Tree) -> Tree:
    """Arrays (M, ...) in the order of the moment."""
    return tree if axis() == _FIRST else jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def leave(tree: Tree) -> Tree:
    """The inverse of `enter`."""
    return tree if axis() == _FIRST else jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)


def time_first(tree: Tree) -> Tree:
    """Sequences (B, T, ...) as scans read them: time first, items in the order of the moment."""
    if axis() == _FIRST:
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
    return enter(tree)


def time_second(tree: Tree) -> Tree:
    """The inverse of `time_first`."""
    if axis() == _FIRST:
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
    return leave(tree)


# --- What layers do with features --------------------------------------------------------------


def size(x: jax.Array) -> int:
    """The number of features."""
    return x.shape[axis()]


def concat(parts: Sequence[jax.Array]) -> jax.Array:
    """Features side by side."""
    return jnp.concatenate(parts, axis())


def split(x: jax.Array, parts: int | Sequence[int] | np.ndarray) -> list[jax.Array]:
    """Features in this many equal parts, or cut before these."""
    return jnp.split(x, parts, axis())


def group(x: jax.Array, groups: int) -> jax.Array:
    """Features in equal groups: (..., F) -> (..., G, F / G)."""
    at = x.ndim + axis()
    return x.reshape(*x.shape[:at], groups, -1, *x.shape[at + 1 :])


def ungroup(x: jax.Array) -> jax.Array:
    """The inverse of `group`."""
    at = x.ndim + axis()
    return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])


def weights(vector: jax.Array) -> jax.Array:
    """A vector (..., F) that belongs to the features, such as a bias, ready to meet activations."""
    return vector if axis() == _FIRST else vector[..., None]


def per_item(flag: jax.Array, x: jax.Array) -> jax.Array:
    """One entry for each item (M,), ready to meet x (M, ...)."""
    return flag if axis() == _LAST else flag.reshape(-1, *[1] * (x.ndim - 1))


def single(x: jax.Array) -> jax.Array:
    """The only feature (..., 1) as a number (...)."""
    return x.squeeze(axis())
