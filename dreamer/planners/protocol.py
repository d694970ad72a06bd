"""What a planner may know of a world, and what it answers.

A *world* is anything to act in without consequences: the agent's own world model (`learned.LearnedWorld`), a table of
transitions, an exact model of a known system. All of it is pure and works on a batch of M states, inside jit, scan,
vmap and grad. Axis C, candidates: action sequences that are tried from the same state; M is N * C then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from dreamer.distributions import Distribution
from dreamer.types import Spaces

#: A pytree of arrays (M, ...).
State = Any
#: What a planner tells beside its action, each (N, ...); see `Plan`.
Extras = Mapping[str, jax.Array]


class World(Protocol):
    """A model of a world, with the judgement of a policy and a critic.

    actions: spaces by name, in key order; flat actions (M, A) have them side by side, one-hot where discrete,
    continuous ones within [-1, 1].
    """

    @property
    def actions(self) -> Spaces: ...

    def step(self, state: State, action: jax.Array, key: jax.Array | None) -> tuple[State, jax.Array, jax.Array]:
        """(state, reward, cont) after `action` (M, A).

        key: draws the outcome; None asks for the most likely or the expected one. reward (M,): of this step. cont
        (M,): the probability that the episode goes on, times the discount; the factor of all that follows.
        """

    def value(self, state: State) -> jax.Array:
        """What follows a state, discounted, (M,)."""

    def policy(self, state: State) -> dict[str, Distribution]:
        """The policy's distribution of each action, by name, in key order; it keeps to `allowed`."""

    def allowed(self, state: State) -> jax.Array | None:
        """bool (M, A): the actions that are allowed in a state, at least one; None where all always are."""


class Plan(Protocol):
    """A planner: ``plan(model, state, key) -> (action, extras)``, a pure function.

    state (N, ...): where to plan from; before (N, H, A): `plan` of the step before in the same episode, zeros at its
    beginning, None if it is not kept. action (N, A): float32, one-hot where discrete. extras:

    - ``planned`` (N,): the discounted return that the planner expects, the critic's part included
    - ``plan`` (N, H, A): what it means to do, this action first; for discrete actions one-hots or probabilities.
      Not of every planner: a tree has no such sequence.

    The same arguments give the same plan.
    """

    def __call__(
        self, model: World, state: State, key: jax.Array, before: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...
