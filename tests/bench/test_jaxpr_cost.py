"""Operations and memory of traced programs: against sums by hand, and against what XLA says of small programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer.bench.jaxpr_cost import flops, peak_bytes, tree_bytes

SIDE = 64
PRODUCT = 2 * SIDE**3
MATRIX = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
BYTES = 4 * SIDE**2


def program(function, *shapes):
    return jax.jit(function).trace(*shapes).jaxpr.jaxpr


def loop(x, w):
    return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=10)[0]


def branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)


def turns(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)


def unread(x, w):
    del w
    x @ x @ x
    return x @ x


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x, w: x @ w, 1),
        (lambda x, w: jnp.einsum("bi,cid->bcd", x, jnp.zeros((3, SIDE, SIDE)) + w), 3),
        (loop, 10),
        (jax.vmap(loop, in_axes=(None, None), axis_size=2, out_axes=0), 10),
        (branches, 2),
        (turns, 1),
        (jax.jit(lambda x, w: jax.jit(lambda y: y @ w)(x @ w)), 2),
        (unread, 1),
        (jax.grad(lambda x, w: loop(x, w).sum(), argnums=(0, 1)), 30),
    ],
)
def test_products_of_matrices(function, products):
    assert flops(program(function, MATRIX, MATRIX)) == pytest.approx(products * PRODUCT, rel=0.05)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("by", [0, 1])
def test_convolutions_and_their_gradients(stride, by):
    """Each of the three costs as much: B x H x W x k x k x inputs x outputs products, less where there is padding."""
    image, kernel = jax.ShapeDtypeStruct((4, 32, 32, 8), jnp.float32), jax.ShapeDtypeStruct((5, 5, 8, 16), jnp.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lambda x, k: jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=numbers)  # noqa: E731
    expected = 2 * 4 * (32 // stride) ** 2 * 25 * 8 * 16
    assert flops(program(out, image, kernel)) == expected
    gradient = jax.grad(lambda x, k: out(x, k).sum(), argnums=by)
    assert flops(program(gradient, image, kernel)) == pytest.approx(expected, rel=0.01)


def test_numbers_one_by_one_and_sums():
    assert flops(program(lambda x, w: jnp.tanh(x + w).sum(), MATRIX, MATRIX)) == 3 * SIDE**2


def layers(weights, x):
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return (x**2).mean()


def test_a_network_against_xla():
    """Without loops XLA counts right, and its buffers are those of the program that runs."""
    weights, x = [MATRIX] * 8, jax.ShapeDtypeStruct((4096, SIDE), jnp.float32)
    traced = jax.jit(jax.value_and_grad(layers)).trace(weights, x)
    lowered = traced.lower()
    assert flops(traced.jaxpr.jaxpr) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.1)
    laid_out = lowered.compile().memory_analysis().temp_size_in_bytes
    assert peak_bytes(traced.jaxpr.jaxpr) == pytest.approx(laid_out, rel=0.3)


@pytest.mark.parametrize(
    ("function", "matrices"),
    [
        (lambda x, w: x @ w, 0),  # what is given, and what is made
        (lambda x, w: (x @ w) @ w, 1),
        (lambda x, w: ((x @ w) @ w) @ w, 2),  # one read, one written
        (lambda x, w: (x @ w).reshape(-1, 2)[:, None] @ w.reshape(-1, 2)[:, :, None], 1),
        (lambda x, w: ((x @ w) * 2 + 1 - w) @ w, 1),  # done while it is read
        (lambda x, w: jnp.exp(x @ w) @ w, 1),
        (lambda x, w: (lambda y: (y @ w) @ (y @ x))(jnp.exp(x @ w)), 3),  # read twice
        (lambda x, w: jax.jit(lambda y: (y @ y) @ w)(x @ w), 2),
        (lambda x, w: loop(x @ w, w), 1),
        (unread, 0),
    ],
)
def test_most_bytes_at_once(function, matrices):
    assert peak_bytes(program(function, MATRIX, MATRIX)) == matrices * BYTES


def test_what_a_loop_keeps_for_its_gradient():
    """Ten carries, and a few of one turn."""
    peak = peak_bytes(program(jax.grad(lambda x, w: loop(x, w).sum(), argnums=1), MATRIX, MATRIX))
    assert 10 * BYTES <= peak <= 14 * BYTES


def test_bytes_of_a_tree():
    tree = {"a": np.zeros((2, 3), np.uint8), "b": [jax.ShapeDtypeStruct((5,), jnp.bfloat16), jnp.zeros((), jnp.int32)]}
    assert tree_bytes(tree) == 6 + 10 + 4
