"""Every rewrite for speed against its plain twin, each alone and the whole update in both forms."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from learner_data import CHEAP, fix_draws, perturb, random_batch, small_config, weights
from tiny_runs import as_for_users

from dreamer import features, kernels
from dreamer.agent import Agent
from dreamer.behaviours import Motive
from dreamer.imagination import imagine
from dreamer.networks import BlockLinear
from dreamer.types import Space
from dreamer.values import ConfigError

RNG = np.random.default_rng(0)
few = hypothesis.settings(max_examples=2)
small = st.integers(1, 4)

SPACES = {
    "vector": ({"position": Space("vector", (3,))}, {"action": Space("vector", (2,))}),
    "image": (
        {"image": Space("image", (8, 8, 1))},
        {"act": Space("discrete", (), (3,)), "many": Space("discrete", (2,), (2, 4))},
    ),
}


def same(fast: Any, plain: Any, *args: Any) -> None:
    """Values and gradients by every argument, to rounding in float64."""

    def weighed(function: Any) -> Any:
        total = lambda *args: (y := function(*args), (jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)).sum())[::-1]  # noqa: E731
        return jax.value_and_grad(total, argnums=tuple(range(len(args))), has_aux=True)

    def both(*args: Any) -> Any:
        return weighed(fast)(*args), weighed(plain)(*args)

    one, two = jax.jit(both, compiler_options=CHEAP)(*args)
    for ours, oracle in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-9, atol=1e-9)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(0, 1, shape))


# Rewrites against their plain forms


@few
@hypothesis.given(size=st.integers(1, 6), height=small, width=small, inputs=small, outputs=small)
def test_convolutions(size, height, width, inputs, outputs):
    with jax.enable_x64(True):
        kernel, x = draw(size, size, inputs, outputs), draw(2, height, width, inputs)
        padding = ((1, size), (0, size - 1))
        by_hand, plain = (partial(f, padding=padding) for f in kernels.REWRITES["conv"][:2])
        same(by_hand, plain, draw(2, height, width, inputs), kernel)
        same(*kernels.REWRITES["upsample_conv"][:2], x, kernel)
        same(*kernels.REWRITES["conv_pool"][:2], draw(2, 2 * height, 2 * width, inputs), kernel)


@few
@hypothesis.given(images=st.integers(3, 12), part=st.integers(100, 400))
def test_images_in_parts(images, part):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PART_BYTES", part)
        kernel, sizes = draw(3, 3, 2, 2), []

        def stage(kernel: jax.Array, x: jax.Array) -> jax.Array:
            sizes.append(x.shape[0])
            return jax.nn.silu(kernels.conv_pool(x, kernel))

        divided = lambda kernel, x: kernels.in_parts(partial(stage, kernel), x, 8 * 4 * 4 * 2)  # noqa: E731
        plain = lambda kernel, x: jax.nn.silu(kernels.conv_pool(x, kernel))  # noqa: E731
        same(divided, plain, kernel, draw(images, 4, 4, 2))
    assert sum(sizes) == images and 1 < len(sizes) <= kernels.MOST_PARTS


@few
@hypothesis.given(lead=st.lists(small, max_size=2), inputs=small, outputs=small, batch=small)
def test_transposed_product(lead, inputs, outputs, batch):
    with jax.enable_x64(True):
        same(*kernels.REWRITES["transposed_product"][:2], draw(*lead, inputs, outputs), draw(*lead, inputs, batch))


@few
@hypothesis.given(blocks=small, own=small, outputs=small, shared=small, batch=small)
def test_block_linear_with_items_last(blocks, own, outputs, shared, batch):
    with jax.enable_x64(True):
        layer = BlockLinear(blocks, blocks * own, blocks * outputs, shared=shared, rngs=weights())
        graph, state = nnx.split(layer)
        state = jax.tree.map(lambda x: draw(*x.shape), state)

        apply = lambda state, x, y: nnx.merge(graph, state)(x, y)  # noqa: E731

        def last(state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            with features.items_last():
                return features.leave(apply(state, *features.enter((x, y))))

        def plain(state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            with kernels.plain():
                return apply(state, x, y)

        same(last, plain, state, draw(batch, blocks, own), draw(batch, shared))
        same(apply, plain, state, draw(batch, blocks, own), draw(batch, shared))


@few
@hypothesis.given(batch=small, units=small)
def test_recomputed_norms(batch, units):
    with jax.enable_x64(True):
        fast, plain, _ = kernels.REWRITES["recomputed"]
        squash = lambda scale, y: jax.nn.silu(y * scale / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True)))  # noqa: E731
        of = lambda form: lambda scale, y: form(partial(squash, scale), y)  # noqa: E731
        same(of(fast), of(plain), draw(units), draw(batch, units))


@pytest.mark.parametrize("last", [False, True], ids=["items first", "items last"])
@pytest.mark.parametrize("name", SPACES)
def test_heads_read_the_same_inside_the_scan_and_after_it(name, last, monkeypatch):
    """Every number of a dream, and the gradients of what is trained, in float64; nothing else has a gradient."""
    fix_draws(monkeypatch)
    with jax.enable_x64(True):
        agent = Agent(*SPACES[name], small_config())
        double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64) + 0.1 * draw(*x.shape), tree)  # noqa: E731
        params, slow = double(agent.init(0)["params"]), double(agent.init(1)["slow"])
        shapes = agent.model(params).world_model.rssm.init(3, jnp.float64)
        starts = jax.tree.map(lambda x: draw(*x.shape), shapes)

        def dream(params: Any, slow: Any, starts: Any, inside: bool) -> tuple[jax.Array, Any]:
            model, copies = agent.model(params), agent.slow_modules(slow)
            # A GPU reads after the scan, a CPU within it.
            with kernels.traced_for(kernels.Target("cpu" if inside else "gpu")), features.scans_turn(last):
                parts = model.world_model, model.actor_critic, copies
                seen = vars(imagine(*parts, starts, 3, jax.random.key(0), masked=False, motive=Motive()))
            total = sum((jnp.sin(x) * jnp.arange(x.size).reshape(x.shape)).sum() for x in jax.tree.leaves(seen))
            return total, seen

        slopes = jax.jit(jax.grad(dream, argnums=(0, 1, 2), has_aux=True), static_argnums=3, compiler_options=CHEAP)
        one, two = (slopes(params, slow, starts, inside) for inside in (True, False))
    for ours, oracle in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-9, atol=1e-9)
    (of_params, of_slow, of_starts), seen = one
    moved = lambda tree: any(np.asarray(x).any() for x in jax.tree.leaves(tree))  # noqa: E731
    assert not moved(of_slow) and not moved(of_starts) and not moved(of_params["world_model"])
    assert moved(of_params["actor_critic"]["policy"]) and moved(of_params["actor_critic"]["value"])
    assert seen["value"].shape == (4, 3) and seen["log_prob"].shape == (3, 3)


def test_both_ways_to_draw_classes_follow_the_probabilities():
    probs = jnp.asarray([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]])
    keys = jax.random.split(jax.random.key(0), 20_000)
    for function in kernels.REWRITES["draw_class"][:2]:
        index = np.asarray(jax.vmap(lambda key, function=function: function(key, probs))(keys))
        shares = np.stack([(index == k).mean(0) for k in range(4)], -1)
        np.testing.assert_allclose(shares, probs, atol=0.015)


# The whole update


@pytest.mark.parametrize("name", SPACES)
def test_the_whole_update_is_the_same_function(name):
    """Loss terms, metrics, latents and gradients of all parameters; every draw fixed."""
    results = []
    for how in (contextlib.nullcontext(), kernels.plain()):
        with pytest.MonkeyPatch.context() as patch, how:
            fix_draws(patch)
            patch.setattr(kernels, "PART_BYTES", 1000)
            agent = Agent(*SPACES[name], small_config())
            state = agent.init(0)
            slopes = jax.jit(jax.grad(agent.loss, has_aux=True), compiler_options=CHEAP)
            args = (perturb(state["params"]), state["slow"], state["return_scale"], random_batch(agent))
            results.append(slopes(*args, jax.random.key(0)))
    (ours, (scale, latents, metrics, *_)), (oracle, (plain_scale, plain_latents, plain_metrics, *_)) = results
    np.testing.assert_array_equal(latents["stoch"], plain_latents["stoch"])
    for one, two in ((ours, oracle), (scale, plain_scale), (metrics, plain_metrics)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


def test_the_reference_s_updates_compiled_as_for_users():
    """With all that XLA then does to a program; ./scripts/test has it take less trouble with the other tests."""
    three = Path(__file__).with_name("test_reference.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{three}::test_three_updates"]
    subprocess.run(command, env=as_for_users(), check=True)


def test_every_rewrite_is_used_and_plain_takes_all_of_them_away(monkeypatch):
    """What an update of an image agent on a CPU calls."""
    called: dict[str, set[str]] = {}

    def watched(form: str, name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            called.setdefault(form, set()).add(name)
            return function(*arguments)

        return run

    for name, (fast, plain, on) in list(kernels.REWRITES.items()):
        row = kernels.Rewrite(watched("fast", name, fast), watched("plain", name, plain), on)
        monkeypatch.setitem(kernels.REWRITES, name, row)
    for how, form in ((contextlib.nullcontext(), "fast"), (kernels.plain(), "plain")):
        called.clear()
        with how:
            agent = Agent(*SPACES["image"], small_config())
        batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in random_batch(agent).items()}
        jax.make_jaxpr(agent.learn)(jax.eval_shape(agent.create, 0), batch)
        # The plain product needs no turned kernel; the plain convolutions and scan call no other one of the table.
        missing = {"in_one_kernel", "in_few_kernels"}
        missing |= set() if form == "fast" else {"transposed_product", "conv", "items_last_in_scans"}
        rows = kernels.REWRITES.items()
        for_others = {name for name, row in rows if not row.on(kernels.Target("cpu"))} if form == "fast" else set()
        for_others -= missing
        assert called.keys() - ({"plain"} if for_others else set()) == {form}, called
        assert called[form] | missing | for_others == set(kernels.REWRITES)
        assert called.get("plain", set()) in (for_others, called[form])


def test_single_rewrites_are_left_out_where_an_option_says_so():
    def trace(*without: str) -> None:
        agent = Agent(*SPACES["image"], small_config(run={"without": without}))
        batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in random_batch(agent).items()}
        with pytest.MonkeyPatch.context() as patch:
            for name in ("draw_class", "recomputed"):
                patch.setitem(kernels.REWRITES, name, kernels.REWRITES[name]._replace(fast=partial(_refused, name)))
            jax.make_jaxpr(agent.learn)(jax.eval_shape(agent.create, 0), batch)

    trace("draw_class", "recomputed")
    with pytest.raises(AssertionError, match="recomputed"):
        trace("draw_class")
    with pytest.raises(ConfigError, match="without: expected rewrites among .*draw_class.*, got spell"):
        Agent(*SPACES["image"], small_config(run={"without": ("spell",)}))


def _refused(name: str, *arguments: Any) -> Any:
    raise AssertionError(name)


def test_the_target_is_that_of_the_agents_device():
    gpu = kernels.Target("gpu")
    assert kernels.current() == kernels.Target("cpu")
    with kernels.traced_for(gpu):
        assert kernels.current() == gpu and not kernels.heads_read_in_scan() and not kernels.items_last_in_scans()
    with kernels.plain():
        assert kernels.target("cpu") == kernels.Target("cpu", rewrites=False) == kernels.current()
        assert not kernels.items_last_in_scans()
    assert kernels.current() == kernels.Target("cpu")
