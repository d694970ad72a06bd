"""BSuite: small experiments that each test one ability. Tasks are bsuite's ids: ``catch/0``, ``deep_sea/10``.

The observation is flattened to one vector. What bsuite's own log files record about an episode is under ``log/`` at
every step instead, so ``scores.jsonl`` has what its scoring needs. An experiment is defined over a number of episodes,
with one environment: ``log/episodes_left`` counts down to 0; afterwards the environment simply goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from dreamer.env_config import EnvConfig
from dreamer.envs.interface import TaskError, Transition, transition
from dreamer.types import Space

#: Settings per experiment.
EXPERIMENTS: dict[str, int] = {
    "bandit": 20,
    "bandit_noise": 20,
    "bandit_scale": 20,
    "cartpole": 20,
    "cartpole_noise": 20,
    "cartpole_scale": 20,
    "cartpole_swingup": 20,
    "catch": 20,
    "catch_noise": 20,
    "catch_scale": 20,
    "deep_sea": 21,
    "deep_sea_stochastic": 21,
    "discounting_chain": 20,
    "memory_len": 23,
    "memory_size": 17,
    "mnist": 20,
    "mnist_noise": 20,
    "mnist_scale": 20,
    "mountain_car": 20,
    "mountain_car_noise": 20,
    "mountain_car_scale": 20,
    "umbrella_distract": 23,
    "umbrella_length": 23,
}
#: The attribute in which a wrapper holds what it wraps.
INSIDE = "_env"
#: Attributes that never change: the pictures of the mnist experiments.
CONSTANT = {"_images", "_labels"}


class BSuite:
    """One experiment: the environment, for some of them in a noise or scale wrapper."""

    def __init__(self, name: str, seed: int) -> None:
        import bsuite.bsuite
        from bsuite import sweep

        experiment = name.partition("/")[0]
        try:
            self._env: Any = bsuite.bsuite.load(experiment, sweep.SETTINGS[name])
        except OSError as error:  # the mnist experiments fetch their pictures
            raise TaskError(
                f"could not load bsuite_{name}: {error}; it downloads data, which needs a network"
            ) from error
        self._layers = _layers(self._env)
        seeds = np.random.SeedSequence(seed).generate_state(len(self._layers))
        for layer, own in zip(self._layers, seeds, strict=True):
            if "_rng" in vars(layer):
                layer._rng = np.random.RandomState(own)
        self._left = int(self._env.bsuite_num_episodes)
        size = int(np.prod(self._env.observation_spec().shape))
        logs = ("log/episodes_left", *(f"log/{key}" for key in self._env.bsuite_info()))
        self.observation_spaces = {
            "vector": Space("vector", (size,)),
            **{key: Space("vector", ()) for key in logs},
        }
        self.action_spaces = {"action": Space("discrete", (), (int(self._env.action_spec().num_values),))}

    def reset(self) -> Transition:
        return transition(self._observation(self._env.reset()), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        result = self._env.step(int(action["action"]))
        over = result.last()
        self._left = max(self._left - over, 0)
        return transition(
            self._observation(result), result.reward, is_last=over, is_terminal=over and result.discount == 0
        )

    def render(self) -> None:
        """There are no pictures."""

    def close(self) -> None:
        """Nothing is held."""

    def get_state(self) -> dict[str, Any]:
        return copy.deepcopy({"layers": [_changing(layer) for layer in self._layers], "left": self._left})

    def set_state(self, state: dict[str, Any]) -> None:
        for layer, values in zip(self._layers, copy.deepcopy(state["layers"]), strict=True):
            vars(layer).update(values)
        self._left = state["left"]

    def _observation(self, result: Any) -> dict[str, np.ndarray | np.generic]:
        logs = {f"log/{key}": np.float32(value) for key, value in self._env.bsuite_info().items()}
        vector = np.array(result.observation, np.float32).reshape(-1)
        return {"vector": vector, "log/episodes_left": np.float32(self._left), **logs}


def _layers(env: Any) -> list[Any]:
    """The environment and what it wraps, the outermost first."""
    found = [env]
    while INSIDE in vars(found[-1]):
        found.append(vars(found[-1])[INSIDE])
    return found


def _changing(layer: Any) -> dict[str, Any]:
    """Attributes of a layer that are its state. Functions are left out: they read the state from the layer itself."""
    return {
        key: value
        for key, value in vars(layer).items()
        if key != INSIDE and key not in CONSTANT and not isinstance(value, FunctionType)
    }


def make(name: str, config: EnvConfig, seed: int) -> BSuite:
    return BSuite(name, seed)


def tasks() -> Sequence[str]:
    return tuple(f"{experiment}/{index}" for experiment, count in EXPERIMENTS.items() for index in range(count))
