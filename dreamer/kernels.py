"""Every rewrite for speed beside its plain twin; where each is used; `plain()` for benches and oracles.

A rewrite computes the same function as the formula that it replaces, faster on the devices that it is `on`. A program
takes it or its twin by the `Target` that it is traced for. `REWRITES` lists them all, those of `scans` and `optimizer`
too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dreamer import features
from dreamer.values import ConfigError

#: What is added (top, bottom), (left, right).
Padding = tuple[tuple[int, int], ...]
Function = TypeVar("Function", bound=Callable[..., Any])

# --- Which are used ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is traced for: kind of device, how many share the work, whether rewrites are wanted at all, and
    which are not."""

    platform: str
    devices: int = 1
    rewrites: bool = True
    without: tuple[str, ...] = ()


_target: ContextVar[Target | None] = ContextVar("kernels_target", default=None)
_wanted: ContextVar[bool] = ContextVar("kernels_wanted", default=True)


def target(platform: str, devices: int = 1, without: tuple[str, ...] = ()) -> Target:
    """The target of programs that are built now: without rewrites inside of `plain()`, or without some. ConfigError for
    names that are none's."""
    if unknown := sorted(set(without) - set(REWRITES)):
        names = ", ".join(sorted(REWRITES))
        raise ConfigError(f"without: expected rewrites among {names}, got {', '.join(unknown)}")
    return Target(platform, devices, _wanted.get(), without)


def current() -> Target:
    """The target that is traced for; outside of `traced_for`, JAX's default device."""
    return _target.get() or target(jax.default_backend())


@contextlib.contextmanager
def traced_for(chosen: Target) -> Iterator[None]:
    """What is traced inside is for this target."""
    token = _target.set(chosen)
    try:
        with features.scans_turn(items_last_in_scans()):
            yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Agents that are built inside, and whatever is traced inside without one, compute every formula as it stands."""
    token = _wanted.set(False)
    try:
        with features.scans_turn(False):
            yield
    finally:
        _wanted.reset(token)


class Rewrite(NamedTuple):
    """A function, its plain twin, and the targets that it is used on."""

    fast: Callable[..., Any]
    plain: Callable[..., Any]
    on: Callable[[Target], bool]


REWRITES: dict[str, Rewrite] = {}


def everywhere(target: Target) -> bool:
    return True


def cpu(target: Target) -> bool:
    return target.platform == "cpu"


def accelerator(target: Target) -> bool:
    return target.platform != "cpu"


def one_accelerator(target: Target) -> bool:
    return target.platform != "cpu" and target.devices == 1


def one_gpu(target: Target) -> bool:
    return target.platform == "gpu" and target.devices == 1


def one_cpu(target: Target) -> bool:
    return target.platform == "cpu" and target.devices == 1


def rewrite(plain: Callable[..., Any], on: Callable[[Target], bool] = everywhere) -> Callable[[Function], Function]:
    """Makes a function the rewrite of `plain`: called, one of the two runs, as the target asks."""

    def decorate(fast: Function) -> Function:
        name = fast.__name__
        REWRITES[name] = Rewrite(fast, plain, on)

        @functools.wraps(fast)
        def chosen(*arguments: Any) -> Any:
            here, row = current(), REWRITES[name]
            wanted = here.rewrites and name not in here.without and row.on(here)
            return (row.fast if wanted else row.plain)(*arguments)

        return chosen  # type: ignore[return-value]

    return decorate


# --- How a program is laid out -----------------------------------------------------------------


@rewrite(plain=lambda: False, on=cpu)
def items_last_in_scans() -> bool:
    """Whether the items lie last inside scans, see `features`."""
    return True


@rewrite(plain=lambda: False, on=cpu)
def heads_read_in_scan() -> bool:
    """Whether heads read each imagined state within the scan, while it is in the cache and another core dreams on;
    otherwise all states together after it, in few large products."""
    return True


@rewrite(plain=lambda function, x: function(x))
def recomputed(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``function(x)``, recomputed from x in the backward pass: where that is cheap, scans keep one array, not five."""
    return jax.checkpoint(function, prevent_cse=False)(x)


