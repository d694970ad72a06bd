"""Trained weights in other programs: load a logdir, act on observations."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import VectorEnv

from dreamer import agent as core
from dreamer.config import Config
from dreamer.presets import run_config, runs_inside
from dreamer.run.adapters import Adapter, EnvAdapter, NamedAdapter, read_batch, read_observation, stack
from dreamer.run.devices import find_devices
from dreamer.run.factories import make_agent, spaces_from_json
from dreamer.saves.checkpoint import Checkpointer, CheckpointError
from dreamer.saves.weights import load_params
from dreamer.types import visible


def load_agent(config: Config) -> tuple[core.Agent, Any, np.ndarray]:
    """(agent, best or newest weights on the device, run key) of the run in `config.logdir`, read only."""
    find_devices(config.run.platform)
    checkpointer = Checkpointer(config.logdir, read_only=True)
    if checkpointer.latest() is None and (inside := runs_inside(Path(config.logdir))):
        raise CheckpointError(
            f"expected a run of one seed, got several in {config.logdir}; give one: {', '.join(inside)}"
        )
    _, key, meta = checkpointer.restore(parts=("key",))
    agent = make_agent(config, spaces_from_json(meta["observations"]), spaces_from_json(meta["actions"]))
    template = jax.eval_shape(agent.init, 0)
    params = load_params(checkpointer, {"params": template["params"]})
    return agent, jax.device_put(params), key["key"]


class Agent:
    """A trained agent that acts in one environment, or in several at once::

        env = gymnasium.make("CartPole-v1")
        agent = dreamer.Agent.load("runs/mine", env)
        for episode in range(10):
            obs, done = env.reset()[0], False
            agent.reset()
            while not done:
                obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
                done = terminated or truncated

    It remembers the episode so far and cannot see from an observation that another one began: call `reset`, or pass
    ``first=True``. So one `Agent` acts in one environment. For another one use `copy.copy(agent)`, which shares its
    weights and compiled programs, or act in all of them at once with `act_batch`.

    Threads may take turns with it, but not act at the same time; give each a copy of its own. Each process loads its
    own: an agent cannot be pickled, and JAX does not work in a fork.
    """

    def __init__(
        self,
        agent: core.Agent,
        params: Any,
        key: np.ndarray,
        env: gymnasium.Env | VectorEnv | None = None,
        sample: bool = False,
    ) -> None:
        """env: see `load`. sample: draw actions and latents instead of taking the most likely ones."""
        self._agent, self._params = agent, params
        spaces = visible(agent.observations)
        self._adapter: Adapter = NamedAdapter(spaces) if env is None else EnvAdapter(env, spaces, agent.actions)
        self._key = jax.jit(lambda n: core.stream_key(key, "eval", n)) if sample else None
        self._count = 0
        self._process, self._lock = os.getpid(), threading.Lock()
        #: For N environments, None before the first observation; and which of them (N,) begin an episode next.
        self._carry: dict[str, jax.Array] | None = None
        self._first = np.ones(0, bool)

    @classmethod
    def load(
        cls,
        logdir: str | Path,
        env: gymnasium.Env | VectorEnv | None = None,
        sample: bool = False,
        planner: str | Mapping[str, Any] | None = None,
    ) -> Agent:
        """The best evaluated weights of a run, or its newest. ConfigError if the folder is not that of a run,
        CheckpointError if it has no weights yet.

        env: a Gymnasium environment with the spaces of training, or a vector of such; then `act` takes its observations
        and returns its actions as they are, nested and within their own bounds. ValueError if its spaces differ.

        planner: who acts in place of what the run was trained with: a planner's name, "null" for the policy, or
        options of the group `planner`: ``{"name": "mppi", "horizon": 5}``.
        """
        given = {"name": planner} if isinstance(planner, str) else dict(planner or {})
        config = run_config(logdir, {f"planner.{name}": value for name, value in given.items()})
        return cls(*load_agent(config), env=env, sample=sample)

    def reset(self, ended: Any = None) -> None:
        """Forget the episode; the next observation is the first of a new one.

        ended: bool (N,), forget only these environments of `act_batch`. Without it all are forgotten, and the next call
        may have a different number of them.
        """
        with self._alone():
            if ended is None:
                self._carry, self._first = None, np.ones(0, bool)
            elif self._carry is not None:
                self._first = self._first | _mask("ended", ended, len(self._first))

    def act(self, observation: Any, first: bool = False) -> Any:
        """The action for one observation, without batch axis. first: it begins an episode.

        Loaded with an environment, both are in that environment's form. Without one, the observation is a mapping by
        the names of training, or the bare array if there is only one; the action is bare if there is only one, a class
        index or a vector in [-1, 1], else a mapping by name.

        ValueError, and nothing is remembered, if names, shapes or kinds of numbers differ from those of training, or
        numbers are not finite or out of range. RuntimeError if another thread is acting with the same agent.
        """
        if not isinstance(first, bool | np.bool_):
            raise ValueError(
                f"expected first to be True or False, got {type(first).__name__}; pass the observation alone"
            )
        return self._choose([read_observation(self._adapter, observation)], np.array([first]))[0]

    def act_batch(self, observations: Any, first: Any = None) -> Any:
        """The actions for one observation of each of N environments, chosen at once.

        observations  stacked, as in Gymnasium's vectors: like one of `act`, every array with a leading axis N; the
                      answer is then stacked too. Or a list of N, answered with a list of N
        first         bool (N,): which of them begin an episode; at the beginning, and after `reset`, they all do

        Each environment has a memory of its own, in this order, and N stays the same until `reset`. The most likely
        actions are those of N separate agents, up to rounding. Sampled ones are drawn together: the same N and the same
        calls give the same draws, a different N gives others. Each N is compiled once. Errors are those of `act`; one
        that concerns a single environment names its index. An `action_mask` may forbid everything, as in a final
        observation, whose action nobody executes; then any action may come.
        """
        seen, stacked = read_batch(self._adapter, observations)
        begins = np.zeros(len(seen), bool) if first is None else _mask("first", first, len(seen))
        actions = self._choose(seen, begins)
        return stack(actions) if stacked else actions

    def _choose(self, seen: Sequence[dict[str, np.ndarray]], first: np.ndarray) -> list[Any]:
        """Actions for checked observations, one for each remembered environment."""
        with self._alone():
            carry, begins = self._carry, first
            if carry is None:
                carry, begins = self._agent.init_policy(len(seen)), np.ones(len(seen), bool)
            elif len(self._first) == len(seen):
                begins = first | self._first
            else:
                raise ValueError(
                    f"expected {len(self._first)} observations, one for each environment that is remembered, got "
                    f"{len(seen)}; call reset() before acting in a different number of them"
                )
            batch = {key: np.stack([one[key] for one in seen]) for key in seen[0]} | {"is_first": begins}
            key = None if self._key is None else self._key(self._count)
            self._carry, answer, _ = self._agent.policy(self._params, carry, batch, key)
            self._count, self._first = self._count + 1, np.zeros(len(seen), bool)
            actions = jax.device_get(answer)
        return [self._adapter.from_agent({k: v[i] for k, v in actions.items()}) for i in range(len(seen))]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the memory. RuntimeError if another thread holds it: two environments would mix in it."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "expected the process that loaded this agent, got a fork of it, in which JAX does not work; load the "
                "agent in the new process, started with multiprocessing's method 'spawn'"
            )
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "expected one thread at a time, got a second one while this agent is acting; it remembers a single "
                "episode: give each thread its copy.copy(agent), or collect the observations for act_batch"
            )
        try:
            yield
        finally:
            self._lock.release()

    def __copy__(self) -> Agent:
        """Another agent with the same weights and programs, and a memory of its own that begins like this one."""
        with self._alone():
            twin = object.__new__(type(self))
            twin.__dict__.update(self.__dict__, _lock=threading.Lock())
            twin._carry = jax.tree.map(jnp.copy, self._carry)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Agent:
        """The same as a copy: weights never change."""
        return self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Agent cannot be pickled; load it where it is to act: dreamer.Agent.load(logdir)")


def _mask(name: str, value: Any, count: int) -> np.ndarray:
    """bool (count,)."""
    mask = np.asarray(value)
    if mask.dtype != bool or mask.shape != (count,):
        raise ValueError(
            f"expected {name} as {count} booleans, one for each environment, got {mask.dtype}{list(mask.shape)}"
        )
    return mask
