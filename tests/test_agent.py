"""The whole agent: every kind of space, one compilation each, determinism, acting and training alike, precision."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import (
    BEHAVIOUR_TERMS,
    CHEAP,
    WORLD_TERMS,
    B,
    T,
    fix_draws,
    perturb,
    random_batch,
    small_config,
)

from dreamer.agent import Agent
from dreamer.model import Outcome
from dreamer.sharding import OneDevice
from dreamer.types import TAKEN, TRANSITION_FIELDS, Space

OBSERVATIONS = {
    "image": Space("image", (8, 8, 1)),
    "position": Space("vector", (2, 2)),
    "mass": Space("vector", ()),
    "item": Space("discrete", (), (3,)),
    "tools": Space("discrete", (2,), (2, 4)),
    "hidden": Space("vector", (2,)),
    "log/note": Space("vector", (1,)),
}
ACTIONS = {"act": Space("discrete", (), (3,)), "many": Space("discrete", (2,), (2, 4)), "walk": Space("vector", (2,))}
VECTOR = {"position": Space("vector", (3,))}
DISCRETE = {"action": Space("discrete", (), (3,))}

METRICS = {
    *("adv", "adv_mag", "adv_std", "rew", "con", "val", "slowval", "weight", "tar"),
    *("ret", "ret_min", "ret_max", "ret_rate", "dyn_ent", "rep_ent"),
    *("opt/loss", "opt/grad_norm", "opt/grad_rms", "opt/update_rms", "opt/param_rms", "opt/updates"),
}


def expected_metrics(agent: Agent) -> set[str]:
    """Every metric an update of this agent must report."""
    recon = {k for k in agent.observations if not k.startswith("log/")}
    names = METRICS | {f"loss/{k}" for k in recon | WORLD_TERMS | BEHAVIOUR_TERMS}
    names |= {f"ent/{k}" for k in agent.actions}
    names |= {
        f"opt/module_grad_norm/{k}" for k in ("encoder", "rssm", "objective", "reward", "cont", "policy", "value")
    }
    return names | {f"rand/{k}" for k, s in agent.actions.items() if s.kind == "discrete"}


def copy(tree: Any) -> Any:
    """A state that may be donated while the original lives on."""
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture
def fixed(monkeypatch):
    fix_draws(monkeypatch)


@pytest.fixture(scope="module")
def mixed():
    """Everything at once. The encoder does not read `hidden`; the decoder predicts it."""
    return Agent(OBSERVATIONS, ACTIONS, small_config(dict(encoder_keys="^(?!hidden)")))


@pytest.fixture(scope="module")
def start(mixed):
    """A perturbed state: heads predict something, and the prior is sure of what the posterior doubts."""
    state = mixed.init(0)
    params = perturb(state["params"])
    bias = params["world_model"]["rssm"]["prior_logits"]["bias"]
    params["world_model"]["rssm"]["prior_logits"]["bias"] = jnp.where(jnp.arange(bias.size) % 4 == 0, 6.0, bias)
    return state | {"params": params}


# Spaces

SPACES = {
    "84x84 gray, discrete": ({"image": Space("image", (84, 84, 1))}, DISCRETE),
    "210x160 colour, continuous": ({"image": Space("image", (210, 160, 3))}, {"action": Space("vector", (2,))}),
    "32x48 colour, several choices": (
        {"image": Space("image", (32, 48, 3)), "position": Space("vector", (2,))},
        {"action": Space("discrete", (3,), (2, 1, 5))},
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_images_of_any_size_train(name):
    agent = Agent(*SPACES[name], small_config())
    step = jax.jit(agent.learn, compiler_options=CHEAP)
    state, latents, metrics = step(agent.init(0), random_batch(agent))
    assert set(metrics) == expected_metrics(agent)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert agent.finite(metrics)
    assert latents["deter"].shape == (B, T, 16) and latents["stoch"].shape == (B, T, 4)
    assert state["updates"] == 1


OTHER_SPACES = {
    "vector": (VECTOR, DISCRETE),
    "scalar": ({"mass": Space("vector", ())}, {"action": Space("vector", ())}),
    "choice": ({"item": Space("discrete", (), (7,))}, DISCRETE),
    "choices": ({"tools": Space("discrete", (2, 2), (2, 3, 4, 2))}, {"action": Space("discrete", (2,), (2, 2))}),
    "two images": ({"a": Space("image", (32, 48, 1)), "b": Space("image", (32, 48, 3))}, ACTIONS),
    "tuple": ({"0": Space("vector", (2,)), "1": Space("discrete", (), (2,))}, {"0/act": ACTIONS["act"]}),
    "names of dict methods": (
        {"items": Space("vector", (2,)), "keys": Space("vector", (1,))},
        {"values": ACTIONS["act"]},
    ),
}


@pytest.mark.parametrize("name", OTHER_SPACES)
def test_an_update_can_be_built_for_every_kind_of_space(name):
    """Traced, not computed: shapes, dtypes and metric names of a whole update."""
    agent = Agent(*OTHER_SPACES[name], small_config())
    state = jax.eval_shape(agent.create, 0)
    new, latents, metrics = jax.eval_shape(agent.learn, state, random_batch(agent))
    assert set(metrics) == expected_metrics(agent)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(new) == shapes(state)
    assert {k: (v.shape[2:], v.dtype) for k, v in latents.items()} == {
        k: (field.shape, field.dtype) for k, field in agent.extras.items()
    }


def test_everything_at_once_trains(mixed):
    _, _, metrics = mixed.train_step(mixed.init(0), random_batch(mixed))
    assert set(metrics) == expected_metrics(mixed)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    # New heads are nearly uniform, new critics say 0.
    for action in ("act", "many"):
        assert 0.99 < metrics[f"rand/{action}"] <= 1.00001
    assert metrics["val"] == metrics["slowval"] == metrics["rew"] == 0


def test_an_action_without_a_choice_has_no_randomness_to_report():
    agent = Agent(VECTOR, {"action": Space("discrete", (), (1,))}, small_config())
    _, _, metrics = jax.eval_shape(agent.learn, jax.eval_shape(agent.create, 0), random_batch(agent))
    assert "ent/action" in metrics and "rand/action" not in metrics


def test_observations_named_like_a_loss_term_are_refused():
    with pytest.raises(
        ValueError, match=r"not named like the loss terms .*got \['policy', 'rew'\].*model.decoder_keys"
    ):
        Agent({k: Space("vector", (1,)) for k in ("policy", "rew", "x")}, DISCRETE, small_config())
    Agent({k: Space("vector", (1,)) for k in ("policy", "x")}, DISCRETE, small_config(dict(decoder_keys="x")))


def test_everything_that_a_step_stores_is_a_name_that_is_taken(mixed):
    assert {*mixed.extras, *TRANSITION_FIELDS} <= set(TAKEN)
    for name in mixed.extras:
        with pytest.raises(ValueError, match=rf"extra names \['{name}'\] are taken"):
            Agent({name: Space("vector", (1,))}, DISCRETE, small_config())


# Acting


def observation(agent: Agent, envs: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    obs = {k: np.stack([s.sample(rng) for _ in range(envs)]) for k, s in agent.observations.items()}
    return obs | {"is_first": np.zeros(envs, bool)}


def test_actions_come_as_the_environments_take_them(mixed, start):
    carry, action, extras = mixed.policy(
        start["params"], mixed.init_policy(5), observation(mixed, 5), jax.random.key(0)
    )
    assert {k: (v.shape, v.dtype) for k, v in action.items()} == {
        "act": ((5,), jnp.int32),
        "many": ((5, 2), jnp.int32),
        "walk": ((5, 2), jnp.float32),
    }
    assert (0 <= action["act"]).all() and (action["act"] < 3).all()
    assert (0 <= action["many"]).all() and (action["many"] < np.array([2, 4])).all()
    assert {k: (v.shape, v.dtype) for k, v in extras.items()} == {
        k: ((5, *field.shape), field.dtype) for k, field in mixed.extras.items()
    }
    # The carry remembers the action as the networks read it: one-hots side by side in key order.
    flat = np.asarray(carry["action"])
    np.testing.assert_array_equal(flat[:, :3].argmax(-1), action["act"])
    np.testing.assert_array_equal(flat[:, 3:5].argmax(-1), action["many"][:, 0])
    np.testing.assert_array_equal(flat[:, 5:9].argmax(-1), action["many"][:, 1])
    np.testing.assert_array_equal(flat[:, 9:], action["walk"])


def test_without_a_key_the_policy_is_deterministic_and_with_one_it_samples(mixed, start):
    obs = observation(mixed, 8)

    def act(key: jax.Array | None) -> dict[str, np.ndarray]:
        return jax.device_get(mixed.policy(start["params"], mixed.init_policy(8), obs, key)[1])

    one, two = act(None), act(None)
    assert all(np.array_equal(one[k], two[k]) for k in ACTIONS)
    same, again, other = act(jax.random.key(1)), act(jax.random.key(1)), act(jax.random.key(2))
    assert all(np.array_equal(same[k], again[k]) for k in ACTIONS)
    assert (same["walk"] != other["walk"]).any() and (same["walk"] != one["walk"]).any()


def test_environments_do_not_see_each_other(mixed, start):
    """Without a key: what one environment shows changes its own action only."""
    obs = observation(mixed, 8)
    other = observation(mixed, 8, seed=1)
    changed = {k: np.where((np.arange(8) == 3).reshape(-1, *[1] * (v.ndim - 1)), other[k], v) for k, v in obs.items()}
    changed["position"][3] += 50
    outputs = [
        jax.device_get(mixed.policy(start["params"], mixed.init_policy(8), o, None)[1]["walk"]) for o in (obs, changed)
    ]
    np.testing.assert_array_equal((outputs[0] != outputs[1]).any(-1), np.arange(8) == 3)


@pytest.mark.usefixtures("fixed")
def test_acting_and_training_compute_the_same_states():
    """A sequence is acted, stored, replayed: the world model filters it into the states the policy had."""
    agent = Agent(VECTOR, {"a": ACTIONS["act"], "b": ACTIONS["walk"]}, small_config())
    params = perturb(agent.init(0)["params"])
    carry, steps, rng = agent.init_policy(B), [], np.random.default_rng(0)
    is_first = np.zeros((B, T + 2), bool)
    is_first[:, :2] = True  # the context step's stored latents are rounded; from the first step on nothing is
    is_first[1, 4] = True
    for t in range(T + 2):
        obs = {"position": rng.normal(0, 2, (B, 3)).astype(np.float32), "is_first": is_first[:, t]}
        carry, action, extras = agent.policy(params, carry, obs, jax.random.key(t))
        steps.append(jax.device_get({**obs, **action, **extras, "state": carry["deter"]}))
    batch = {k: np.stack([step[k] for step in steps], 1) for k in steps[0]}
    states = batch.pop("state")
    batch |= {k: np.zeros((B, T + 2), bool) for k in ("is_last", "is_terminal")}
    batch |= {"reward": np.zeros((B, T + 2), np.float32)}

    @jax.jit
    def filtered(params: Any, batch: Any) -> Any:
        model = agent.model(params)
        return model.world_model.loss(*model.split_batch(batch), model.actor_critic, {}, jax.random.key(0)).seen.states

    replayed = filtered(params, batch)
    np.testing.assert_allclose(replayed["deter"], states[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(replayed["stoch"].argmax(-1), batch["stoch"][:, 1:])
    assert len(np.unique(batch["a"])) > 1 and np.ptp(states) > 0.1
    # The check can fail: actions shifted by one step give other states.
    shifted = filtered(params, batch | {"a": np.roll(batch["a"], 1, 1), "b": np.roll(batch["b"], 1, 1)})
    assert np.abs(np.asarray(shifted["deter"]) - states[:, 1:]).max() > 1e-2


# Compilation and memory


def test_the_old_state_is_donated(mixed):
    """No second copy of weights and optimizer is alive after an update, nor of the policy's carry after a step."""
    state, carry = mixed.init(0), mixed.init_policy(3)
    new, _, _ = mixed.train_step(state, random_batch(mixed))
    for part in ("params", "slow", "opt"):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state[part])), part
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    mixed.policy(new["params"], carry, observation(mixed, 3), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new["params"]))