#: Where `in_parts` divides: what a layer's activations may take up, in bytes, and the number of parts it stops at.
PART_BYTES, MOST_PARTS = 2**24, 8


@rewrite(plain=lambda function, x, each: function(x), on=one_cpu)
def in_parts(function: Callable[[jax.Array], jax.Array], x: jax.Array, each: int) -> jax.Array:
    """``function(x)`` for x (M, ...), of which every item is computed for itself, part by part.

    The activations between layers, `each` bytes an item at most, then stay in the processor's cache. Side by side in
    the program, because a loop would copy what it keeps for the backward pass.
    """
    parts = min(MOST_PARTS, x.shape[0], -(-x.shape[0] * each // PART_BYTES))
    if parts < 2:
        return function(x)
    return jnp.concatenate([function(part) for part in jnp.array_split(x, parts)])


# --- Products ----------------------------------------------------------------------------------


@rewrite(plain=lambda kernel, x: kernel.swapaxes(-1, -2) @ x)
def transposed_product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """``kernel.T @ x``: kernels (..., I, O) and items last (..., I, M) to (..., O, M).

    The gradient of x is ``kernel @ dy``, by the kernel as it is stored. Differentiation alone would keep the transposed
    kernel and turn it back in every product, for which XLA has no fast loop on a CPU.
    """
    return _product(jax.lax.stop_gradient(kernel).swapaxes(-1, -2), kernel, x)


@jax.custom_vjp
def _product(turned: jax.Array, kernel: jax.Array, x: jax.Array) -> jax.Array:
    # The turned kernel is an argument, so that a scan turns it once and not in every step.
    return turned @ x


def _product_kept(turned: jax.Array, kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return turned @ x, (kernel, x)


def _product_gradients(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    kernel, x = kept
    return None, x @ dy.swapaxes(-1, -2), kernel @ dy


_product.defvjp(_product_kept, _product_gradients)


def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """``W x``: features (..., I) by a kernel (I, O) to features (..., O)."""
    if features.are_last():
        return x @ kernel
    # One product for each leading index: a single one would move x first, which is larger than the copied kernels.
    return transposed_product(jnp.broadcast_to(kernel, (*x.shape[:-2], *kernel.shape)), x)


def plain_block_product(kernel: jax.Array, own: jax.Array, shared: jax.Array | None) -> jax.Array:
    """Every block gets its own copy of the shared input. Items first."""
    if shared is not None:
        copies = jnp.broadcast_to(shared[..., None, :], (*own.shape[:-1], shared.shape[-1]))
        own = jnp.concatenate([own, copies], -1)
    return jnp.einsum("...gi,gio->...go", own, kernel)


@rewrite(plain=plain_block_product)
def block_product(kernel: jax.Array, own: jax.Array, shared: jax.Array | None) -> jax.Array:
    """``y[g] = own[g] @ kernel[g, :own] + shared @ kernel[g, own:]``: own (..., G, I), shared (..., W), y (..., G, O).

    One dense product for the shared input instead of G copies of it.
    """
    blocks, width, outputs = kernel.shape
    cut = features.size(own)
    if features.are_last():
        y = jnp.einsum("...gi,gio->...go", own, kernel[:, :cut])
    else:
        y = transposed_product(kernel[:, :cut], own)
    if shared is None:
        return y
    dense = kernel[:, cut:].swapaxes(0, 1).reshape(width - cut, blocks * outputs)
    return y + features.group(product(dense, shared), blocks)


# --- Convolutions ------------------------------------------------------------------------------


def plain_conv(x: jax.Array, kernel: jax.Array, padding: Padding | None = None) -> jax.Array:
    """Stride-1 convolution of x (M, H, W, I) with a kernel (h, w, I, O); without `padding` H and W stay."""
    padding = padding or tuple(((size - 1) // 2, size // 2) for size in kernel.shape[:2])
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@rewrite(plain=plain_conv, on=cpu)
def conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """`plain_conv`, whose gradients are convolutions in the same order of axes.

    XLA's CPU backend hands only these to its fast code, and within loops does not turn others into them.
    """
    return _conv(x, kernel, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    return plain_conv(x, kernel, padding)


def _conv_gradients(padding: Padding, inputs: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    around = tuple((n - 1 - low, n - 1 - high) for n, (low, high) in zip(kernel.shape, padding, strict=False))
    of_x = plain_conv(g, kernel[::-1, ::-1].swapaxes(2, 3), around)
    of_kernel = plain_conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), padding)
    return of_x, of_kernel.transpose(1, 2, 0, 3)


_conv.defvjp(lambda x, kernel, padding: (plain_conv(x, kernel, padding), (x, kernel)), _conv_gradients)


def plain_conv_pool(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 2x2 maximum of a convolution that keeps the size."""
    y = plain_conv(x, kernel)
    m, height, width, outputs = y.shape
    return y.reshape(m, height // 2, 2, width // 2, 2, outputs).max((2, 4))


@rewrite(plain=plain_conv_pool)
def conv_pool(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`plain_conv_pool`, exactly: (M, H, W, I) -> (M, H/2, W/2, O), H and W even.

    With the pixels of each 2x2 cell laid out as channels, one smaller convolution gives the four outputs of a cell
    side by side: the few channels of images fill the machine's vectors better, and the maximum runs along them::

        output pixel 2i + a reads input pixels 2i + a + t - p, that is pixel b of cell i + o, 2o + b = a + t - p
    """
    size = kernel.shape[0]
    pixel = np.arange(2)[:, None] + np.arange(size)[None] - (size - 1) // 2
    cell, within = pixel // 2, pixel % 2
    low, high = int(cell.min()), int(cell.max())
    same_cell = cell[..., None, None] == np.arange(low, high + 1)[:, None]
    moved = jnp.asarray(same_cell & (within[..., None, None] == np.arange(2)), kernel.dtype)
    cells = jnp.einsum("atmb,cund,tuio->mnbdiaco", moved, moved, kernel)
    m, height, width, inputs = x.shape
    x = x.reshape(m, height // 2, 2, width // 2, 2, inputs).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(m, height // 2, width // 2, 4 * inputs)
    y = conv(x, cells.reshape(*cells.shape[:2], 4 * inputs, -1), ((-low, high), (-low, high)))
    return y.reshape(*y.shape[:3], 4, -1).max(3)


def plain_upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of x upsampled by 2, every pixel four times."""
    return plain_conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel)


@rewrite(plain=plain_upsample_conv)
def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`plain_upsample_conv`, exactly, in about a third of the arithmetic: (M, H, W, I) -> (M, 2H, 2W, O).

    Neighbouring output pixels read the same input pixel through several kernel taps. Adding these taps up first
    leaves one small convolution (3x3 for 5x5) with four groups of outputs, one for each pixel of a 2x2 cell::

        output pixel 2i + a reads upsampled pixels 2i + a + t - p, that is input pixels i + (a + t - p) // 2
    """
    size = kernel.shape[0]
    phase, tap = np.arange(2)[:, None], np.arange(size)[None]
    offset = (phase + tap - (size - 1) // 2) // 2
    low, high = int(offset.min()), int(offset.max())
    merge = jnp.asarray(offset[..., None] == np.arange(low, high + 1), kernel.dtype)
    phases = jnp.einsum("atm,bun,tuio->mniabo", merge, merge, kernel)
    m, height, width, _ = x.shape
    y = conv(x, phases.reshape(*phases.shape[:3], -1), ((-low, high), (-low, high)))
    y = y.reshape(m, height, width, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(m, 2 * height, 2 * width, -1)


# --- Sampling ----------------------------------------------------------------------------------


def plain_draw_class(key: jax.Array, probs: jax.Array) -> jax.Array:
    """The Gumbel trick: as many random numbers and logarithms as there are classes."""
    return jax.random.categorical(key, jnp.log(probs))


@rewrite(plain=plain_draw_class)
def draw_class(key: jax.Array, probs: jax.Array) -> jax.Array:
    """Sample class indices (...) from probabilities (..., K) by inverting the CDF at one uniform per variable."""
    uniform = jax.random.uniform(key, probs.shape[:-1], probs.dtype)
    below = jnp.cumsum(probs, -1) <= uniform[..., None]
    # Rounding can leave the last cumulative sum below the uniform: the index must stay a class.
    return jnp.minimum(below.sum(-1), probs.shape[-1] - 1)
