"""What leaves the device while a run goes on, and what is compiled: counted over whole tiny runs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from tiny_runs import share_agents, tiny_config

from dreamer import transfer
from dreamer.config import Config
from dreamer.records.meters import Aggregator, Packed
from dreamer.run.loop import Run
from dreamer.run.seeds import SeedRuns
from dreamer.run.signals import StopRequest
from dreamer.terminal import Console

Door = collections.Counter[str]


@contextlib.contextmanager
def watched_door() -> Iterator[Door]:
    """Counts "reads" through the door, and "elsewhere" all arrays whose numbers come to the host some other way."""
    counts: Door = collections.Counter()
    read, numbers = transfer.read, ArrayImpl._value
    inside = False

    def counted(tree: Any) -> Any:
        nonlocal inside
        counts["reads"] += 1
        inside = True
        try:
            return read(tree)
        finally:
            inside = False

    def fetched(array: ArrayImpl) -> np.ndarray:
        counts["elsewhere"] += not inside
        return numbers.fget(array)

    def converted(array: Any, *arguments: Any, **options: Any) -> np.ndarray:
        # On a CPU, numpy looks into the device's memory without asking.
        counts["elsewhere"] += isinstance(array, jax.Array) and not inside
        return asarray(array, *arguments, **options)

    asarray = np.asarray
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "read", counted)
        patch.setattr(ArrayImpl, "_value", property(fetched))
        patch.setattr(np, "asarray", converted)
        yield counts


@dataclasses.dataclass
class Pass:
    """One pass of the loop: reads, numbers that came elsewhere, dispatches, whether metrics were logged."""

    reads: int
    elsewhere: int
    dispatches: int
    logged: bool


def passes(config: Config, folder: Path) -> list[Pass]:
    """What every pass of a run did, from its first to its last."""
    found: list[Pass] = []
    run = Run(dataclasses.replace(config, logdir=str(folder)), None, Console(quiet=True))
    counts: Door = collections.Counter()

    def spied(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return method(*arguments)

        setattr(owner, name, call)

    spied(run.learner, "update")
    spied(run, "_log_metrics")
    record = run.record

    def recorded(save: bool) -> None:
        record(save)
        found.append(Pass(door["reads"], door["elsewhere"], counts["update"], bool(counts["_log_metrics"])))
        door.clear()
        counts.clear()

    run.record = recorded
    try:
        with watched_door() as door:
            run.loop(StopRequest())
    finally:
        run.close()
    return found


def quiet_config(**overrides: Any) -> Config:
    """A tiny run of nothing but the loop."""
    off = {"run__eval_every": None, "run__report_every": None, "run__checkpoint_every": None, "run__final_eval": False}
    return tiny_config(**(off | overrides))


def test_the_door_counts():
    with watched_door() as door:
        assert transfer.read({"a": jnp.ones(3)})["a"].sum() == 3
        assert (door["reads"], door["elsewhere"]) == (1, 0)
        float(jnp.ones(()))
        bool(jnp.ones(()))
        np.asarray(jnp.ones(2) + 1)
        jax.device_get(jnp.ones(2) + 2)
        assert door["elsewhere"] == 4


@pytest.mark.parametrize(
    ("ratio", "together", "dispatches", "storage"),
    [
        (2, 1, 0.25, "host"),
        (8, 1, 1, "host"),
        (32, 1, 4, "device"),
        pytest.param(56, 3, 3, "host", marks=pytest.mark.slow),
        pytest.param(24, 3, 1, "device", marks=pytest.mark.slow),
    ],
)
def test_one_read_for_each_step_of_the_environments(monkeypatch, tmp_path, ratio, together, dispatches, storage):
    """And one for each further dispatch of the same step, whose latents must be there first, and for each log line."""
    share_agents(monkeypatch)
    config = quiet_config(
        run__train_ratio=ratio, run__updates_per_dispatch=together, run__agent_steps=120, replay__storage=storage
    )
    found = passes(config, tmp_path)
    assert len(found) == 60
    # Batches of 2 x 8 and two environments: an eighth of the ratio in updates each pass; 7 go as 3, 3 and 1.
    assert sum(one.dispatches for one in found[-20:]) == 20 * dispatches
    for one in found:
        assert one.elsewhere == 0
        assert one.reads == 1 + max(0, one.dispatches - 1) + one.logged, one


@pytest.mark.slow
def test_several_seeds_share_the_read(tmp_path):
    config = quiet_config(run__train_ratio=8, run__seeds=2, run__agent_steps=120, logdir=str(tmp_path))
    runs = SeedRuns(config, None, Console(quiet=True))
    found: list[tuple[int, int, bool]] = []
    logged: Door = collections.Counter()
    for run in runs.runs:
        log = run._log_metrics
        run._log_metrics = lambda log=log: (logged.update(lines=1), log())
    first = runs.runs[0]
    record = first.record

    def recorded(save: bool) -> None:
        found.append((door["reads"] - logged["lines"], door["elsewhere"], first.schedule.started))
        door.clear()
        logged.clear()
        record(save)

    first.record = recorded
    try:
        with watched_door() as door:
            runs.loop(StopRequest())
    finally:
        runs.close()
    assert len(found) == 60 and found[-1][2]
    assert {(reads, elsewhere) for reads, elsewhere, _ in found} == {(1, 0)}


def test_packed_metrics_count_as_those_added_one_by_one():
    apart, packed = Aggregator(), Aggregator()
    for values in ((1.0, 2.0), (3.0, 7.0)):
        apart.add({"a": values[0], "b_last": values[1]}, "train/")
        packed.add(Packed(("a", "b_last"), jnp.array(values)), "train/")
    assert packed.result() == apart.result() == {"train/a": 2.0, "train/b_last": 7.0}
    packed.add(Packed(("a", "b_last"), np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])))
    assert packed.result() == {"a": 2.0, "b_last": 6.0}


@pytest.mark.parametrize("together", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_program_is_compiled_once(tmp_path, together):
    traced: collections.Counter[str] = collections.Counter()
    late: list[str] = []
    # Four updates are due in each step: three together and one.
    config = quiet_config(run__train_ratio=32, run__updates_per_dispatch=together, run__agent_steps=200)
    run = Run(dataclasses.replace(config, logdir=str(tmp_path)), None, Console(quiet=True))

    def note(event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            traced[str(about["fun_name"])] += 1
            if 100 < run.agent_steps < 200:
                late.append(str(about["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        run.loop(StopRequest())
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
        run.close()
    programs = {name: traced[name] for name in ("act", "learn", "learn_in_turn")}
    assert programs == {"act": 1, "learn": 1, "learn_in_turn": int(together > 1)}, traced
    assert late == []
