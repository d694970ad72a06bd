"""Launches of a GPU, counted by XLA's CUDA compiler without one, and read from programs that are spelled out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dreamer import cli
from dreamer.bench import bench_kernels as bench
from dreamer.bench.bench_kernels import Request
from dreamer.bench.launches import Launch, Loop, launched, loops

ROOT = Path(__file__).resolve().parents[2]
COMPILER = ROOT / ".cache" / f"cuda-compiler-{jax.__version__}"

#: Most launches in each trip of the loops of the 1m vector update, and outside of them; loops as several kernels.
MOST = {
    "RSSM.observe": (64, 25),
    "backward RSSM.observe": (64, 23),
    "RSSM.imagine": (15, 39),
    "outside of loops": (1, 580),
}

PROGRAM = """
HloModule jit_learn

%body (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  %x = f32[16,4]{1,0} get-tuple-element(%p), index=1
  %dot = bf16[16,4]{1,0} fusion(%x), kind=kCustom, {op_name="jit(learn)/dot_general"}, kind:"__triton_gemm"
  %add = f32[16,4]{1,0} fusion(%dot), kind=kLoop, calls=%g, metadata={op_name="jit(learn)/add"}
  ROOT %t = (s32[], f32[16,4]{1,0}) tuple(%x, %add)
}

ENTRY %main (a: f32[16,4]) -> f32[16,4] {
  %a = f32[16,4]{1,0} parameter(0)
  %norm = f32[]{:T(128)} fusion(%a), kind=kInput, calls=%h, metadata={op_name="jit(learn)/reduce_sum"}
  %library = (f32[16,4]{1,0}, s8[64]{0}) custom-call(%a, %a), custom_call_target="__cublas$lt$matmul"
  %buffer = f32[16,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[]) tuple(%a)
  %w = (s32[]) while(%start), body=%body, {op_name="backward loop of RSSM.observe"}, "known_trip_count":{"n":"64"}
  %one = f32[16,4]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", config={name = "loop_64_1000"}
  ROOT %copy = f32[16,4]{1,0} copy(%a)
}
"""


def test_launches_are_read_from_a_program_loop_by_loop():
    loop = Loop(
        "backward RSSM.observe",
        64,
        (
            Launch("product (Triton)", "jit(learn)/dot_general", 16 * 4 * 2),
            Launch("elementwise", "jit(learn)/add", 16 * 4 * 4),
        ),
    )
    outside = Loop(
        "outside of loops",
        1,
        (
            Launch("reduction", "jit(learn)/reduce_sum", 4),
            Launch("product (library)", "", 16 * 4 * 4 + 64),
            Launch("loop in one kernel", "", 16 * 4 * 4, 64 * 1000),
            Launch("copy", "", 16 * 4 * 4),
        ),
    )
    assert loops(PROGRAM) == [loop, outside]
    found = bench.modelled([loop, outside], 500.0, "h200", Request(launch_us=2, tflops=500, stream_gbs=64))
    written = 64 * (128 + 256) + 4 + 320 + 256 + 256
    assert found == {"launches": 132, "written_gb": written / 1e9, "model_ms": pytest.approx(0.264 + 1 + 0.001)}


TRACE = """
planes {
  name: "/device:GPU:0"
  lines { id: 1 name: "Stream #13(Compute)" events { metadata_id: 1 } events { metadata_id: 1 offset_ps: 9 } }
  lines { id: 2 name: "Stream #14(MemcpyD2D)" events { metadata_id: 1 } }
  lines { id: 3 name: "XLA Ops" events { metadata_id: 1 } }
  event_metadata { key: 1 value { id: 1 name: "step_65536" } }
}
planes { name: "/host:CPU" lines { id: 1 name: "Stream of thought" events { metadata_id: 1 } } }
"""


def test_launches_are_read_from_a_trace(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "2026"
    folder.mkdir(parents=True)
    (folder / "host.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(TRACE))
    assert launched(tmp_path) == 3
    with jax.profiler.trace(str(tmp_path / "cpu")):
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    assert list((tmp_path / "cpu").rglob("*.xplane.pb")) and launched(tmp_path / "cpu") == 0


def test_arguments_reach_the_count(monkeypatch):
    seen: list[Request] = []
    monkeypatch.setattr(bench, "bench_kernels", seen.append)
    line = "bench kernels --sizes 1m 12m --obs image --cards h100 --launch-us 4 --tflops 400 --flags a=b"
    line += " --without scan --seeds 4 --stream-gbs 50"
    assert cli.main(["bench", "kernels"]) == cli.main(line.split()) == 0
    assert seen == [
        Request(["1m"], ["vector", "image"], ["h200"], 2.0, 500.0, 100.0, [], []),
        Request(["1m", "12m"], ["image"], ["h100"], 4.0, 400.0, 50.0, ["a=b"], ["scan"], seeds=4),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--without", "spell"], "without: expected rewrites among .*scan.*, got spell"),
        (["--flags", "spell"], "--flags: expected NAME=VALUE, got 'spell'"),
        ([], "expected XLA's CUDA compiler.*dreamer\\[aot\\]"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, message, capsys):
    assert cli.main(["bench", "kernels", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def count(*arguments: str, json_file: Path) -> dict[str, tuple[int, int]]:
    """(trips, launches in each) of the loops of the 1m vector update, by name."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(COMPILER), str(ROOT)])}
    command = [sys.executable, "-m", "dreamer", "bench", "kernels", "--obs", "vector", "--json", str(json_file)]
    subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True)
    rows = json.loads(json_file.read_text())["rows"]
    titles = [name.partition(": ")[2].partition(", ") for name in rows if ": " in name]
    return {name: (int(shape.split(" x ")[0]), int(shape.split(" x ")[1])) for shape, _, name in titles}


