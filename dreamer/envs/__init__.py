"""Environments: one interface (`interface.py`), one file per suite, one table of names (`registry.py`)."""

from dreamer.envs.interface import Batch, Env, EnvError, TaskError, Transition, VectorEnv, transition
from dreamer.envs.registry import (
    SUITES,
    Suite,
    best_score,
    check_task,
    frames_per_step,
    human_normalized,
    list_suites,
    list_tasks,
    make_env,
    summary,
)
from dreamer.envs.vector import env_seed, make_vector_env
from dreamer.envs.workers.inline import InlineVectorEnv
from dreamer.envs.workers.processes import ProcessVectorEnv

__all__ = [
    "SUITES",
    "Batch",
    "Env",
    "EnvError",
    "InlineVectorEnv",
    "ProcessVectorEnv",
    "Suite",
    "TaskError",
    "Transition",
    "VectorEnv",
    "best_score",
    "check_task",
    "env_seed",
    "frames_per_step",
    "human_normalized",
    "list_tasks",
    "make_env",
    "make_vector_env",
    "list_suites",
    "summary",
    "transition",
]
