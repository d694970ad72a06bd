"""Tiny configurations, agents that are compiled once for all tests of a process, and a runnable collection."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from dreamer.agent import Agent
from dreamer.config import Config
from dreamer.env_config import EnvConfig
from dreamer.envs import VectorEnv, make_vector_env
from dreamer.model import act_by_planner, act_by_policy
from dreamer.presets import load_config
from dreamer.replay import Replay
from dreamer.run.collector import Collector, Episode
from dreamer.run.devices import choose_device
from dreamer.saves.snapshot import flatten
from dreamer.types import Spaces, replay_fields

QUIET: dict[str, Any] = {
    "run.display": False, "run.platform": "cpu", "run.report_every": None, "log.tensorboard": False,
    "log.videos": False,
}  # fmt: skip

_agents: dict[str, Agent] = {}


def tiny_config(**overrides: Any) -> Config:
    """The debug preset, quiet; `run__batch_size=4` means run.batch_size."""
    return load_config(["debug"], QUIET | {name.replace("__", "."): value for name, value in overrides.items()})


def as_for_users(**variables: str) -> dict[str, str]:
    """The surroundings of a process that compiles as users' do, not in the shortest time as ./scripts/test has it."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | variables


def eight_devices() -> dict[str, str]:
    """The surroundings of a process that sees eight CPUs."""
    return as_for_users(XLA_FLAGS="--xla_force_host_platform_device_count=8")


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def newest(logdir: Path, name: str) -> Any:
    """A metric's last value in the whole lines of a run that may be writing; 0: none yet."""
    path = logdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(whole[-1])[name] if whole else 0


def tiny_agent(observations: Spaces, actions: Spaces, config: Config | None = None) -> Agent:
    """An agent; the same object for the same spaces, networks and losses: it holds nothing but compiled functions."""
    config = config or tiny_config()
    parts = (config.model, config.loss, config.actor_critic, config.optimizer, config.planner)
    name = repr((sorted(observations.items()), sorted(actions.items()), parts))
    if name not in _agents:
        chooses = act_by_policy if config.planner.name is None else act_by_planner(config.planner)
        _agents[name] = Agent(observations, actions, config, chooses=chooses)
    return _agents[name]


def share_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of this process use the agents of `tiny_agent`."""

    def make_agent(config: Config, observations: Spaces, actions: Spaces, devices: Sequence[Any] = ()) -> Agent:
        choose_device(config.run.platform)
        return tiny_agent(observations, actions, config)

    for module in ("components", "loaded_agent"):
        monkeypatch.setattr(f"dreamer.run.{module}.make_agent", make_agent)


def vector_env(make: Callable[[int, int], gymnasium.Env], num_envs: int = 1, workers: str = "inline") -> VectorEnv:
    return make_vector_env("own", EnvConfig(workers=workers), num_envs, 0, True, make)


class Collection:
    """Environments, a tiny agent with fresh weights, its collector, and a replay of sequences of `length` steps."""

    def __init__(
        self, envs: VectorEnv, length: int = 9, sample: bool = True, seed: int = 0, rows: int = 1000, **replay: Any
    ) -> None:
        self.agent = tiny_agent(envs.observation_spaces, envs.action_spaces)
        self.state = self.agent.init(seed)
        self.collector = Collector(self.agent, envs, np.asarray(self.state["key"]), "policy", sample)
        fields = replay_fields(envs.observation_spaces, envs.action_spaces, self.agent.extras)
        self.replay = Replay(fields, envs.num_envs, rows * envs.num_envs, length, seed, **replay)

    def steps(self, count: int) -> list[Episode]:
        """Collect; returns the episodes that ended."""
        episodes = []
        for _ in range(count):
            self.replay.add(self.collector.act(self.state["params"]))
            episodes += self.collector.wait()
        return episodes


def same(a: Any, b: Any) -> bool:
    """Whether two trees have equal arrays, bit for bit, at equal paths."""
    ours, theirs = ({path: np.asarray(leaf) for path, leaf in flatten(tree).items()} for tree in (a, b))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in ours)
