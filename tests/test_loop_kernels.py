"""Loops as kernels of a GPU, interpreted on a CPU: what `jax.lax.scan` computes, whatever the step is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, perturb, random_batch, small_config

from dreamer import few_kernels, kernels, one_kernel, parts, scans
from dreamer.agent import Agent
from dreamer.types import Space

GPU = kernels.Target("gpu")
DISCRETE = ({"position": Space("vector", (3,))}, {"action": Space("discrete", (), (3,))})
CONTINUOUS = ({"position": Space("vector", (20,))}, {"walk": Space("vector", (2,))})
#: The narrowest networks whose products are as wide as a GPU's matrix units ask for.
WIDE = dict(deter=32, hidden=16, stoch=4, classes=4, units=16, blocks=2)


#: The ways to make kernels of a loop.
LOOPS = {"one kernel": one_kernel.loop_in_one_kernel, "few kernels": few_kernels.loop_in_few_kernels}


@contextlib.contextmanager
def interpretation(how: str) -> Iterator[list[str]]:
    """Inside, kernels of a GPU run on the CPU; a list of what became of each loop."""
    seen: list[str] = []

    def run(step: Any, state: Any, inputs: Any, length: int, reverse: bool) -> Any:
        try:
            results = LOOPS[how](step, state, inputs, length, reverse, interpret=True)
        except parts.UnsuitedError as reason:
            seen.append(str(reason))
            return scans.in_several_kernels(step, state, inputs, length, reverse)
        seen.append(how)
        return results

    row = kernels.REWRITES["in_one_kernel"]
    kernels.REWRITES["in_one_kernel"] = row._replace(fast=run)
    try:
        with kernels.traced_for(GPU):
            yield seen
    finally:
        kernels.REWRITES["in_one_kernel"] = row


@pytest.fixture(params=LOOPS)
def how(request) -> str:
    return request.param


@pytest.fixture
def interpreted(how) -> Iterator[list[str]]:
    with interpretation(how) as seen:
        yield seen


@pytest.mark.parametrize("spaces", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_an_update_whose_loops_are_kernels_is_the_plain_one(spaces, how, interpreted):
    """Loss terms, latents and gradients of all parameters, in float64, the same random numbers drawn."""
    results = []
    with jax.enable_x64(True):
        for names in ((), ("scan",)):
            agent = Agent(*spaces, small_config(model=WIDE, actor_critic=dict(horizon=2)))
            agent.target = kernels.Target("gpu", without=names)
            double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)  # noqa: E731
            state = agent.init(0)
            params, slow, scale = map(double, (perturb(state["params"]), state["slow"], state["return_scale"]))
            batch = random_batch(agent, length=3)
            slopes = jax.jit(jax.grad(agent.loss, has_aux=True), compiler_options=CHEAP)
            grads, outcome = slopes(params, slow, scale, batch, jax.random.key(0))
            results.append((grads, outcome.metrics, outcome.written))
    # observe, imagine, and the way back through each
    assert interpreted == [how] * 4
    for (path, ours), oracle in zip(jax.tree.leaves_with_path(results[0]), jax.tree.leaves(results[1]), strict=True):
        a, b = np.float64(ours), np.float64(oracle)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1e-3, np.abs(b).max()), err_msg=str(path))


def recurrent(rng: np.random.Generator, kind: Any, batch: int, width: int, groups: int, classes: int) -> tuple:
    """A step with everything that steps are made of: (step, state, inputs), weights and activations of a kind."""
    draw = lambda *shape: jnp.asarray(rng.normal(0, shape[-2] ** -0.5 if len(shape) > 1 else 1, shape), kind)  # noqa: E731
    units, variables = groups * width, width // classes
    whole, shared, back = draw(units, width), draw(2 * width, units), draw(units, width)
    own, gates = draw(groups, width, width), draw(groups, width, 2 * width)
    scale, start = jnp.asarray(rng.normal(0, 1, (1, units)), jnp.float32), jnp.zeros((batch, units), kind)

    def step(state: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        (x, drawn), (first, seen, uniform) = state, row
        x = jnp.where(first, start, x)
        a = jax.nn.silu(x @ whole)
        b = jnp.concatenate([a, drawn.reshape(batch, width)], -1) @ shared
        grouped = x.reshape(batch, groups, width)
        y = jnp.einsum("bgi,gio->bgo", grouped, own).reshape(batch, units) + b + seen
        y32 = y.astype(jnp.float32) if y.dtype == jnp.bfloat16 else y
        y = (y32 * jax.lax.rsqrt(jnp.square(y32).mean(-1, keepdims=True) + 1e-4) * scale).astype(kind)
        gate, candidate = jnp.split(jnp.einsum("bgi,gio->bgo", y.reshape(batch, groups, width), gates), 2, -1)
        gate = jax.nn.sigmoid(gate - 1)
        x = (gate * jnp.tanh(candidate) + (1 - gate) * grouped).reshape(batch, units)
        logits = (x @ back).reshape(batch, variables, classes)
        probs = jax.nn.softmax(logits.astype(uniform.dtype), -1)
        index = jnp.minimum((jnp.cumsum(probs, -1) <= uniform[..., None]).sum(-1), classes - 1)
        drawn = (index[..., None] == jnp.arange(classes)).astype(kind)
        return [x, drawn], [logits, x.sum(-1, keepdims=True), seen]

    def inputs(length: int) -> list[Any]:
        first = jnp.broadcast_to(jnp.asarray(rng.random((length, batch, 1)) < 0.3), (length, batch, units))
        seen = jnp.asarray(rng.normal(0, 1, (length, batch, units)), kind)
        return [first, seen, jnp.asarray(rng.random((length, batch, variables)), jnp.float32)]

    state = [jnp.asarray(rng.normal(0, 1, (batch, units)), kind), jnp.zeros((batch, variables, classes), kind)]
    return step, state, inputs


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    how=st.sampled_from(list(LOOPS)),
    kind=st.sampled_from(["float32", "bfloat16"]),
    batch=st.sampled_from([1, 3, 16, 20]),
    width=st.sampled_from([16, 32]),
    groups=st.integers(1, 3),
    classes=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_any_step_gives_the_states_and_outputs_of_a_scan(how, kind, batch, width, groups, classes, seed):
    """Rows that fill no copy of the kernel, and several copies; bfloat16 is compared step by step, each from the same
    state, because one draw at the edge of two classes changes all that follow."""
    rng = np.random.default_rng(seed)
    step, state, inputs = recurrent(rng, jnp.dtype(kind), batch, width, groups, classes)
    length = 3 if kind == "float32" else 1
    row = inputs(length)

    def scan(state: list[Any], row: list[Any]) -> Any:
        def noted(state: list[Any], row: list[Any]) -> Any:
            state, outputs = step(state, row)
            return state, (state, outputs)

        return scans.scan(noted, state, row, length, False)

    with interpretation(how) as seen:
        ours = jax.jit(scan)(state, row)
    assert seen == [how]
    with kernels.plain():
        oracle = jax.jit(lambda *args: scan(*args))(state, row)
    tolerance = 1e-4 if kind == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.float64(a), np.float64(b)
        close = np.isclose(a, b, rtol=tolerance, atol=tolerance)
        assert close.mean() > (1 - 1e-9 if kind == "float32" else 0.97), np.abs(a - b).max()


WEIGHTS, WIDE_WEIGHTS = np.eye(32, dtype=np.float32), np.ones((32, 2**15), np.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: jnp.split(x @ WEIGHTS, [9], -1)[1].sum(-1, keepdims=True) + x, "a cut through a part"),
        (lambda x: (x @ WIDE_WEIGHTS) @ WIDE_WEIGHTS.T, "too many weights"),
        (lambda x: (x @ x.T) @ x, "product of two values"),
        (lambda x: jax.lax.sort(x) @ WEIGHTS, "sort"),
        (lambda x: x - jax.lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None), "reduce_sum"),
    ],
    ids=["cut", "weights", "values", "sort", "rows"],
)
def test_what_cannot_be_one_kernel_is_refused_with_the_reason(change, reason):
    def step(state: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        x = change(state[0]) + row[0]
        return [x], [x]

    with pytest.raises(parts.UnsuitedError, match=reason):
        one_kernel.loop_in_one_kernel(step, [jnp.ones((16, 32))], [jnp.ones((2, 16, 32))], 2, False, interpret=True)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x, y: ([x @ WEIGHTS], [jnp.concatenate([x @ WEIGHTS, y], -1)]), "a joined result"),
        (lambda x, y: ([x @ WEIGHTS], [jnp.zeros(())]), "a constant result"),
        (lambda x, y: ([y], [x @ WEIGHTS]), "states that no step makes"),
        (lambda x, y: ([(x @ WIDE_WEIGHTS) @ WIDE_WEIGHTS.T], [y]), "many products"),
    ],
    ids=["joined", "constant", "states", "products"],
)
def test_steps_that_cannot_be_a_few_kernels_are_refused_with_the_reason(step, reason, monkeypatch):
    monkeypatch.setattr(few_kernels, "MOST_PRODUCTS", 2**20)
    with pytest.raises(parts.UnsuitedError, match=reason):
        few_kernels.loop_in_few_kernels(
            lambda state, row: step(state[0], row[0]),
            [jnp.ones((16, 32))], [jnp.ones((2, 16, 32))], 2, False, interpret=True,
        )  # fmt: skip


@pytest.mark.parametrize("what", ["accumulated", "mapped"])
def test_updates_with_kernels_may_be_accumulated_and_mapped_over_seeds(what, how, interpreted):
    """Against the same with plain scans, draws and all: new weights, latents and metrics."""
    options = dict(optimizer=dict(accumulate=2) if what == "accumulated" else {}, actor_critic=dict(horizon=2))
    results = []
    for names in ((), ("scan",)):
        agent = Agent(*CONTINUOUS, small_config(model=WIDE, **options))
        agent.target = kernels.Target("gpu", without=names)
        batches = [random_batch(agent, seed, length=3) for seed in (1, 2)]
        states = [agent.init(seed) for seed in (3, 4)]
        if what == "mapped":
            stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
            run = jax.jit(jax.vmap(agent.learn), compiler_options=CHEAP)
            results.append(run(stack(states), stack(batches)))
        else:
            results.append(jax.jit(agent.learn, compiler_options=CHEAP)(states[0], batches[0]))
    # When accumulated, the way back through a dream, which nobody needs, adds up over rows.
    assert interpreted.count(how) >= 3
    ours, oracle = (jax.tree.leaves_with_path(result) for result in results)
    for (path, x), (_, y) in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-3, atol=2e-4, err_msg=str(path))
