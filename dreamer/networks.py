"""Layers of the paper: linear, block-linear, convolution, RMSNorm and the dense stack of them.

Parameters are float32 `nnx.Param` leaves; a layer computes in the dtype of its input (float32 or bfloat16).
Initial weights (paper v2, "Networks"): truncated normal on [-2, 2] times 1.1368 / sqrt(fan_in) times the layer's
out-scale, biases 0, norm scales 1.

Activations lie in one of two layouts, named by the axis of their features. `ROWS`, the default: (..., features).
`COLUMNS`: (..., features, batch), y = Wx as on paper. Numbers are the same. With columns, groups of features lie
together, sums over features run along the batch, and no block-linear layer moves its input: scans like that.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

#: 1 / (standard deviation of a unit normal truncated to [-2, 2]); makes the drawn weights have variance 1 / fan_in.
TRUNCATED_NORMAL_GAIN = 1.1368
RMS_EPSILON = 1e-4
#: The axis of the features in the two layouts.
ROWS, COLUMNS = -1, -2

#: What is added (top, bottom), (left, right).
Padding = tuple[tuple[int, int], ...]


class Draws:
    """Stands in for `nnx.Rngs` while a whole model is built: truncated normals drawn at once, handed out in turn.

    XLA compiles one long draw about ten times faster than the model's many short ones.
    """

    def __init__(self, key: jax.Array, count: int) -> None:
        self.values, self.used = jax.random.truncated_normal(key, -2.0, 2.0, (count,), jnp.float32), 0

    def take(self, shape: tuple[int, ...]) -> jax.Array:
        start, self.used = self.used, self.used + math.prod(shape)
        return self.values[start : self.used].reshape(shape)


def initial_weights(rngs: nnx.Rngs | Draws, shape: tuple[int, ...], fan_in: int, scale: float) -> nnx.Param:
    """Truncated-normal weights of variance ``scale^2 / fan_in``, float32 of `shape`."""
    if isinstance(rngs, Draws):
        draw = rngs.take(shape)
    else:
        draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(draw * (TRUNCATED_NORMAL_GAIN * scale / fan_in**0.5))


def at_least_float32(x: jax.Array) -> jax.Array:
    """Raise the precision of `x` to float32; float64 passes through, so that float64 oracles work."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def along(vector: jax.Array, axis: int) -> jax.Array:
    """`vector` (..., F), ready to meet activations whose features lie along `axis`."""
    return vector if axis == ROWS else vector[..., None]


def project(kernel: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """``x @ kernel`` for rows (..., I) and a kernel (I, O), ``kernel.T @ x`` for columns (..., I, M)."""
    if axis == ROWS:
        return x @ kernel
    # One product for each leading index: a single one would move x first, which is larger than the copied kernels.
    return transposed_product(jnp.broadcast_to(kernel, (*x.shape[:-2], *kernel.shape)), x)


def transposed_product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """``kernel.T @ x``: kernels (..., I, O) and columns (..., I, M) to columns (..., O, M).

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


def columns(x: jax.Array) -> jax.Array:
    """Rows (M, ...) -> columns (..., M): the first axis last."""
    return jnp.moveaxis(x, 0, -1)


def rows(x: jax.Array) -> jax.Array:
    """Columns (..., M) -> rows (M, ...): the last axis first."""
    return jnp.moveaxis(x, -1, 0)


def split_features(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Features in equal parts: rows (..., F) -> (..., parts, F / parts), columns likewise, before their batch."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], parts, -1, *x.shape[at + 1 :])


def join_features(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `split_features`."""
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])


