"""`dreamer train --plan`: its figures against what a run really has, its labels, and that it allocates nothing."""

from __future__ import annotations

import fractions
import json
import subprocess
import sys
import types

import jax
import pytest
from learner_data import CHEAP
from tiny_runs import tiny_config

from dreamer import cli, compiler
from dreamer.bench import plan, update_estimate
from dreamer.bench.update_estimate import Estimate, Memory, Pace, TracedUpdate, why_not
from dreamer.commands.train import train_config
from dreamer.data.preload import task_spaces
from dreamer.replay import Replay
from dreamer.run.devices import choose_device
from dreamer.run.factories import make_agent, make_replay
from dreamer.terminal import Console
from dreamer.types import replay_fields


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(update_estimate, "_ENVS_SECONDS", 0.02)
    monkeypatch.setattr(update_estimate, "product_rate", lambda dtype, device: 1e9)


@pytest.fixture(scope="module")
def agent():
    return agent_of(tiny_config())


@pytest.fixture(scope="module")
def update(agent):
    return TracedUpdate(tiny_config(), agent)


def agent_of(config):
    return make_agent(config, *task_spaces(config))


def figures(config, seconds=None) -> dict[str, plan.Figure]:
    return {figure.name: figure for figure in plan.make_plan(config, seconds)}


