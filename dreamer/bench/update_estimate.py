"""What one dispatch of updates costs: traced for its operations, compiled for its memory, run for its time."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from dreamer.agent import Agent, seed_key
from dreamer.bench.alone import EnvsAlone, PolicyAlone
from dreamer.bench.bench_update import batch_shapes, random_batch
from dreamer.bench.jaxpr_cost import flops, peak_bytes, tree_bytes
from dreamer.config import Config
from dreamer.records.display import format_bytes
from dreamer.replay import machine_memory
from dreamer.run.factories import free_device_bytes, training_envs
from dreamer.run.seeds import MappedAgent

#: An update is tried if it needs less than this share of the free memory, and at the measured rate fewer seconds.
MEMORY_SHARE, UPDATE_SECONDS = 0.7, 10.0
#: Seconds for which the environments are tried if the update is not.
_ENVS_SECONDS = 5.0
#: Side of the matrices whose product measures a device's speed.
_SIDE = {"cpu": 1024}
_LARGE_SIDE = 8192
#: Shares of a trial's time for the environments and the policy; the update has the rest.
_ENVS, _POLICY = 0.25, 0.1
#: Least number of timed dispatches, however long they take.
_DISPATCHES = 2

#: Called with what is being done.
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one dispatch: its inputs, its outputs beside the state that it changes in place, and all in between."""

    arguments: int
    results: int
    working: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.working


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of each part alone: a step of all environments, an action for each of them, one update."""

    envs: float
    policy: float
    update: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory and speed, each with how it was obtained. lowest: no run is faster than this."""

    memory: Memory
    memory_how: str
    pace: Pace
    pace_how: str
    lowest: bool


class TracedUpdate:
    """The program that a run dispatches most of the time, traced. Nothing of it is allocated before `try_parts`.

    count   Updates in it.
    agents  Agents whose updates are one program, S; each counts as one update (`run.seeds`).
    state   Shapes of the training state of one agent.
    """

    def __init__(self, config: Config, agent: Agent) -> None:
        due, most = config.env.num_envs * config.updates_per_step, config.run.updates_per_dispatch
        self._config, self.agent = config, agent
        self.count, self.agents = most if due >= most else 1, config.run.seeds or 1
        self.state: Any = jax.eval_shape(agent.init, 0)
        batch = batch_shapes(agent, config)
        if config.run.seeds is None:
            program = agent.train_step if self.count == 1 else agent.train_steps
            self._stack: Callable = lambda states: states[0]
        else:
            mapped = MappedAgent(agent)
            program, self._stack = mapped.update, mapped.stack
        self._inputs = (jax.eval_shape(self._stack, [self.state] * self.agents), self._batches(batch))
        self._traced = program.trace(*self._inputs)

    def _batches(self, batch: Any) -> Any:
        """What the program takes, with this batch as every batch."""
        if self._config.run.seeds is None:
            return batch if self.count == 1 else [batch] * self.count
        return [[batch] * self.count] * self.agents

    @property
    def flops(self) -> float:
        """Floating-point operations of one update of all agents."""
        return flops(self._traced.jaxpr.jaxpr) / self.count

    def estimated_memory(self) -> Memory:
        """From the traced program: sizes of its inputs and outputs, and how long the arrays between them live."""
        _, *results = self._traced.out_info
        return Memory(tree_bytes(self._inputs), tree_bytes(results), peak_bytes(self._traced.jaxpr.jaxpr))

    @functools.cached_property
    def _compiled(self) -> Any:
        return self._traced.lower().compile()

    def compiled_memory(self) -> Memory:
        """What the compiler has laid out, for each device."""
        found = self._compiled.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        return Memory(found.argument_size_in_bytes, results, found.temp_size_in_bytes)

    def try_parts(self, seconds: float) -> Pace:
        """Times the parts of the loop, `seconds` in all; compiling and the first call of each are not counted."""
        envs, policy, config = environment_seconds(self._config, _ENVS * seconds), 0.0, self._config
        states = [self.agent.init(seed_key(config.seed + index)) for index in range(self.agents)]
        if config.run.collect:
            params, key = states[0]["params"], np.asarray(states[0]["key"])
            acting = PolicyAlone(self.agent, lambda: params, config.env.num_envs * self.agents, key)
            policy = seconds_per_call(acting, _POLICY * seconds)
            del params, acting  # The update changes them in place.
        turn = TimedDispatch(self._compiled, self._stack(states), self._batches(random_batch(self.agent, config)))
        del states
        update = seconds_per_call(turn, (1 - _ENVS - _POLICY) * seconds, _DISPATCHES)
        return Pace(envs, policy, update / self.count)


