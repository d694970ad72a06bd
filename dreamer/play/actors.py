"""Who acts: a person's keys, the policy, or a planner, each from the state of the dream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dreamer.coders import split_actions
from dreamer.dreaming import Dreams
from dreamer.model import Act, act_by_planner, act_by_policy
from dreamer.planner_config import Name, PlannerConfig
from dreamer.rssm import State
from dreamer.types import ACTION_MASK, Space

PERSON, POLICY = "person", "policy"
#: What an actor carries from step to step, (1, ...) by name.
Memory = dict[str, Any]


class Actors:
    """The programs that can act, by name: the policy does what is most likely, planners draw. Each is compiled when it
    acts for the first time, and those that cannot act in these spaces are left out."""

    def __init__(self, dreams: Dreams) -> None:
        self._dreams = dreams
        own = dreams.agent.config.planner
        acts = {POLICY: act_by_policy}
        acts |= {name: act_by_planner(own if own.name == name else PlannerConfig(name=name)) for name in get_args(Name)}
        self._programs: dict[str, Callable[..., Any]] = {}
        self._first: dict[str, Memory] = {}
        for name, act in acts.items():
            with contextlib.suppress(ValueError):
                _, memory = dreams.agent.noted(act)
                self._first[name] = {key: np.zeros((1, *field.shape), field.dtype) for key, field in memory.items()}
                self._programs[name] = self._program(act, sampled=name != POLICY)
        self.names = (PERSON, *self._programs)

    def begin(self, name: str) -> Memory:
        """What an actor carries into its first step."""
        return self._first.get(name, {})

    def choose(
        self, name: str, state: State, observation: Mapping[str, Any], memory: Memory, seed: int, step: int
    ) -> tuple[dict[str, Any], Memory]:
        """The action by name, without batch axis, that `name` takes in a state (1, ...), and what it carries on. Random
        numbers come from seed and step."""
        numbers = np.uint32(seed), np.uint32(step)
        chosen, memory = self._programs[name](self._dreams.params, state, self._allowed(observation), memory, *numbers)
        return {key: value[0] for key, value in jax.device_get(chosen).items()}, memory

    def _allowed(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        """The predicted mask of actions, bool (1, A); None where there is none."""
        masked = self._dreams.agent.masked and ACTION_MASK in observation
        return np.asarray(observation[ACTION_MASK]) > 0 if masked else None

    def _program(self, act: Act, sampled: bool) -> Callable[..., Any]:
        agent = self._dreams.agent

        def choose(
            params: Any, state: State, allowed: Any, memory: Memory, seed: jax.Array, step: jax.Array
        ) -> tuple[dict[str, jax.Array], Memory]:
            key = jax.random.fold_in(jax.random.key(seed), step) if sampled else None
            mask = None if allowed is None else jnp.asarray(allowed)
            flat, _, carried = act(agent.model(params), state, key, mask, memory)
            return split_actions(flat, agent.actions), carried

        return agent.compiled(choose)


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
