"""The recurrent state-space model: one step spelled out, timelines, resets, gradients, the stored form."""

from __future__ import annotations

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from learner_data import CHEAP, weights

from dreamer import features
from dreamer.config import ModelConfig
from dreamer.rssm import DYNAMICS, RSSM, State

B, T, ACTION, TOKENS = 3, 6, 3, 5
RNG = np.random.default_rng(0)


def build(**changes: Any) -> RSSM:
    """A small model whose biases and norm scales are not the trivial initial ones."""
    config = ModelConfig(**dict(deter=8, hidden=4, stoch=3, classes=4, blocks=2) | changes)
    rssm = DYNAMICS[config.dynamics](TOKENS, ACTION, config, rngs=weights())
    rng = np.random.default_rng(1)
    graph, state = nnx.split(rssm)
    return nnx.merge(graph, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), state))


@pytest.fixture(scope="module")
def rssm():
    return build()


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(0, 1, shape), jnp.float32)


def random_state(batch: int = B) -> State:
    return {"deter": normal(batch, 8), "stoch": jax.nn.one_hot(RNG.integers(0, 4, (batch, 3)), 4)}


@pytest.fixture(scope="module")
def observe(rssm):
    """`rssm.observe`, compiled once; key None."""
    return jax.jit(lambda *args: rssm.observe(*args, None))


def sequence() -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """Random start, actions, tokens and no resets."""
    return random_state(), normal(B, T, ACTION), normal(B, T, TOKENS), jnp.zeros((B, T), bool)


def differs(a: State, b: State) -> np.ndarray:
    """(B, T) bool: whether any unit of the two sequences of states differs."""
    return np.logical_or(
        np.asarray(a["deter"] != b["deter"]).any(-1), np.asarray(a["stoch"] != b["stoch"]).any((-1, -2))
    )


# One step


