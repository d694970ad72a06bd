"""Action sequences: drawn, kept to what is allowed, tried out in a world, and drawn again around the best.

A candidate is told by *scores* (..., A). The scores of a continuous action are the action; of a discrete one, the class
with the highest score among those that the state reached allows is taken. So the same candidate always fits, whatever
its steps lead to, and one way of drawing serves all kinds of actions: a normal for continuous ones, and log-probability
plus Gumbel noise for discrete ones, whose highest entry is a draw (Gumbel, 1954).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dreamer.actor_critic import sample_actions
from dreamer.planner_config import Settings
from dreamer.planners.protocol import State, World
from dreamer.types import Spaces

#: Share of a uniform distribution in what discrete candidates are drawn from, so that no class is ruled out for good.
UNIMIX = 0.01
#: The score of an action that is not allowed.
NEVER = -1e9


def discrete_entries(actions: Spaces) -> np.ndarray:
    """bool (A,): which entries of a flat action belong to discrete actions."""
    return np.repeat([s.classes is not None for s in actions.values()], [s.flat_width for s in actions.values()])


def class_sums(x: jax.Array, actions: Spaces) -> jax.Array:
    """For every entry (..., A) of a discrete action the sum over its classes; 1 for continuous entries."""
    parts = [
        jnp.broadcast_to(p.sum(-1, keepdims=True), p.shape) if n else jnp.ones_like(p) for p, n in _split(x, actions)
    ]
    return jnp.concatenate(parts, -1)


def _widths(actions: Spaces) -> list[int]:
    """Entries of a flat action, variable by variable; a continuous action is one variable."""
    return [n for space in actions.values() for n in (space.classes or (space.flat_width,))]


def _split(x: jax.Array, actions: Spaces) -> list[tuple[jax.Array, int]]:
    """The parts of (..., A): (part, number of classes) of each variable, 0 classes for a continuous action."""
    sizes = _widths(actions)
    classes = [n for s in actions.values() for n in (s.classes or (0,))]
    return list(zip(jnp.split(x, np.cumsum(sizes)[:-1].tolist(), -1), classes, strict=True))


def act(scores: jax.Array, allowed: jax.Array | None, actions: Spaces, soft: bool = False) -> jax.Array:
    """The action (M, A) that scores (M, A) mean. allowed: bool (M, A) or None.

    soft: straight-through, one-hots have the gradient of the softmax of their scores.
    """
    if allowed is not None:
        scores = jnp.where(allowed, scores, NEVER)
    parts = []
    for part, classes in _split(scores, actions):
        if not classes:
            parts.append(jnp.clip(part, -1, 1))
            continue
        hot = jax.nn.one_hot(part.argmax(-1), classes, dtype=part.dtype)
        probs = jax.nn.softmax(part) if soft else None
        parts.append(hot if probs is None else hot + (probs - jax.lax.stop_gradient(probs)))
    return jnp.concatenate(parts, -1)


def explore(action: jax.Array, allowed: jax.Array | None, actions: Spaces, noise: float, key: jax.Array) -> jax.Array:
    """`action` (N, A) with noise of this deviation on continuous actions; discrete ones are random with this chance."""
    which_key, class_key, normal_key = jax.random.split(key, 3)
    scores = jax.random.gumbel(class_key, action.shape)
    entries = discrete_entries(actions)
    variables = _widths(actions)
    chance = jax.random.uniform(which_key, (action.shape[0], len(variables)))
    random = jnp.repeat(chance < noise, np.array(variables), 1, total_repeat_length=len(entries))
    moved = jnp.where(random, scores, jnp.where(action > 0, -NEVER, NEVER))
    return act(
        jnp.where(entries, moved, action + noise * jax.random.normal(normal_key, action.shape)), allowed, actions
    )


# --- Trying out --------------------------------------------------------------------------------


class Tried(NamedTuple):
    """Sequences from N states, C from each: actions (N, C, H, A) and discounted returns (N, C)."""

    actions: jax.Array
    returns: jax.Array


def spread(state: State, count: int) -> State:
    """Each of N states `count` times, (N * count, ...)."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, 0), state)


