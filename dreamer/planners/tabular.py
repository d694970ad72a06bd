"""Worlds that are tables: exact values by value iteration, a world to plan in, and models counted from experience.

Axes: C cells (states), A actions. Everything before `TabularWorld` is numpy in float64, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dreamer.distributions import OneHot
from dreamer.types import Space


class Table(NamedTuple):
    """transition (C, A, C): chance of the next cell, 1 in sum; reward (C, A, C): on the way there; terminal (C,) bool:
    where an episode ends; what stands in the tables from there on counts for nothing."""

    transition: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray

    def action_values(self, values: np.ndarray, discount: float) -> np.ndarray:
        """Q (C, A) = Σ p(s'|s,a) (r + γ v(s')), with v = 0 where the episode has ended; 0 from there."""
        follows = discount * np.where(self.terminal, 0.0, values)
        found = (self.transition * (self.reward + follows)).sum(-1)
        return np.where(self.terminal[:, None], 0.0, found)


def value_iteration(table: Table, discount: float = 1.0, tolerance: float = 1e-10, rounds: int = 100_000) -> np.ndarray:
    """The best policy's values (C,): v = max Q, until no value moves by more than `tolerance` (Bellman, 1957).

    Without discount, values are the best total reward where every policy that matters ends. ValueError if they do not
    settle.
    """
    values = np.zeros(len(table.terminal))
    for _ in range(rounds):
        better = table.action_values(values, discount).max(-1)
        moved, values = float(np.abs(better - values).max()), better
        if moved <= tolerance:
            return values
    raise ValueError(f"expected values that settle within {rounds} rounds, got changes of {moved:.3g}; lower discount")


def policy_values(table: Table, policy: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """The values (C,) of a policy (C, A) of probabilities: v = R + γ P v, solved; 0 where the episode has ended.

    Without discount, the policy must end its episodes sooner or later, but for cells where it never earns anything.
    """
    live = ~table.terminal
    chance = np.einsum("ca,cat->ct", policy, table.transition)
    if discount == 1:
        # Where a policy stays for ever the system is singular, and 0 is the value that a discount would approach.
        ends = table.terminal
        for _ in live:
            ends = ends | (chance[:, ends] > 0).any(-1)
        live = live & ends
    earned = np.einsum("ca,cat,cat->c", policy, table.transition, table.reward)[live]
    values = np.zeros(len(live))
    values[live] = np.linalg.solve(np.eye(int(live.sum())) - discount * chance[np.ix_(live, live)], earned)
    return values


def greedy(table: Table, values: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """A best policy (C, A) for these values, as one-hots; of equal actions the first."""
    q = table.action_values(values, discount)
    best = np.isclose(q, q.max(-1, keepdims=True), rtol=0, atol=1e-9).argmax(-1)
    return np.eye(q.shape[1])[best]


def uniform(table: Table) -> np.ndarray:
    """Random play (C, A)."""
    cells, actions, _ = table.transition.shape
    return np.full((cells, actions), 1 / actions)


# --- Counted -----------------------------------------------------------------------------------


class Counts:
    """What was seen: how often each transition, with what reward, and where episodes ended."""

    def __init__(self, cells: int, actions: int) -> None:
        self.transitions = np.zeros((cells, actions, cells), np.int64)
        self.rewards = np.zeros((cells, actions, cells))
        self.ends = np.zeros(cells, bool)

    def add(self, episode: Mapping[str, Any], cell: str = "cell", action: str = "action") -> None:
        """One episode, or a stretch of one, as transitions: cell, reward and is_terminal of each step (T,), and the
        action taken after it. This is how episode files have them; the last action counts for nothing."""
        cells, actions = (np.asarray(episode[name]).astype(int) for name in (cell, action))
        reward, terminal = np.asarray(episode["reward"], np.float64), np.asarray(episode["is_terminal"], bool)
        steps = cells[:-1], actions[:-1], cells[1:]
        np.add.at(self.transitions, steps, 1)
        np.add.at(self.rewards, steps, reward[1:])
        self.ends[cells[terminal]] = True

    def table(self, caution: float = 0.0) -> Table:
        """Frequencies and mean rewards as a table.

        A pair that was never tried is taken to stay where it is, for nothing. caution: that many imagined tries of each
        pair, all of which end the episode with nothing, in an extra cell, the last of the table. So what was seen once
        is trusted little, what was seen a thousand times is trusted.
        """
        counts = self.transitions.astype(np.float64)
        total = counts.sum(-1, keepdims=True)
        reward = self.rewards / np.maximum(counts, 1)
        cells, actions, _ = counts.shape
        own = np.broadcast_to(np.eye(cells)[:, None], counts.shape)
        if not caution:
            return Table(np.where(total > 0, counts / np.maximum(total, 1), own), reward, self.ends)
        whole = np.zeros((cells + 1, actions, cells + 1))
        whole[:-1, :, :-1] = counts / (total + caution)
        whole[:-1, :, -1] = (caution / (total + caution))[..., 0]
        whole[-1, :, -1] = 1
        grown = np.pad(reward, ((0, 1), (0, 0), (0, 1)))
        return Table(whole, grown, np.append(self.ends, True))


# --- A world to plan in ------------------------------------------------------------------------


class TabularWorld:
    """A table as `protocol.World`. A state (M, C) is how likely each cell is, given that the episode goes on.

    Without a key, a step gives all that may happen: exact expectations. With one, a single cell is drawn.
    policy (C, A), values (C,): of the policy and the critic; of random play where they are None.
    """

    def __init__(
        self, table: Table, discount: float = 1.0, policy: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> None:
        self.actions = {"action": Space("discrete", (), (table.transition.shape[1],))}
        self.discount = discount
        policy = uniform(table) if policy is None else policy
        values = policy_values(table, policy, discount) if values is None else values
        live = ~table.terminal
        as_array = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
        self._transition, self._policy = as_array(table.transition), as_array(policy)
        self._gains, self._live, self._values = (
            as_array(table.transition * table.reward),
            as_array(live),
            as_array(values),
        )

    def at(self, cells: Sequence[int] | np.ndarray) -> jax.Array:
        """The states (M, C) of being in these cells (M,) for sure."""
        return jax.nn.one_hot(jnp.asarray(cells), len(self._values))

    def step(
        self, state: jax.Array, action: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        reach = jnp.einsum("mc,ma,cat->mt", state, action, self._transition)
        gain = jnp.einsum("mc,ma,cat->mt", state, action, self._gains)
        if key is not None:
            chance, drawn = reach, jax.random.categorical(key, jnp.log(reach))
            reach = jax.nn.one_hot(drawn, reach.shape[1])
            gain = reach * gain / jnp.maximum(chance, 1e-9)
        going = reach * self._live
        cont = going.sum(-1)
        return going / jnp.maximum(cont, 1e-9)[:, None], gain.sum(-1), self.discount * cont

    def value(self, state: jax.Array) -> jax.Array:
        return state @ self._values

    def policy(self, state: jax.Array) -> dict[str, OneHot]:
        return {"action": OneHot(jnp.log(jnp.maximum(state @ self._policy, 1e-9)))}

    def allowed(self, state: jax.Array) -> None:
        """Everything always is."""
