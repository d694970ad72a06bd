"""`dreamer collect`: episodes of a random or a trained policy, as files to train on later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.agent import Agent
from dreamer.config import Config
from dreamer.envs import VectorEnv, make_vector_env
from dreamer.envs.faults import FaultBudget, describe
from dreamer.envs.interface import Batch, Fault
from dreamer.presets import ConfigError
from dreamer.replay.episodes import EpisodeCutter
from dreamer.run.collector import Collector
from dreamer.run.export_episodes import new_writer, written
from dreamer.run.factories import check_spaces_as_trained
from dreamer.run.loaded_agent import load_agent
from dreamer.run.signals import StopRequest
from dreamer.terminal import Console
from dreamer.types import ACTION_MASK, TRANSITION_FIELDS, masks_actions, visible

#: Identifies the random stream of `random_steps` among all that are derived from the run's seed.
RANDOM_STREAM = 0x7A9D0
#: Fewest steps of an episode: a first and a last one.
_FEWEST = 2


def collect_episodes(config: Config, out: Path | str, steps: int, policy: str, console: Console | None = None) -> int:
    """Play `config.env.num_envs` environments for `steps` agent steps in all, and write the episodes into `out`.

    steps   Counted as in training, over all environments, rounded up to a multiple of their number.
    policy  "random": uniform over the actions; "sample" or "mode": the agent that `config.logdir` holds.

    Unfinished episodes at the end, or at a request to stop, are closed as cut: `is_last`, not terminal. So are those of
    environments that fail, which is reported. Returns the exit code. EnvError if environments fail too often,
    ConfigError if `out` holds episodes already, TaskError if the agent was trained with other spaces.
    """
    console = console or Console()
    fewest = _FEWEST * config.env.num_envs
    if steps < fewest:
        raise ConfigError(
            f"--steps: expected at least {fewest}, two in each of {config.env.num_envs} environments, got {steps}; an "
            "episode of one step says nothing"
        )
    writer = new_writer(out)
    failures = FaultBudget(config.env)

    def tell(fault: Fault) -> None:
        console.print(describe(fault))
        failures.add(fault)

    trained = None if policy == "random" else load_agent(config)
    envs = make_vector_env(config.task, config.env, config.env.num_envs, config.seed, training=True)
    with contextlib.closing(envs), StopRequest() as stop:
        if trained is None:
            source = random_steps(envs, config.seed)
        else:
            source = _agent_steps(*trained, envs, policy == "sample", tell)
        cutter = EpisodeCutter(envs.num_envs)
        for number in range(-(-steps // envs.num_envs)):
            if stop and number >= _FEWEST:
                break
            step = next(source)
            for fault in envs.take_faults():
                tell(fault)
            for env in range(envs.num_envs):
                for episode in cutter.add(env, {key: value[env : env + 1] for key, value in step.items()}):
                    writer.write(episode)
        for episode in cutter.rest():
            writer.write(episode)
    console.print(written(writer))
    return 0


def random_steps(envs: VectorEnv, seed: int) -> Iterator[Batch]:
    """Transitions (N, ...) with the actions that were taken, uniform over those allowed, without end."""
    rng = np.random.default_rng([seed, RANDOM_STREAM])
    keys = (*visible(envs.observation_spaces), *TRANSITION_FIELDS)
    seen = envs.reset()
    masked = masks_actions(envs.observation_spaces, envs.action_spaces)
    while True:
        action = _random_allowed(envs, rng, seen[ACTION_MASK]) if masked else _random(envs, rng)
        envs.step_async(action)
        yield {**{key: seen[key] for key in keys}, **action}
        seen = envs.step_wait()


def _random(envs: VectorEnv, rng: np.random.Generator) -> Batch:
    """Actions (N, ...) by key."""
    spaces = envs.action_spaces.items()
    return {key: np.stack([space.sample(rng) for _ in range(envs.num_envs)]) for key, space in spaces}


def _random_allowed(envs: VectorEnv, rng: np.random.Generator, mask: np.ndarray) -> Batch:
    """The same where a mask (N, classes) says which classes of the one action are allowed."""
    ((key, space),) = envs.action_spaces.items()
    chosen = [rng.choice(np.flatnonzero(allowed)) for allowed in mask]
    return {key: np.array(chosen, space.dtype).reshape(-1, *space.shape)}


def _agent_steps(
    agent: Agent, params: Any, key: np.ndarray, envs: VectorEnv, sample: bool, on_fault: Callable[[Fault], None]
) -> Iterator[Batch]:
    """The same with the actions of a trained agent."""
    check_spaces_as_trained(agent, envs)
    collector = Collector(agent, envs, key, "eval", sample, on_fault)
    while True:
        step = collector.act(params)
        yield {key: value for key, value in step.items() if key not in agent.extras}
        collector.wait()
