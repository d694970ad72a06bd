"""What an accelerator would be asked to compute: proved on a machine without one, nothing is compiled for it."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from dreamer import compiler, kernels
from dreamer.agent import Agent
from dreamer.bench.bench_update import batch_shapes
from dreamer.config import Config
from dreamer.presets import load_config, preset_names
from dreamer.run.devices import keep_compiled_programs
from dreamer.types import Space, Spaces


def image(side: int, channels: int = 3) -> dict[str, Space]:
    return {"image": Space("image", (side, side, channels))}


def vector(**widths: int) -> dict[str, Space]:
    return {name: Space("vector", (width,)) for name, width in widths.items()}


def classes(count: int) -> dict[str, Space]:
    return {"action": Space("discrete", (), (count,))}


def box(width: int) -> dict[str, Space]:
    return {"action": Space("vector", (width,))}


MINECRAFT = {
    **image(64),
    **vector(inventory=390, inventory_max=390, health=1, hunger=1, breath=1),
    "equipped": Space("discrete", (), (391,)),
}

#: What each preset's task shows and takes.
TASKS: dict[str, tuple[Spaces, Spaces]] = {
    "atari": (image(96, 1), classes(18)),
    "atari100k": (image(64), classes(6)),
    "atari100k_official": (image(64), classes(6)),
    "bsuite": (vector(observation=50), classes(3)),
    "carracing": (image(64), box(3)),
    "crafter": (image(64), classes(17)),
    "crafter_curious": (image(64), classes(17)),
    "debug": (image(16), classes(3)),
    "dmc_proprio": (vector(height=1, orientations=14, velocity=9), box(6)),
    "dmc_vision": (image(64), box(6)),
    "dmlab": (image(64), classes(15)),
    "gym": (vector(observation=4), classes(2)),
    "memory_maze": (image(64), classes(6)),
    "dreamer_v1": (image(64), box(6)),
    "dreamer_v2": (image(64, 1), classes(18)),
    "planet": (image(64), box(1)),
    "minecraft": (MINECRAFT, classes(25)),
    "muzero": (image(64, 1), classes(18)),
    "minigrid": (image(64), classes(7)),
    "procgen": (image(96), classes(15)),
    "quickstart": (image(32), classes(3)),
    "r2dreamer": (image(64), classes(17)),
    "vizdoom": (image(64), classes(3)),
    "world_models": (image(64), classes(3)),
}
#: One of each kind; the others take as long again.
QUICK = {"atari", "crafter", "dmc_proprio", "minecraft", "planet"}


@pytest.fixture(scope="module", autouse=True)
def _agents_are_built_for_an_accelerator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "target", lambda platform, devices=1, without=(): kernels.Target("gpu", devices))
        yield


def shapes(agent: Agent, config: Config) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """The training state and a batch, without their numbers."""
    return jax.eval_shape(agent.create, 0), batch_shapes(agent, config)


def test_every_preset_is_here():
    sizes = {name for name in preset_names() if name.startswith("size")}
    assert set(TASKS) == set(preset_names()) - sizes - {"cpu"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
)
def test_the_update_of_every_preset_lowers_for_gpu_and_tpu(name):
    config = load_config([name])
    agent = Agent(*TASKS[name], config, jnp.bfloat16)
    ours = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]  # kept by no promise of XLA's, nor stored
    for kind, platform in (("gpu", "cuda"), ("tpu", "tpu")):
        agent.target = kernels.Target(kind)
        update = agent.compiled(agent.learn)  # traced anew: of the same function JAX would keep the other kind's
        lowered = export.export(update, platforms=[platform], disabled_checks=ours)(*shapes(agent, config))
        assert lowered.platforms == (platform,)
        assert len(lowered.out_avals) > len(jax.tree.leaves(agent.shapes))


# bfloat16

#: Arithmetic that loses too much, or overflows, in bfloat16; sums of AD over the batch are left to the compiler.
PRECISE = {
    "cumprod",
    "cumsum",
    "erf_inv",
    "exp",
    "integer_pow",
    "log",
    "log1p",
    "pow",
    "rsqrt",
    "sort",
    "sqrt",
    "square",
}
#: What nearly all time goes into.
FAST = {"conv_general_dilated", "dot_general"}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.fixture(scope="module")
def traced():
    """The update in bfloat16, with every kind of observation and action."""
    config = load_config(["crafter", "size1m"])
    seen = {**image(64), **vector(speed=5), "item": Space("discrete", (), (4,))}
    agent = Agent(seen, {**classes(17), "walk": Space("vector", (2,))}, config, jnp.bfloat16)
    return jax.jit(agent.learn).trace(*shapes(agent, config))


def test_products_are_bfloat16_and_delicate_arithmetic_float32(traced):
    found = collections.defaultdict(set)
    for equation in equations(traced.jaxpr.jaxpr):
        found[equation.primitive.name] |= {
            value.aval.dtype for value in equation.invars if jnp.issubdtype(value.aval.dtype, jnp.floating)
        }
    assert {name for name in found if found[name] == {jnp.dtype(jnp.bfloat16)}} >= FAST
    assert {name: found[name] for name in PRECISE & found.keys() if found[name] != {jnp.dtype(jnp.float32)}} == {}
    assert len(PRECISE & found.keys()) >= 10


def test_what_is_kept_between_updates_is_float32(traced):
    state, latents, metrics = traced.out_info
    floats = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree) if x.dtype.name.startswith(("float", "bf"))}  # noqa: E731
    for name in ("params", "slow", "opt", "return_scale"):
        assert floats(state[name]) == {"float32"}, name
    assert floats(metrics) == {"float32"}
    assert {key: value.dtype.name for key, value in latents.items()} == {"deter": "bfloat16", "stoch": "uint8"}


# The compiler


@pytest.fixture
def gpu(monkeypatch):
    """The target, with nothing said in XLA_FLAGS."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    compiler.options.cache_clear()
    yield kernels.Target("gpu")
    compiler.options.cache_clear()


def test_compiler_options_of_a_gpu_are_known_to_this_xla(gpu):
    assert compiler.options(gpu) == compiler.OPTIONS["gpu"]
    assert compiler.options(kernels.Target("gpu", rewrites=False)) is None


@pytest.mark.parametrize(
    ("flags", "ours"),
    [("--xla_gpu_autotune_level=2", False), ("--xla_dump_to=/nowhere --xla_gpu_graph_min_graph_size=3", False)]
    + [("--xla_force_host_platform_device_count=8", True)],
)
def test_the_users_flags_come_first(gpu, monkeypatch, flags, ours):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert (compiler.options(gpu) is not None) == ours


def test_an_option_that_xla_does_not_know_is_left_out(gpu, monkeypatch):
    monkeypatch.setitem(compiler.OPTIONS, "gpu", {"xla_gpu_of_the_future": True})
    assert compiler.options(gpu) is None


def test_autotuning_is_kept_beside_the_compiled_programs(tmp_path, monkeypatch):
    """What a GPU found out about its kernels; JAX itself does it, wherever there is a compilation cache."""
    from jax._src.compiler import get_compile_options

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs()
        options = get_compile_options(num_replicas=1, num_partitions=1)
        folder = options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
        assert folder.startswith(str(tmp_path / "dreamer" / "jax"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