def test_step_against_a_spelled_out_gru(rssm):
    """The recurrence in numpy float64, block by block, from the algorithm's description."""

    def value(param: Any) -> np.ndarray:
        return np.asarray(param[...], np.float64)

    def norm_silu(x: np.ndarray, scale: Any) -> np.ndarray:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * value(scale)
        return x / (1 + np.exp(-x))

    def dense(layer: Any, x: np.ndarray) -> np.ndarray:
        return norm_silu(x @ value(layer.linear.kernel) + value(layer.linear.bias), layer.norm.scale)

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    state, action = random_state(), normal(B, ACTION) * 3
    deter, stoch = np.float64(state["deter"]), np.float64(state["stoch"]).reshape(B, -1)
    clipped = np.float64(action) / np.maximum(1, np.abs(np.float64(action)))
    shared = np.concatenate(
        [dense(rssm.from_deter, deter), dense(rssm.from_stoch, stoch), dense(rssm.from_action, clipped)], -1
    )
    blocks, size = 2, 4
    mixed = np.concatenate(
        [
            np.concatenate([deter[:, g * size : (g + 1) * size], shared], -1) @ value(rssm.mix.kernel)[g]
            for g in range(blocks)
        ],
        -1,
    )
    hidden = norm_silu(mixed + value(rssm.mix.bias), rssm.mix_norm.scale)
    expected = np.empty_like(deter)
    for g in range(blocks):
        own = slice(g * size, (g + 1) * size)
        bias = value(rssm.gates.bias)[g * 3 * size : (g + 1) * 3 * size]
        gates = hidden[:, own] @ value(rssm.gates.kernel)[g] + bias
        reset, candidate, update = gates[:, :size], gates[:, size : 2 * size], gates[:, 2 * size :]
        update = sigmoid(update - 1)
        expected[:, own] = update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * deter[:, own]
    np.testing.assert_allclose(rssm.step(state, action), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gru", "normed_gru"])
def test_dense_steps_spelled_out(kind):
    """The recurrence of PlaNet to DreamerV2 in numpy float64: one unit of the state after the other."""
    model = build(dynamics=kind)
    parts = {".".join(map(str, path)): np.float64(x) for path, x in nnx.to_flat_state(nnx.state(model))}
    state, action = random_state(), normal(B, ACTION) * 3
    deter, stoch = np.float64(state["deter"]), np.float64(state["stoch"]).reshape(B, -1)
    clipped = np.float64(action) / np.maximum(1, np.abs(np.float64(action)))
    x = np.concatenate([stoch, clipped], -1)
    x = x @ parts["from_inputs.linear.kernel"] + parts["from_inputs.linear.bias"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * parts["from_inputs.norm.scale"]
    x = np.concatenate([x / (1 + np.exp(-x)), deter], -1)
    gates = x @ parts["all_gates.kernel"] + parts["all_gates.bias"]
    if kind == "normed_gru":
        spread = (gates - gates.mean(-1, keepdims=True)) / np.sqrt(gates.var(-1, keepdims=True) + 1e-3)
        gates = spread * parts["gates_norm.scale"] + parts["gates_norm.bias"]
    expected = np.empty_like(deter)
    for b in range(B):
        for unit in range(8):
            reset, candidate, update = (gates[b, unit + 8 * i] for i in range(3))
            share = 1 / (1 + np.exp(1 - update))
            expected[b, unit] = share * np.tanh(candidate / (1 + np.exp(-reset))) + (1 - share) * deter[b, unit]
    np.testing.assert_allclose(model.step(state, action), expected, rtol=1e-4, atol=1e-6)


def test_an_lstm_spelled_out():
    """Hidden and cell state in numpy float64, one unit after the other; they lie side by side."""
    model = build(dynamics="lstm")
    kernel, bias = np.float64(model.all_gates.kernel[...]), np.float64(model.all_gates.bias[...])
    state, action = random_state(), normal(B, ACTION) * 3
    hidden, cell = np.split(np.float64(state["deter"]), 2, -1)
    clipped = np.float64(action) / np.maximum(1, np.abs(np.float64(action)))
    inputs = np.concatenate([np.float64(state["stoch"]).reshape(B, -1), clipped, hidden], -1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = np.empty((B, 8))
    for b in range(B):
        for unit in range(4):
            enter, candidate, forget, out = (inputs[b] @ kernel[:, unit + 4 * i] + bias[unit + 4 * i] for i in range(4))
            kept = sigmoid(forget + 1) * cell[b, unit] + sigmoid(enter) * np.tanh(candidate)
            expected[b, unit], expected[b, unit + 4] = sigmoid(out) * np.tanh(kept), kept
    np.testing.assert_allclose(model.step(state, action), expected, rtol=1e-4, atol=1e-6)


def test_large_actions_are_scaled_to_one_without_gradient_through_the_divisor(rssm):
    state = random_state()
    total = jax.jit(lambda action: rssm.step(state, action).sum())
    slope = jax.jit(jax.grad(lambda action: rssm.step(state, action).sum()))
    one, big = jnp.full((B, ACTION), -1.0), jnp.full((B, ACTION), -4.0)
    assert total(one) == total(big) != total(one / 2)
    np.testing.assert_allclose(slope(big), slope(one) / 4, rtol=1e-5)


def test_states_before_an_episode_are_zero(rssm):
    state = rssm.init(2, jnp.bfloat16)
    assert {k: (v.shape, v.dtype, bool(v.any())) for k, v in state.items()} == {
        "deter": ((2, 8), jnp.bfloat16, False),
        "stoch": ((2, 3, 4), jnp.bfloat16, False),
    }


def test_prior_and_posterior_mix_in_one_percent_uniform(rssm):
    logits = rssm.prior(normal(B, 8) * 100)
    assert logits.shape == (B, 3, 4)
    probs = np.asarray(rssm.latent.dist(logits * 1000).probs)
    np.testing.assert_allclose(probs.min(-1), 0.01 / 4, rtol=1e-3)
    assert rssm.posterior(normal(B, T, 8), normal(B, T, TOKENS)).shape == (B, T, 3, 4)


# Filtering


def test_observe_is_a_chain_of_steps(rssm):
    """Also the random numbers: step t uses the t-th part of the key."""
    state, actions, tokens, is_first = sequence()
    is_first = is_first.at[1, 2].set(True)
    key = jax.random.key(3)
    states, logits = jax.jit(rssm.observe)(state, actions, tokens, is_first, key)
    assert states["deter"].shape == (B, T, 8) and states["stoch"].shape == logits.shape == (B, T, 3, 4)

    @jax.jit
    def step(state: State, action: jax.Array, tokens: jax.Array, is_first: jax.Array, key: jax.Array) -> Any:
        with features.in_scans():
            return features.leave(rssm.observe_step(*features.enter((state, action, tokens, is_first)), key))

    for t, step_key in enumerate(jax.random.split(key, T)):
        state, step_logits = step(state, actions[:, t], tokens[:, t], is_first[:, t], step_key)
        np.testing.assert_allclose(states["deter"][:, t], state["deter"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(states["stoch"][:, t], state["stoch"])
        np.testing.assert_allclose(logits[:, t], step_logits, rtol=1e-4, atol=1e-5)


def test_samples_are_one_hot_and_follow_the_posterior(rssm):
    args = (random_state(1), normal(1, 1, ACTION), normal(1, 1, TOKENS), jnp.zeros((1, 1), bool))
    many = jax.jit(jax.vmap(lambda key: rssm.observe(*args, key)))
    states, logits = many(jax.random.split(jax.random.key(0), 4000))
    stoch = np.asarray(states["stoch"])[:, 0, 0]
    assert set(np.unique(stoch)) == {0, 1} and (stoch.sum(-1) == 1).all()
    np.testing.assert_allclose(stoch.mean(0), rssm.latent.dist(logits).probs[0, 0, 0], atol=0.04)


def test_a_reset_makes_the_rest_independent_of_the_past(observe):
    state, actions, tokens, is_first = sequence()
    is_first = is_first.at[:, 3].set(True)
    other_actions = actions.at[:, :4].set(normal(B, 4, ACTION))  # with the action that leads to the first step
    other_tokens = tokens.at[:, :3].set(normal(B, 3, TOKENS))
    one, _ = observe(state, actions, tokens, is_first)
    two, _ = observe(random_state(), other_actions, other_tokens, is_first)
    assert differs(one, two)[:, :3].all()
    assert not differs(one, two)[:, 3:].any()
    # The rest is what a new episode gives, and only the flag makes it so.
    fresh = {"deter": jnp.zeros((B, 8)), "stoch": jnp.zeros((B, 3, 4))}
    again, _ = observe(
        fresh, jnp.roll(actions, -3, 1).at[:, 0].set(0), jnp.roll(tokens, -3, 1), jnp.zeros((B, T), bool)
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 3:], b[:, :3]), one, again)
    assert differs(one, observe(state, actions, tokens, jnp.zeros((B, T), bool))[0])[:, 3:].all()


def test_a_reset_concerns_its_own_sequence_only(observe):
    state, actions, tokens, is_first = sequence()
    one, _ = observe(state, actions, tokens, is_first)
    two, _ = observe(state, actions, tokens, is_first.at[1, 3].set(True))
    expected = np.zeros((B, T), bool)
    expected[1, 3:] = True
    np.testing.assert_array_equal(differs(one, two), expected)


def test_the_action_at_t_leads_to_step_t(observe):
    state, actions, tokens, is_first = sequence()
    one, _ = observe(state, actions, tokens, is_first)
    two, _ = observe(state, actions.at[:, 3].add(0.3), tokens, is_first)
    changed = (np.asarray(one["deter"]) != np.asarray(two["deter"])).any(-1)
    assert not changed[:, :3].any() and changed[:, 3:].all()


def test_the_tokens_at_t_inform_the_posterior_at_t_and_the_deterministic_state_after(observe):
    state, actions, tokens, is_first = sequence()
    one, logits_one = observe(state, actions, tokens, is_first)
    two, logits_two = observe(state, actions, tokens.at[:, 3].add(20.0), is_first)
    changed = (np.asarray(logits_one) != np.asarray(logits_two)).any((-1, -2))
    assert not changed[:, :3].any() and changed[:, 3].all()
    changed = (np.asarray(one["deter"]) != np.asarray(two["deter"])).any(-1)
    assert not changed[:, :4].any() and changed[:, 4].any()


# Dreaming


def test_timeline_of_imagination(rssm):
    """start -actions[0]-> states[0] -actions[1]-> states[1] ..., each action the policy's for the state before."""
    chosen = lambda state: jnp.tanh(state["deter"][:, :ACTION] + state["stoch"][:, 0, :ACTION])  # noqa: E731
    policy = lambda state, key: (chosen(state), {"seen": state["deter"][:, 0]})  # noqa: E731
    start, horizon = random_state(), 5
    states, actions, notes = jax.jit(lambda s: rssm.imagine(s, policy, horizon, None))(start)
    assert states["deter"].shape == (horizon, B, 8) and actions.shape == (horizon, B, ACTION)
    before = start
    step = jax.jit(lambda state, action: rssm.imagine_step(state, action, None))
    for h in range(horizon):
        np.testing.assert_allclose(actions[h], chosen(before), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(notes["seen"][h], before["deter"][:, 0])
        after = step(before, actions[h])
        np.testing.assert_allclose(states["deter"][h], after["deter"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(states["stoch"][h], after["stoch"])
        before = {k: v[h] for k, v in states.items()}
    replayed = jax.jit(lambda s, a: rssm.imagine_actions(s, a, None))(start, actions.swapaxes(0, 1))
    np.testing.assert_allclose(rssm.feature(replayed).swapaxes(0, 1), rssm.feature(states), rtol=1e-5, atol=1e-6)


def test_imagination_samples_from_the_prior(rssm):
    start, action = random_state(1), normal(1, ACTION)
    many = jax.jit(jax.vmap(lambda key: rssm.imagine(start, lambda *_: (action, None), 1, key)[0]))
    states = many(jax.random.split(jax.random.key(0), 4000))
    prior = rssm.latent.dist(rssm.prior(rssm.step(start, action))).probs[0]
    np.testing.assert_allclose(states["stoch"][:, 0, 0].mean(0), prior, atol=0.04)


# Gradients


def test_gradients_flow_through_time_but_not_through_a_reset(rssm):
    state, actions, tokens, is_first = sequence()

    def last(actions: jax.Array, tokens: jax.Array, state: State, is_first: jax.Array) -> jax.Array:
        return rssm.observe(state, actions, tokens, is_first, None)[0]["deter"][:, -1].sum()

    slope = jax.jit(jax.grad(last, argnums=(0, 1, 2)))
    moves = lambda x: np.abs(np.asarray(x)).max((0, -1)) > 0  # noqa: E731
    by_action, by_token, by_state = slope(actions, tokens, state, is_first)
    assert moves(by_action).all()
    # Straight through the samples; the tokens of the last step come too late for its deterministic state.
    np.testing.assert_array_equal(moves(by_token), [True] * (T - 1) + [False])
    assert by_state["deter"].any() and by_state["stoch"].any()
    by_action, by_token, by_state = slope(actions, tokens, state, is_first.at[:, 3].set(True))
    np.testing.assert_array_equal(moves(by_action), [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(moves(by_token), [False] * 3 + [True] * 2 + [False])
    assert not by_state["deter"].any() and not by_state["stoch"].any()


def test_imagination_does_not_stop_gradients(rssm):
    start = random_state()

    def end(start: State, weight: jax.Array) -> jax.Array:
        policy = lambda state, key: (state["deter"][:, :ACTION] * weight, None)  # noqa: E731
        states, *_ = rssm.imagine(start, policy, 4, None)
        return states["deter"][-1].sum()

    by_start, by_policy = jax.jit(jax.grad(end, argnums=(0, 1)))(start, jnp.float32(0.5))
    assert by_start["deter"].any() and by_start["stoch"].any() and by_policy != 0


# Stored form


@pytest.mark.parametrize("classes, dtype", [(4, np.uint8), (256, np.uint8), (257, np.uint16), (300, np.uint16)])
def test_stored_form_round_trip(classes, dtype):
    rssm = RSSM(TOKENS, ACTION, ModelConfig(deter=8, hidden=4, stoch=3, classes=classes, blocks=2), rngs=weights())
    index = np.array([[0, 1, classes - 1], [classes - 1, classes // 2, 2]])
    state = {"deter": normal(2, 8), "stoch": jax.nn.one_hot(index, classes)}
    packed = rssm.pack(state)
    fields = rssm.stored()
    assert fields["deter"].dtype == ml_dtypes.bfloat16 and fields["stoch"].dtype == dtype
    for k, field in fields.items():
        assert packed[k].shape[1:] == field.shape and packed[k].dtype == field.dtype
    np.testing.assert_array_equal(packed["stoch"], index)
    back = rssm.unpack(packed, jnp.float32)
    assert {v.dtype for v in back.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(back["stoch"], state["stoch"])
    np.testing.assert_allclose(back["deter"], state["deter"], rtol=2**-8)
    # What was stored once is exact from then on.
    again = rssm.pack(back)
    np.testing.assert_array_equal(np.float32(again["deter"]), np.float32(packed["deter"]))
    assert rssm.unpack(packed, jnp.bfloat16)["deter"].dtype == jnp.bfloat16


# Where features lie


@hypothesis.settings(max_examples=3)
@hypothesis.given(
    batch=st.integers(1, 5),
    blocks=st.sampled_from([1, 2, 4]),
    unit=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    dynamics=st.sampled_from(list(DYNAMICS)),
)
def test_items_last_compute_what_items_first_do(batch, blocks, unit, shape, dynamics):
    """One step, prior and posterior of a random model, and the gradient of everything, in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        model = build(blocks=blocks, deter=blocks * unit, stoch=shape[0], classes=shape[1], dynamics=dynamics)
        graph, params = nnx.split(model)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        draw = lambda *s: jnp.asarray(rng.normal(0, 1, s))  # noqa: E731
        state = {"deter": draw(batch, blocks * unit), "stoch": draw(batch, *shape)}
        inputs = (state, draw(batch, ACTION) * 2, draw(batch, TOKENS))
        is_first = jnp.asarray(rng.random(batch) < 0.3)

        def total(params: Any, inputs: Any, last: bool) -> tuple[jax.Array, Any]:
            with features.items_last(last):
                rssm, (state, action, tokens) = nnx.merge(graph, params), features.enter(inputs)
                after, posterior = rssm.observe_step(state, action, tokens, is_first, None)
                dreamed = rssm.imagine_step(after, action, None)
                read = features.leave((after, posterior, dreamed, rssm.prior(after["deter"]), rssm.feature(dreamed)))
            return sum((jnp.sin(x) * jnp.arange(x.size).reshape(x.shape)).sum() for x in jax.tree.leaves(read)), read

        slopes = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), static_argnums=2, compiler_options=CHEAP)
        both = [slopes(params, inputs, last) for last in (False, True)]
    for one, two in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-9)
