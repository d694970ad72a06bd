"""An ensemble of priors: its loss and disagreement written out, that nothing else notices it, and its three uses."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, B, T, perturb, random_batch, small_config

from dreamer import features
from dreamer.agent import Agent
from dreamer.behaviours import make_motive
from dreamer.config import ReplayConfig, SelectionConfig
from dreamer.presets import load_config
from dreamer.types import Space
from dreamer.values import ConfigError

VECTOR = {"position": Space("vector", (3,))}
DISCRETE = {"action": Space("discrete", (), (3,))}
MEMBERS = 3


def make(latent: str = "categorical", members: int | None = MEMBERS, **options: Any) -> Agent:
    return Agent(VECTOR, DISCRETE, small_config({"latent": latent, "ensemble": members}, **options))


def softmax(x: np.ndarray) -> np.ndarray:
    odds = np.exp(x - x.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def said(model: Any, deter: Any) -> list[np.ndarray]:
    """What each member makes of deterministic states (..., D): logits, float64."""
    return [np.float64(member(jnp.asarray(deter, jnp.float32))) for member in model.world_model.ensemble.members]


def classes(logits: np.ndarray) -> np.ndarray:
    return 0.99 * softmax(logits) + 0.01 / logits.shape[-1]


def expected(latent: str, logits: np.ndarray) -> np.ndarray:
    """(..., S, K) or (..., S)."""
    return {"categorical": classes, "gaussian": lambda x: x[..., :4], "deterministic": lambda x: x}[latent](logits)


def spread(latent: str, found: list[np.ndarray]) -> np.ndarray:
    """The variance of what members expect, spelled out for each state and variable."""
    means = np.stack([expected(latent, logits) for logits in found])
    means = means if latent == "categorical" else means[..., None]
    total = np.zeros(means.shape[1:-2])
    for at in np.ndindex(total.shape):
        for variable in range(4):
            for number in range(means.shape[-1]):
                values = [means[(member, *at, variable, number)] for member in range(MEMBERS)]
                middle = sum(values) / MEMBERS
                total[at] += sum((value - middle) ** 2 for value in values) / MEMBERS / 4
    return total


@pytest.mark.parametrize("latent", ["categorical", "gaussian", "deterministic"])
def test_loss_and_disagreement_written_out(latent):
    agent = make(latent)
    params = perturb(agent.init(0)["params"])

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def learn(params: Any, batch: Any) -> Any:
        world = agent.model(params).world_model
        seen = world.see(*agent.model(params).split_batch(batch), None)
        return seen, world.ensemble.learn(seen), world.ensemble.disagreement(seen.feature)

    seen, (losses, metrics), unknown = learn(params, random_batch(agent))
    model = agent.model(params)
    found, posterior = said(model, seen.states["deter"]), np.float64(seen.posterior)
    total = np.zeros((B, T))
    for logits in found:
        if latent == "categorical":
            p, q = classes(posterior), classes(logits)
            total += (p * np.log(p / q)).sum((-1, -2))
        elif latent == "gaussian":
            (m, s), (n, z) = ((x[..., :4], np.log1p(np.exp(x[..., 4:])) + 0.1) for x in (posterior, logits))
            total += (np.log(z / s) + (s**2 + (m - n) ** 2) / (2 * z**2) - 0.5).sum(-1)
        else:
            total += 0.5 * np.square(posterior - logits).sum(-1)
    np.testing.assert_allclose(losses["ensemble"], total, rtol=2e-4)
    ours = spread(latent, found)
    assert ours.shape == (B, T) and ours.min() > 1e-4
    np.testing.assert_allclose(unknown, ours, rtol=1e-3)
    np.testing.assert_allclose(metrics["disagreement"], ours.mean(), rtol=1e-3)
    with features.items_last():
        turned = model.world_model.ensemble.disagreement(seen.feature.reshape(B * T, -1).T)
    np.testing.assert_allclose(turned, ours.reshape(-1), rtol=1e-3)


def test_members_that_say_the_same_agree():
    agent = make()
    params = perturb(agent.init(0)["params"])
    members = params["world_model"]["ensemble"]["members"]
    members |= {"1": members["0"], "2": members["0"]}
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (5, agent.model(params).world_model.rssm.width)), jnp.float32)
    assert np.abs(agent.model(params).world_model.ensemble.disagreement(x)).max() < 1e-12


def test_no_other_weight_notices_it():
    """Updates with it and without it, from the same weights, the norm of all gradients clipped: the same to the bit."""
    optimizer = {"kind": "adam", "clip_norm": 0.1}
    without, agent = make(members=None, optimizer=optimizer), make(optimizer=optimizer)
    batch, state, begun = random_batch(agent), agent.init(0), agent.init(0)["params"]

    def others(params: Any) -> Any:
        rest = {name: part for name, part in params["world_model"].items() if name != "ensemble"}
        return jax.tree.map(jnp.array, {**params, "world_model": rest})

    plain = {**without.init(0), "params": others(state["params"]), "slow": jax.tree.map(jnp.array, state["slow"])}
    assert "ensemble" not in without.shapes["world_model"]
    for _ in range(3):
        state, latents, metrics = agent.train_step(state, batch)
        plain, same, fewer = without.train_step(plain, batch)
    jax.tree.map(np.testing.assert_array_equal, others(state["params"]), plain["params"])
    jax.tree.map(np.testing.assert_array_equal, dict(latents), dict(same))
    added = {"loss/ensemble", "disagreement", "opt/module_grad_norm/ensemble"}
    assert set(metrics) - set(fewer) == added and not set(fewer) - set(metrics)
    member = state["params"]["world_model"]["ensemble"]["members"]["0"]
    first = begun["world_model"]["ensemble"]["members"]["0"]
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (member, first)), strict=True))


def test_priorities_are_as_without_it():
    """Where replay draws by the model's loss, the members' losses do not count."""
    config, replay = small_config({"ensemble": 2}), ReplayConfig(selection=SelectionConfig(prioritised=1.0))
    agent = Agent(VECTOR, DISCRETE, dataclasses.replace(config, replay=replay))
    params, batch = perturb(agent.init(0)["params"]), random_batch(agent)
    slow, scale = agent.slow_copies(params), {"low": jnp.float32(0), "high": jnp.float32(0)}
    outcome = jax.jit(agent.loss, compiler_options=CHEAP)(params, slow, scale, batch, jax.random.key(0))[1]
    scales, metrics = agent.model(params).scales, outcome.metrics
    told = sum(scales[name] * metrics[f"loss/{name}"] for name in ("position", "rew", "con", "dyn", "rep"))
    np.testing.assert_allclose(outcome.written["priority"].mean(), told, rtol=1e-5)
    assert scales["ensemble"] * metrics["loss/ensemble"] > 0.1


def test_rewards_of_curiosity_and_of_caution():
    """Along a dream, and in a batch: r' = 0.5 r + 2 d as a motive, r - 3 d where a planner is to pay."""
    options = {"explore": 2.0, "task_reward": 0.5}
    agent = make(actor_critic=options)
    params, batch = perturb(agent.init(0)["params"]), random_batch(agent)
    motive, rng = make_motive(agent.config.actor_critic), np.random.default_rng(0)
    starts = {
        "deter": jnp.asarray(rng.normal(0, 1, (4, 16)), jnp.float32),
        "stoch": jax.nn.one_hot(rng.integers(0, 4, (4, 4)), 4),
    }

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def walk(params: Any, batch: Any) -> Any:
        model = agent.model(params)
        slow = {"value": model.actor_critic.value}
        plain, curious = (model.dream(slow, starts, None, **given) for given in ({}, {"motive": motive}))
        steps, state = [], starts
        worlds = [model.as_world(starts, None, penalty)[0] for penalty in (0.0, 3.0)]
        for action in curious.actions:
            steps.append([world.step(state, action, None) for world in worlds])
            state = steps[-1][0][0]
        context, actions, trained = model.split_batch(batch)
        seen = model.world_model.see(context, actions, trained, None)
        lived = motive.lived(model.world_model, seen.feature, trained["reward"])
        return plain.reward, curious.reward, steps, seen.states["deter"], lived, trained["reward"]

    dreamt, curious, steps, deter, lived, task = walk(params, batch)
    model = agent.model(params)
    for step, ((new, reward, cont), (same, less, also)) in enumerate(steps, 1):
        unknown = spread("categorical", said(model, new["deter"]))
        assert unknown.min() > 1e-4
        np.testing.assert_allclose(dreamt[step], reward, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(curious[step], 0.5 * reward + 2 * unknown, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(less, reward - 3 * unknown, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(cont, also, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, new, same)
    unknown = spread("categorical", said(model, deter))
    np.testing.assert_allclose(lived, 0.5 * task + 2 * unknown, rtol=1e-3, atol=1e-5)
    assert make_motive(small_config().actor_critic).lived(model.world_model, deter, task) is task


def test_a_policy_learns_through_disagreement_which_does_not_learn_from_it():
    """With nothing but disagreement to gain, the dynamics gradient moves the policy, and no weight of the model."""
    options = {"explore": 5.0, "task_reward": 0.0, "gradient": "dynamics", "entropy": 0.0, "horizon": 1}
    agent = make("gaussian", actor_critic=options)
    params, motive = perturb(agent.init(0)["params"]), make_motive(agent.config.actor_critic)
    rng = np.random.default_rng(0)
    starts = {
        name: jnp.asarray(rng.normal(0, 1, (5, size)), jnp.float32) for name, size in (("deter", 16), ("stoch", 4))
    }

    def gain(params: Any) -> jax.Array:
        model = agent.model(params)
        return model.dream({"value": model.actor_critic.value}, starts, jax.random.key(0), motive).reward[1:].sum()

    grads = jax.jit(jax.grad(gain), compiler_options=CHEAP)(params)
    moved = {
        name: any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(part))
        for module in grads.values()
        for name, part in module.items()
    }
    assert moved.pop("policy") and not any(moved.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"planner.name": "mppi", "planner.penalty": 1},
            "planner.penalty 0 without an ensemble, got 1.*--model.ensemble",
        ),
        ({"actor_critic.explore": 0.5}, "actor_critic.explore 0 without an ensemble, got 0.5.*--model.ensemble"),
        ({"model.ensemble": 3, "planner.penalty": 1}, "planner.penalty 0 without a planner, got 1.*--planner.name"),
        ({"actor_critic.task_reward": 0}, "actor_critic.task_reward 1 without actor_critic.explore, got 0"),
        (
            {"model.ensemble": 3, "actor_critic.explore": 1, "planner.name": "mppi"},
            "planner.critic false with actor_critic.explore.*--planner.critic false",
        ),
        ({"model.ensemble": 1}, "model.ensemble.*2"),
    ],
)
def test_what_cannot_be(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(["debug"], overrides)


@pytest.mark.slow
def test_on_a_grid_whose_truth_is_known():
    """Disagreement goes with the true error of a step, by the table; a penalty on it closes most of what plans promise
    too much, and costs no return."""
    study = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "results" / "fidelity" / "unknown.py"))["study"]
    found = study(0, penalties=(0.0, 3.0))
    assert found.error.mean() > 0.1 and found.correlation >= 0.5
    gap = found.believed - found.real
    assert gap[0] > 0.5 and gap[1] < 0.6 * gap[0] and found.real[1] > found.real[0] - 0.05