def estimate_update(
    config: Config, update: TracedUpdate, device: jax.Device, seconds: float | None, say: Say
) -> Estimate:
    """Tries the update if it fits this machine, else estimates. seconds: of the trial, None for none."""
    say("measuring the device")
    rate = product_rate(update.agent.dtype, device)
    memory, work = update.estimated_memory(), update.flops
    reason = "not asked for"
    if seconds is not None:
        reason = why_not(memory.total, free_bytes(device), work * update.count / rate)
    if seconds is not None and not reason:
        try:
            return _tried(update, seconds, say)
        except jax.errors.JaxRuntimeError as error:  # the accelerator's memory, most likely
            reason = f"it failed here: {str(error).splitlines()[0]}"
    say("trying the environments")
    pace = Pace(environment_seconds(config, _ENVS_SECONDS), 0.0, work / rate)
    return Estimate(
        memory,
        f"estimated from the traced program, neither compiled nor run: {reason}",
        pace,
        f"update: its FLOPs at the {format_flops(rate)}/s measured here in matrix products, which no update "
        f"reaches; environments: tried for {_ENVS_SECONDS:g} seconds; policy not counted",
        lowest=True,
    )


def _tried(update: TracedUpdate, seconds: float, say: Say) -> Estimate:
    say("compiling the update")
    memory = update.compiled_memory()
    say("trying environments, policy and update")
    pace = update.try_parts(seconds)
    how = f"trial of {seconds:g} seconds: environments, policy and update, each alone"
    return Estimate(memory, "laid out by the compiler for this device", pace, how, lowest=False)


def why_not(needed: int, free: int, seconds: float) -> str:
    """Why an update is not tried here; empty if it can be."""
    if needed > MEMORY_SHARE * free:
        return f"one needs about {format_bytes(needed)}, {format_bytes(free)} are free here"
    if seconds > UPDATE_SECONDS:
        return f"one would take more than {seconds:,.0f} seconds here"
    return ""


def free_bytes(device: jax.Device) -> int:
    """Free bytes of the memory that updates use: the accelerator's, or the machine's."""
    free = free_device_bytes(device)
    return min(machine_memory(), psutil.virtual_memory().available) if free is None else free


class TimedDispatch:
    """One dispatch of a compiled update, on the same batches each time; a call waits for its end."""

    def __init__(self, program: Any, state: Any, batches: Any) -> None:
        self._program, self._state, self._batches = program, state, batches

    def __call__(self) -> None:
        self._state, *outputs = self._program(self._state, self._batches)
        jax.block_until_ready((self._state, outputs))


def environment_seconds(config: Config, seconds: float) -> float:
    """Seconds of one step of all training environments with random actions; 0 if a run collects nothing. Those of
    several agents step one after another."""
    if not config.run.collect:
        return 0.0
    envs = EnvsAlone(training_envs(config, 1, None))
    try:
        return seconds_per_call(envs, seconds) * (config.run.seeds or 1)
    finally:
        envs.close()


def product_rate(dtype: Any, device: jax.Device, seconds: float = 1.5) -> float:
    """Floating-point operations per second of a device in products of large matrices, which no update exceeds."""
    side = _SIDE.get(device.platform, _LARGE_SIDE)
    matrix = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(lambda x: x @ x)
    return 2 * side**3 / seconds_per_call(lambda: product(matrix).block_until_ready(), seconds)


def format_flops(number: float) -> str:
    """Floating-point operations: 5.4 GFLOP."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}FLOP"
    return f"{number:.0f} FLOP"


def seconds_per_call(function: Callable[[], object], seconds: float, least: int = 3) -> float:
    """Mean over at least `seconds` seconds and `least` calls, after one that is not counted."""
    function()
    calls, start = 0, time.perf_counter()
    while calls < least or time.perf_counter() - start < seconds:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls
