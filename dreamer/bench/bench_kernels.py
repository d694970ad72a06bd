"""What a GPU would launch for one update, counted on a machine without one: `dreamer bench kernels`.

XLA's CUDA compiler needs no device, only the description of one. It gives the program that a GPU would run: every
launch of a kernel, the loops around them with their numbers of trips, the memory. Nothing runs. Milliseconds are a
model: so many for each launch, or the arithmetic, or the memory traffic, whichever is slower. Without a device nothing
is tuned by trying, and library calls are those of the defaults.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dreamer import compiler, kernels
from dreamer.agent import Agent
from dreamer.bench.bench_update import TASKS, batch_shapes
from dreamer.bench.jaxpr_cost import flops
from dreamer.bench.launches import Loop, loops
from dreamer.bench.measuring import Report, Rows
from dreamer.config import Config
from dreamer.presets import load_config
from dreamer.run.seeds import MappedAgent
from dreamer.schema import ConfigError
from dreamer.types import Spaces

_DEVICE = (
    "gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} "
    "l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448 "
    "cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} "
    'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"'
)
#: Cards that can be compiled for.
CARDS: dict[str, dict[str, Any]] = {
    "h100": {"bandwidth": 3_350_000_000_000, "memory": 85_520_809_984, "name": "NVIDIA H100 80GB HBM3"},
    "h200": {"bandwidth": 4_800_000_000_000, "memory": 151_397_597_184, "name": "NVIDIA H200 141GB HBM3e"},
}
# --- Compiling ---------------------------------------------------------------------------------


def chip(card: str) -> Any:
    """A device to compile for, which is not there. ConfigError without the CUDA compiler."""
    try:
        found = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=_DEVICE.format(**CARDS[card]))
    except NotImplementedError:
        raise ConfigError(
            "expected XLA's CUDA compiler, got a JAX without it; install the two wheels that hold it, which need "
            "neither a driver nor CUDA: pip install 'dreamer[aot]'"
        ) from None
    return found.devices[0]


def compile_dispatch(
    agent: Agent, config: Config, card: str, flags: dict[str, Any], updates: int | None = None, seeds: int | None = None
) -> Any:
    """One dispatch as it would run on a card, compiled: a single update, `updates` in turn, or one of many `seeds`."""
    state, batch = jax.eval_shape(agent.create, 0), batch_shapes(agent, config)
    program: Any = jax.jit(agent.learn if updates is None else agent.learn_in_turn, donate_argnums=0)
    batches: Any = batch if updates is None else [batch] * updates
    if seeds is not None:
        mapped = MappedAgent(agent)
        state, program = jax.eval_shape(mapped.stack, [state] * seeds), mapped.update
        batches = [[batch] * (updates or 1)] * seeds
    place = SingleDeviceSharding(chip(card))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, batches))
    return program.lower(*shapes).compile(compiler_options=flags)


def agent_for_gpu(spaces: tuple[Spaces, Spaces], config: Config, without: Sequence[str] = ()) -> Agent:
    """An agent whose programs are traced for one GPU, in bfloat16, wherever this is called; ConfigError for rewrites to
    do without that are none."""
    agent = Agent(*spaces, config, jnp.bfloat16)
    agent.target = kernels.target("gpu", without=tuple(without))
    return agent


# --- The command -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """What `dreamer bench kernels` was asked for; `--help` says what each means."""

    sizes: Sequence[str] = ("1m",)
    obs: Sequence[str] = ("vector", "image")
    cards: Sequence[str] = ("h200",)
    launch_us: float = 2.0
    tflops: float = 500.0
    stream_gbs: float = 100.0
    flags: Sequence[str] = ()
    without: Sequence[str] = ()
    updates_per_dispatch: int | None = None
    seeds: int | None = None


def bench_kernels(request: Request) -> Report:
    """Counts what each update would launch, a row for it and one for each of its loops; of several updates in one
    dispatch, or of several seeds, what all of them together would. gflop: of one update of one seed."""
    flags = dict(map(_flag, request.flags)) or compiler.OPTIONS["gpu"]
    rows: Rows = {}
    for size in request.sizes:
        config = load_config([f"size{size}"], {})
        for obs in request.obs:
            agent = agent_for_gpu(TASKS[obs], config, request.without)
            shapes = jax.eval_shape(agent.create, 0), batch_shapes(agent, config)
            gflop = flops(jax.make_jaxpr(agent.learn)(*shapes).jaxpr) / 1e9
            for card in request.cards:
                name, start = f"{size} {obs}, {card}", time.perf_counter()
                dispatch = request.updates_per_dispatch, request.seeds
                compiled = compile_dispatch(agent, config, card, flags, *dispatch)
                seconds = time.perf_counter() - start
                found = loops(compiled.as_text())
                facts = {"gflop": gflop, "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20}
                rows[name] = modelled(found, gflop, card, request) | facts | {"compile_s": seconds}
                rows |= {f"{name}: {loop.title}": kinds(loop) for loop in found}
    columns = ("launches", "model_ms", "gflop", "written_gb", "temp_mb", "compile_s", "kinds")
    note = (
        f"Counted by the compiler; nothing ran. model_ms: {request.launch_us:g} us a launch, the weights of our own "
        f"kernels at {request.stream_gbs:g} GB/s, and behind them {request.tflops:g} TFLOP/s or the card's "
        "memory bandwidth, whichever is slower."
    )
    return Report("kernels", dataclasses.asdict(request), columns, rows, note)


def _flag(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise ConfigError(f"--flags: expected NAME=VALUE, got {text!r}")
    return name, {"true": True, "false": False}.get(value, value)


def modelled(found: Sequence[Loop], gflop: float, card: str, request: Request) -> dict[str, float]:
    """Launches of all loops, gigabytes that they write, and the milliseconds that both should take."""
    launches = sum(loop.total for loop in found)
    written = sum(loop.times * launch.written for loop in found for launch in loop.launches) / 1e9
    # What is written was read before or will be read once.
    several = (request.updates_per_dispatch or 1) * (request.seeds or 1)
    behind = max(several * gflop / request.tflops, 2e12 * written / CARDS[card]["bandwidth"])
    inside = sum(loop.times * launch.read for loop in found for launch in loop.launches) / (request.stream_gbs * 1e6)
    taken = launches * request.launch_us * 1e-3 + inside + behind
    return {"launches": launches, "written_gb": written, "model_ms": taken}


def kinds(loop: Loop) -> dict[str, Any]:
    """The launches of a loop by kind and, for files, by the operations that they came from."""
    told = collections.Counter(launch.kind for launch in loop.launches)
    sources = collections.Counter((launch.kind, launch.source) for launch in loop.launches)
    return {
        "launches": loop.total,
        "kinds": ", ".join(f"{count} {kind}" for kind, count in told.most_common()),
        "sources": [[*key, count] for key, count in sources.most_common()],
    }
