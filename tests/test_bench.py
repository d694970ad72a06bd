"""The benchmark of the update: every rewrite against its plain form, the whole update in both, the protocol."""

from __future__ import annotations

import io
import json
from functools import partial
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from learner_data import CHEAP, fixed_class, fixed_normal, perturb, random_batch, small_config, weights

from dreamer import cli, coders, distributions, imagination, networks
from dreamer.actor_critic import lambda_return
from dreamer.agent import Agent
from dreamer.diagnostics import bench_update as bench
from dreamer.networks import COLUMNS, ROWS, BlockLinear, columns, rows
from dreamer.types import Space

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
def test_convolutions(size: int, height: int, width: int, inputs: int, outputs: int) -> None:
    with jax.enable_x64(True):
        kernel, x = draw(size, size, inputs, outputs), draw(2, height, width, inputs)
        padding = ((1, size), (0, size - 1))
        by_hand, plain = (partial(f, padding=padding) for f in (networks._conv_and_gradients, networks.plain_conv))
        same(by_hand, plain, draw(2, height, width, inputs), kernel)
        same(networks.upsample_conv, bench.plain_upsample_conv, x, kernel)
        same(networks.conv_pool, bench.plain_conv_pool, draw(2, 2 * height, 2 * width, inputs), kernel)


@few
@hypothesis.given(images=st.integers(3, 12), part=st.integers(100, 400))
def test_images_in_parts(images: int, part: int) -> None:
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(coders, "PART_BYTES", part)
        kernel, sizes = draw(3, 3, 2, 2), []

        def stage(kernel: jax.Array, x: jax.Array) -> jax.Array:
            sizes.append(x.shape[0])
            return jax.nn.silu(networks.conv_pool(x, kernel))

        divided = lambda kernel, x: coders.in_parts(partial(stage, kernel), x, 8 * 4 * 4 * 2)  # noqa: E731
        plain = lambda kernel, x: jax.nn.silu(networks.conv_pool(x, kernel))  # noqa: E731
        same(divided, plain, kernel, draw(images, 4, 4, 2))
    assert sum(sizes) == images and 1 < len(sizes) <= coders.MOST_PARTS


@few
@hypothesis.given(lead=st.lists(small, max_size=2), inputs=small, outputs=small, batch=small)
def test_transposed_product(lead: list[int], inputs: int, outputs: int, batch: int) -> None:
    plain = {(owner, name): form for owner, name, form in bench.PLAIN}[networks, "transposed_product"]
    with jax.enable_x64(True):
        same(networks.transposed_product, plain, draw(*lead, inputs, outputs), draw(*lead, inputs, batch))


