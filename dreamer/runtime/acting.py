"""Trained weights in somebody else's program: load a logdir, act on observations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from dreamer import agent as core
from dreamer.config import Config
from dreamer.envs.spaces import action_leaves, flatten, observation_leaves, unflatten
from dreamer.presets import CONFIG_FILE, load_config
from dreamer.runtime.checkpoint import Checkpointer
from dreamer.runtime.setup import make_agent, spaces_from_json
from dreamer.runtime.weights import load_params
from dreamer.types import Spaces, visible


def load_agent(config: Config) -> tuple[core.Agent, Any, np.ndarray]:
    """(agent, best or newest weights on the device, run key) of the run in `config.logdir`, read only."""
    checkpointer = Checkpointer(config.logdir, read_only=True)
    _, key, meta = checkpointer.restore(parts=("key",))
    agent = make_agent(config, spaces_from_json(meta["observations"]), spaces_from_json(meta["actions"]))
    template = jax.eval_shape(agent.init, 0)
    params = load_params(checkpointer, {"params": template["params"]})
    return agent, jax.device_put(params), key["key"]


class Agent:
    """A trained agent that acts in one environment::

        env = gymnasium.make("CartPole-v1")
        agent = dreamer.Agent.load("runs/mine", env)
        obs, done = env.reset()[0], False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            done = terminated or truncated

    It remembers the episode so far; call `reset` (or pass ``first=True``) when a new one begins.
    """

    def __init__(
        self,
        agent: core.Agent,
        params: Any,
        key: np.ndarray,
        env: gymnasium.Env | None = None,
        sample: bool = False,
    ) -> None:
        """env: see `load`. sample: draw actions and latents instead of taking the most likely ones."""
        self._agent, self._params = agent, params
        self._spaces = visible(agent.observations)
        self._door = None if env is None else Door(env, self._spaces, agent.actions)
        self._key = jax.jit(lambda n: core.stream_key(key, "eval", n)) if sample else None
        self._count = 0
        self.reset()

    @classmethod
    def load(cls, logdir: str | Path, env: gymnasium.Env | None = None, sample: bool = False) -> Agent:
        """The best evaluated weights of a run, or its newest. CheckpointError if there are none.

        env: a Gymnasium environment with the spaces of training; then `act` takes its observations and gives its
        actions as they are, nested and within their own bounds. ValueError if its spaces are others.
        """
        path = str(Path(logdir).resolve() / CONFIG_FILE)
        config = load_config([path], {"logdir": str(logdir), "run.platform": "auto"})
        return cls(*load_agent(config), env=env, sample=sample)

    def reset(self) -> None:
        """Forget the episode; the next observation is the first of a new one."""
        self._carry = self._agent.init_policy(1)
        self._first = True

    def act(self, observation: Any, first: bool = False) -> Any:
        """The action for one observation, without batch axis.

        Loaded with an environment, both are as that environment has them. Without one, observation is a mapping by
        the names of training, or the bare array where there is only one; the answer is the bare action where there
        is only one, a class index or a vector in [-1, 1], else a mapping by name. ValueError if names, shapes or
        kinds of numbers differ from those of training.
        """
        named = self._named(observation if self._door is None else self._door.seen(observation))
        batch = {k: np.asarray(named[k], s.dtype)[None] for k, s in self._spaces.items()}
        batch["is_first"] = np.array([first or self._first])
        key = None if self._key is None else self._key(self._count)
        self._carry, answer, _ = self._agent.policy(self._params, self._carry, batch, key)
        self._count, self._first = self._count + 1, False
        action = {k: v[0] for k, v in jax.device_get(answer).items()}
        if self._door is not None:
            return self._door.done(action)
        return next(iter(action.values())) if len(action) == 1 else action

    def _named(self, observation: Any) -> dict[str, np.ndarray]:
        """The observation by name, checked."""
        spaces = self._spaces
        named = observation if isinstance(observation, Mapping) else {next(iter(spaces)): observation}
        values = {k: np.asarray(v) for k, v in named.items()}
        for key, space in spaces.items():
            value = values.get(key)
            if value is None or value.shape != space.shape or not _converts(value, space.dtype):
                wanted = ", ".join(f"{k} {s.dtype}{list(s.shape)}" for k, s in spaces.items())
                found = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in values.items())
                raise ValueError(f"expected the observations of training, {wanted}; got {found}")
        return values


def _converts(value: np.ndarray, dtype: np.dtype) -> bool:
    """Whether the numbers keep their meaning: whole ones of any width, not an image of floats as bytes."""
    return np.can_cast(value.dtype, dtype, "same_kind") or value.dtype.kind in "iu" and dtype.kind in "iu"


class Door:
    """Between a Gymnasium environment's own observations and actions, and the agent's."""

    def __init__(self, env: gymnasium.Env, observations: Spaces, actions: Spaces) -> None:
        self._env = env
        self._see, self._act = observation_leaves(env.observation_space), action_leaves(env.action_space)
        for what, leaves, spaces in (("observations", self._see, observations), ("actions", self._act, actions)):
            found = {leaf.key: leaf.space for leaf in leaves}
            if found != dict(spaces):
                raise ValueError(f"expected an environment with the {what} of training, {dict(spaces)}, got {found}")

    def seen(self, observation: Any) -> dict[str, np.ndarray]:
        return flatten(self._see, observation)

    def done(self, action: Mapping[str, np.ndarray]) -> Any:
        return unflatten(self._env.action_space, self._act, action)
