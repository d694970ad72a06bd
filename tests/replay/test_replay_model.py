"""The buffer against a slow model of it: plain Python lists, driven by random operations, on every storage."""

import copy
import json
import math
import os
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dreamer.config import SelectionConfig
from dreamer.replay import Replay, ReplayError, Selection, disk, persistence, prune, versions
from dreamer.types import Field

FIELDS = {
    "serial": Field((), np.dtype(np.int32)),
    "is_last": Field((), np.dtype(bool)),
    "deter": Field((2,), np.dtype(ml_dtypes.bfloat16), latent=True),
    "stoch": Field((1,), np.dtype(np.uint8), latent=True),
}
MIXTURES = [
    SelectionConfig(),
    SelectionConfig(uniform=0, prioritised=1),
    SelectionConfig(uniform=0, prioritised=1, priority_zero_on_sample=True),
    SelectionConfig(uniform=1, prioritised=2, recency=1, recency_half_life=5),
]
SMALL = [(persistence, "CHUNK_BYTES", 120), (disk, "SEGMENT_BYTES", 30), (disk, "SEGMENTS", 3)]
SMALL += [(versions, "EXTENT_BYTES", 20), (versions, "EXTENTS", 4), (disk, "VERIFIED_BYTES", 10**9)]


class Model:
    """Per environment, `history` lists every step ever made; the ring holds those from `tails` on."""

    def __init__(self, num_envs: int, rows: int, length: int, limit: int):
        self.rows, self.length, self.limit = rows, length, limit
        self.history: list[list[dict]] = [[] for _ in range(num_envs)]
        self.tails = [0] * num_envs
        self.queue: list[tuple[int, int]] = []  # (env, row) of complete stretches not served yet
        self.cut = [0] * num_envs
        self.priorities: dict[tuple[int, int], float] = {}  # of starts that have one; others: infinite

    def shrink(self) -> None:
        for env, steps in enumerate(self.history):
            self.tails[env] = max(self.tails[env], len(steps) - self.rows)

    def starts(self) -> set[tuple[int, int]]:
        ends = [len(steps) - self.length for steps in self.history]
        return {(e, r) for e, end in enumerate(ends) for r in range(self.tails[e], end + 1)}

    def priority(self, start: tuple[int, int]) -> float:
        return self.priorities.get(start, math.inf)


