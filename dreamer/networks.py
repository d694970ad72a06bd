"""Layers of the paper: linear, block-linear, convolution, RMSNorm and the dense stack of them.

Parameters are float32 `nnx.Param` leaves; a layer computes in the dtype of its input (float32 or bfloat16).
Initial weights (paper v2, "Networks"): truncated normal on [-2, 2] times 1.1368 / sqrt(fan_in) times the layer's
out-scale, biases 0, norm scales 1.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dreamer import features, kernels

#: 1 / (standard deviation of a unit normal truncated to [-2, 2]); makes the drawn weights have variance 1 / fan_in.
TRUNCATED_NORMAL_GAIN = 1.1368
RMS_EPSILON, LAYER_EPSILON = 1e-4, 1e-3


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


def frozen(module: Any) -> Any:
    """The module with weights that get no gradient."""
    graph, weights = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, weights))


class Linear(nnx.Module):
    """``x @ kernel + bias``: (..., inputs) -> (..., outputs). An out-scale of 0 makes the initial output exactly 0."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, scale: float = 1.0, bias: bool = True) -> None:
        self.kernel = initial_weights(rngs, (inputs, outputs), inputs, scale)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = kernels.product(self.kernel[...].astype(x.dtype), x)
        return y if self.bias is None else y + features.weights(self.bias[...].astype(x.dtype))


class BlockLinear(nnx.Module):
    """A linear layer with a block-diagonal kernel of G blocks and, if asked, a part of the input that all blocks read.

    ``y[g] = own[g] @ kernel[g, :own] + shared @ kernel[g, own:] + bias[g]`` with
    own (..., G, I), shared (..., W) and y (..., G, O). The fan-in for the initial weights is the full width
    G * (I + W), not the width of one block.
    """

    def __init__(self, blocks: int, own: int, outputs: int, *, rngs: nnx.Rngs, shared: int = 0) -> None:
        if own % blocks or outputs % blocks:
            raise ValueError(f"expected widths that {blocks} blocks divide, got {own} inputs and {outputs} outputs")
        width = own // blocks + shared
        self.kernel = initial_weights(rngs, (blocks, width, outputs // blocks), blocks * width, 1.0)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, own: jax.Array, shared: jax.Array | None = None) -> jax.Array:
        kernel, bias = self.kernel[...].astype(own.dtype), self.bias[...].astype(own.dtype)
        bias = features.weights(bias.reshape(kernel.shape[0], kernel.shape[2]))
        return kernels.block_product(kernel, own, shared) + bias


class Conv(nnx.Module):
    """Stride-1 same-padded 2D convolution, (M, H, W, inputs) -> (M, H, W, outputs), with bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = initial_weights(rngs, (kernel, kernel, inputs, outputs), kernel * kernel * inputs, 1.0)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def pooled(self, x: jax.Array) -> jax.Array:
        """The 2x2 maximum of this convolution: (M, H, W, inputs) -> (M, H/2, W/2, outputs)."""
        return kernels.conv_pool(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)

    def upsampled(self, x: jax.Array) -> jax.Array:
        """This convolution of `x` upsampled by 2: (M, H, W, inputs) -> (M, 2H, 2W, outputs)."""
        return kernels.upsample_conv(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x * rsqrt(mean(x^2) + 1e-4) * scale`` over the features, computed in float32; no shift."""

    def __init__(self, units: int) -> None:
        self.scale = nnx.Param(jnp.ones(units, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = at_least_float32(x)
        root = jax.lax.rsqrt(jnp.square(y).mean(features.axis(), keepdims=True) + RMS_EPSILON)
        return (y * (root * features.weights(self.scale[...].astype(y.dtype)))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean(x)) * rsqrt(var(x) + 1e-3) * scale + bias`` over the features, in float32 (Ba et al., 2016)."""

    def __init__(self, units: int) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(units, jnp.float32)), nnx.Param(jnp.zeros(units, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = at_least_float32(x)
        scale, bias = (features.weights(one[...].astype(y.dtype)) for one in (self.scale, self.bias))
        y = y - y.mean(features.axis(), keepdims=True)
        root = jax.lax.rsqrt(jnp.square(y).mean(features.axis(), keepdims=True) + LAYER_EPSILON)
        return (y * (root * scale) + bias).astype(x.dtype)


class Dense(nnx.Module):
    """Linear -> RMSNorm -> SiLU: (..., inputs) -> (..., units)."""

    def __init__(self, inputs: int, units: int, *, rngs: nnx.Rngs) -> None:
        self.linear = Linear(inputs, units, rngs=rngs)
        self.norm = RMSNorm(units)

    def __call__(self, x: jax.Array) -> jax.Array:
        return kernels.recomputed(lambda y: jax.nn.silu(self.norm(y)), self.linear(x))


class MLP(nnx.Module):
    """A stack of Dense layers: (..., inputs) -> (..., units)."""

    def __init__(self, inputs: int, units: int, layers: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Dense(inputs if i == 0 else units, units, rngs=rngs) for i in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x
