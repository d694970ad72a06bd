"""The benchmark of the update: dispatches, the protocol, turns."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from dreamer import cli
from dreamer.bench import bench_update as bench

# The command


class FakeProgram:
    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> tuple[float, float]:
        wall = self.times.pop(0)
        return wall, wall / 2

    def facts(self) -> dict[str, Any]:
        return {"compile_s": 1.0, "temp_mb": 2.0}


def test_the_protocol_is_one_update_for_each_line(capsys):
    program = FakeProgram(3.0, 4.0, 5.0)
    bench.serve(program, io.StringIO("\n\nq\n\n"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [program.facts(), {"ms": 3.0, "cpu_ms": 1.5}, {"ms": 4.0, "cpu_ms": 2.0}]
    assert program.times == [5.0]


def test_programs_take_turns_and_ratios_are_paired():
    figures = bench.measure({"update": FakeProgram(1, 2, 9), "plain": FakeProgram(3, 4, 27)}, 3)
    assert figures["update"]["ms"] == 2 and figures["plain"]["ms"] == 4
    assert figures["update"]["speedup"] == figures["update"]["cpu_speedup"] == 3
    assert figures["update"]["ms_quartiles"] == [1.5, 5.5] and figures["plain"]["speedup"] == 1


def test_arguments_reach_the_benchmark(monkeypatch):
    seen: list[bench.Request] = []
    monkeypatch.setattr(bench, "bench_update", lambda request: seen.append(request))
    line = "bench update --size 12m --obs image --updates-per-dispatch 4 --seeds 2 --against plain --protocol"
    line += " --without scan"
    assert cli.main(["bench", "update"]) == cli.main(line.split()) == 0
    assert seen == [
        bench.Request(without=[]),
        bench.Request("12m", "image", 4, 2, against="plain", without=["scan"], protocol=True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "seeds"), [(None, None), (2, 2)])
def test_the_benchmark_measures(dispatch, seeds):
    program = bench.Program("1m", "vector", dispatch, seeds)
    wall, cpu = program()
    assert wall > 0 and cpu > 0 and program.facts()["params"] == 640_867
    assert np.ravel(program.state["updates"]).tolist() == [(bench.WARM_UP + 1) * (dispatch or 1)] * (seeds or 1)