def test_updates_are_deterministic_and_each_draws_anew(mixed, start):
    batch = random_batch(mixed)
    one, _, first = mixed.train_step(copy(start), batch)
    two, _, second = mixed.train_step(copy(start), batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one["params"]), jax.device_get(two["params"]))
    assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in second.items()}
    # The learning rate of the first update is 0; only the counter, and so the random draws, differ in the next.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one["params"]), jax.device_get(start["params"]))
    _, _, third = mixed.train_step(one, batch)
    assert third["loss/policy"] != first["loss/policy"]


# Broken numbers


@pytest.mark.parametrize(
    "key, broken, sound",
    [
        ("reward", {"rew", "repval"}, {"con", "dyn", "rep", "policy", "value", "position", "image", "hidden"}),
        ("hidden", {"hidden"}, {"rew", "con", "dyn", "rep", "policy", "value", "repval", "position", "image"}),
        ("position", {"position", "image", "rew", "dyn", "rep", "policy", "value"}, set()),
        ("walk", {"image", "rew", "dyn", "rep", "policy"}, set()),
    ],
)
def test_a_broken_number_shows_in_the_losses_it_touches(mixed, start, key, broken, sound):
    batch = random_batch(mixed)
    batch[key][1, 2] = np.nan
    _, _, metrics = mixed.train_step(copy(start), batch)
    wrong = {k.removeprefix("loss/") for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)}
    assert broken <= wrong and not wrong & sound
    assert not mixed.finite(metrics)