class Linear(nnx.Module):
    """``x @ kernel + bias``: (..., inputs) -> (..., outputs). An out-scale of 0 makes the initial output exactly 0."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, scale: float = 1.0) -> None:
        self.kernel = initial_weights(rngs, (inputs, outputs), inputs, scale)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array, axis: int = ROWS) -> jax.Array:
        return project(self.kernel[...].astype(x.dtype), x, axis) + along(self.bias[...].astype(x.dtype), axis)


class BlockLinear(nnx.Module):
    """A linear layer with a block-diagonal kernel of G blocks and, if asked, a part of the input that all blocks read.

    ``y[g] = own[g] @ kernel[g, :own] + shared @ kernel[g, own:] + bias[g]`` with
    own (..., G, I), shared (..., W) and y (..., G, O), or as columns (G, I, M), (W, M) and (G, O, M). The fan-in for
    the initial weights is the full width G * (I + W), not the width of one block.
    """

    def __init__(self, blocks: int, own: int, outputs: int, *, rngs: nnx.Rngs, shared: int = 0) -> None:
        if own % blocks or outputs % blocks:
            raise ValueError(f"expected widths that {blocks} blocks divide, got {own} inputs and {outputs} outputs")
        width = own // blocks + shared
        self.kernel = initial_weights(rngs, (blocks, width, outputs // blocks), blocks * width, 1.0)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, own: jax.Array, shared: jax.Array | None = None, axis: int = ROWS) -> jax.Array:
        kernel = self.kernel[...].astype(own.dtype)
        blocks, width, outputs = kernel.shape
        cut = own.shape[axis]
        bias = along(self.bias[...].astype(own.dtype).reshape(blocks, outputs), axis)
        if axis == ROWS:
            y = jnp.einsum("...gi,gio->...go", own, kernel[:, :cut])
        else:
            y = transposed_product(kernel[:, :cut], own)
        if shared is not None:
            # One dense product instead of G copies of the shared input.
            dense = kernel[:, cut:].swapaxes(0, 1).reshape(width - cut, blocks * outputs)
            y = y + split_features(project(dense, shared, axis), blocks, axis)
        return y + bias


class Conv(nnx.Module):
    """Stride-1 same-padded 2D convolution, (M, H, W, inputs) -> (M, H, W, outputs), with bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = initial_weights(rngs, (kernel, kernel, inputs, outputs), kernel * kernel * inputs, 1.0)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)

    def pooled(self, x: jax.Array) -> jax.Array:
        """The 2x2 maximum of this convolution: (M, H, W, inputs) -> (M, H/2, W/2, outputs)."""
        return conv_pool(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)

    def upsampled(self, x: jax.Array) -> jax.Array:
        """This convolution of `x` upsampled by 2: (M, H, W, inputs) -> (M, 2H, 2W, outputs)."""
        return upsample_conv(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x * rsqrt(mean(x^2) + 1e-4) * scale`` over the features, computed in float32; no shift."""

    def __init__(self, units: int) -> None:
        self.scale = nnx.Param(jnp.ones(units, jnp.float32))

    def __call__(self, x: jax.Array, axis: int = ROWS) -> jax.Array:
        y = at_least_float32(x)
        root = jax.lax.rsqrt(jnp.square(y).mean(axis, keepdims=True) + RMS_EPSILON)
        return (y * (root * along(self.scale[...].astype(y.dtype), axis))).astype(x.dtype)


class Dense(nnx.Module):
    """Linear -> RMSNorm -> SiLU: (..., inputs) -> (..., units)."""

    def __init__(self, inputs: int, units: int, *, rngs: nnx.Rngs) -> None:
        self.linear = Linear(inputs, units, rngs=rngs)
        self.norm = RMSNorm(units)

    def __call__(self, x: jax.Array, axis: int = ROWS) -> jax.Array:
        # Recomputed from its input in the backward pass: cheap, and scans keep one array for it instead of five.
        squash = lambda y: jax.nn.silu(self.norm(y, axis))  # noqa: E731
        return jax.checkpoint(squash, prevent_cse=False)(self.linear(x, axis))


class MLP(nnx.Module):
    """A stack of Dense layers: (..., inputs) -> (..., units)."""

    def __init__(self, inputs: int, units: int, layers: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Dense(inputs if i == 0 else units, units, rngs=rngs) for i in range(layers)])

    def __call__(self, x: jax.Array, axis: int = ROWS) -> jax.Array:
        for layer in self.layers:
            x = layer(x, axis)
        return x


def for_cpu() -> bool:
    """Whether JAX's default device, for which programs are traced, is a CPU."""
    return jax.default_backend() == "cpu"


def conv(x: jax.Array, kernel: jax.Array, padding: Padding | None = None) -> jax.Array:
    """Stride-1 convolution of x (M, H, W, I) with a kernel (h, w, I, O); without `padding` H and W stay."""
    padding = padding or tuple(((size - 1) // 2, size // 2) for size in kernel.shape[:2])
    return (_conv_and_gradients if for_cpu() else plain_conv)(x, kernel, padding)


def plain_conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """`conv` as JAX has it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_and_gradients(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """`plain_conv`, whose gradients are convolutions in the same order of axes.

    XLA's CPU backend hands only these to its fast code, and within loops does not turn others into them.
    """
    return plain_conv(x, kernel, padding)


def _conv_gradients(padding: Padding, inputs: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    around = tuple((n - 1 - low, n - 1 - high) for n, (low, high) in zip(kernel.shape, padding, strict=False))
    of_x = plain_conv(g, kernel[::-1, ::-1].swapaxes(2, 3), around)
    of_kernel = plain_conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), padding)
    return of_x, of_kernel.transpose(1, 2, 0, 3)


_conv_and_gradients.defvjp(lambda x, kernel, padding: (plain_conv(x, kernel, padding), (x, kernel)), _conv_gradients)


def conv_pool(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``max_pool(conv(x, kernel))``, exactly: (M, H, W, I) -> (M, H/2, W/2, O), H and W even.

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


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``conv(upsample(x), kernel)``, exactly, in about a third of the arithmetic: (M, H, W, I) -> (M, 2H, 2W, O).

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


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 maximum: (N, H, W, C) -> (N, H/2, W/2, C)."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by 2: (N, H, W, C) -> (N, 2H, 2W, C)."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
