"""Controllers that are evolved: CMA-ES where the best is known, candidates against a slow loop, updates."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learner_data import B, T, perturb, random_batch, small_config

from dreamer.agent import Agent, stream_key
from dreamer.config import EvolutionConfig
from dreamer.evolution import Trial, cma_es, metrics_of
from dreamer.optimizer import filled, make_optimizer
from dreamer.presets import load_config
from dreamer.types import Space
from dreamer.values import ConfigError

VECTOR = {"position": Space("vector", (3,))}
TURN = {"turn": Space("discrete", (), (3,))}
PUSH = {"push": Space("vector", (2,))}
EVOLVED: dict[str, Any] = {
    "gradient": "evolution", "horizon": 3, "evolution": {"population": 6, "rollouts": 3, "every": 2, "after": 1},
}  # fmt: skip


@functools.cache
def build(actions: str = "turn") -> Agent:
    """An agent whose latents are of 2018."""
    model, loss = {"latent": "mixture", "dynamics": "lstm"}, {"free_nats_of": "rep", "objective": ("autoencoding",)}
    return Agent(VECTOR, TURN if actions == "turn" else PUSH, small_config(model, loss, EVOLVED))


def test_a_valley_is_descended_to_its_lowest_point():
    """A quadratic whose axes, turned by chance, differ by 30: the distribution must move, take its shape and shrink."""
    rng = np.random.default_rng(0)
    turned, best = np.linalg.qr(rng.normal(0, 1, (6, 6)))[0], rng.normal(0, 3, 6)
    hill = np.float32(10 ** np.linspace(0, 1.5, 6)[:, None] * turned)
    optimizer = cma_es(EvolutionConfig(population=16, std=1.0, every=1))

    def height(tree: Any) -> jax.Array:
        return jnp.square((jnp.concatenate([tree["a"], tree["b"]], -1) - best) @ hill.T).sum(-1)

    def update(carry: tuple, number: jax.Array) -> tuple[tuple, jax.Array]:
        params, state = carry
        trial = Trial(lambda: jax.random.fold_in(jax.random.key(0), number), lambda tree: -height(tree))
        updates, state = optimizer.update(params, state, params, trial=trial)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), height(params)

    start = {"a": jnp.zeros(2), "b": jnp.zeros(4)}
    (params, state), heights = jax.jit(lambda: jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(250)))()
    assert heights[0] > 100 and heights[-1] < 1e-6
    np.testing.assert_allclose(np.concatenate([params["a"], params["b"]]), best, atol=1e-3)
    assert state["generation"] == 250 == metrics_of({"x": {"y": state}})["evolution/generation"]
    spread = np.linalg.eigvalsh(hill @ np.float64(state["cov"]) @ hill.T)
    assert spread.max() / spread.min() < 30  # of the hill itself: 1000


def test_generations_are_as_often_as_asked_and_nothing_moves_in_between():
    config = EvolutionConfig(population=4, every=3, after=2)
    optimizer, params = cma_es(config), {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    update = jax.jit(
        lambda state, number: optimizer.update(
            params, state, params, trial=Trial(lambda: jax.random.key(number), lambda tree: tree["w"].sum(-1))
        )
    )
    moved = []
    for number in range(10):
        updates, state = update(state, number)
        moved.append(bool(updates["w"].any()))
    assert [i + 1 for i, move in enumerate(moved) if move] == [5, 8] and state["generation"] == 2


def test_an_optimizer_of_its_own_sees_its_weights_alone():
    found: list[Any] = []

    def update(grads: Any, state: Any, params: Any, *, trial: Trial) -> tuple[Any, Any]:
        found.append(filled(jax.tree.map(lambda x: x - 5, params), {"a": {"x": 1.0, "y": 2.0}, "b": 3.0}))
        return jax.tree.map(lambda x: x * 0 + trial.returns(None), params), state

    own = optax.GradientTransformationExtraArgs(lambda params: {}, update)
    optimizer = make_optimizer({"": small_config(optimizer={"kind": "adam"}).optimizer}, {"a.x": own})
    params = {"a": {"x": jnp.float32(7), "y": jnp.float32(8)}, "b": jnp.float32(9)}
    updates, _ = optimizer.update(params, optimizer.init(params), params, trial=Trial(lambda: None, lambda _: 4.0))
    assert updates["a"]["x"] == 4 and found == [{"a": {"x": 2, "y": 2}, "b": 3}]


@pytest.mark.parametrize("actions", ["turn", "push"])
def test_candidates_bring_what_a_slow_loop_over_them_finds(actions):
    """One after the other, each from each of its starts, step by step; all from the same starts, by the same draws."""
    agent = build(actions)
    state = agent.init(0)
    state["params"] = params = perturb(state["params"])
    batch = random_batch(agent)
    rssm = agent.model(params).world_model.rssm
    latents = {name: jnp.asarray(batch[name][:, 1:]) for name in rssm.stored()}
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 1, (6, *x.shape)), jnp.float32),
                         params["actor_critic"]["policy"])  # fmt: skip
    place = lambda policy: {**params, "actor_critic": {**params["actor_critic"], "policy": policy}}  # noqa: E731
    masked = jax.tree.map(lambda x: optax.MaskedNode(), params)
    candidates = {**masked, "actor_critic": {**masked["actor_critic"], "policy": drawn}}
    found = jax.jit(lambda candidates: agent.trial(state, latents).returns(candidates))(candidates)

    _, start_key, dream_key = jax.random.split(stream_key(state["key"], "evolution", 0), 3)
    places = np.asarray(jax.random.permutation(start_key, B * T))[:3]
    for number in range(6):
        model = agent.model(place(jax.tree.map(lambda x: x[number], drawn)))  # noqa: B023
        state_ = {name: jnp.float32(x).reshape(B * T, -1)[places] for name, x in latents.items()}
        total, weight = np.zeros(3), np.ones(3)
        for key in jax.random.split(dream_key, 3):
            x = np.concatenate([state_["deter"], state_["stoch"]], -1)
            out = model.actor_critic.policy.heads[actions].out
            numbers = np.asarray(x, np.float64) @ np.float64(out.kernel[...]) + np.float64(out.bias[...])
            action = np.tanh(numbers) if actions == "push" else np.eye(3)[numbers.argmax(-1)]
            state_ = model.world_model.rssm.imagine_step(state_, jnp.float32(action), key)
            x = model.world_model.rssm.feature(state_)
            total += weight * np.float64(model.world_model.reward(x).mode())
            weight *= np.float64(model.world_model.cont(x).mode())
        np.testing.assert_allclose(found[number], total.mean(), rtol=1e-4, atol=1e-5)
    assert np.std(found) > 1e-3


def test_updates_move_the_controller_by_generations_and_the_world_model_always():
    """The first update is the model's alone, then every second one has a generation; all of it is the training state's,
    so a run that stops between two updates goes on the same."""
    agent = build()
    state, batch = agent.init(0), random_batch(agent)
    policies, models, told = [], [], []
    for _ in range(5):
        state, _, metrics = agent.train_step(jax.tree.map(jnp.array, jax.device_get(state)), batch)
        policies.append(jax.device_get(state["params"]["actor_critic"]["policy"]["heads"]["turn"]["out"]["kernel"]))
        models.append(jax.device_get(jax.tree.leaves(state["params"]["world_model"])[0]))
        told.append(float(metrics["evolution/generation"]))
    assert told == [0, 0, 1, 1, 2] and agent.finite(metrics)
    changes = [bool((a != b).any()) for a, b in zip(policies, policies[1:], strict=False)]
    assert not policies[0].any() and changes == [False, True, False, True]
    assert all((a != b).any() for a, b in zip(models, models[1:], strict=False))
    assert {"loss/policy", "loss/value"} & set(metrics) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actor_critic.evolution.every": 3}, "expected actor_critic.gradient evolution with options"),
        ({"actor_critic.gradient": "evolution", "planner.name": "cem"}, "expected planner.name null with"),
        ({"actor_critic.gradient": "evolution", "actor_critic.evolution.rollouts": 2000}, "got 2000; dreams begin"),
        (
            {"actor_critic.gradient": "evolution", "actor_critic.explore": 0.5, "model.ensemble": 2},
            "with actor_critic.explore, .* got evolution",
        ),
        ({"actor_critic.gradient": "evolution", "optimizer.accumulate": 2}, "expected optimizer.accumulate 1 with"),
    ],
)
def test_what_cannot_be_together_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        load_config([], options)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "evosax.algorithms", None)
    with pytest.raises(ValueError, match=r"pip install 'dreamer\[evolution\]'"):
        cma_es(EvolutionConfig())
