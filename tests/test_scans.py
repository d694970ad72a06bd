"""Scans whose loops hold only what needs the step before: the same function as `jax.lax.scan`, of any step."""

from __future__ import annotations

import collections
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, fixed_class, fixed_normal, perturb, random_batch, small_config

from dreamer import distributions, kernels
from dreamer.agent import Agent
from dreamer.types import Space

GPU = kernels.Target("gpu")
VECTOR = ({"position": Space("vector", (3,))}, {"action": Space("discrete", (), (3,))})
MIXED = ({"image": Space("image", (8, 8, 1)), "position": Space("vector", (3,))}, {"walk": Space("vector", (2,))})


def loops(jaxpr: Any) -> list[collections.Counter]:
    """The operations in the body of each scan of a program, those of inner calls included."""
    found: list[collections.Counter] = []

    def count(jaxpr: Any, into: collections.Counter) -> None:
        for equation in jaxpr.eqns:
            inner = [getattr(v, "jaxpr", v) for v in equation.params.values()]
            inner = [v for v in inner if hasattr(v, "eqns")]
            if equation.primitive.name == "scan":
                found.append(collections.Counter())
                count(inner[0], found[-1])
                continue
            into[equation.primitive.name] += 1
            for one in inner:
                count(one, into)

    count(jaxpr, collections.Counter())
    return found


