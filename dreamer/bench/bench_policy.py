"""What choosing actions costs: `dreamer bench policy`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dreamer.agent import seed_key
from dreamer.bench.alone import PolicyAlone, spaces_of
from dreamer.bench.measuring import Report, Rows, figure, milliseconds, take_turns
from dreamer.config import Config
from dreamer.run.allocator import reuse_freed_memory
from dreamer.run.setup import make_agent

#: Calls in each round.
CALLS = 20


def bench_policy(config: Config, counts: Sequence[int] | None, rounds: int) -> Report:
    """For each number of environments in `counts` (default: one, and the configured number)."""
    reuse_freed_memory()
    agent = make_agent(config, *spaces_of(config))
    state = agent.init(seed_key(config.seed))
    programs, first, sizes = {}, {}, {}
    for count in sorted(set(counts or (1, config.env.num_envs))):
        name = f"{count} environment{'s' if count > 1 else ''}"
        program = PolicyAlone(agent, lambda: state["params"], count, np.asarray(state["key"]))
        sizes[name], first[name] = count, milliseconds(program) / 1e3
        programs[name] = functools.partial(milliseconds, program, CALLS)
    take_turns(programs, 1)  # warm-up
    rows: Rows = {}
    for name, times in take_turns(programs, rounds).items():
        row: dict[str, Any] = figure("ms", times)
        row |= {"steps_per_s": sizes[name] / row["ms"] * 1e3, "first_call_s": first[name]}
        rows[name] = row
    request = {
        "task": config.task,
        "parameters": sum(x.size for x in jax.tree.leaves(state["params"])),
        "rounds": rounds,
    }
    note = "From observations on the host to actions and latents on the host; the first call compiles."
    return Report("policy", request, ("ms", "steps_per_s", "first_call_s"), rows, note)
