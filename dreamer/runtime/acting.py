"""Trained weights in somebody else's program: load a logdir, act on observations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dreamer import agent as core
from dreamer.config import Config
from dreamer.presets import CONFIG_FILE, load_config
from dreamer.runtime.checkpoint import Checkpointer
from dreamer.runtime.setup import load_params, make_agent, spaces_from_json


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

        agent = dreamer.Agent.load("runs/mine")
        obs, done = env.reset()[0], False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            done = terminated or truncated

    It remembers the episode so far; call `reset` (or pass ``first=True``) when a new one begins.
    """

    def __init__(self, agent: core.Agent, params: Any, key: np.ndarray, sample: bool = False) -> None:
        """sample: draw actions and latents instead of taking the most likely ones."""
        self._agent, self._params = agent, params
        self._key = jax.jit(lambda n: core.stream_key(key, "eval", n)) if sample else None
        self._count = 0
        self.reset()

    @classmethod
    def load(cls, logdir: str | Path, sample: bool = False) -> Agent:
        """The best evaluated weights of a run, or its newest. CheckpointError if there are none."""
        config = load_config(
            [str(Path(logdir).resolve() / CONFIG_FILE)], {"logdir": str(logdir), "run.platform": "auto"}
        )
        return cls(*load_agent(config), sample=sample)

    def reset(self) -> None:
        """Forget the episode; the next observation is the first of a new one."""
        self._carry = self._agent.init_policy(1)
        self._first = True

    def act(self, observation: Any, first: bool = False) -> Any:
        """The action for one observation, without batch axis.

        observation: a mapping by the names of training, or the bare array where there is only one. Returns the bare
        action where there is only one: a class index, or a vector in [-1, 1]; else a mapping by name. ValueError if
        names or shapes differ from those of training.
        """
        spaces = {k: s for k, s in self._agent.observations.items() if not k.startswith("log/")}
        named = observation if isinstance(observation, Mapping) else {next(iter(spaces)): observation}
        shapes = {k: np.shape(named[k]) for k in named if k in spaces}
        if shapes != {k: s.shape for k, s in spaces.items()}:
            wanted = {k: s.shape for k, s in spaces.items()}
            raise ValueError(f"expected observations {wanted}, got { {k: np.shape(v) for k, v in named.items()} }")
        batch = {k: np.asarray(named[k], s.dtype)[None] for k, s in spaces.items()}
        batch["is_first"] = np.array([first or self._first])
        key = None if self._key is None else self._key(self._count)
        self._carry, action, _ = self._agent.policy(self._params, self._carry, batch, key)
        self._count, self._first = self._count + 1, False
        action = {k: v[0] for k, v in jax.device_get(action).items()}
        return next(iter(action.values())) if len(action) == 1 else action