def printed(lines, width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(plan.table(lines))
    assert max(map(len, capture.get().splitlines())) <= width
    return capture.get()


# --- Counted, not measured ----------------------------------------------------------------------


def test_counts_are_those_of_the_run(tmp_path):
    config = tiny_config(logdir=str(tmp_path / "run"), env__num_envs=3, run__checkpoint_keep=4)
    found = figures(config)
    agent = make_agent(config, *task_spaces(config))
    state, replay = agent.init(0), make_replay(config, agent)
    leaves = jax.tree.leaves(state)
    assert found["parameters"].values["parameters"] == sum(x.size for x in jax.tree.leaves(state["params"]))
    assert found["checkpoints"].values["disk_bytes"] == 5 * sum(x.nbytes for x in leaves)
    assert found["replay, a step"].values["bytes"] == replay.nbytes_per_step
    assert found["replay, full"].values["memory_bytes"] == replay.capacity * replay.nbytes_per_step
    assert f"{replay.capacity:,} steps, host storage" in found["replay, full"].how
    assert not (tmp_path / "run").exists(), "a plan leaves nothing behind"
    text = printed(found.values())
    assert "neither compiled nor run: not asked for" in " ".join(text.split())
    assert all(figure.how for figure in found.values())


def test_memory_and_operations_grow_with_the_agents_trained_together(agent, update):
    together = TracedUpdate(tiny_config(run__seeds=3), agent)
    assert (together.agents, update.agents) == (3, 1)
    assert together.flops == pytest.approx(3 * update.flops, rel=0.1)
    given = together.estimated_memory().arguments
    assert given == pytest.approx(3 * update.estimated_memory().arguments, rel=0.01)


def test_a_dispatch_of_several_updates(agent, update):
    config = tiny_config(run__updates_per_dispatch=4, env__num_envs=4, run__train_ratio=16)  # one a step
    several = TracedUpdate(config, agent)
    assert (several.count, update.count) == (4, 1)
    assert several.flops == pytest.approx(update.flops, rel=0.05)


@pytest.mark.parametrize(
    ("envs", "batch", "length", "ratio", "steps"),
    [(1, 2, 8, 16, 200), (3, 2, 8, 5.5, 100), (8, 4, 16, 64, 500), (4, 2, 8, 16, 30), (16, 2, 8, 16, 8)],
)
def test_updates_are_those_of_the_loop(envs, batch, length, ratio, steps):
    config = tiny_config(
        run__agent_steps=steps,
        run__batch_size=batch,
        run__batch_length=length,
        run__train_ratio=ratio,
        env__num_envs=envs,
    )
    done = updates = start = passes = 0
    while done < steps:
        done, passes = done + envs, passes + 1
        if not start and envs * max(passes - length, 0) >= batch * length:
            start = done
        if start:
            updates = (done - start) * fractions.Fraction(ratio) // (batch * length)
    assert plan.schedule(config, preloaded=0) == plan.Schedule(passes, updates)


def test_starts_of_a_real_replay_are_what_the_schedule_takes_them_for(agent):
    replay = Replay(replay_fields(*task_spaces(tiny_config()), agent.extras), 3, 300, 9, 0)
    step = {name: jax.numpy.zeros((3, *field.shape), field.dtype) for name, field in replay.fields.items()}
    filled = 0
    while replay.starts < 2 * 8:
        replay.add(step)
        filled += 1
    assert filled == 8 + -(-2 * 8 // 3)


def test_hours():
    whole = plan.Schedule(passes=3600, updates=1800)
    pace = Pace(envs=2.0, policy=1.0, update=6.0)
    assert plan.hours(whole, pace, shared=True) == 1 + 2 + 3
    assert plan.hours(whole, pace, shared=False) == 1 + 3


# --- Tried, or not ------------------------------------------------------------------------------


def test_an_update_that_fits_is_compiled_and_tried(monkeypatch, update):
    config = tiny_config(run__agent_steps=100)
    monkeypatch.setattr(update_estimate, "product_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr(compiler, "options", lambda target: CHEAP)
    found = figures(config, seconds=0.2)
    memory, speed = found["memory of an update"], found["speed"]
    assert memory.how == "laid out by the compiler for this device"
    assert speed.how.startswith("trial of 0.2 seconds") and "at least" not in found["time to the end"].text
    sizes = memory.values
    estimate = update.estimated_memory()
    assert sizes["arguments_bytes"] == estimate.arguments and sizes["results_bytes"] >= estimate.results
    assert sizes["device_bytes"] > estimate.arguments + estimate.results
    seconds = speed.values
    assert all(value > 0 for value in seconds.values())
    passes, updates = 50, found["updates"].values["updates"]
    expected = passes * (seconds["envs_seconds"] + seconds["policy_seconds"]) + updates * seconds["update_seconds"]
    assert found["time to the end"].values["hours"] == pytest.approx(expected / 3600)


@pytest.mark.parametrize(
    ("needed", "free", "seconds", "said"),
    [(60, 100, 9, ""), (80, 100, 1, "80 B, 100 B are free"), (1, 100, 11, "more than 11 seconds")],
)
def test_when_an_update_is_tried(needed, free, seconds, said):
    assert said in why_not(needed, free, seconds) and bool(said) == bool(why_not(needed, free, seconds))


def estimate(update):
    return update_estimate.estimate_update(tiny_config(), update, choose_device("cpu"), 30.0, lambda text: None)


def test_an_update_that_would_take_too_long_is_reckoned(monkeypatch, update):
    monkeypatch.setattr(update_estimate, "product_rate", lambda dtype, device: 1e3)
    found = estimate(update)
    assert found.lowest and found.pace.update == update.flops / 1e3 and found.pace.envs > 0
    assert "one would take more than" in found.memory_how and "at the 1000 FLOP/s measured here" in found.pace_how
    config, whole = tiny_config(), plan.Schedule(10, 5)
    lines = plan.update_figures(config, update, whole, found, choose_device("cpu"))
    assert "at least" in lines[-1].text and "at least" in lines[-2].text


def test_an_update_that_fails_is_reckoned_and_the_reason_told(monkeypatch, update):
    def fail(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")

    monkeypatch.setattr(TracedUpdate, "compiled_memory", fail)
    monkeypatch.setattr(update_estimate, "product_rate", lambda dtype, device: 1e12)
    found = estimate(update)
    assert found.lowest and found.memory_how.endswith("it failed here: RESOURCE_EXHAUSTED: Out of memory")


@pytest.mark.parametrize("seeds", [None, 3])
def test_what_does_not_fit_is_loud(agent, update, seeds):
    device = choose_device("cpu")
    long = {"run__agent_steps": 10**12, "replay__storage": "host", "env__num_envs": 7, "run__seeds": seeds}
    _, found = plan.replay_figures(tiny_config(**long, replay__capacity=10**12), agent, 0, device)
    assert found.loud and "too much; --replay.capacity" in found.text
    largest = int(found.text.split("--replay.capacity ")[1].split()[0])
    for more, loud in ((0, False), (7, True)):
        config = tiny_config(**long, replay__capacity=largest + more)
        assert plan.replay_figures(config, agent, 0, device)[1].loud == loud
    huge = Estimate(Memory(10**15, 0, 0), "", Pace(1, 1, 1), "", lowest=True)
    line, *_ = plan.update_figures(tiny_config(), update, plan.Schedule(1, 1), huge, device)
    assert line.loud and "1000.0 TB of" in line.text


def test_the_command_plans_and_does_not_train(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(plan, "make_plan", lambda config, say: seen.append(config) or [])
    monkeypatch.setitem(sys.modules, "dreamer.run.training", types.SimpleNamespace())
    monkeypatch.setattr(plan, "reuse_freed_memory", lambda: None)
    assert cli.main(["train", "--configs", "debug", "--plan", "--run.platform", "cpu"]) == 0
    assert seen == [train_config(["--configs", "debug", "--run.platform", "cpu"])]


# --- In processes of their own ------------------------------------------------------------------

LARGE = """
import json
from dreamer.bench import plan, update_estimate
from dreamer.presets import load_config
update_estimate._ENVS_SECONDS = 0.1
lines = plan.make_plan(load_config(["atari100k", "size200m"]), None)
values = {line.name: dict(line.values) for line in lines}
most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([values, int(most.split()[1]) * 1024]))
"""


def test_a_plan_of_the_largest_preset_allocates_neither_replay_nor_update():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values, most = json.loads(done.stdout)
    assert values["memory of an update"]["device_bytes"] > 10e9 and values["replay, full"]["memory_bytes"] > 3e9
    assert values["work of an update"]["flops"] > 1e13 and 150e6 < values["parameters"]["parameters"] < 200e6
    assert most < 800e6


MEASURE = """
import ctypes, gc, json, sys
from dreamer.bench.update_estimate import TimedDispatch, TracedUpdate, product_rate
from dreamer.bench.bench_update import random_batch
from dreamer.presets import load_config
from dreamer.run.devices import choose_device
from dreamer.data.preload import task_spaces
from dreamer.run.factories import make_agent

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def settled():
    # Memory that was freed goes back to the kernel, and the peak is counted from now on.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    return resident("VmRSS")

# Blocks of 1 MB and more come from the kernel and go back to it; otherwise the C library may keep up to 64 MB.
mmap_threshold = -3
ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)
config = load_config(sys.argv[1:], {"run.platform": "cpu"})
device = choose_device("cpu")
agent = make_agent(config, *task_spaces(config))
update = TracedUpdate(config, agent)
memory, estimate = update.compiled_memory(), update.estimated_memory()
agent.init(0), random_batch(agent, config), product_rate("float32", device, 0.1)  # their programs are compiled
before = settled()
turn = TimedDispatch(update._compiled, agent.init(0), random_batch(agent, config))
arguments = settled() - before
for _ in range(3):  # threads have their stacks then
    turn()
begun = settled()
turn()
peak = arguments + resident("VmHWM") - begun
print(json.dumps({"plan": memory.total, "estimate": estimate.total, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("configs", [["quickstart"], ["gym", "cpu"]])
def test_memory_of_an_update_is_what_the_process_grows_by(configs):
    done = subprocess.run([sys.executable, "-c", MEASURE, *configs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plan"] == pytest.approx(found["peak"], rel=0.25), found
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.4), found


@pytest.mark.slow
def test_the_command_plans_the_largest_preset_within_two_minutes():
    command = [sys.executable, "-m", "dreamer", "train", "--configs", "atari100k", "size200m", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "time to the end" in done.stdout, done.stdout + done.stderr
