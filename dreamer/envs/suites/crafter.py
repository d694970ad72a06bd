"""Crafter: tasks ``reward`` and ``noreward`` (the same world, its reward only logged)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dreamer.env_config import CrafterConfig, EnvConfig
from dreamer.envs.interface import Transition, transition
from dreamer.types import Space

#: Attributes of Crafter's environment that change while it runs; its seed decides the worlds to come.
PARTS = ("_world", "_player", "_step", "_episode", "_seed", "_last_health", "_unlocked")


class Crafter:
    """One world. An episode ends by death (terminal) or after 10,000 steps (a time limit).

    Beside the image there are log keys: how often each of the 22 achievements has been reached in the episode, and the
    reward (useful when the agent gets none).
    """

    def __init__(self, reward: bool, config: CrafterConfig, seed: int) -> None:
        import crafter

        height, width = config.size
        self._env = crafter.Env(size=(width, height), reward=reward, seed=seed)
        _make_reproducible(self._env)
        self._image = np.zeros((height, width, 3), np.uint8)
        self._achievements = tuple(crafter.constants.achievements)
        logs = ("log/reward", *(f"log/achievement_{name}" for name in self._achievements))
        self.observation_spaces = {
            "image": Space("image", (height, width, 3)),
            **{key: Space("vector", ()) for key in logs},
        }
        self.action_names = {"action": list(crafter.constants.actions)}
        self.action_spaces = {"action": Space("discrete", (), (len(crafter.constants.actions),))}

    def reset(self) -> Transition:
        image = self._image = self._env.reset()
        return transition(self._observation(image, 0.0, dict.fromkeys(self._achievements, 0)), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        image, reward, over, info = self._env.step(int(action["action"]))
        self._image = image
        observation = self._observation(image, info["reward"], info["achievements"])
        return transition(observation, reward, is_last=bool(over), is_terminal=info["discount"] == 0)

    def get_state(self) -> dict[str, Any]:
        # One pickle, because the creatures, the player and the world refer to one another; the textures stay outside.
        parts = {name: getattr(self._env, name) for name in PARTS}
        return {"env": pickle.dumps(parts), "image": self._image.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        parts = pickle.loads(state["env"])
        vars(self._env).update(parts)
        for view in (self._env._local_view, self._env._sem_view):
            view._world = parts["_world"]
        self._image = state["image"].copy()

    def render(self) -> np.ndarray:
        """The last observation: at night, drawing another would consume random numbers of the world."""
        return self._image.copy()

    def close(self) -> None:
        """Nothing is held."""

    def _observation(self, image: np.ndarray, reward: float, achievements: Mapping[str, int]) -> Transition:
        logs = {f"log/achievement_{name}": np.float32(achievements[name]) for name in self._achievements}
        return {"image": image, "log/reward": np.float32(reward), **logs}


def _make_reproducible(env: Any) -> None:
    """Let equal seeds give equal worlds.

    Crafter keeps the creatures of a chunk in a set, whose order follows memory addresses, and draws one of them by
    index to despawn. Sorting them by place changes none of its rules.
    """
    balance = env._balance_chunk
    env._balance_chunk = lambda chunk, creatures: balance(chunk, sorted(creatures, key=lambda one: tuple(one.pos)))


def make(name: str, config: EnvConfig, seed: int) -> Crafter:
    return Crafter(name == "reward" and config.crafter.reward, config.crafter, seed)


def tasks() -> Sequence[str]:
    return ("reward", "noreward")


def summary(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The Crafter score of one or more episodes, from the maxima of their achievement counts, in percent.

    exp(mean(ln(1 + sᵢ))) - 1 over the 22 achievements, sᵢ the percentage of episodes in which i was reached.
    """
    names = [name for name in episodes[0] if name.startswith("achievement_") and name.endswith("/max")]
    if not names:
        return {}
    rates = 100 * np.mean([[episode[name] > 0 for name in names] for episode in episodes], 0)
    return {"crafter_score": float(np.expm1(np.log1p(rates).mean()))}
