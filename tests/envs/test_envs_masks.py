"""Masks of Gymnasium environments, from the environment to the agent that acts in it."""

from __future__ import annotations

from typing import Any

import gymnasium
import gymnasium.spaces as gs
import numpy as np
import pytest
from learner_data import random_batch
from tiny_runs import Collection

from dreamer.env_config import EnvConfig
from dreamer.envs import EnvError, TaskError, make_env, make_vector_env
from dreamer.types import Space

MASK = Space("discrete", (4,), (2,) * 4)


class Corridor(gymnasium.Env):
    """Actions 0 to 3. In cell c only c % 4 and (c + 1) % 4 are allowed; others raise. Ends after six steps."""

    action_space = gs.Discrete(4)
    cells = gs.Box(0, 6, (1,))

    def __init__(self, place: str, mask: gs.Space | None = None) -> None:
        self.place = place
        mask = mask or gs.MultiBinary(4)
        self.observation_space = gs.Dict({"cell": self.cells, "action_mask": mask}) if place != "info" else self.cells
        self.cell = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self.cell = 0
        return self._result()

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        if not self._mask()[action]:
            raise ValueError(f"action {action} is forbidden in cell {self.cell}")
        self.cell += 1
        observation, info = self._result()
        return observation, float(action == self.cell % 4), self.cell == 6, False, info

    def _mask(self) -> np.ndarray:
        mask = np.zeros(4, np.int8)
        if self.cell < 6:  # nothing is left to do at the end
            mask[[self.cell % 4, (self.cell + 1) % 4]] = 1
        return mask

    def _result(self) -> tuple[Any, dict]:
        cell = np.array([self.cell], np.float32)
        if self.place == "info":
            return cell, {"action_mask": self._mask()}
        return {"cell": cell, "action_mask": self._mask()}, {}


def corridors(place: str, **options: Any) -> Any:
    config = EnvConfig(workers="inline", gym={"info_mask": place == "info"}, **options)
    return make_vector_env("own", config, 3, 0, True, lambda index, seed: Corridor(place))


@pytest.mark.parametrize("place", ["info", "observation"])
def test_the_mask_is_an_observation(place):
    env = corridors(place)
    assert env.observation_spaces["action_mask"] == MASK
    masks = [env.reset()["action_mask"][0].tolist()]
    for step in range(6):
        env.step_async({"action": np.full(3, (step + 1) % 4, np.int32)})
        batch = env.step_wait()
        masks.append(batch["action_mask"][0].tolist())
        assert batch["reward"][0] == 1
    assert batch["is_terminal"].all()
    # At the end the environment allows nothing, which does not matter: no action is executed there.
    assert masks == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    env.close()


def test_an_agent_acts_validly_before_and_after_it_learns():
    """A forbidden action raises in the environment, which is an error of the collector."""
    collection = Collection(corridors("observation"))
    episodes = collection.steps(40)
    batch = random_batch(collection.agent, length=3)
    collection.state, _, metrics = collection.agent.train_step(collection.state, batch)
    assert collection.agent.finite(metrics)
    episodes += collection.steps(40)
    assert len(episodes) >= 30 and {episode.length for episode in episodes} == {6}
    collection.collector.envs.close()


def test_taxi_offers_its_mask_in_info():
    env = make_env("gym_Taxi-v4", EnvConfig(gym={"info_mask": True}), seed=0)
    inner = gymnasium.make("Taxi-v4").unwrapped
    rng = np.random.default_rng(0)
    result = env.reset()
    for _ in range(50):
        np.testing.assert_array_equal(result["action_mask"], inner.action_mask(int(result["discrete"])))
        result = env.step({"action": np.int32(rng.choice(np.flatnonzero(result["action_mask"])))})
        if result["is_last"]:
            result = env.reset()
    env.close()


@pytest.mark.parametrize("mask", [gs.Box(0, 1, (4,), np.int8), gs.MultiDiscrete([2] * 4), gs.MultiBinary(4)])
def test_masks_of_every_space(mask):
    make = lambda index, seed: Corridor("observation", mask)  # noqa: E731
    env = make_vector_env("own", EnvConfig(workers="inline"), 1, 0, True, make)
    assert env.observation_spaces["action_mask"] == MASK
    assert env.reset()["action_mask"].tolist() == [[1, 1, 0, 0]]
    env.close()


def test_masks_that_do_not_fit():
    def made(env: gymnasium.Env, **options: Any) -> Any:
        return make_vector_env("own", EnvConfig(workers="inline", **options), 1, 0, True, lambda index, seed: env)

    with pytest.raises(TaskError, match="one entry per action"):
        made(Corridor("observation", gs.MultiBinary(3)))
    with pytest.raises(TaskError, match="no action repeat"):
        made(Corridor("observation"), gym={"repeat": 2})
    with pytest.raises(TaskError, match="single discrete action.*info_mask false"):
        make_env("gym_Pendulum-v1", EnvConfig(gym={"info_mask": True}), seed=0)
    with pytest.raises(EnvError, match="after every reset and step"):
        make_env("gym_CartPole-v1", EnvConfig(gym={"info_mask": True}), seed=0).reset()
