"""`dreamer train --plan`: what a run will need and how long it will take, before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
from rich import box
from rich.text import Text

from dreamer.agent import Agent
from dreamer.bench.jaxpr_cost import tree_bytes
from dreamer.bench.update_estimate import Estimate, Pace, Say, TracedUpdate, estimate_update, format_flops, free_bytes
from dreamer.config import Config
from dreamer.contradictions import filling_steps
from dreamer.data.preload import find_preload, task_spaces
from dreamer.envs import frames_per_step
from dreamer.records.display import format_bytes, format_count, format_duration
from dreamer.replay import budget, bytes_per_step, choose_storage
from dreamer.run.devices import choose_device, keep_compiled_programs, reuse_freed_memory
from dreamer.run.factories import free_device_bytes, make_agent, module_sizes, replay_capacity, resolve_logdir
from dreamer.run.schedule import UpdateSchedule
from dreamer.terminal import Console, Table
from dreamer.types import replay_fields

#: Seconds for trying the environments, the policy and the update, compiling not counted.
TRIAL_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of a plan.

    text    What a person reads.
    how     How it was obtained.
    values  The numbers in it by name; names end with their unit.
    loud    Whether the run cannot work like this.
    """

    name: str
    text: str
    how: str
    values: Mapping[str, float]
    loud: bool = False


# --- What a run needs ---------------------------------------------------------------------------


def replay_figures(config: Config, agent: Agent, preloaded: int, device: jax.Device) -> list[Figure]:
    """Bytes of the replay for each step and when full, where they are kept, and whether there is room."""
    fields = replay_fields(agent.observations, agent.actions, agent.extras)
    step, agents = bytes_per_step(fields), config.run.seeds or 1
    capacity = replay_capacity(config, preloaded, step)
    folder, free = Path(resolve_logdir(config).logdir) / "replay", free_device_bytes(device)
    kind = config.replay.storage
    chosen = choose_storage(fields, capacity * agents, folder, free) if kind == "auto" else kind
    found = budget(chosen, fields, folder, free)
    sizes = {medium: capacity * agents * need for medium, need in found.needs.items() if need}
    text = ", ".join(f"{format_bytes(size)} of {format_bytes(found.has[m])} {m}" for m, size in sizes.items())
    lacking = capacity * agents > found.largest
    if lacking:
        room = found.largest // (agents * config.env.num_envs) * config.env.num_envs
        text = f"{text}: too much; --replay.capacity {room} or less has room"
    largest = sorted(fields, key=lambda name: -fields[name].nbytes)[:3]
    parts = ", ".join(f"{name} {format_bytes(fields[name].nbytes)}" for name in largest)
    whose = f" for each of {agents} agents" if agents > 1 else ""
    how = f"{capacity:,} steps{whose}, {found.kind} storage; checkpoints keep it on disk too"
    values = {f"{medium}_bytes": float(size) for medium, size in sizes.items()}
    return [
        Figure("replay, a step", f"{format_bytes(step)} ({parts})", "sizes of what is stored", {"bytes": step}),
        Figure("replay, full", text, how, values, lacking),
    ]


