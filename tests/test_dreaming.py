"""A trained model as a thing to step: its states, what it tells of them, and where its random numbers come from."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_data import CHEAP, perturb
from tiny_runs import tiny_agent, tiny_config

from dreamer.coders import join_actions
from dreamer.dreaming import Dreams
from dreamer.objectives import OBJECTIVES, Objective
from dreamer.types import Space

SEEN = {
    "image": Space("image", (16, 16, 3)),
    "mode": Space("discrete", (2,), (3, 5)),
    "vector": Space("vector", (3,)),
}
ACTED = {"gear": Space("discrete", (), (3,)), "push": Space("vector", (2,))}


@functools.cache
def dreams() -> Dreams:
    agent = tiny_agent(SEEN, ACTED)
    return Dreams(agent, perturb(agent.init(0)["params"]))


def episodes(count: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda space: np.stack([space.sample(rng) for _ in range(count * length)])  # noqa: E731
    found = {key: draw(space).reshape(count, length, *space.shape) for key, space in {**SEEN, **ACTED}.items()}
    return found | {"is_first": np.arange(length)[None].repeat(count, 0) == 0}


@functools.cache
def starts() -> dict[str, jax.Array]:
    """States (24, ...) after each step of an episode."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), dreams().watch(episodes(1, 24)))


def step(index: int, seeds: np.ndarray, count: int = 1, begins: bool = False):
    """Dreams at the start number `index`, one for each seed, taken on by the same action."""
    size = len(seeds)
    states = jax.tree.map(lambda x: jnp.repeat(x[index][None], size, 0), starts())
    actions = {"gear": np.full(size, 2, np.int32), "push": np.full((size, 2), 0.5, np.float32)}
    flags, other = np.full(size, begins), np.full(size, 7, np.int32)
    return dreams().step(starts(), states, actions, flags, other, seeds, np.full(size, count, np.uint32))


MANY = np.arange(2000, dtype=np.uint32)


def test_watching_an_episode_is_what_the_policy_sees_of_it():
    played, agent = episodes(2, 6), dreams().agent
    states, carry = dreams().watch(played), agent.init_policy(2)
    for t in range(6):
        observation = {key: played[key][:, t] for key in (*SEEN, "is_first")}
        carry, _, _ = agent.policy(dreams().params, carry, observation, None)
        for name, found in states.items():
            np.testing.assert_allclose(found[:, t], carry[name], rtol=1e-4, atol=1e-5)
        taken = join_actions({key: jnp.asarray(played[key][:, t]) for key in ACTED}, agent.actions, agent.dtype)
        carry = carry | {"action": taken}


def test_a_dream_follows_the_prior_and_is_read_by_the_heads():
    states, glimpse = step(3, MANY)
    model = dreams().agent.model(dreams().params)
    rssm, world = model.world_model.rssm, model.world_model
    before = jax.tree.map(lambda x: x[3][None], starts())
    deter = rssm.step(before, jnp.array([[0, 0, 1, 0.5, 0.5]], jnp.float32))
    np.testing.assert_allclose(states["deter"], np.asarray(deter).repeat(len(MANY), 0), rtol=1e-4, atol=1e-5)
    # The drawn latents occur as often as the prior says, mixed with one per cent of a uniform distribution.
    probs = np.asarray(jax.nn.softmax(rssm.prior(deter)[0], -1)) * 0.99 + 0.01 / 4
    np.testing.assert_allclose(np.asarray(states["stoch"]).mean(0), probs, atol=5 * 0.5 / len(MANY) ** 0.5)
    np.testing.assert_allclose(glimpse.entropy, -(probs * np.log(probs)).sum(), rtol=1e-4)
    x = rssm.feature(states)
    np.testing.assert_allclose(glimpse.reward, world.reward(x).mode(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(glimpse.value, model.actor_critic.value(x).mode(), rtol=1e-3, atol=1e-4)
    outputs = {key: np.asarray(output.mode()) for key, output in world.objective.predict(x).items()}
    np.testing.assert_allclose(glimpse.observation["image"], outputs["image"] * 255, atol=0.51)
    np.testing.assert_allclose(glimpse.observation["vector"], outputs["vector"], rtol=1e-3, atol=1e-4)
    classes = [outputs["mode"][:, :3].argmax(-1), outputs["mode"][:, 3:].argmax(-1)]
    np.testing.assert_array_equal(glimpse.observation["mode"], np.stack(classes, -1))
    assert {key: value.dtype for key, value in glimpse.observation.items()} == {k: s.dtype for k, s in SEEN.items()}


def test_the_end_is_drawn_from_what_the_head_says_beside_the_discount():
    _, glimpse = step(3, MANY)
    model = dreams().agent.model(dreams().params)
    states, _ = step(3, MANY)
    learned = np.asarray(model.world_model.cont(model.world_model.rssm.feature(states)).mode())
    discount = 1 - 1 / 333
    np.testing.assert_allclose(glimpse.cont, np.minimum(learned / discount, 1), rtol=1e-4)
    expected = (1 - np.asarray(glimpse.cont)).mean()
    assert 0.05 < expected < 0.95
    assert abs(np.mean(glimpse.ended) - expected) < 5 * 0.5 / len(MANY) ** 0.5


def test_a_dream_begins_at_its_start_with_nothing_behind_it():
    states, glimpse = step(3, MANY[:4], begins=True)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, jnp.repeat(y[7][None], 4, 0)), states, starts())
    assert not np.any(glimpse.reward) and not np.any(glimpse.ended)


def test_random_numbers_are_a_dreams_own():
    alone = [step(5, MANY[i : i + 1], count=9)[0]["stoch"] for i in range(3)]
    together = step(5, MANY[:3], count=9)[0]["stoch"]
    np.testing.assert_array_equal(np.concatenate(alone), together)
    assert (np.asarray(step(5, MANY[:3], count=10)[0]["stoch"]) != np.asarray(together)).any()


def test_a_model_that_predicts_nothing_is_refused(monkeypatch):
    class Blind(Objective):
        def __init__(self, width, tokens, spaces, config, loss, *, rngs):
            super().__init__({})

    monkeypatch.setitem(OBJECTIVES, "reconstruction", Blind)
    from dreamer.agent import Agent

    agent = Agent(SEEN, ACTED, tiny_config())
    params = jax.jit(agent.create, compiler_options=CHEAP)(0)["params"]
    with pytest.raises(ValueError, match="predicts observations, got one without a decoder"):
        Dreams(agent, params)