@hypothesis.settings(max_examples=3)
@hypothesis.given(
    length=st.integers(1, 6),
    width=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_values_and_every_gradient_are_those_of_a_plain_scan(length, width, batch, seed):
    """Weights, first state and inputs in two parts of the step each; keys, integers and flags among the inputs."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape))  # noqa: E731
    with jax.enable_x64(True):
        weights = {"w": draw(width, width), "v": draw(3, width), "b": draw(width)}
        state = {"x": draw(batch, width), "count": jnp.zeros(batch)}
        inputs = {"u": draw(length, batch, 3), "flag": jnp.asarray(rng.random((length, batch)) < 0.3)}
        inputs |= {"index": jnp.arange(length), "key": jax.random.split(jax.random.key(seed), length)}
        score = draw(length, batch, width)

        def total(weights: Any, state: Any, u: Any, scan: Any) -> tuple[jax.Array, Any]:
            def step(state: Any, row: Any) -> tuple[Any, Any]:
                noise = jax.random.normal(row["key"], (batch, width))
                seen = jnp.tanh(row["u"] @ weights["v"]) + noise
                x = jnp.where(row["flag"][:, None], 0, state["x"])
                x = jax.nn.silu(x @ weights["w"] + seen) + weights["b"] * row["index"]
                x = x + jax.lax.stop_gradient(jnp.sin(x))
                state = {"x": x, "count": state["count"] + 1}
                return state, {"x": x, "even": row["index"] % 2, "seen": seen, "sum": jax.nn.relu(x).sum(-1)}

            outputs = scan(step, state, inputs | {"u": u}, length, False)
            return (outputs["x"] * score).sum() + jnp.square(outputs["seen"]).sum() + outputs["sum"].sum(), outputs

        both = []
        for scan in (kernels.REWRITES["scan"].fast, kernels.REWRITES["scan"].plain):
            run = lambda *args, scan=scan: total(*args, scan)  # noqa: E731
            both.append(
                jax.jit(jax.grad(run, (0, 1, 2), has_aux=True), compiler_options=CHEAP)(weights, state, inputs["u"])
            )
    for ours, oracle in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spaces", [VECTOR, MIXED], ids=["vector", "mixed"])
def test_the_update_for_an_accelerator_is_the_plain_one(spaces, monkeypatch):
    """Loss terms, latents and gradients of all parameters, every draw fixed, in float64."""
    monkeypatch.setattr(distributions, "draw_class", fixed_class)
    monkeypatch.setattr(distributions, "draw_normal", fixed_normal)
    results = []
    with jax.enable_x64(True):
        for target in (GPU, kernels.Target("gpu", rewrites=False)):
            agent = Agent(*spaces, small_config())
            agent.target = target
            double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)  # noqa: E731
            state = agent.init(0)
            params, slow, scale = map(double, (perturb(state["params"]), state["slow"], state["return_scale"]))
            slopes = jax.jit(jax.grad(agent.loss, has_aux=True), compiler_options=CHEAP)
            grads, outcome = slopes(params, slow, scale, random_batch(agent), jax.random.key(0))
            results.append((grads, outcome.metrics, outcome.written))
    for (path, ours), oracle in zip(jax.tree.leaves_with_path(results[0]), jax.tree.leaves(results[1]), strict=True):
        a, b = np.float64(ours), np.float64(oracle)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1e-3, np.abs(b).max()), err_msg=str(path))


def test_what_needs_no_step_before_is_outside_of_the_loops():
    """In the loops of an update are no random numbers, and of every product of the RSSM one forward and one back."""
    agent = Agent(*VECTOR, small_config())
    agent.target = GPU
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in random_batch(agent).items()}
    bodies = loops(jax.make_jaxpr(agent.learn)(jax.eval_shape(agent.create, 0), batch).jaxpr)
    observe, dream, *backs = (body for body in bodies if body["dot_general"])
    # deter, stoch -> mix (own, shared) -> gates -> posterior, logits; the action's and the tokens' parts are outside.
    assert [body["dot_general"] for body in (observe, *backs)] == [7, 7, 7], bodies
    # The prior in the place of the posterior; the policy and the action's part beside it.
    assert dream["dot_general"] == 10, bodies
    for body in bodies:
        assert not [name for name in body if "random" in name or "threefry" in name], body


@hypothesis.settings(max_examples=10)
@hypothesis.given(length=st.integers(1, 20), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_recurrence_by_halves_is_the_one_step_by_step(length, batch, seed):
    rng = np.random.default_rng(seed)
    fixed, factor, last = rng.normal(0, 1, (length, batch)), rng.uniform(0, 1, (length, batch)), rng.normal(0, 1, batch)
    factor[rng.random(factor.shape) < 0.2] = 0
    with jax.enable_x64(True):
        found = np.asarray(kernels.REWRITES["recurrence"].fast(*map(jnp.asarray, (fixed, factor, last))))
    x = last
    for t in reversed(range(length)):
        x = fixed[t] + factor[t] * x
        np.testing.assert_allclose(found[t], x, rtol=1e-12, atol=1e-12)


@hypothesis.settings(max_examples=10)
@hypothesis.given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_squares_of_many_arrays_are_added_up_each_for_itself(sizes, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(0, 10.0 ** rng.integers(-3, 4), size) for size in sizes]
    with jax.enable_x64(True):
        found = kernels.REWRITES["square_sums"].fast([jnp.asarray(x) for x in arrays])
    np.testing.assert_allclose(found, [np.square(x).sum() for x in arrays], rtol=1e-12)


@pytest.mark.parametrize("how", ["accumulated", "mapped", "in turn"])
def test_updates_for_an_accelerator_may_be_accumulated_mapped_over_seeds_and_in_turn(how):
    """Against the same with plain scans, draws and all: new weights, latents and metrics."""
    config = small_config(optimizer=dict(accumulate=2) if how == "accumulated" else {})
    results = []
    for names in ((), ("scan", "square_sums", "recurrence")):
        agent = Agent(*VECTOR, config)
        agent.target = kernels.Target("gpu", without=names)
        batches = [random_batch(agent, seed) for seed in (1, 2)]
        states = [agent.init(seed) for seed in (3, 4)]
        if how == "mapped":
            stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
            run = jax.jit(jax.vmap(agent.learn), compiler_options=CHEAP)
            results.append(run(stack(states), stack(batches)))
        elif how == "in turn":
            results.append(jax.jit(agent.learn_in_turn, compiler_options=CHEAP)(states[0], batches))
        else:
            results.append(jax.jit(agent.learn, compiler_options=CHEAP)(states[0], batches[0]))
    ours, oracle = (jax.tree.leaves_with_path(result) for result in results)
    for (path, x), (_, y) in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-3, atol=2e-4, err_msg=str(path))
