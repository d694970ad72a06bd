"""Who acts: a person's keys, the policy, or a planner, each from the state of the dream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamer import kernels
from dreamer.coders import split_actions
from dreamer.dreaming import Dreams
from dreamer.model import Act, act_by_policy
from dreamer.rssm import State
from dreamer.types import ACTION_MASK, Space

PERSON, POLICY = "person", "policy"


class Actors:
    """The programs that can act, by name: each is compiled when it acts for the first time.

    The policy does what is most likely; planners draw, from the seed and the step.
    """

    def __init__(self, dreams: Dreams, planners: Mapping[str, Act]) -> None:
        self._dreams = dreams
        self._programs = {POLICY: self._program(act_by_policy, sampled=False)}
        self._programs |= {name: self._program(plan, sampled=True) for name, plan in planners.items()}
        self.names = (PERSON, *self._programs)

    def choose(self, name: str, state: State, observation: Mapping[str, Any], seed: int, step: int) -> dict[str, Any]:
        """The action by name, without batch axis, that `name` takes in a state (1, ...)."""
        agent = self._dreams.agent
        allowed = np.asarray(observation[ACTION_MASK]) > 0 if agent.masked and ACTION_MASK in observation else None
        chosen = self._programs[name](self._dreams.params, state, allowed, np.uint32(seed), np.uint32(step))
        return {key: value[0] for key, value in jax.device_get(chosen).items()}

    def _program(self, act: Act, sampled: bool) -> Callable[..., dict[str, jax.Array]]:
        agent = self._dreams.agent

        def choose(params: Any, state: State, allowed: Any, seed: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
            with kernels.traced_for(agent.target):
                key = jax.random.fold_in(jax.random.key(seed), step) if sampled else None
                flat, _ = act(agent.model(params), state, key, None if allowed is None else jnp.asarray(allowed))
                return split_actions(flat, agent.actions)

        return jax.jit(choose)


def read_action(value: Any, spaces: Mapping[str, Space]) -> dict[str, np.ndarray]:
    """What a person's page sent, as an action by name without batch axis. ValueError for anything that is not one."""
    if not isinstance(value, dict) or value.keys() != spaces.keys():
        raise ValueError(f"expected an action with {', '.join(spaces)}")
    return {key: _read_part(key, value[key], space) for key, space in spaces.items()}


def _read_part(key: str, value: Any, space: Space) -> np.ndarray:
    """One class index or, where there are several numbers, a flat list of them."""
    single = space.shape == () and space.classes is not None
    numbers = [value] if single else value
    right = isinstance(numbers, list) and len(numbers) == space.zeros().size
    if not right or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"expected {space.zeros().size} numbers as {key!r}")
    if space.classes is None:
        if not all(-1 <= number <= 1 for number in numbers):
            raise ValueError(f"expected numbers from -1 to 1 as {key!r}")
    elif not all(type(n) is int and 0 <= n < count for n, count in zip(numbers, space.classes, strict=True)):
        raise ValueError(f"expected classes below {space.classes} as {key!r}")
    return np.array(numbers, space.dtype).reshape(space.shape)