# Options that change memory, not numbers


@pytest.mark.usefixtures("fixed")
def test_rematerialisation_and_accumulation_change_no_number():
    """Three agents, one batch whose sequences differ: the same gradients, latents, return scale and metrics."""
    agents = {
        "plain": Agent(VECTOR, DISCRETE, small_config()),
        "remat": Agent(VECTOR, DISCRETE, small_config(dict(remat=True))),
        "accumulate": Agent(VECTOR, DISCRETE, small_config(optimizer=dict(accumulate=2))),
    }
    state = agents["plain"].init(0)
    state |= {"params": perturb(state["params"]), "slow": perturb(state["slow"], 1)}
    state |= {"return_scale": {"low": jnp.float32(-1), "high": jnp.float32(2)}}
    batch = random_batch(agents["plain"])

    def update(agent: Agent) -> tuple:
        def gradients(state: Any, batch: Any) -> tuple:
            if agent.config.optimizer.accumulate == 1:
                return agent._gradients(state, batch, jax.random.key(0))
            parts = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), batch)
            return agent._accumulate(state, parts, jax.random.split(jax.random.key(0)))

        return jax.device_get(jax.jit(gradients, compiler_options=CHEAP)(state, batch))

    grads, (scale, latents, metrics) = update(agents["plain"])
    for name in ("remat", "accumulate"):
        other, (other_scale, other_latents, other_metrics) = update(agents[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, other)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), latents, other_latents)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scale, other_scale)
        assert metrics.keys() == other_metrics.keys()
        for key in metrics:
            np.testing.assert_allclose(other_metrics[key], metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("slices", [1, 2, 4, 8, 16])
def test_spread_between_sequences_is_in_the_return_scale_however_a_batch_is_sliced(slices):
    """Returns that spread by 5 between sequences and by 1 within: percentiles, gradient and metrics of the whole."""
    rng = np.random.default_rng(0)
    returns = (rng.normal(0, 5, (16, 1)) + rng.normal(0, 1, (16, 30))).astype(np.float32)
    value, score = (rng.normal(0, 1, (16, 30)).astype(np.float32) for _ in range(2))
    config = small_config(actor_critic=dict(return_rate=1))
    state = {
        "params": {
            "actor_critic": {"policy": jnp.float32(0.5), "value": jnp.float32(2)},
            "world_model": jnp.float32(1),
        },
        "slow": {},
        "return_scale": {"low": jnp.float32(0), "high": jnp.float32(0)},
    }

    def loss(params: Any, slow: Any, scale: Any, batch: Any, key: Any, factor: Any) -> tuple:
        """One weight for each network: log-probability w x, entropy w, other losses without return scale."""
        policy, advantages = params["actor_critic"]["policy"], batch["returns"] - batch["value"]
        actor = -(policy * batch["score"] * advantages * factor + 0.1 * policy).mean()
        total = actor + (params["actor_critic"]["value"] * params["world_model"] * batch["value"]).mean()
        metrics = {"loss/policy": actor, "opt/loss": total, "tar": batch["returns"].mean()}
        return total, Outcome(scale, {"latent": batch["value"]}, metrics, batch["returns"], advantages)

    agent = types.SimpleNamespace(config=config, devices=OneDevice(), loss=loss)
    parts = {"returns": returns, "value": value, "score": score}
    parts = {k: v.reshape(-1, slices, 30).swapaxes(0, 1) for k, v in parts.items()}
    grads, (scale, latents, metrics) = jax.jit(functools.partial(Agent._accumulate, agent))(
        state, parts, jax.random.split(jax.random.key(0), slices)
    )
    low, high = np.percentile(np.float64(returns), (5, 95))
    assert high - low > 12
    np.testing.assert_allclose([scale["low"], scale["high"]], [low, high], rtol=1e-5)
    advantages = (np.float64(returns) - value) / (high - low)
    np.testing.assert_allclose(grads["actor_critic"]["policy"], -(score * advantages).mean() - 0.1, rtol=1e-5)
    np.testing.assert_allclose(grads["actor_critic"]["value"], value.mean(), rtol=1e-4)
    np.testing.assert_allclose(grads["world_model"], 2 * value.mean(), rtol=1e-4)
    np.testing.assert_array_equal(latents["latent"], value)
    normed = (returns - low) / (high - low)
    expected = {"adv": advantages.mean(), "adv_std": advantages.std(), "adv_mag": np.abs(advantages).mean()}
    expected |= {"ret": normed.mean(), "ret_min": normed.min(), "ret_max": normed.max()}
    expected |= {"ret_rate": (np.abs(normed) >= 1).mean(), "tar": returns.mean()}
    expected["loss/policy"] = -0.5 * (score * advantages).mean() - 0.05
    expected["opt/loss"] = expected["loss/policy"] + 2 * value.mean()
    assert metrics.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_accumulated_update_can_be_built():
    agent = Agent(VECTOR, DISCRETE, small_config(optimizer=dict(accumulate=2)))
    state = jax.eval_shape(agent.create, 0)
    _, latents, metrics = jax.eval_shape(agent.learn, state, random_batch(agent))
    assert latents["deter"].shape == (B, T, 16) and set(metrics) == expected_metrics(agent)


@pytest.mark.usefixtures("fixed")
def test_imagining_from_the_last_steps_only():
    """After a reset the past is forgotten: the last two steps of a sequence teach what a sequence of two steps does."""
    behaviour = [f"loss/{k}" for k in sorted(BEHAVIOUR_TERMS)] + ["adv", "tar", "weight", "ret", "ent/action"]
    every = Agent(VECTOR, DISCRETE, small_config())
    last = Agent(VECTOR, DISCRETE, small_config(actor_critic=dict(imagine_last=2)))
    state = every.init(0)
    params = perturb(state["params"])
    long = random_batch(every)
    long["is_first"][:, -2] = True
    short = {k: v[:, -3:] for k, v in long.items()}
    key = jax.random.key(0)

    def metrics(agent: Agent, batch: Any) -> dict[str, float]:
        loss = jax.jit(agent.loss, compiler_options=CHEAP)
        return loss(params, state["slow"], state["return_scale"], batch, key)[1][2]

    from_last, from_short = metrics(last, long), metrics(every, short)
    for name in behaviour:
        np.testing.assert_allclose(from_last[name], from_short[name], rtol=1e-4, atol=1e-6)
    # The world model learns from all steps.
    for name in sorted(WORLD_TERMS | {"position"} - {"con"}):
        assert abs(from_last[f"loss/{name}"] - from_short[f"loss/{name}"]) > 1e-3


# Precision


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_under_strict_promotion(dtype):
    """No implicit promotion anywhere in the loss; whatever is kept or summed up is float32 in either precision."""
    agent = Agent(OBSERVATIONS, ACTIONS, small_config(), dtype)
    state, batch, key = jax.eval_shape(agent.create, 0), random_batch(agent), jax.random.key(0)
    args = (state["params"], state["slow"], state["return_scale"], batch, key)
    with jax.numpy_dtype_promotion("strict"):
        (loss, (scale, latents, metrics, *_)), grads = jax.eval_shape(
            jax.value_and_grad(agent.loss, has_aux=True), *args
        )
        carry = agent.init_policy(3)
        carry, _, extras = jax.eval_shape(agent.act, state["params"], carry, observation(agent, 3), key)
    kept = {"state": [state[k] for k in ("params", "slow", "return_scale")], "grads": grads, "scale": scale}
    kept |= {"losses": {k: v for k, v in metrics.items() if k.startswith(("loss/", "adv", "ret"))}, "loss": loss}
    for name, tree in kept.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}, name
    assert {leaf.dtype for leaf in jax.tree.leaves(state["opt"])} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert {v.dtype for v in carry.values()} == {jnp.dtype(dtype)}
    for found in (latents, extras):
        assert {k: v.dtype for k, v in found.items()} == {k: field.dtype for k, field in agent.extras.items()}
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(grads) == shapes(state["params"])