@few
@hypothesis.given(blocks=small, own=small, outputs=small, shared=small, batch=small)
def test_block_linear_in_columns(blocks: int, own: int, outputs: int, shared: int, batch: int) -> None:
    with jax.enable_x64(True):
        layer = BlockLinear(blocks, blocks * own, blocks * outputs, shared=shared, rngs=weights())
        graph, state = nnx.split(layer)
        state = jax.tree.map(lambda x: draw(*x.shape), state)

        def fast(state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return rows(nnx.merge(graph, state)(columns(x), columns(y), COLUMNS))

        def plain(state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return bench.plain_block_linear(nnx.merge(graph, state), x, y)

        same(fast, plain, state, draw(batch, blocks, own), draw(batch, shared))
        by_rows = lambda state, x, y: nnx.merge(graph, state)(x, y, ROWS)  # noqa: E731
        same(by_rows, plain, state, draw(batch, blocks, own), draw(batch, shared))


@few
@hypothesis.given(batch=small, length=st.integers(2, 9))
def test_lambda_return(batch: int, length: int) -> None:
    with jax.enable_x64(True):
        same(lambda_return, bench.plain_lambda_return, *(draw(batch, length) for _ in range(4)))


@pytest.mark.parametrize("axis", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("name", SPACES)
def test_heads_read_the_same_inside_the_scan_and_after_it(
    name: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of a dream, and the gradients of what is trained, in float64; nothing else has a gradient."""
    monkeypatch.setattr(distributions, "draw_class", fixed_class)
    monkeypatch.setattr(distributions, "draw_normal", fixed_normal)
    with jax.enable_x64(True):
        agent = Agent(*SPACES[name], small_config())
        double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64) + 0.1 * draw(*x.shape), tree)  # noqa: E731
        params, slow = double(agent.init(0)["params"]), double(agent.init(1)["slow_value"])
        shapes = agent._merge(params).world_model.rssm.init(3, jnp.float64)
        starts = jax.tree.map(lambda x: draw(*x.shape), shapes)

        def dream(params: Any, slow: Any, starts: Any, inside: bool) -> tuple[jax.Array, Any]:
            model, critic = agent._merge(params), agent.slow_critic(slow)
            how = {"masked": False, "axis": axis, "read_inside": inside}
            dreamer = imagination.Dreamer(model.world_model, model.actor_critic, critic, **how)
            seen = vars(dreamer.dream(starts, 3, jax.random.key(0)))
            seen |= {"critic": seen["critic"].logits}
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
    assert seen["value"].shape == (3, 4) and seen["log_prob"].shape == (3, 3)


def test_both_ways_to_draw_classes_follow_the_probabilities() -> None:
    probs = jnp.asarray([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]])
    keys = jax.random.split(jax.random.key(0), 20_000)
    for function in (distributions.draw_class, bench.plain_draw_class):
        index = np.asarray(jax.vmap(lambda key, function=function: function(key, probs))(keys))
        shares = np.stack([(index == k).mean(0) for k in range(4)], -1)
        np.testing.assert_allclose(shares, probs, atol=0.015)


# The whole update


@pytest.mark.parametrize("name", SPACES)
def test_the_whole_update_is_the_same_function(name: str) -> None:
    """Loss terms, metrics, latents and gradients of all parameters; every draw fixed."""
    results = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                for owner, attribute, form in bench.PLAIN:
                    patch.setattr(owner, attribute, form)
            patch.setattr(distributions, "draw_class", fixed_class)
            patch.setattr(distributions, "draw_normal", fixed_normal)
            patch.setattr(coders, "PART_BYTES", 1000)
            agent = Agent(*SPACES[name], small_config())
            state = agent.init(0)
            slopes = jax.jit(jax.grad(agent.loss, has_aux=True), compiler_options=CHEAP)
            args = (perturb(state["params"]), state["slow_value"], state["return_scale"], random_batch(agent))
            results.append(slopes(*args, jax.random.key(0)))
    (ours, (scale, latents, metrics)), (oracle, (plain_scale, plain_latents, plain_metrics)) = results
    np.testing.assert_array_equal(latents["stoch"], plain_latents["stoch"])
    for one, two in ((ours, oracle), (scale, plain_scale), (metrics, plain_metrics)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


def test_plain_forms_are_taken_back() -> None:
    before = [getattr(owner, name) for owner, name, _ in bench.PLAIN]
    with bench.plain_forms():
        assert networks.conv_pool is bench.plain_conv_pool and Agent.layout == ROWS
    assert [getattr(owner, name) for owner, name, _ in bench.PLAIN] == before


def test_updates_in_one_dispatch_are_those_of_single_dispatches() -> None:
    agent = Agent(*SPACES["vector"], small_config())
    batches = [random_batch(agent, seed=i) for i in range(3)]
    one, many = (jax.jit(f, compiler_options=CHEAP) for f in (agent._train_step, agent._train_steps))
    state, singles = agent.init(0), []
    for batch in batches:
        state, *outputs = one(state, batch)
        singles.append(outputs)
    together, *outputs = many(agent.init(0), batches)
    assert together["updates"] == 3
    stacked = jax.tree.map(lambda *x: np.stack(x), *singles)
    for ours, oracle in ((together["params"], state["params"]), (outputs[0]["deter"], stacked[0]["deter"])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, oracle)
    np.testing.assert_allclose(outputs[1]["opt/loss"], stacked[1]["opt/loss"], rtol=1e-4)


# The command


class FakeProgram:
    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> tuple[float, float]:
        wall = self.times.pop(0)
        return wall, wall / 2

    def facts(self) -> dict[str, Any]:
        return {"compile_s": 1.0, "temp_mb": 2.0}


def test_the_protocol_is_one_update_for_each_line(capsys: pytest.CaptureFixture[str]) -> None:
    program = FakeProgram(3.0, 4.0, 5.0)
    bench.serve(program, io.StringIO("\n\nq\n\n"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [program.facts(), {"ms": 3.0, "cpu_ms": 1.5}, {"ms": 4.0, "cpu_ms": 2.0}]
    assert program.times == [5.0]


def test_programs_take_turns_and_ratios_are_paired() -> None:
    figures = bench.measure({"update": FakeProgram(1, 2, 9), "plain": FakeProgram(3, 4, 27)}, 3)
    assert figures["update"]["ms"] == 2 and figures["plain"]["ms"] == 4
    assert figures["update"]["speedup"] == figures["update"]["cpu_speedup"] == 3
    assert figures["update"]["ms_quartiles"] == [1.5, 5.5] and figures["plain"]["speedup"] == 1


def test_arguments_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bench.Request] = []
    monkeypatch.setattr(bench, "bench_update", lambda request: seen.append(request))
    line = "bench update --size 12m --obs image --updates-per-dispatch 4 --against plain --protocol"
    assert cli.main(["bench", "update"]) == cli.main(line.split()) == 0
    assert seen == [bench.Request(), bench.Request("12m", "image", 4, against="plain", protocol=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "seeds"), [(None, None), (2, 2)])
def test_the_benchmark_measures(dispatch: int | None, seeds: int | None) -> None:
    program = bench.Program("1m", "vector", dispatch, seeds)
    wall, cpu = program()
    assert wall > 0 and cpu > 0 and program.facts()["params"] == 640_867
    assert np.ravel(program.state["updates"]).tolist() == [(bench.WARM_UP + 1) * (dispatch or 1)] * (seeds or 1)
