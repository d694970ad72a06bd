"""Layers against dense matrices and spelled-out loops; the spread of the initial weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dreamer import kernels
from dreamer.networks import MLP, BlockLinear, Conv, Dense, Linear, RMSNorm

RNG = np.random.default_rng(0)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(params=0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(0, 1, shape).astype(np.float32)


def numpy_rmsnorm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    x = np.float64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale


def numpy_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


# Layers against oracles


def test_linear():
    layer, x = Linear(3, 5, rngs=rngs()), normal(2, 4, 3)
    layer.bias[...] = jnp.asarray(normal(5))
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), rtol=1e-5)


@pytest.mark.parametrize("shared", [0, 3])
def test_block_linear_is_a_dense_layer_with_a_block_matrix(shared):
    """Input [own of all blocks, shared]: own parts meet only their block's outputs, the shared part meets all."""
    blocks, own, outputs = 4, 8, 12
    layer = BlockLinear(blocks, own, outputs, shared=shared, rngs=rngs())
    layer.bias[...] = jnp.asarray(normal(outputs))
    kernel = np.asarray(layer.kernel[...])
    i, o = own // blocks, outputs // blocks
    assert kernel.shape == (blocks, i + shared, o)
    dense = np.zeros((own + shared, outputs), np.float32)
    for g in range(blocks):
        dense[g * i : (g + 1) * i, g * o : (g + 1) * o] = kernel[g, :i]
        dense[own:, g * o : (g + 1) * o] = kernel[g, i:]
    x, y = normal(5, own), normal(5, shared)
    oracle = np.concatenate([x, y], -1) @ dense + np.asarray(layer.bias[...])
    ours = layer(jnp.asarray(x).reshape(5, blocks, i), jnp.asarray(y) if shared else None)
    np.testing.assert_allclose(ours.reshape(5, outputs), oracle, rtol=1e-4, atol=1e-5)


def test_block_linear_refuses_widths_that_its_blocks_do_not_divide():
    with pytest.raises(ValueError, match="widths that 4 blocks divide, got 8 inputs and 10 outputs"):
        BlockLinear(4, 8, 10, rngs=rngs())


@pytest.mark.parametrize("size", [3, 5])
def test_convolution_and_maximum_against_loops(size):
    layer, x = Conv(2, 3, size, rngs=rngs()), normal(1, 4, 6, 2)
    layer.bias[...] = jnp.asarray(normal(3))
    kernel, pad = np.asarray(layer.kernel[...]), size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    oracle = np.empty((1, 4, 6, 3))
    for row in range(4):
        for column in range(6):
            window = padded[0, row : row + size, column : column + size]
            oracle[0, row, column] = (window[..., None] * kernel).sum((0, 1, 2)) + np.asarray(layer.bias[...])
    oracle = oracle.reshape(1, 2, 2, 3, 2, 3).max((2, 4))
    np.testing.assert_allclose(layer.pooled(jnp.asarray(x)), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_upsampled_convolution_is_a_convolution_of_the_upsampled_image(size):
    layer, x = Conv(2, 3, size, rngs=rngs()), normal(2, 3, 4, 2)
    layer.bias[...] = jnp.asarray(normal(3))
    grown = np.repeat(np.repeat(x, 2, 1), 2, 2)
    oracle = kernels.plain_conv(jnp.asarray(grown), layer.kernel[...]) + layer.bias[...]
    np.testing.assert_allclose(layer.upsampled(jnp.asarray(x)), oracle, rtol=1e-4, atol=1e-5)


def test_dense_is_linear_then_rmsnorm_then_silu():
    layer, x = Dense(3, 4, rngs=rngs()), normal(5, 3)
    layer.norm.scale[...] = jnp.asarray(normal(4))
    hidden = x @ np.asarray(layer.linear.kernel[...]) + np.asarray(layer.linear.bias[...])
    oracle = numpy_silu(numpy_rmsnorm(hidden, np.asarray(layer.norm.scale[...])))
    np.testing.assert_allclose(layer(x), oracle, rtol=1e-4, atol=1e-6)


def test_mlp_is_its_layers_in_order():
    mlp, x = MLP(3, 4, 3, rngs=rngs()), jnp.asarray(normal(5, 3))
    assert [layer.linear.kernel.shape for layer in mlp.layers] == [(3, 4), (4, 4), (4, 4)]
    y = x
    for layer in mlp.layers:
        y = layer(y)
    np.testing.assert_array_equal(mlp(x), y)


def test_rmsnorm_makes_the_mean_square_one():
    y = np.asarray(RMSNorm(64)(jnp.asarray(normal(10, 64) * 50)))
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-5)
    # No shift: the mean stays, scaled like everything else. The epsilon keeps zeros zero.
    np.testing.assert_allclose(RMSNorm(4)(jnp.full(4, 7.0)), 1, rtol=1e-5)
    np.testing.assert_array_equal(RMSNorm(4)(jnp.zeros(4)), 0)


