"""Checkpoints: what is saved comes back bit for bit, damage is noticed, nothing valid is lost."""

import collections
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer.records.system import versions
from dreamer.replay import Replay
from dreamer.saves import snapshot
from dreamer.saves.checkpoint import Checkpointer, CheckpointError, CheckpointMismatchError, CheckpointWarning
from dreamer.types import TRANSITION_FIELDS, Field


def make_state(value=1.0):
    return {
        "params": {
            "enc/rgb": {"w": jnp.full((3, 4), value), "b": jnp.arange(4, dtype=jnp.bfloat16)},
            "dec": {0: np.ones(2)},
        },
        "optimizer": {"empty": jnp.zeros((0, 3)), "step": jnp.asarray(7, jnp.int32)},
        "key": np.array([3, 2**32 - 1], np.uint32),
        "flag": np.asarray(True),
    }


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), y, strict=True)


def saved(tmp_path, steps, **kwargs):
    checkpointer = Checkpointer(tmp_path, **{"keep": 10, **kwargs})
    for step in steps:
        checkpointer.save(step, {"w": np.full(5, step)}, {"step": step})
    checkpointer.wait()
    return checkpointer


def test_everything_comes_back_bit_for_bit(tmp_path):
    generator = np.random.default_rng(3)
    generator.random(5)
    meta = {
        "counters": {"agent_steps": np.int64(12), "ratio": 0.1 + 0.2},
        "pcg64": generator.bit_generator.state,
        "mt19937": np.random.RandomState(1).get_state(legacy=False),
        "returns": np.array([0.1, np.nan, np.inf]),
        "nothing": None,
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(12, make_state(), meta)
    step, state, loaded = Checkpointer(tmp_path, read_only=True).restore()
    assert step == 12
    assert_equal(make_state(), state)
    assert loaded["counters"] == {"agent_steps": 12, "ratio": 0.1 + 0.2} and loaded["nothing"] is None
    np.testing.assert_array_equal(loaded["returns"], meta["returns"])
    again = np.random.default_rng()
    again.bit_generator.state = loaded["pcg64"]
    np.testing.assert_array_equal(again.random(9), generator.random(9))
    twister = np.random.RandomState()
    twister.set_state(loaded["mt19937"])
    np.testing.assert_array_equal(twister.random(700), np.random.RandomState(1).random(700))


def test_restored_arrays_may_be_written(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {"array": np.zeros(2)})
        _, state, meta = checkpointer.restore()
    for array in [*jax.tree.leaves(state), meta["array"]]:
        array[...] = 0


def test_template_gives_its_structure(tmp_path):
    pair = collections.namedtuple("pair", "mu nu")
    state = {"opt": (pair(np.ones(3), np.zeros(2)), None), "w": [np.arange(2)]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        _, loaded, _ = checkpointer.restore(abstract)
        _, nested, _ = checkpointer.restore()
    assert_equal(state, loaded)
    assert list(nested["opt"][0]) == ["mu", "nu"] and nested["w"][0].tolist() == [0, 1]


def test_parts_are_read_alone(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
        _, state, _ = checkpointer.restore(parts=["params"])
        assert_equal({"params": make_state()["params"]}, state)
        _, state, _ = checkpointer.restore({"params": make_state()["params"]}, parts=["params"])
        assert_equal({"params": make_state()["params"]}, state)
        with pytest.raises(CheckpointMismatchError, match="planner: not in the checkpoint"):
            checkpointer.restore(parts=["params", "planner"])


def test_state_is_copied_before_save_returns(tmp_path):
    """The next update donates the buffers of the state, and numpy arrays change in place."""
    update = jax.jit(lambda s: {k: v * 0 - 1 for k, v in s.items()}, donate_argnums=0)
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    counter = np.zeros(3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"jax": state, "numpy": counter}, {})
        counter[:] = 9
        state = jax.block_until_ready(update(state))
    _, loaded, _ = checkpointer.restore()
    np.testing.assert_array_equal(loaded["jax"]["w"], np.arange(1_000_000, dtype=np.float32))
    np.testing.assert_array_equal(loaded["numpy"], np.zeros(3))


def test_writing_overlaps_with_the_caller(tmp_path, monkeypatch):
    go = threading.Event()
    write = snapshot.write
    monkeypatch.setattr(snapshot, "write", lambda *args: (go.wait(10), write(*args)))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(5, make_state(), {})
    assert not checkpointer.poll() and checkpointer.latest() is None
    go.set()
    checkpointer.wait()
    assert checkpointer.poll() and checkpointer.latest() == 5


def test_newest_and_milestones_stay(tmp_path):
    saved(tmp_path, [5, 90, 130, 160, 210, 290, 340, 350], keep=2, milestone_every=100)
    assert Checkpointer(tmp_path, read_only=True).steps() == [130, 210, 340, 350]
    # Reopening and going on finds the same milestones.
    assert saved(tmp_path, [390, 400, 410], keep=1, milestone_every=100).steps() == [130, 210, 340, 400, 410]


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    checkpointer = saved(tmp_path, [10, 20])
    for step in checkpointer.steps():
        (tmp_path / "checkpoints" / f"{step:012d}" / "meta.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint .* is damaged"):
            checkpointer.restore()
        assert checkpointer.latest() == 20
    with pytest.raises(CheckpointError, match="expected a checkpoint in .* found none"):
        Checkpointer(tmp_path / "elsewhere").restore()


def test_chosen_step(tmp_path):
    checkpointer = saved(tmp_path, [10, 20, 30])
    assert checkpointer.restore(step=20)[0] == 20
    with pytest.raises(CheckpointError, match="step 25 .* found 10, 20, 30"):
        checkpointer.restore(step=25)
    (tmp_path / "checkpoints" / "000000000020" / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match="meta.json has 2 bytes"):
        Checkpointer(tmp_path).restore(step=20)


def test_files_are_verified_once_between_two_saves(tmp_path, monkeypatch):
    verified, verify = [], snapshot.verify
    monkeypatch.setattr(snapshot, "verify", lambda folder: verified.append(int(folder.name)) or verify(folder))
    checkpointer = saved(tmp_path, [10, 20])
    assert checkpointer.restore(parts=())[0] == checkpointer.restore()[0] == 20 and verified == [20]
    checkpointer.save(30, make_state(), {})
    assert checkpointer.restore()[0] == checkpointer.restore()[0] == 30 and verified == [20, 30]


def test_going_back_abandons_the_later_ones(tmp_path):
    checkpointer = saved(tmp_path, [10, 20, 30])
    checkpointer.restore(step=10)
    checkpointer.save(15, {"w": np.zeros(1)}, {})
    checkpointer.wait()
    assert checkpointer.steps() == [10, 15]
    assert (tmp_path / "checkpoints" / "abandoned-000000000030" / "manifest.json").exists()


def test_same_step_again_is_the_newer_one(tmp_path):
    checkpointer = saved(tmp_path, [10, 20], keep=2)
    checkpointer.save(20, {"w": np.full(5, -1)}, {"again": True})
    checkpointer.wait()
    assert checkpointer.steps() == [10, 20]
    assert checkpointer.restore()[2] == {"again": True}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_interrupted_write_is_reported_and_cleared(tmp_path):
    saved(tmp_path, [10])
    partial = tmp_path / "checkpoints" / ".partial-000000000020"
    shutil.copytree(tmp_path / "checkpoints" / "000000000010", partial)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Checkpointer(tmp_path, read_only=True).latest() == 10
    assert partial.exists()  # It may belong to a live run.
    with pytest.warns(CheckpointWarning, match="000000000020 .* interrupted"):
        checkpointer = Checkpointer(tmp_path)
    assert not partial.exists() and checkpointer.restore()[0] == 10


def test_mismatch_names_parameters_and_shapes(tmp_path):
    template = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
    template["params"]["enc/rgb"]["w"] = jnp.zeros((3, 5))
    template["params"]["enc/rgb"]["b"] = jnp.zeros(4, jnp.float32)
    template["params"]["extra"] = jnp.zeros((2, 2))
    del template["key"]
    with pytest.raises(CheckpointMismatchError) as info:
        checkpointer.restore(template)
    assert sorted(info.value.differences) == [
        "key: uint32[2] in the checkpoint, not in this model",
        "params.enc/rgb.b: expected float32[4], checkpoint has bfloat16[4]",
        "params.enc/rgb.w: expected float32[3, 5], checkpoint has float32[3, 4]",
        "params.extra: expected float32[2, 2], not in the checkpoint",
    ]
    assert all(line in str(info.value) for line in info.value.differences)
    # Seven saved arrays and 24 others have nothing in common; eight of the 31 lines are shown.
    with pytest.raises(CheckpointMismatchError, match="31 arrays differ(?s:.*)and 23 more"):
        checkpointer.restore({f"w{i}": np.zeros(1) for i in range(24)})


def test_refused_states(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="key: use jax.random.key_data"):
        checkpointer.save(1, {"key": jax.random.key(0)}, {})
    with pytest.raises(CheckpointError, match="a.b comes twice"):
        checkpointer.save(1, {"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, {})
    checkpointer.save(1, {"a": np.ones(1)}, {"bad": object()})
    with pytest.raises(CheckpointError, match="expected JSON values"):
        checkpointer.wait()
    with pytest.raises(CheckpointError, match="read-only"):
        Checkpointer(tmp_path, read_only=True).save(1, {}, {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def test_full_disk_loses_no_earlier_checkpoint(tmp_path):
    """A limit on file sizes stands in for the full disk: the write fails in the same call."""
    checkpointer = saved(tmp_path, [10])
    big = {"w": np.random.default_rng(0).random(1_000_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        checkpointer.save(20, big, {})
        with pytest.raises(CheckpointError, match="checkpoint 20 could not be written"):
            checkpointer.wait()
        assert checkpointer.poll()  # Reported once.
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000010"]
    checkpointer.save(30, big, {})
    checkpointer.wait()
    assert checkpointer.steps() == [10, 30] and checkpointer.restore()[0] == 30


def test_failed_save_is_reported_by_the_next_which_goes_on(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    checkpointer.save(10, {"w": np.ones(1)}, {})
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    (tmp_path / "checkpoints").unlink()
    with pytest.raises(CheckpointError, match="checkpoint 10 could not be written"):
        checkpointer.save(20, {"w": np.ones(1)}, {})
    checkpointer.wait()
    assert checkpointer.steps() == [20]


class Recorder:
    """A replay whose every step is its number, 8 kB each: ten at a time, the newest forty are kept."""

    def __init__(self):
        fields = {"number": Field((), np.dtype(np.int64)), "bulk": Field((1000,), np.dtype(np.int64))}
        fields |= {k: Field((), np.dtype(d)) for k, d in TRANSITION_FIELDS.items()}
        fields |= {
            "deter": Field((1,), np.dtype(np.float32), latent=True),
            "stoch": Field((1,), np.dtype(np.uint8), latent=True),
        }
        self.replay = Replay(fields, num_envs=1, capacity=40, length=3, seed=0, online=False)
        self.count = 0

    def collect(self):
        for _ in range(10):
            step = {k: np.zeros((1, *f.shape), f.dtype) for k, f in self.replay.fields.items()}
            self.replay.add({**step, "number": np.array([self.count])})
            self.count += 1

    def load(self, folder):
        """The check that loads the replay with a checkpoint."""
        return lambda meta, snapshot: self.replay.load(folder, meta["replay"])

    def numbers(self):
        return set(self.replay.gather(self.replay.select(200))["number"].ravel().tolist())


def test_replay_files_live_as_long_as_a_checkpoint_names_them(tmp_path):
    recorder = Recorder()
    checkpointer = Checkpointer(tmp_path, keep=2, milestone_every=70)
    for _ in range(14):
        recorder.collect()
        checkpointer.save(recorder.count, {"w": np.ones(1)}, {}, recorder.replay)
        checkpointer.wait()
    assert checkpointer.steps() == [70, 130, 140]
    kept = {c["file"] for s in checkpointer.steps() for c in checkpointer.restore(step=s)[2]["replay"]["chunks"]}
    files = sorted(checkpointer.replay_folder.iterdir())
    # The milestone holds 30-70, the two newest hold 90-130 and 100-140: nine chunks; 10-30 and 70-90 are gone.
    assert {f.name for f in files} == kept and len(files) == 9
    for step in checkpointer.steps():
        reader = Recorder()
        checkpointer.restore(step=step, check=reader.load(checkpointer.replay_folder))
        assert reader.numbers() == set(range(step - 40, step))
    # A save without the replay says nothing about its files.
    checkpointer.save(150, {"w": np.ones(1)}, {})
    checkpointer.wait()
    assert sorted(checkpointer.replay_folder.iterdir()) == files


def test_failing_replay_is_a_checkpoint_error(tmp_path):
    class Full:
        def save(self, folder):
            raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="No space left"):
            checkpointer.save(1, {"w": np.ones(1)}, {}, Full())
        assert checkpointer.latest() is None


def test_best_weights(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.best_score() is None
    with pytest.raises(CheckpointError, match="found none"):
        checkpointer.restore_best()
    checkpointer.save_best(1.5, {"w": np.ones(2)}, {"step": 10})
    checkpointer.save_best(2.5, {"w": np.full(2, 4.0)}, {"step": 20})
    assert checkpointer.best_score() == 2.5
    score, params, meta = Checkpointer(tmp_path, read_only=True).restore_best({"w": np.zeros(2)})
    assert (score, params["w"].tolist(), meta["step"]) == (2.5, [4.0, 4.0], 20)
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_reader_beside_a_live_run(tmp_path):
    """Whatever a live run deletes while it is being read, the reader gets an intact checkpoint."""
    writer, reader = saved(tmp_path, [1], keep=1), Checkpointer(tmp_path, read_only=True)
    seen = []
    for step in range(2, 12):
        writer.save(step, {"w": np.full(5, step)}, {"step": step})
        got, state, meta = reader.restore()
        assert got == meta["step"] == state["w"][0]
        seen.append(got)
    writer.wait()
    assert seen == sorted(seen) and reader.restore()[0] == 11


KILLED = """
import sys, numpy as np
from dreamer.saves.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2)
for step in range(1, 10_000):
    checkpointer.save(step, {"w": np.full(200_000, step)}, {"step": step})
    print(step, flush=True)
"""


def test_killed_while_writing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for extra in (0.0, 0.007):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            begun = [int(process.stdout.readline()) for _ in range(3)][-1]
            time.sleep(extra)
            process.send_signal(signal.SIGKILL)
            begun = max([begun, *(int(line) for line in process.stdout)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            step, state, meta = Checkpointer(tmp_path).restore(template={"w": np.zeros(200_000, int)})
        assert step == meta["step"] == state["w"][0] == state["w"][-1]
        assert begun - 1 <= step <= begun  # A save begins only after the one before it is complete.
        shutil.rmtree(tmp_path / "checkpoints")


def test_versions_of_what_decides_the_numbers():
    assert versions()["jax"] == jax.__version__ and int(versions()["cores"]) >= 1
    assert json.dumps(versions())
