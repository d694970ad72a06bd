"""N environments of a task, or of a user's own function, stepped together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from dreamer.env_config import EnvConfig
from dreamer.envs.interface import Env, TaskError, VectorEnv
from dreamer.envs.options import wrap
from dreamer.envs.registry import check_task, make_env, split_task
from dreamer.envs.suites.dm_env import adopted
from dreamer.envs.suites.gym import GymEnv, old_gym
from dreamer.envs.workers.inline import InlineVectorEnv, Maker
from dreamer.envs.workers.processes import ProcessVectorEnv

#: Streams of seeds, so that evaluation never repeats a training environment.
STREAMS = {"training": 0, "evaluation": 1}

#: A user's own environment function: (index, seed) -> gymnasium.Env, dm_env.Environment or our Env.
MakeEnv = Callable[[int, int], Any]


def env_seed(seed: int, training: bool, index: int, attempt: int = 0) -> int:
    """Seed of environment `index` of a run: below 2**32, different in training and evaluation.

    attempt  How often the environment was recreated; each time with another seed, or it would fail again.
    """
    stream = STREAMS["training" if training else "evaluation"]
    entropy = [seed, stream, index, attempt] if attempt else [seed, stream, index]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def make_vector_env(
    task: str, config: EnvConfig, num_envs: int, seed: int, training: bool, make: MakeEnv | None = None
) -> VectorEnv:
    """N environments of a task, or of a user's own function (then `task` is only a name for messages).

    `config.workers` says where they run; ``auto`` takes processes for slow suites with more than one environment and
    runs everything else, a user's own function included, in this process. A suite that makes all environments at once
    decides that itself.
    """
    seeds = [functools.partial(env_seed, seed, training, index) for index in range(num_envs)]
    makers: list[Maker]
    if make is None:
        check_task(task)
        suite, name = split_task(task)
        together = suite.vector(name, config, [one() for one in seeds])
        if together is not None:
            return together
        makers = [functools.partial(_of_task, task, config, one) for one in seeds]
        slow = suite.process(config)
    else:
        makers = [functools.partial(_of_user, make, config, index, one) for index, one in enumerate(seeds)]
        slow = False
    where = config.workers if config.workers != "auto" else "process" if slow and num_envs > 1 else "inline"
    if where == "process":
        return ProcessVectorEnv(makers, task, config.restart_seconds, config.timeout_seconds)
    return InlineVectorEnv(makers, task, config.restart_seconds)


def _of_task(task: str, config: EnvConfig, seed: Callable[[int], int], attempt: int) -> Env:
    return make_env(task, config, seed(attempt))


def _of_user(make: MakeEnv, config: EnvConfig, index: int, seed: Callable[[int], int], attempt: int) -> Env:
    return adopt(make, config, index, seed(attempt))


def adopt(make: MakeEnv, config: EnvConfig, index: int, seed: int) -> Env:
    """A user's environment behind our interface."""
    made = make(index, seed)
    gymnasium_made = isinstance(made, gymnasium.Env)
    again = functools.partial(make, index, seed)
    env = GymEnv(made, config.gym, seed, again) if isinstance(made, gymnasium.Env) else adopted(made)
    if not isinstance(env, Env):
        raise TaskError(
            "expected make_env(index, seed) to return a gymnasium.Env, a dm_env.Environment, or an object with "
            f"observation_spaces, action_spaces, reset, step, render and close, got {type(env).__name__}{old_gym(env)}"
        )
    if config.gym.repeat > 1 and not gymnasium_made:
        raise TaskError(
            f"expected env.gym.repeat only for a gymnasium.Env, got {config.gym.repeat} for a {type(env).__name__}; "
            "set env.repeat instead"
        )
    return wrap(env, config, seed, config.gym.repeat if gymnasium_made else 1)
