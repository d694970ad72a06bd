"""What a decision costs, by who takes it: `dreamer bench plan`, the policy beside each planner and budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dreamer.agent import seed_key
from dreamer.bench.alone import PolicyAlone, spaces_of
from dreamer.bench.measuring import Report, Rows, figure, milliseconds, spent, take_turns
from dreamer.config import Config
from dreamer.planner_config import PlannerConfig
from dreamer.run.devices import reuse_freed_memory
from dreamer.run.factories import make_agent
from dreamer.values import ConfigError

#: Planners with their own settings, and with budgets that a CPU can afford; None: the policy.
BUDGETS: dict[str, PlannerConfig] = {
    "policy": PlannerConfig(),
    "random_shooting": PlannerConfig(name="random_shooting"),
    "cem 1000x12x10": PlannerConfig(name="cem"),
    "cem 128x12x4": PlannerConfig(name="cem", candidates=128, rounds=4, elites=16),
    "mppi 512x3x6": PlannerConfig(name="mppi"),
    "mppi 80x5x4": PlannerConfig(name="mppi", candidates=80, horizon=5, rounds=4, elites=16),
    "gradient 16x12x20": PlannerConfig(name="gradient"),
    "gradient 4x6x5": PlannerConfig(name="gradient", candidates=4, horizon=6, rounds=5),
    "dream_mpc 5x15x1": PlannerConfig(name="dream_mpc"),
    "mcts 16": PlannerConfig(name="mcts"),
    "mcts 50": PlannerConfig(name="mcts", simulations=50),
}
#: A round calls a program this often at most, and fewer times if that takes longer.
MOST_CALLS, ROUND_MS = 20, 200.0


def bench_planning(config: Config, counts: Sequence[int], rounds: int, chosen: Sequence[str] | None) -> Report:
    """Times decisions for each number of environments. chosen: planners by name, or "policy"; None: all.

    A planner that cannot act with the task's actions is left out.
    """
    reuse_freed_memory()
    spaces = spaces_of(config)
    programs: dict[str, PolicyAlone] = {}
    rows: Rows = {}
    for name, planner in BUDGETS.items():
        if chosen is not None and name.split()[0] not in chosen:
            continue
        try:
            agent = make_agent(dataclasses.replace(config, planner=planner), *spaces)
        except ConfigError:
            continue
        state = agent.init(seed_key(config.seed))
        params, key = state["params"], np.asarray(state["key"])
        for count in counts:
            label = f"{name}, {count} environment{'s' if count > 1 else ''}"
            programs[label] = PolicyAlone(agent, functools.partial(dict, params), count, key)
            rows[label] = {"first_call_s": milliseconds(programs[label]) / 1e3}
    calls = {}
    for label, program in programs.items():
        once = milliseconds(program, 2)  # warm-up too
        calls[label] = functools.partial(spent, program, max(1, min(MOST_CALLS, int(ROUND_MS / once))))
    for label, times in take_turns(calls, rounds).items():
        wall, cpu = np.array(times).T
        rows[label] = figure("ms", wall) | figure("cpu_ms", cpu) | rows[label]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(agent.shapes))
    request: dict[str, Any] = {"task": config.task, "parameters": parameters, "rounds": rounds}
    note = "Candidates x horizon x rounds, or simulations; from observations on the host to actions on the host."
    return Report("plan", request, ("ms", "cpu_ms", "first_call_s"), rows, note)