def state_figures(config: Config, update: TracedUpdate) -> list[Figure]:
    """Parameters, and the disk space of checkpoints of the training state."""
    modules = module_sizes(update.state["params"])
    parameters = sum(modules.values())
    shares = ", ".join(f"{name} {format_count(size)}" for name, size in modules.items())
    one, kept = tree_bytes(update.state), (config.run.checkpoint_keep + 1) * update.agents
    return [
        Figure("parameters", f"{format_count(parameters)} ({shares})", "counted", {"parameters": parameters}),
        Figure(
            "checkpoints",
            f"{format_bytes(kept * one)} of disk, replay not counted",
            f"{kept} times weights, slow critic and optimizer state, {format_bytes(one)} each",
            {"disk_bytes": kept * one},
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """passes: iterations of the loop, N agent steps each; updates: in the whole run."""

    passes: int
    updates: int


def schedule(config: Config, preloaded: int) -> Schedule:
    """How much the loop does from the first step to the last."""
    run, envs = config.run, config.env.num_envs
    passes = math.ceil(run.agent_steps / envs)
    filled = 1 if preloaded else filling_steps(config)
    if filled > passes:
        return Schedule(passes, 0)
    due = UpdateSchedule(run.train_ratio, run.batch_size, run.batch_length)
    due.start(filled * envs)
    return Schedule(passes, due.due(passes * envs))


def hours(whole: Schedule, pace: Pace, shared: bool) -> float:
    """Hours to the end, from the parts alone: added up on a CPU, else environments in parallel with updates."""
    envs, updates = whole.passes * pace.envs, whole.updates * pace.update
    beside = envs + updates if shared else max(envs, updates)
    return (whole.passes * pace.policy + beside) / 3600


# --- What an update costs -----------------------------------------------------------------------


def update_figures(
    config: Config, update: TracedUpdate, whole: Schedule, estimate: Estimate, device: jax.Device
) -> list[Figure]:
    """Memory, operations, number and time of the updates."""
    memory, pace, work, envs = estimate.memory, estimate.pace, update.flops, config.env.num_envs
    shared, free = device.platform == "cpu", free_bytes(device)
    joined = "added up, since they share the cores" if shared else "environments beside updates"
    end, least = hours(whole, pace, shared), "at least " if estimate.lowest else ""
    sizes = dataclasses.asdict(memory)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    policy = "" if estimate.lowest else f"policy {_seconds(pace.policy)}, "
    return [
        Figure(
            f"memory of {update.count} updates" if update.count > 1 else "memory of an update",
            f"{format_bytes(memory.total)} of {format_bytes(free)} free ({parts}), {update.agent.dtype.name}",
            estimate.memory_how,
            {"device_bytes": memory.total, **{f"{name}_bytes": size for name, size in sizes.items()}},
            memory.total > free,
        ),
        Figure(
            "work of an update",
            format_flops(work),
            "counted in the traced program, loops by their lengths",
            {"flops": work},
        ),
        Figure(
            "updates",
            f"{whole.updates:,} ({config.updates_per_step:g} per agent step)",
            "the schedule's own arithmetic",
            {"updates": whole.updates},
        ),
        Figure(
            "speed",
            f"{_counted(envs, 'environment')} {_seconds(pace.envs)} a step, {policy}"
            f"an update {least}{_seconds(pace.update)}",
            estimate.pace_how,
            {"envs_seconds": pace.envs, "policy_seconds": pace.policy, "update_seconds": pace.update},
        ),
        Figure(
            "time to the end",
            f"{least}{end:,.2f} hours ({format_duration(end * 3600)})",
            f"speeds times counts, {joined}; evaluations, reports and checkpoints not counted",
            {"hours": end},
        ),
    ]


# --- The plan -----------------------------------------------------------------------------------


def make_plan(config: Config, seconds: float | None = TRIAL_SECONDS, say: Say = lambda text: None) -> list[Figure]:
    """What a run of this configuration needs, from its first step on, and how long it takes.

    seconds: of the trial; None: the update is neither compiled nor tried, whatever its size. say: told what is being
    done.
    """
    say("tracing the update")
    device = choose_device(config.run.platform)
    observations, actions = task_spaces(config)
    agent = make_agent(config, observations, actions)
    found = find_preload(config, observations, actions)
    preloaded = found.room(config.env.num_envs) if found else 0
    update, whole = TracedUpdate(config, agent), schedule(config, preloaded)
    estimate = estimate_update(config, update, device, seconds, say)
    steps = config.run.agent_steps
    frames = steps * frames_per_step(config.task, config.env)
    envs = _counted(config.env.num_envs, "environment")
    task = f"{config.task}, {envs}, {steps:,} agent steps ({frames:,} frames)"
    if update.agents > 1:
        task = f"{task}, for each of {update.agents} agents; updates below are those of all together"
    return [
        Figure("task", task, "the configuration", {"agent_steps": steps, "env_frames": frames}),
        *state_figures(config, update),
        *replay_figures(config, agent, preloaded, device),
        *update_figures(config, update, whole, estimate, device),
    ]


def table(lines: list[Figure]) -> Table:
    """One row per figure, with how it was obtained below it."""
    shown = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, padding=(0, 1))
    shown.add_column("", style="bold", no_wrap=True)
    shown.add_column("", overflow="fold")
    for line in lines:
        text = Text(line.text, "bold black on yellow" if line.loud else "")
        shown.add_row(line.name, Text.assemble(text, "\n", (line.how, "dim")))
    return shown


def print_plan(config: Config) -> int:
    """Prints the plan of a run. Exit code 0, even if the run cannot work: then its lines say so."""
    reuse_freed_memory()
    keep_compiled_programs()
    console = Console()
    with console.status("planning") as status:
        lines = make_plan(config, say=lambda text: status.update(Text(f"{text} ...")))
    console.print(table(lines))
    return 0


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _seconds(number: float) -> str:
    """A short time: 0.30 ms, 141 s."""
    return f"{number * 1e3:.3g} ms" if number < 1 else f"{number:,.3g} s" if number < 1e3 else f"{number:,.0f} s"
