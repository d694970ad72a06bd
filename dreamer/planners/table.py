"""The table of planners, and a planner from its options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from dreamer.planner_config import PlannerConfig
from dreamer.planners.cem import cem
from dreamer.planners.dream_mpc import dream_mpc
from dreamer.planners.gradient import gradient
from dreamer.planners.mcts import mcts
from dreamer.planners.mppi import mppi
from dreamer.planners.protocol import Plan
from dreamer.planners.random_shooting import random_shooting

#: Called with settled options, and then as `protocol.Plan`.
PLANNERS: Mapping[str, Callable[..., Any]] = {
    "random_shooting": random_shooting,
    "cem": cem,
    "mppi": mppi,
    "gradient": gradient,
    "mcts": mcts,
    "dream_mpc": dream_mpc,
}


def make_planner(config: PlannerConfig) -> Plan:
    """The planner of these options; ConfigError as `PlannerConfig.settled`."""
    settings = config.settled()
    return functools.partial(PLANNERS[settings.name], settings)
