"""N environments of a task, or of a user's own function, stepped together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import gymnasium
import numpy as np

from dreamer.config import EnvConfig
from dreamer.envs.gym import GymEnv
from dreamer.envs.inline import InlineVectorEnv, Maker
from dreamer.envs.interface import Env, TaskError, VectorEnv, check_spaces
from dreamer.envs.options import wrap
from dreamer.envs.processes import ProcessVectorEnv
from dreamer.envs.registry import check_task, make_env, split_task

#: Streams of seeds, so that evaluation never repeats a training environment.
STREAMS = {"training": 0, "evaluation": 1}

#: A user's own environment function: (index, seed) -> environment.
MakeEnv = Callable[[int, int], "gymnasium.Env | Env"]


def env_seed(seed: int, training: bool, index: int) -> int:
    """Seed of environment `index` of a run: below 2**32, different in training and evaluation."""
    stream = STREAMS["training" if training else "evaluation"]
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1)[0])


def make_vector_env(
    task: str, config: EnvConfig, num_envs: int, seed: int, training: bool, make: MakeEnv | None = None
) -> VectorEnv:
    """N environments of a task, or of a user's own function (then `task` is only a name for messages).

    `config.workers` says where they run; ``auto`` takes processes for slow suites with more than one environment and
    runs everything else, a user's own function included, in this process. A suite that makes all environments at once
    decides that itself.
    """
    seeds = [env_seed(seed, training, index) for index in range(num_envs)]
    makers: list[Maker]
    if make is None:
        check_task(task)
        suite, name = split_task(task)
        together = suite.vector(name, config, seeds)
        if together is not None:
            return together
        makers = [functools.partial(make_env, task, config, one) for one in seeds]
        slow = suite.process(config)
    else:
        makers = [functools.partial(adopt, make, config, index, one) for index, one in enumerate(seeds)]
        slow = False
    where = config.workers if config.workers != "auto" else "process" if slow and num_envs > 1 else "inline"
    return ProcessVectorEnv(makers, task) if where == "process" else InlineVectorEnv(makers, task)


def adopt(make: MakeEnv, config: EnvConfig, index: int, seed: int) -> Env:
    """A user's environment behind our interface."""
    made = make(index, seed)
    gymnasium_made = isinstance(made, gymnasium.Env)
    env = GymEnv(made, config.gym, seed) if isinstance(made, gymnasium.Env) else made
    if not isinstance(env, Env):
        raise TaskError(
            "expected make_env(index, seed) to return a gymnasium.Env or an object with observation_spaces, "
            f"action_spaces, reset, step, render and close, got {type(env).__name__}"
        )
    if config.gym.repeat > 1 and not gymnasium_made:
        raise TaskError(
            f"expected env.gym.repeat only for a gymnasium.Env, got {config.gym.repeat} for a {type(env).__name__}; "
            "set env.repeat instead"
        )
    check_spaces(env.observation_spaces, env.action_spaces)
    return wrap(env, config, seed, config.gym.repeat if gymnasium_made else None)