def try_out(
    world: World, state: State, scores: jax.Array, settings: Settings, key: jax.Array, soft: bool = False
) -> Tried:
    """Follow candidates, scores (N, C, H, A), from states (N, ...).

    R = r₁ + c₁(r₂ + c₂(... + c_H v(s_H))): a reward comes with the state that it led to, and the chance to go on from
    there multiplies what follows, as in `actor_critic.lambda_return`.
    """
    envs, count, horizon, width = scores.shape
    given = jnp.moveaxis(scores, 2, 0).reshape(horizon, envs * count, width)

    def choose(state: State, score: jax.Array, key: jax.Array) -> jax.Array:
        return act(score, world.allowed(state), world.actions, soft)

    return _roll(world, state, count, choose, given, settings, key)


def follow_policy(world: World, state: State, count: int, settings: Settings, key: jax.Array) -> Tried:
    """What the policy would do from states (N, ...), `count` draws each."""

    def choose(state: State, score: None, key: jax.Array) -> jax.Array:
        action = jnp.clip(sample_actions(world.policy(state), key), -1, 1)
        return jax.lax.stop_gradient(action).astype(jnp.float32)

    return _roll(world, state, count, choose, None, settings, key)


def add_up(
    step: Callable[[State, Any], tuple[State, jax.Array, jax.Array, Any]], state: State, inputs: Any
) -> tuple[State, jax.Array, jax.Array, Any]:
    """Follow ``state, reward, cont, note = step(state, input)`` from states (M, ...) along inputs (H, ...): the last
    state, R = r₁ + c₁(r₂ + c₂(...)) (M,), the product of all c (M,), and the notes (H, ...)."""

    def one(carry: tuple, inputs: Any) -> tuple[tuple, Any]:
        state, total, weight = carry
        state, reward, cont, note = step(state, inputs)
        return (state, total + weight * reward, weight * cont), note

    zero = jnp.zeros(jax.tree.leaves(state)[0].shape[0], jnp.float32)
    (end, total, weight), notes = jax.lax.scan(one, (state, zero, zero + 1), inputs)
    return end, total, weight, notes


def _roll(
    world: World,
    state: State,
    count: int,
    choose: Callable[[State, Any, jax.Array], jax.Array],
    given: jax.Array | None,
    settings: Settings,
    key: jax.Array,
) -> Tried:
    """`choose` acts from the state, its entry of `given` (H, M, ...) and a key."""

    def step(state: State, inputs: tuple) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        score, key = inputs
        act_key, step_key = jax.random.split(key)
        action = choose(state, score, act_key)
        return *world.step(state, action, step_key if settings.outcomes == "sampled" else None), action

    envs = jax.tree.leaves(state)[0].shape[0]
    keys = jax.random.split(key, settings.horizon)
    end, total, weight, actions = add_up(step, spread(state, count), (given, keys))
    if settings.critic:
        total = total + weight * world.value(end)
    actions = jnp.moveaxis(actions, 0, 1).reshape(envs, count, *actions.shape[::2])
    return Tried(actions, total.reshape(envs, count))


def of_policy(settings: Settings) -> int:
    """How many of the candidates are the policy's; at least one is not."""
    return min(round(settings.policy_share * settings.candidates), settings.candidates - 1)


def join(one: Tried, other: Tried) -> Tried:
    """The candidates of both."""
    return Tried(*(jnp.concatenate(pair, 1) for pair in zip(one, other, strict=True)))


def best(tried: Tried) -> Tried:
    """The best candidate of each state alone: actions (N, 1, H, A), returns (N, 1)."""
    at = tried.returns.argmax(1)[:, None]
    return Tried(jnp.take_along_axis(tried.actions, at[:, :, None, None], 1), jnp.take_along_axis(tried.returns, at, 1))