@pytest.mark.skipif(not COMPILER.is_dir(), reason="no CUDA compiler for this system")
def test_an_update_has_no_more_launches_than_it_had(tmp_path):
    found = count("--without", "in_one_kernel", "in_few_kernels", json_file=tmp_path / "found.json")
    assert found.keys() == MOST.keys()
    for name, (times, launches) in found.items():
        assert times == MOST[name][0] and launches <= MOST[name][1], f"{name}: {times} x {launches}, was {MOST[name]}"


SMALL = """
import sys
from learner_data import small_config
from test_loop_kernels import CONTINUOUS, WIDE
from dreamer.bench import bench_kernels as bench
from dreamer.bench.launches import loops
config = small_config(model=WIDE)
agent = bench.agent_for_gpu(CONTINUOUS, config, sys.argv[1:])
compiled = bench.compile_dispatch(agent, config, "h100", {})
for loop in sorted(loops(compiled.as_text()), key=lambda loop: loop.title.partition(", ")[2]):
    print(*(sum(launch.kind == kind for launch in loop.launches) for kind in ("loop in one kernel", "part of a step")))
"""


@pytest.mark.parametrize(
    ("without", "kernels"),
    [
        # Observe, its backward pass and imagine; around them is no loop any more.
        ((), ["3 0"]),
        # One for each product that waits for another: five in a step of observe, forward and back, seven in a dream's;
        # none outside of loops.
        (("in_one_kernel",), ["0 7", "0 5", "0 5", "0 0"]),
    ],
    ids=["one kernel", "few kernels"],
)
@pytest.mark.skipif(not COMPILER.is_dir(), reason="no CUDA compiler for this system")
def test_loops_of_a_small_model_compile_to_kernels_of_our_own(without, kernels):
    places = [COMPILER, ROOT, ROOT / "tests"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SMALL, *without]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == kernels


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER.is_dir(), reason="no CUDA compiler for this system")
def test_an_update_of_the_smallest_size_has_no_loop_of_launches(tmp_path):
    found = count(json_file=tmp_path / "found.json")
    assert found.keys() == {"outside of loops"} and found["outside of loops"][1] <= 570, found


@pytest.mark.slow
@pytest.mark.parametrize("lever", ["scan", "square_sums", "recurrence"])
@pytest.mark.skipif(not COMPILER.is_dir(), reason="no CUDA compiler for this system")
def test_each_lever_is_seen_in_the_count(lever, tmp_path):
    found = count("--without", lever, "in_one_kernel", "in_few_kernels", json_file=tmp_path / "found.json")
    assert any(launches > MOST.get(name, (1, 0))[1] for name, (_, launches) in found.items()), found