class ReplayMachine(RuleBasedStateMachine):
    storage = "host"

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.path = Path(self.folder.name) / "replay"
        self.serial = self.mark = 0
        self.pending: list[Selection] = []
        self.saves: list[tuple[dict, Model, dict]] = []
        self.patch = pytest.MonkeyPatch()
        for module, name, value in SMALL:
            self.patch.setattr(module, name, value)
        self.patch.setattr(os, "fsync", lambda descriptor: None)  # no test of ours cuts the power

    def teardown(self):
        self.patch.undo()
        self.folder.cleanup()

    @initialize(
        num_envs=st.integers(1, 3),
        rows=st.integers(4, 12),
        length=st.integers(2, 4),
        limit=st.integers(1, 6),
        mixture=st.sampled_from(MIXTURES),
    )
    def begin(self, num_envs, rows, length, limit, mixture):
        if self.storage == "device":  # one shape, so that little is compiled
            num_envs, rows = 2, 9
        self.model, self.mixture = Model(num_envs, rows, length, limit), mixture
        self.replay = self.build(rows)

    def build(self, rows: int) -> Replay:
        model = self.model
        replay = Replay(
            FIELDS,
            len(model.history),
            len(model.history) * rows,
            model.length,
            seed=5,
            selection=self.mixture,
            storage=self.storage,
            folder=self.path,
        )
        replay._selector.queue._limit = model.limit  # of a run it is larger than what is collected here
        return replay

    @rule(count=st.integers(1, 9), data=st.data())
    def add(self, count, data):
        model, num_envs = self.model, len(self.model.history)
        some = data.draw(st.none() | st.lists(st.integers(0, num_envs - 1), unique=True, min_size=1))
        envs = list(range(num_envs)) if some is None else some
        for _ in range(count):
            serials = [self.serial + i for i in range(len(envs))]
            self.serial += len(envs)
            for env, serial in zip(envs, serials, strict=True):
                step = {"serial": serial, "deter": serial % 100, "stoch": serial % 256, "is_last": serial % 7 == 0}
                model.history[env].append(step)
            model.shrink()
            for env in sorted(envs):
                if len(model.history[env]) == model.cut[env] + model.length:
                    model.queue.append((env, model.cut[env]))
                    model.cut[env] += model.length - 1
            model.queue = model.queue[-model.limit :]
            step = {
                "serial": np.array(serials, np.int32),
                "is_last": np.array(serials) % 7 == 0,
                "deter": np.repeat(np.array(serials)[:, None] % 100, 2, 1).astype(ml_dtypes.bfloat16),
                "stoch": (np.array(serials)[:, None] % 256).astype(np.uint8),
            }
            self.replay.add(step, None if some is None else envs)

    @rule(batch=st.integers(1, 5))
    def select(self, batch):
        valid = self.model.starts()
        assert self.replay.starts == len(valid)
        if not valid:
            with pytest.raises(ReplayError):
                self.replay.select(batch)
            return
        selection = self.replay.select(batch)
        drawn = list(zip(selection.env.tolist(), selection.row.tolist(), strict=True))
        assert set(drawn) <= valid
        waiting = [item for item in self.model.queue if item in valid]
        served = waiting[:batch]
        assert drawn[: len(served)] == served
        assert selection.online.tolist() == [i < len(served) for i in range(batch)]
        self.model.queue = waiting[len(served) :]
        if self.mixture.prioritised and not self.mixture.uniform:
            self.check_priorities(drawn[len(served) :], valid)
        self.check_content(selection)
        self.pending.append(selection)

    def check_priorities(self, drawn, valid):
        fresh = {start for start in valid if self.model.priority(start) == math.inf}
        first, rest = drawn[: len(fresh)], drawn[len(fresh) :]
        assert set(first) <= fresh and len(set(first)) == len(first)
        ranked = [start for start in valid if 0 < self.model.priority(start) < math.inf]
        if fresh or ranked:
            assert set(rest) <= set(ranked or fresh)
            if self.mixture.priority_zero_on_sample:
                self.model.priorities |= dict.fromkeys(drawn, 0)

    @precondition(lambda self: self.pending)
    @rule(index=st.integers(0, 100), newest_first=st.booleans(), both=st.booleans())
    def write(self, index, newest_first, both):
        model = self.model
        selection = self.pending.pop(-1 if newest_first else index % len(self.pending))
        marks = np.arange(self.mark, self.mark + len(selection) * (model.length - 1)).reshape(len(selection), -1)
        self.mark += marks.size
        values = {"deter": np.stack([marks % 90, marks % 90], -1).astype(np.float32), "stoch": (marks % 256)[..., None]}
        values = values if both else {"stoch": values["stoch"]}
        touched = set()
        for b, (env, row) in enumerate(zip(selection.env.tolist(), selection.row.tolist(), strict=True)):
            for t in range(model.length - 1):
                if row + 1 + t >= model.tails[env]:
                    step = model.history[env][row + 1 + t]
                    step |= {"deter": marks[b, t] % 90, "stoch": marks[b, t] % 256} if both else {}
                    step["stoch"] = marks[b, t] % 256
                    touched.add((env, row + 1 + t))
        assert self.replay.write(selection, {k: v.astype(FIELDS[k].dtype) for k, v in values.items()}) == len(touched)

    @precondition(lambda self: self.pending)
    @rule(index=st.integers(0, 100), data=st.data())
    def prioritize(self, index, data):
        selection = self.pending[index % len(self.pending)]
        if not self.replay.prioritised:
            return
        values = data.draw(st.lists(st.integers(-1, 3), min_size=len(selection), max_size=len(selection)))
        trained = np.repeat(np.array(values, np.float32)[:, None], self.model.length - 1, 1)
        self.replay.prioritize(selection, trained)
        for env, row, value in zip(selection.env.tolist(), selection.row.tolist(), values, strict=True):
            if row >= self.model.tails[env]:
                self.model.priorities[env, row] = max(value, 0)

    @rule(data=st.data())
    def abandon(self, data):
        envs = data.draw(st.lists(st.integers(0, len(self.model.history) - 1), unique=True))
        self.replay.abandon(envs)
        for env in envs:
            if len(self.model.history[env]) > self.model.tails[env]:
                self.model.history[env][-1]["is_last"] = True

    @rule()
    def save(self):
        manifest = json.loads(json.dumps(self.replay.save(self.path)))
        self.saves = [*self.saves, (manifest, copy.deepcopy(self.model), self.replay.stats())][-2:]
        prune(self.path, [manifest for manifest, _, _ in self.saves])

    @precondition(lambda self: self.saves)
    @rule(rows=st.none() | st.integers(4, 14), older=st.booleans(), prune_newer=st.booleans())
    def go_on_from_a_save(self, rows, older, prune_newer):
        """A new buffer, of another capacity sometimes, goes on from one of the two newest saves."""
        index = 0 if older else -1
        manifest, model, stats = self.saves[index]
        self.model, self.pending = copy.deepcopy(model), []
        rows = rows if rows and self.storage != "device" else model.rows
        self.replay = self.build(rows)
        self.replay.load(self.path, manifest)
        if rows == model.rows:
            found = json.loads(json.dumps(self.replay._selector.save(self.path)))
            assert found == manifest["selector"] and self.replay.stats() == stats
        self.model.rows = rows
        self.model.shrink()
        if older and prune_newer:
            self.saves = self.saves[:1]
            prune(self.path, [manifest])

    def check_content(self, selection: Selection):
        batch = self.replay.gather(selection)
        for b, (env, row) in enumerate(zip(selection.env, selection.row, strict=True)):
            steps = self.model.history[env][row : row + self.model.length]
            assert batch["serial"][b].tolist() == [s["serial"] for s in steps]
            assert batch["is_last"][b].tolist() == [s["is_last"] for s in steps]
            assert batch["deter"][b].astype(int).tolist() == [[s["deter"]] * 2 for s in steps]
            assert batch["stoch"][b].tolist() == [[s["stoch"]] for s in steps]

    @invariant()
    def everything_is_as_the_model_has_it(self):
        model = self.model
        valid = sorted(model.starts())
        assert len(self.replay) == sum(len(s) - t for s, t in zip(model.history, model.tails, strict=True))
        if valid:
            env, row = np.array(valid, np.int64).T
            self.check_content(Selection(env, row, np.zeros(len(valid), bool), model.length))
        for selection in self.pending:
            if (selection.row < np.array(model.tails)[selection.env]).any():
                with pytest.raises(ReplayError, match="overwritten"):
                    self.replay.gather(selection)


def drive(storage: str, examples: int, steps: int) -> None:
    machine = type("Machine", (ReplayMachine,), {"storage": storage})
    options = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=options)


@pytest.mark.parametrize(("storage", "examples"), [("host", 30), ("disk", 30), ("device", 6)])
def test_random_operations_agree_with_the_model(storage, examples):
    drive(storage, examples, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "examples"), [("host", 200), ("disk", 200), ("device", 30)])
def test_random_operations_agree_with_the_model_for_long(storage, examples):
    drive(storage, examples, steps=100)