def answer(chosen: Tried) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a planner returns that has settled on one sequence for each state; see `protocol.Plan`."""
    plan = chosen.actions[:, 0]
    return plan[:, 0], {"planned": chosen.returns[:, 0], "plan": plan}


# --- Drawing -----------------------------------------------------------------------------------


def nothing_planned(world: World, state: State, settings: Settings) -> jax.Array:
    """The mean (N, H, A) of a proposal that nothing is known for: zeros."""
    envs = jax.tree.leaves(state)[0].shape[0]
    return jnp.zeros((envs, settings.horizon, len(discrete_entries(world.actions))), jnp.float32)


class Proposal(NamedTuple):
    """What candidates are drawn from, each (N, H, A): the mean and the standard deviation of continuous actions, the
    probabilities of discrete ones (and 1)."""

    mean: jax.Array
    std: jax.Array


def first_proposal(mean: jax.Array, std: float, actions: Spaces) -> Proposal:
    """Around `mean` (N, H, A), which may be zeros: then discrete actions are drawn uniformly."""
    discrete = discrete_entries(actions)
    return Proposal(mean, jnp.broadcast_to(jnp.where(discrete, 1.0, std), mean.shape))


def draw(proposal: Proposal, count: int, actions: Spaces, key: jax.Array) -> jax.Array:
    """Scores (N, C, H, A) of `count` candidates for each state."""
    discrete = discrete_entries(actions)
    mean, std = (x[:, None] for x in proposal)
    shape = (mean.shape[0], count, *mean.shape[2:])
    normal_key, gumbel_key = jax.random.split(key)
    drawn = mean + std * jax.random.normal(normal_key, shape)
    if not discrete.any():
        return drawn
    return jnp.where(discrete, log_probs(mean, actions) + jax.random.gumbel(gumbel_key, shape), drawn)


def log_probs(mean: jax.Array, actions: Spaces) -> jax.Array:
    """Log-probabilities (..., A) of discrete actions from probabilities, or from zeros: then uniform ones."""
    ones = class_sums(jnp.ones_like(mean), actions)
    mixed = mean + UNIMIX / ones
    return jnp.log(jnp.maximum(mixed, 1e-9) / class_sums(mixed, actions))


def refit(tried: Tried, weights: jax.Array, min_std: float, actions: Spaces) -> Proposal:
    """The mean and the spread of candidates under weights (N, C), which sum to 1."""
    mean = jnp.einsum("nc,ncha->nha", weights, tried.actions)
    variance = jnp.einsum("nc,ncha->nha", weights, jnp.square(tried.actions - mean[:, None]))
    std = jnp.maximum(jnp.sqrt(variance), min_std)
    return Proposal(mean, jnp.where(discrete_entries(actions), 1.0, std))


def refine(
    world: World,
    state: State,
    proposal: Proposal,
    settings: Settings,
    weigh: Callable[[jax.Array], jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Draw candidates, try them out, refit the proposal to the elites, and so on; see `protocol.Plan`.

    weigh: returns (N, E) of the elites to their weights, which sum to 1. The policy's candidates are tried once and
    compete in every round. The plan is the last proposal's mean.
    """
    policy_key, last_key, key = jax.random.split(key, 3)
    ours = of_policy(settings)
    fixed = [follow_policy(world, state, ours, settings, policy_key)] if ours else []

    def better(proposal: Proposal, key: jax.Array) -> tuple[Proposal, None]:
        draw_key, try_key = jax.random.split(key)
        scores = draw(proposal, settings.candidates - ours, world.actions, draw_key)
        tried = functools.reduce(join, [try_out(world, state, scores, settings, try_key), *fixed])
        returns, at = jax.lax.top_k(tried.returns, settings.elites)
        elites = Tried(jnp.take_along_axis(tried.actions, at[:, :, None, None], 1), returns)
        return refit(elites, weigh(returns), settings.min_std, world.actions), None

    proposal, _ = jax.lax.scan(better, proposal, jax.random.split(key, settings.rounds))
    action, extras = answer(try_out(world, state, proposal.mean[:, None], settings, last_key))
    return action, {**extras, "plan": proposal.mean}
