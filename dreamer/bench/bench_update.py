"""How long one update takes, `dreamer bench update`; `--against plain` replaces every rewrite by its plain twin. What
choosing actions costs: `dreamer bench policy`."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from dreamer import kernels
from dreamer.agent import Agent, seed_key
from dreamer.bench.alone import PolicyAlone, spaces_of
from dreamer.bench.jaxpr_cost import flops
from dreamer.bench.launches import launched, loops
from dreamer.bench.measuring import Report, Rows, figure, milliseconds, take_turns
from dreamer.config import Config
from dreamer.presets import load_config
from dreamer.run.devices import choose_device, compute_dtype, reuse_freed_memory
from dreamer.run.factories import make_agent
from dreamer.run.seeds import MappedAgent
from dreamer.types import Space, Spaces, replay_fields

#: Observation and action spaces of the benchmark.
TASKS: dict[str, tuple[Spaces, Spaces]] = {
    "vector": ({"vector": Space("vector", (24,))}, {"action": Space("vector", (6,))}),
    "image": ({"image": Space("image", (64, 64, 3))}, {"action": Space("discrete", (), (6,))}),
}


# --- One update, compiled ----------------------------------------------------------------------


#: Calls before the first that counts: they use the memory of updates for the first time.
WARM_UP = 3


def random_batch(agent: Agent, config: Config, seed: int = 0) -> dict[str, jax.Array]:
    """Random values for everything that replay stores: (B, T+1, ...)."""
    rng = np.random.default_rng(seed)
    lead = (config.run.batch_size, config.run.batch_length + 1)
    spaces: Spaces = {**agent.observations, **agent.actions}
    batch = {}
    for key, field in replay_fields(agent.observations, agent.actions, agent.extras).items():
        if key in spaces:
            drawn = np.stack([spaces[key].sample(rng) for _ in range(int(np.prod(lead)))])
            batch[key] = drawn.reshape(*lead, *field.shape)
        else:
            batch[key] = np.zeros((*lead, *field.shape), field.dtype)
    batch["reward"] = rng.normal(size=lead).astype(np.float32)
    batch["is_first"], batch["is_last"] = rng.random(lead) < 0.01, rng.random(lead) < 0.01
    return jax.tree.map(jnp.asarray, batch)


def batch_shapes(agent: Agent, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Everything replay stores, (B, T+1, ...), without its numbers."""
    lead = (config.run.batch_size, config.run.batch_length + 1)
    fields = replay_fields(agent.observations, agent.actions, agent.extras)
    return {name: jax.ShapeDtypeStruct((*lead, *field.shape), field.dtype) for name, field in fields.items()}