@pytest.mark.usefixtures("fixed")
def test_bfloat16_activations_give_nearly_the_same_losses():
    agents = [Agent(VECTOR, DISCRETE, small_config(), dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    state, batch = agents[0].init(0), random_batch(agents[0])
    args = (state["params"], state["slow"], state["return_scale"], batch, jax.random.key(0))
    one, two = (jax.jit(agent.loss, compiler_options=CHEAP)(*args)[1][2] for agent in agents)
    for name in ("position", "rew", "con", "dyn", "rep", "value"):
        np.testing.assert_allclose(two[f"loss/{name}"], one[f"loss/{name}"], rtol=0.03)


# Learning


def test_updates_on_one_batch_lower_every_loss_of_the_world_model(mixed, start):
    batch, state = random_batch(mixed), copy(start)
    history = []
    for _ in range(80):
        state, _, metrics = mixed.train_step(state, batch)
        history.append({k: float(v) for k, v in metrics.items() if k.startswith("loss/")})
    mean = lambda part: {k: np.mean([h[k] for h in part]) for k in part[0]}  # noqa: E731
    early, late = mean(history[:5]), mean(history[-5:])
    world = WORLD_TERMS | {k for k in OBSERVATIONS if not k.startswith("log/")}
    ratios = {k: late[f"loss/{k}"] / early[f"loss/{k}"] for k in world}
    assert all(ratio < 0.8 for ratio in ratios.values()), ratios