def test_rmsnorm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(4, 256), jnp.bfloat16)
    y = RMSNorm(256)(x)
    assert y.dtype == jnp.bfloat16
    # One rounding of the exact result, not an accumulation of roundings.
    np.testing.assert_allclose(np.float32(y), numpy_rmsnorm(np.float32(x), np.ones(256)), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_keep_the_dtype_of_their_input_and_float32_parameters(dtype):
    layers: list[tuple[Any, Any, tuple[int, ...]]] = [
        (layer := Dense(4, 4, rngs=rngs()), layer, (2, 4)),
        (layer := BlockLinear(2, 4, 4, rngs=rngs()), layer, (2, 2, 2)),
        (layer := Conv(2, 2, 3, rngs=rngs()), layer.pooled, (1, 4, 4, 2)),
    ]
    for layer, call, shape in layers:
        with jax.numpy_dtype_promotion("strict"):
            assert call(jnp.ones(shape, dtype)).dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.float32)}


# Initial weights


def spread(kernel: jax.Array, fan_in: int) -> float:
    """Variance of the weights in units of 1 / fan_in."""
    return float(np.var(np.asarray(kernel)) * fan_in)


def test_initial_weights_have_variance_one_over_fan_in():
    # 100k weights: the relative standard error of the variance is about 0.3 %.
    assert spread(Linear(500, 200, rngs=rngs()).kernel[...], 500) == pytest.approx(1, abs=0.02)
    assert spread(Conv(40, 100, 5, rngs=rngs()).kernel[...], 25 * 40) == pytest.approx(1, abs=0.02)


def test_block_linear_fan_in_is_the_full_input_width():
    # 8 blocks, each reads its own 64 of 512 units and 100 shared ones: 512 + 8 * 100.
    kernel = BlockLinear(8, 512, 800, shared=100, rngs=rngs()).kernel[...]
    assert spread(kernel, 512 + 8 * 100) == pytest.approx(1, abs=0.02)
    assert spread(BlockLinear(8, 512, 1600, rngs=rngs()).kernel[...], 512) == pytest.approx(1, abs=0.02)


def test_initial_weights_are_truncated_at_two_deviations_and_centred():
    kernel = np.asarray(Linear(400, 300, rngs=rngs()).kernel[...]) * 400**0.5 / 1.1368
    assert np.abs(kernel).max() <= 2.0 + 1e-5
    assert np.abs(kernel).max() > 1.99
    assert abs(kernel.mean()) < 0.01


def test_out_scale_and_the_other_initial_values():
    layer = Linear(200, 200, scale=0.01, rngs=rngs())
    assert spread(layer.kernel[...], 200) == pytest.approx(1e-4, rel=0.02)
    assert not Linear(20, 20, scale=0.0, rngs=rngs()).kernel[...].any()
    assert not layer.bias[...].any()
    assert (RMSNorm(5).scale[...] == 1).all()


def test_layers_built_from_one_stream_differ():
    stream = rngs()
    a, b = Linear(8, 8, rngs=stream), Linear(8, 8, rngs=stream)
    assert (a.kernel[...] != b.kernel[...]).all()
    np.testing.assert_array_equal(a.kernel[...], Linear(8, 8, rngs=rngs()).kernel[...])
