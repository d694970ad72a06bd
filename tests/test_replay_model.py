"""The buffer against a slow model of it: plain Python lists, driven by random operations."""

import json
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

from dreamer.replay import Replay, ReplayError, Selection, persistence, prune
from dreamer.types import Field

FIELDS = {
    "serial": Field((), np.dtype(np.int32)),
    "deter": Field((2,), np.dtype(ml_dtypes.bfloat16)),
    "stoch": Field((1,), np.dtype(np.uint8)),
}


class ReplayMachine(RuleBasedStateMachine):
    """Per environment, `history` lists every step ever made; the ring holds the last `rows` of it."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.serial = self.mark = 0
        self.pending: list[Selection] = []
        self.manifests: list[dict] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(persistence, "CHUNK_BYTES", 120)
        self.patch.setattr(os, "fsync", lambda descriptor: None)  # no test of ours cuts the power

    def teardown(self):
        self.patch.undo()
        self.folder.cleanup()

    @initialize(num_envs=st.integers(1, 3), rows=st.integers(4, 12), length=st.integers(2, 4), limit=st.integers(1, 6))
    def begin(self, num_envs, rows, length, limit):
        self.num_envs, self.rows, self.length, self.limit = num_envs, rows, length, limit
        self.history = [[] for _ in range(num_envs)]
        self.tails = [0] * num_envs
        self.queue: list[tuple[int, int]] = []  # (env, row) of complete stretches not served yet
        self.cut = [0] * num_envs
        self.replay = self.build(rows)

    def build(self, rows: int) -> Replay:
        return Replay(FIELDS, self.num_envs, self.num_envs * rows, self.length, seed=5, online_limit=self.limit)

    def valid_starts(self) -> set[tuple[int, int]]:
        ends = [len(steps) - self.length for steps in self.history]
        return {(e, r) for e in range(self.num_envs) for r in range(self.tails[e], ends[e] + 1)}

    @rule(count=st.integers(1, 9), data=st.data())
    def add(self, count, data):
        some = data.draw(st.none() | st.lists(st.integers(0, self.num_envs - 1), unique=True, min_size=1))
        envs = list(range(self.num_envs)) if some is None else some
        for _ in range(count):
            serials = [self.serial + i for i in range(len(envs))]
            self.serial += len(envs)
            for env, serial in zip(envs, serials, strict=True):
                self.history[env].append({"serial": serial, "deter": serial % 100, "stoch": serial % 256})
                self.tails[env] = max(self.tails[env], len(self.history[env]) - self.rows)
            for env in sorted(envs):
                if len(self.history[env]) == self.cut[env] + self.length:
                    self.queue.append((env, self.cut[env]))
                    self.cut[env] += self.length - 1
            self.queue = self.queue[-self.limit :]
            step = {
                "serial": np.array(serials, np.int32),
                "deter": np.repeat(np.array(serials)[:, None] % 100, 2, 1).astype(ml_dtypes.bfloat16),
                "stoch": (np.array(serials)[:, None] % 256).astype(np.uint8),
            }
            self.replay.add(step, None if some is None else envs)

    @rule(batch=st.integers(1, 5))
    def select(self, batch):
        valid = self.valid_starts()
        assert self.replay.starts == len(valid)
        if not valid:
            with pytest.raises(ReplayError):
                self.replay.select(batch)
            return
        selection = self.replay.select(batch)
        drawn = list(zip(selection.env.tolist(), selection.row.tolist(), strict=True))
        assert set(drawn) <= valid
        waiting = [item for item in self.queue if item in valid]
        served = waiting[:batch]
        assert drawn[: len(served)] == served
        assert selection.online.tolist() == [i < len(served) for i in range(batch)]
        self.queue = waiting[len(served) :]
        self.check_content(selection)
        self.pending.append(selection)

    @precondition(lambda self: self.pending)
    @rule(index=st.integers(0, 100), newest_first=st.booleans())
    def write(self, index, newest_first):
        selection = self.pending.pop(-1 if newest_first else index % len(self.pending))
        marks = np.arange(self.mark, self.mark + len(selection) * (self.length - 1)).reshape(len(selection), -1)
        self.mark += marks.size
        values = {"deter": np.stack([marks % 90, marks % 90], -1).astype(np.float32), "stoch": (marks % 256)[..., None]}
        touched = set()
        for b, (env, row) in enumerate(zip(selection.env, selection.row, strict=True)):
            for t in range(self.length - 1):
                if row + 1 + t >= self.tails[env]:
                    step = self.history[env][row + 1 + t]
                    step["deter"], step["stoch"] = marks[b, t] % 90, marks[b, t] % 256
                    touched.add((env, row + 1 + t))
        assert self.replay.write(selection, {k: v.astype(FIELDS[k].dtype) for k, v in values.items()}) == len(touched)

    @rule(rows=st.none() | st.integers(4, 14), keep=st.booleans())
    def save_and_go_on_from_disk(self, rows, keep):
        """A new buffer, of another capacity sometimes, takes over; `keep`: the old one goes on instead."""
        manifest = json.loads(json.dumps(self.replay.save(self.path)))
        self.manifests = [*self.manifests, manifest][-2:]
        prune(self.path, self.manifests)
        if keep:
            return
        loaded = self.build(rows or self.rows)
        loaded.load(self.path, manifest)
        if rows in (None, self.rows) and self.valid_starts():
            # Both draw the same, then go their own ways.
            ours, theirs = self.replay.select(7), loaded.select(7)
            assert (ours.env.tolist(), ours.row.tolist()) == (theirs.env.tolist(), theirs.row.tolist())
            self.queue = [item for item in self.queue if item in self.valid_starts()][7:]
        self.rows, self.replay = rows or self.rows, loaded
        for env, steps in enumerate(self.history):
            self.tails[env] = max(self.tails[env], len(steps) - self.rows)

    def check_content(self, selection: Selection):
        batch = self.replay.gather(selection)
        for b, (env, row) in enumerate(zip(selection.env, selection.row, strict=True)):
            steps = self.history[env][row : row + self.length]
            assert batch["serial"][b].tolist() == [s["serial"] for s in steps]
            assert batch["deter"][b].astype(int).tolist() == [[s["deter"]] * 2 for s in steps]
            assert batch["stoch"][b].tolist() == [[s["stoch"]] for s in steps]

    @invariant()
    def everything_is_as_the_model_has_it(self):
        valid = sorted(self.valid_starts())
        assert len(self.replay) == sum(len(s) - t for s, t in zip(self.history, self.tails, strict=True))
        if valid:
            env, row = np.array(valid, np.int64).T
            self.check_content(Selection(env, row, np.zeros(len(valid), bool), self.length))
        for selection in self.pending:
            if (selection.row < np.array(self.tails)[selection.env]).any():
                with pytest.raises(ReplayError, match="overwritten"):
                    self.replay.gather(selection)


def drive(examples: int, steps: int) -> None:
    options = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(ReplayMachine, settings=options)


def test_random_operations_agree_with_the_model():
    drive(examples=60, steps=40)


@pytest.mark.slow
def test_random_operations_agree_with_the_model_for_long():
    drive(examples=1000, steps=100)