class Program:
    """A compiled update and the state it changes. One call is one dispatch, waited for."""

    def __init__(
        self, size: str, obs: str, dispatch: int | None = None, seeds: int | None = None, without: Sequence[str] = ()
    ) -> None:
        """size: of a preset, "1m"; obs: a row of `TASKS`; dispatch: updates in one dispatch, None for a single one;
        seeds: agents updated together, None for a single one; without: rewrites left out."""
        config = load_config([f"size{size}"], {"run.without": list(without)})
        dtype = compute_dtype(config.run, choose_device("auto"))
        learner = Agent(*TASKS[obs], config, dtype)
        self.updates, self.seeds = dispatch or 1, seeds
        batches = [random_batch(learner, config, seed) for seed in range(self.updates)]
        update: Any
        self.batch: Any
        if seeds is None:
            self.state = learner.init(0)
            self.batch = batches[0] if dispatch is None else batches
            update = learner.train_step if dispatch is None else learner.train_steps
        else:
            mapped = MappedAgent(learner)
            self.state = mapped.stack([learner.init(seed) for seed in range(seeds)])
            self.batch, update = [batches] * seeds, mapped.update
        start = time.perf_counter()
        traced = update.trace(self.state, self.batch)
        self.gflop = flops(traced.jaxpr.jaxpr) / 1e9 / self.updates
        self.compiled = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - start
        self.metrics: dict[str, jax.Array] = {}
        for _ in range(WARM_UP):
            self()

    def __call__(self) -> tuple[float, float]:
        """Wall and process CPU milliseconds of one update, of all seeds together."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, latents, self.metrics, *further = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, latents, self.metrics, further))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall * 1e3 / self.updates, cpu * 1e3 / self.updates

    def facts(self) -> dict[str, Any]:
        """What does not depend on time: compilation, memory, size; on a GPU, launches that the program is made of."""
        memory: Any = self.compiled.memory_analysis()
        on_gpu = jax.default_backend() == "gpu"
        return {
            **({"launches": sum(loop.total for loop in loops(self.compiled.as_text()))} if on_gpu else {}),
            "compile_s": round(self.compile_seconds, 1),
            "temp_mb": round(memory.temp_size_in_bytes / 2**20, 1),
            "loss": float(jnp.ravel(self.metrics["opt/loss"])[-1]),
            "gflop": round(self.gflop, 2),
            "params": sum(x.size for x in jax.tree.leaves(self.state["params"])) // (self.seeds or 1),
            "device": str(jax.devices()[0]),
        }


# --- The command -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """What `dreamer bench update` was asked for; `--help` says what each means."""

    size: str = "1m"
    obs: str = "vector"
    updates_per_dispatch: int | None = None
    seeds: int | None = None
    against: str | None = None
    without: Sequence[str] = ()
    rounds: int = 11
    protocol: bool = False
    trace: Path | None = None


def serve(program: Program, lines: TextIO) -> None:
    """One update for each line read, its times printed as JSON, until "q": for tools that interleave programs."""
    print(json.dumps(program.facts()), flush=True)
    for line in lines:
        if line.strip() == "q":
            break
        wall, cpu = program()
        print(json.dumps({"ms": wall, "cpu_ms": cpu}), flush=True)


def measure(programs: Mapping[str, Program], rounds: int) -> Rows:
    """Programs take turns; returns medians, quartiles and the paired ratio to the last one."""
    times = {name: np.array(found) for name, found in take_turns(programs, rounds).items()}  # (rounds, wall and CPU)
    reference = list(times.values())[-1]
    rows: Rows = {}
    for name, program in programs.items():
        wall, cpu = times[name].T
        ratios = dict(zip(("speedup", "cpu_speedup"), np.median(reference / times[name], 0).tolist(), strict=True))
        rows[name] = figure("ms", wall) | figure("cpu_ms", cpu) | program.facts() | ratios
    return rows


def bench_update(request: Request) -> Report | None:
    """Runs the benchmark; None after speaking the protocol of `serve`."""
    reuse_freed_memory()
    arguments = (request.size, request.obs, request.updates_per_dispatch, request.seeds, request.without)
    programs: dict[str, Program] = {}
    if not (request.protocol and request.against):
        programs["update"] = Program(*arguments)
    if request.against == "plain":
        with kernels.plain():
            programs["plain"] = Program(*arguments)
    if request.protocol:
        serve(next(iter(programs.values())), sys.stdin)
        return None
    if request.trace is not None:
        with jax.profiler.trace(str(request.trace)):
            programs["update"]()
        print(f"trace of one dispatch in {request.trace}: open its .trace.json.gz at ui.perfetto.dev")
    rows = measure(programs, request.rounds)
    if request.trace is not None and (count := launched(request.trace)):
        rows["update"] |= {"launched": count, "us_per_launch": 1e3 * rows["update"]["ms"] / count}
    against = () if request.against is None else ("speedup", "cpu_speedup")
    note = f"speedup: {' over '.join(programs)}, paired round by round." if against else ""
    if request.seeds is not None:
        rows = {name: row | {"seed_updates_per_s": 1e3 * request.seeds / row["ms"]} for name, row in rows.items()}
    rate = () if request.seeds is None else ("seed_updates_per_s",)
    columns = ("ms", "cpu_ms", "compile_s", "temp_mb", *rate, *against)
    return Report("update", dataclasses.asdict(request), columns, rows, note)


# --- dreamer bench policy --------------------------------------------------------------------------


#: Calls in each round.
CALLS = 20


def bench_policy(config: Config, counts: Sequence[int] | None, rounds: int) -> Report:
    """Times the policy for each number of environments in `counts` (default: one, and the configured number)."""
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
