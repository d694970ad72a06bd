"""What was promised, against what came: returns that a planner or the critic expected, beside the real ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from dreamer.agent import Agent
from dreamer.envs.interface import Batch
from dreamer.records.display import format_number
from dreamer.replay.memory import latents_of
from dreamer.types import PLANNED

#: The name of what the critic expects of a state, where the policy or a planner acts in it.
CRITIC = "critic"


class Gap(NamedTuple):
    """Means over all steps whose episode was played to its end: what was promised, what came, and the standard error of
    their difference over episodes (0 for a single one)."""

    promised: float
    real: float
    error: float
    steps: int

    def __str__(self) -> str:
        gap = self.promised - self.real
        return (
            f"{format_number(self.promised)} promised, {format_number(self.real)} real, "
            f"gap {gap:+.3g} ± {self.error:.2g} (discounted returns after {self.steps:,} steps)"
        )


class Promises:
    """Watches a collector's transitions, and compares."""

    def __init__(self, agent: Agent) -> None:
        self._seen: list[Batch] = []
        self._discount = 1 - 1 / agent.config.actor_critic.discount_horizon
        self._latents = latents_of(agent.extras)

        def value(params: Any, latents: Any) -> jax.Array:
            model = agent.model(params)
            rssm = model.world_model.rssm
            return model.actor_critic.value(rssm.feature(rssm.unpack(latents, agent.dtype))).mode()

        self._value = agent.compiled(value)

    def see(self, transition: Batch, params: Any) -> None:
        """One step of all environments, as `Collector.act` returns it."""
        kept = {name: np.asarray(transition[name]) for name in ("reward", "is_first", "is_last", "is_terminal")}
        kept[CRITIC] = np.asarray(self._value(params, {name: transition[name] for name in self._latents}))
        if PLANNED in transition:
            kept[PLANNED] = np.asarray(transition[PLANNED])
        self._seen.append(kept)

    def gaps(self) -> dict[str, Gap]:
        """By who promised: the planner, if one acts, and the critic. Empty if no episode was played to its end."""
        whole = {name: np.stack([step[name] for step in self._seen], 1) for name in self._seen[0]}
        found = {}
        for name in (PLANNED, CRITIC):
            if name in whole:
                real, known = followed(whole, whole[name], self._discount)
                if known.any():
                    found["planner" if name == PLANNED else name] = _gap(whole[name], real, known, whole["is_first"])
        return found


def followed(steps: Batch, promised: np.ndarray, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """(discounted real returns (N, T) after each step, for which they are known).

    Gₜ = rₜ₊₁ + γ(1 - terminalₜ₊₁) Gₜ₊₁. Where a time limit ends an episode, what was promised there stands for the
    rest. Unknown for last steps, and for episodes that go on when the record ends.
    """
    reward, last, terminal = steps["reward"].astype(np.float64), steps["is_last"], steps["is_terminal"]
    returns, known = np.zeros(reward.shape), np.zeros(reward.shape, bool)
    for t in range(reward.shape[1] - 2, -1, -1):
        rest = np.where(last[:, t + 1], promised[:, t + 1], returns[:, t + 1])
        returns[:, t] = reward[:, t + 1] + discount * ~terminal[:, t + 1] * rest
        known[:, t] = ~last[:, t] & (last[:, t + 1] | known[:, t + 1])
    return returns, known


def _gap(promised: np.ndarray, real: np.ndarray, known: np.ndarray, first: np.ndarray) -> Gap:
    """Errors are counted by episode: steps of one episode share their luck."""
    episode = np.cumsum(first, 1) + 1_000_000 * np.arange(len(first))[:, None]
    _, which = np.unique(episode[known], return_inverse=True)
    apart = (promised - real)[known]
    means = np.bincount(which, apart) / np.bincount(which)
    error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
    return Gap(float(promised[known].mean()), float(real[known].mean()), error, int(known.sum()))
