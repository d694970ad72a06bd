"""The parts of the training loop, each alone: a call runs the part once and waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dreamer import transfer
from dreamer.agent import Agent, TrainState, stream_key
from dreamer.config import Config
from dreamer.envs import VectorEnv
from dreamer.run.factories import evaluation_envs
from dreamer.types import ACTION_MASK, Spaces, visible


def spaces_of(config: Config) -> tuple[Spaces, Spaces]:
    """Observation and action spaces of a task, from an environment made for this and closed."""
    envs = evaluation_envs(config, None, 1)
    try:
        return envs.observation_spaces, envs.action_spaces
    finally:
        envs.close()


class PolicyAlone:
    """Choosing actions for N environments, until they are on the host."""

    def __init__(self, agent: Agent, params: Callable[[], Any], num_envs: int, run_key: np.ndarray) -> None:
        """params: returns the weights at each call; a train step donates the earlier ones."""
        rng = np.random.default_rng(0)
        self._agent, self._params, self._count = agent, params, 0
        self._key = jax.jit(lambda count: stream_key(run_key, "policy", count))
        self._carry = agent.init_policy(num_envs)
        spaces = visible(agent.observations)
        self._obs = {key: np.stack([space.sample(rng) for _ in range(num_envs)]) for key, space in spaces.items()}
        if agent.masked:
            self._obs[ACTION_MASK] = np.ones_like(self._obs[ACTION_MASK])
        self._obs["is_first"] = np.zeros(num_envs, bool)

    def __call__(self) -> None:
        key = self._key(self._count)
        self._carry, *chosen = self._agent.policy(self._params(), self._carry, self._obs, key)
        transfer.read(chosen)
        self._count += 1


class EnvsAlone:
    """One step of N environments with random actions."""

    def __init__(self, envs: VectorEnv, seed: int = 0) -> None:
        self._envs, rng = envs, np.random.default_rng(seed)
        self._actions = [random_actions(envs.action_spaces, envs.num_envs, rng) for _ in range(64)]
        self._count = 0
        envs.reset()

    def __call__(self) -> None:
        self._envs.step_async(self._actions[self._count % len(self._actions)])
        self._envs.step_wait()
        self._count += 1

    def close(self) -> None:
        self._envs.close()


def random_actions(spaces: Spaces, num_envs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Uniform actions (N, ...) by name."""
    return {key: np.stack([space.sample(rng) for _ in range(num_envs)]) for key, space in spaces.items()}


class UpdateAlone:
    """One dispatch of updates on the same batches each time, with a training state of its own."""

    def __init__(self, agent: Agent, state: TrainState, batches: Sequence[Mapping[str, Any]]) -> None:
        """batches: (B, T+1, ...) each, as many as the dispatch has updates."""
        self._agent, self._state = agent, state
        self._batches = [agent.devices.place(dict(batch)) for batch in batches]

    def __call__(self) -> None:
        if len(self._batches) == 1:
            self._state, *outputs = self._agent.train_step(self._state, self._batches[0])
        else:
            self._state, *outputs = self._agent.train_steps(self._state, self._batches)
        jax.block_until_ready((self._state, outputs))
