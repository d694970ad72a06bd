"""The options of planners: which one acts, and how much it may look at before it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from dreamer.values import SCALE, ConfigError, group, option

Name = Literal["random_shooting", "cem", "mppi", "gradient", "mcts", "dream_mpc"]

#: The settings that each planner reads, with its own value of each: that of its paper, where the paper has one. Beside
#: these, all read `critic`, `outcomes`, `penalty` and `noise`.
SETTINGS: Mapping[str, Mapping[str, int | float]] = {
    "random_shooting": {"horizon": 12, "candidates": 512, "policy_share": 0.0, "std": 1.0},
    # PlaNet (Hafner et al., 2019), section 3.
    "cem": {
        "horizon": 12, "candidates": 1000, "rounds": 10, "elites": 100, "policy_share": 0.0, "std": 1.0, "min_std": 0.0
    },
    # TD-MPC2 (Hansen et al., 2024), table 8: 24 of 512 candidates are the policy's.
    "mppi": {
        "horizon": 3, "candidates": 512, "rounds": 6, "elites": 64, "policy_share": 0.046875, "std": 2.0,
        "min_std": 0.05, "temperature": 0.5,
    },
    "gradient": {
        "horizon": 12, "candidates": 16, "rounds": 20, "policy_share": 0.5, "std": 0.5, "step_size": 0.1
    },
    "mcts": {"horizon": 15, "candidates": 16, "simulations": 16, "gumbel": 0.0},
    "dream_mpc": {"horizon": 15, "candidates": 5, "rounds": 1, "step_size": 0.05},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a planner is to do, as `PlannerConfig` describes; 0 where the planner has no such setting."""

    name: str
    critic: bool = True
    outcomes: str = "likely"
    horizon: int = 0
    candidates: int = 0
    rounds: int = 0
    elites: int = 0
    policy_share: float = 0.0
    std: float = 0.0
    min_std: float = 0.0
    temperature: float = 0.0
    step_size: float = 0.0
    simulations: int = 0
    gumbel: float = 0.0


@group
class PlannerConfig:
    """Who acts: the policy, or a planner. A setting that is null is the planner's own, as docs/planners.md has it."""

    name: Name | None = option(None, "Planner that chooses actions in the world model; null: the policy acts")
    horizon: int | None = option(None, "Planned steps; for mcts the greatest depth", "agent steps", ge=1, le=1000)
    candidates: int | None = option(
        None, "Action sequences in a round; for mcts the actions tried where they are continuous", ge=1, le=65_536
    )
    rounds: int | None = option(None, "Times that the candidates are improved", ge=1, le=1000)
    elites: int | None = option(None, "Best candidates, which the next round is drawn around", ge=1, le=65_536)
    policy_share: float | None = option(
        None, "Share of the candidates that are the policy's sequences; the others are drawn", ge=0, le=0.999
    )
    std: float | None = option(None, "Standard deviation of the first continuous candidates", ge=1e-3, le=10)
    min_std: float | None = option(None, "Least standard deviation of continuous candidates", ge=0, le=10)
    temperature: float | None = option(
        None, "Weight of an elite: exp(its return / temperature), in standard deviations of theirs", ge=1e-3, le=1e3
    )
    step_size: float | None = option(None, "Step of Adam along the gradient of a return", ge=1e-6, le=10)
    simulations: int | None = option(None, "Nodes that a tree search adds", ge=1, le=10_000)
    gumbel: float | None = option(
        None,
        "Scale of the noise by which a tree search draws actions when it collects, 1: as likely as it finds them good",
        ge=0,
        le=10,
    )
    critic: bool = option(True, "Whether the critic's value follows the planned steps; false: nothing does")
    outcomes: Literal["likely", "sampled"] = option(
        "likely", "Step the model to its most likely (or expected) next state, or draw one; mcts always the former"
    )
    penalty: float = option(
        0.0, "What a planned step costs for each unit of the ensemble's disagreement on where it leads", **SCALE
    )
    noise: float = option(
        0.0, "Standard deviation of noise on sampled continuous actions, chance of a random discrete one", **SCALE
    )

    def given(self) -> list[str]:
        """Names of the settings of single planners that are not null."""
        some = dict.fromkeys(name for settings in SETTINGS.values() for name in settings)
        return [name for name in some if getattr(self, name) is not None]

    def calm(self) -> PlannerConfig:
        """Without what makes a planner explore."""
        return dataclasses.replace(self, gumbel=None, noise=0.0)

    def settled(self) -> Settings:
        """With the planner's own value for every setting that is null.

        ConfigError if no planner is named, if one of its settings does not exist for this planner, or if there are more
        elites than candidates.
        """
        if self.name is None:
            raise ConfigError(f"expected planner.name to be one of {', '.join(get_args(Name))}, got null")
        known = SETTINGS[self.name]
        given = {field: getattr(self, field) for field in self.given()}
        if odd := [field for field in given if field not in known]:
            raise ConfigError(
                f"expected a setting of the planner {self.name} ({', '.join(known)}), got planner.{odd[0]}; "
                "leave it out"
            )
        whole = {**known, **given}
        if "elites" in whole and whole["elites"] > whole["candidates"]:
            raise ConfigError(
                f"expected planner.elites <= planner.candidates ({whole['candidates']}), got {whole['elites']}; "
                "lower the one or raise the other"
            )
        return Settings(self.name, self.critic, self.outcomes, **whole)
