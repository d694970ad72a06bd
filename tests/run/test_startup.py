"""Where the time to the first update went."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

from tiny_runs import as_for_users, share_agents, tiny_config

from dreamer.records.meters import StartupTimer, process_start
from dreamer.run.loop import Run
from dreamer.run.signals import StopRequest
from dreamer.terminal import Console


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_are_booked_one_after_another():
    clock = Clock()
    startup = StartupTimer(97.0, clock)
    startup.mark("imports")
    for part, seconds, once in (("a", 1, False), ("b", 2, True), ("b", 4, True), ("a", 0.5, False), ("c", 0.01, False)):
        clock.now += seconds
        startup.mark(part, once)
    clock.now += 8
    # The second b was not booked: its 4 seconds went to the mark that followed.
    assert startup.finish("d") == "18.5 s to the first update: imports 3.0, a 5.5, b 2.0, d 8.0"
    startup.mark("late")
    assert startup.finish("d") is None


def test_the_process_was_started_not_long_ago():
    assert 0 < time.time() - process_start() < 24 * 3600


def test_a_run_says_so_once(monkeypatch, tmp_path):
    share_agents(monkeypatch)
    output = io.StringIO()
    off = {"run__eval_every": None, "run__report_every": None, "run__final_eval": False, "run__agent_steps": 60}
    config = tiny_config(logdir=str(tmp_path), run__checkpoint_every=None, **off)
    begun = time.time()
    run = Run(config, None, Console(file=output, width=200), startup=StartupTimer(begun - 5))
    try:
        run.loop(StopRequest())
    finally:
        run.close()
    ((total, parts),) = re.findall(r"^([\d.]+) s to the first update: (.*)$", output.getvalue(), flags=re.M)
    assert 5 <= float(total) <= time.time() - begun + 5.1
    found = dict(part.rsplit(" ", 1) for part in parts.split(", "))
    # Nobody marked the imports here: their five seconds went to what came first.
    assert float(found.pop("environments")) >= 5
    assert set(found) <= {"networks", "initial weights", "first action", "filling replay", "first update"}
    assert abs(float(total) - 5 - sum(map(float, found.values()))) < 1.0


CACHED = """
import jax, jax.numpy as jnp
from dreamer import compiler, kernels

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

def function(x, y):
    kept = [x * i @ y for i in range(1, 11)]
    total = 0.0
    for product in reversed(kept):
        total = jnp.maximum(product, 1 - total)
    return total.sum()

arguments = jnp.ones((4096, 16)), jnp.ones((16, 1024))
program = jax.jit(function, compiler_options=compiler.options(kernels.current())).lower(*arguments).compile()
print(program.memory_analysis().temp_size_in_bytes, "/jax/compilation_cache/cache_hits" in events)
"""


def test_programs_with_much_temporary_memory_come_from_the_compilation_cache(tmp_path):
    """As training compiles them: XLA has options with which a program cannot be written."""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-W", "error:Error:UserWarning", "-c", CACHED]
    for expected in ("False", "True"):
        done = subprocess.run(command, env=as_for_users(**settings), check=True, capture_output=True, text=True)
        temporary, hit = done.stdout.split()
        assert int(temporary) > 100e6 and hit == expected
