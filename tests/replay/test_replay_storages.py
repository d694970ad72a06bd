"""Host, disk and device: the same numbers; disk: saves that survive a kill, damage, and a disk without room."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from replay_data import (
    FIELDS,
    LATENT_BYTES,
    STEP_BYTES,
    build,
    collect,
    everything,
    latents_of,
    make_files_small,
    save,
    train,
)

from dreamer.replay import Replay, ReplayError, blocks, choose_storage, device, disk, memory, prune
from dreamer.types import Field


@pytest.fixture
def small_files(monkeypatch):
    make_files_small(monkeypatch)


@pytest.mark.parametrize("per_dispatch", [1, 4])
@pytest.mark.parametrize("storage", ["disk", "device"])
def test_every_storage_gives_the_same_batches(tmp_path, small_files, storage, per_dispatch):
    expected = train(build("host", tmp_path / "host"), range(90), per_dispatch)
    assert train(build(storage, tmp_path / storage), range(90), per_dispatch) == expected
    assert len(expected) > 80


def test_inside_one_jit_the_device_gives_the_numbers_of_the_host(tmp_path):
    """Dispatch u writes the latents of u - 1 and gathers the batch of u + 1; on the host it is three calls."""
    host, replay = build("host", tmp_path), build("device", tmp_path)
    traces = []

    def dispatch(arrays, write_slots, latents, gather_slots):
        traces.append(1)
        arrays = device.write(arrays, write_slots, latents)
        return arrays, device.gather(arrays, gather_slots)

    dispatch = jax.jit(dispatch, donate_argnums=0)
    before = None
    for time in range(120):
        collect(host, range(time, time + 1))
        collect(replay, range(time, time + 1))
        if time < 10:
            continue
        if before is not None:
            selection, latents = before
            host.write(selection, latents)
            write_slots = replay.write_slots(selection)
        chosen, twin = host.select(6), replay.select(6)
        batch = host.gather(chosen)
        if before is not None:
            replay.storage.arrays, found = dispatch(replay.storage.arrays, write_slots, latents, replay.slots(twin))
            assert {k: np.asarray(v).tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in batch.items()}
        before = chosen, latents_of(batch, time)
    assert len(traces) == 1 and host.stats() == replay.stats() and everything(host) == everything(replay)


def test_the_device_refuses_what_jax_would_narrow(tmp_path):
    fields = {"x": Field((), np.dtype(np.float64))}
    with pytest.raises(ReplayError, match=r"at most 32 bits on the device, got wider ones in \['x'\]"):
        Replay(fields, 1, 10, 3, 0, storage="device")


@pytest.mark.parametrize("target", ["host", "disk", "device"])
@pytest.mark.parametrize("source", ["host", "disk", "device"])
def test_a_run_goes_on_with_another_storage(tmp_path, small_files, source, target):
    original = build(source, tmp_path / "a")
    train(original, range(33))
    save(original, tmp_path / "a")
    train(original, range(33, 60))
    original.abandon([1])
    manifest = save(original, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = build(target, tmp_path / "b")
    copy.load(tmp_path / "b", manifest)
    assert everything(copy) == everything(original)
    elsewhere = build(target, tmp_path / "c")
    elsewhere.load(tmp_path / "b", manifest)
    assert everything(elsewhere) == everything(original)
    assert train(copy, range(60, 80)) == train(original, range(60, 80)) == train(elsewhere, range(60, 80))
    again = save(elsewhere, tmp_path / "c")
    last = build(target, tmp_path / "c")
    last.load(tmp_path / "c", again)
    assert everything(last) == everything(original)


def test_disk_storage_is_mapped_not_read_back(tmp_path, small_files, monkeypatch):
    monkeypatch.setattr(disk, "VERIFIED_BYTES", 0)
    original = build("disk", tmp_path)
    train(original, range(60))
    manifest = save(original, tmp_path)
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert {e["bytes"] for e in (*manifest["segments"], *manifest["latents"]["extents"])} < set(sizes.values())
    replay = build("disk", tmp_path)
    replay.load(tmp_path, manifest)
    segment = manifest["segments"][2]
    (tmp_path / segment["file"]).write_bytes(bytes(segment["bytes"]))  # in place: what is mapped changes with it
    rows = np.arange(segment["start"][0], segment["stop"][0])
    assert not replay.storage.take("reward", 0, rows).any() and original.storage.take("is_last", 0, rows).sum() == 0


def test_disk_storage_uses_a_few_large_files(tmp_path):
    replay = build("disk", tmp_path, rows=400)
    collect(replay, range(300))
    save(replay, tmp_path)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["latents", "places", "segment"]


def test_a_save_can_be_read_while_its_run_goes_on(tmp_path, small_files):
    live, twin = build("disk", tmp_path), build("host", tmp_path / "twin")
    assert train(live, range(40)) == train(twin, range(40))
    manifest, content = save(live, tmp_path), everything(live)
    assert train(live, range(40, 75)) == train(twin, range(40, 75))
    before = sorted(p.name for p in tmp_path.iterdir())
    reader = build("host", tmp_path / "elsewhere")
    reader.load(tmp_path, manifest)
    assert everything(reader) == content and sorted(p.name for p in tmp_path.iterdir()) == before
    assert any(name.endswith(".open") for name in before)
    assert train(live, range(75, 120)) == train(twin, range(75, 120))
    save(live, tmp_path)


def test_segments_leave_when_no_save_needs_them(tmp_path, small_files):
    replay, manifests = build("disk", tmp_path), []
    for start in range(0, 400, 20):
        train(replay, range(start, start + 20))
        manifests.append(save(replay, tmp_path))
        prune(tmp_path, manifests[-2:])
    files = [p.name for p in tmp_path.iterdir()]
    assert len([n for n in files if n.startswith("segment")]) <= 8 + 5 + 2
    # Every latent changes between two saves: the buffer's own place, and one for each of the two saves.
    size = replay.storage._versions._size
    assert len([n for n in files if n.startswith("latents")]) * size <= 3 * replay.capacity + size
    copy = build("disk", tmp_path)
    copy.load(tmp_path, manifests[-2])
    assert len(copy) == 80


KILLED = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import json, pytest
import replay_data as t
t.make_files_small(pytest.MonkeyPatch())
folder = pathlib.Path(sys.argv[2])
replay = t.build("disk", folder)
for start, name in [(0, "older"), (35, "newer"), (70, "never")]:
    t.train(replay, range(start, start + 35))
    if name != "never":
        content = {k: v.hex() for k, v in t.everything(replay).items()}
        (folder.parent / name).write_text(json.dumps([replay.save(folder), content]))
print("now", flush=True)
while True:
    t.train(replay, range(start, start + 35))
    start += 35
"""


def test_a_killed_run_leaves_both_saves_as_they_were(tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(tmp_path / "replay")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((tmp_path / "replay").glob("*.open"))
    for name in ("newer", "older", "newer"):
        manifest, content = json.loads((tmp_path / name).read_text())
        replay = build("disk", tmp_path / "replay")
        replay.load(tmp_path / "replay", manifest)
        assert {k: v.hex() for k, v in everything(replay).items()} == content
        train(replay, range(200, 260))
    assert not list((tmp_path / "replay").glob("*.partial"))


def no_room(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_holds_up_saving_but_not_training(tmp_path, small_files, monkeypatch):
    replay, twin = build("disk", tmp_path), build("host", tmp_path / "twin")
    assert train(replay, range(30)) == train(twin, range(30))
    older, content = save(replay, tmp_path), everything(replay)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "reserve", no_room)
        assert train(replay, range(30, 70)) == train(twin, range(30, 70))
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                replay.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space left"):
            replay.save(tmp_path)
    assert train(replay, range(70, 80)) == train(twin, range(70, 80))
    newer = save(replay, tmp_path)
    prune(tmp_path, [older, newer])
    expected = everything(replay)
    for manifest, known in ((newer, expected), (older, content)):
        loaded = build("disk", tmp_path)
        loaded.load(tmp_path, manifest)
        assert everything(loaded) == known


def test_a_file_system_that_cannot_reserve_gets_zeros(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "file").open("w+b") as file:
        blocks.reserve(file.fileno(), 3 * 2**20 + 5)
    assert (tmp_path / "file").read_bytes() == bytes(3 * 2**20 + 5)


def test_disk_storage_is_saved_where_it_lies(tmp_path):
    with pytest.raises(ReplayError, match="save disk storage in its own folder"):
        build("disk", tmp_path / "a").save(tmp_path / "b")
    with pytest.raises(ReplayError, match="expected a folder for disk storage"):
        Replay(FIELDS, 1, 10, 3, 0, storage="disk")


def test_what_each_storage_needs_and_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 100_000)
    monkeypatch.setattr(memory, "disk_space", lambda folder: 1_000_000)
    step, latents = STEP_BYTES, LATENT_BYTES
    tables = {kind: memory.budget(kind, FIELDS, tmp_path, 50_000) for kind in ("host", "disk", "device")}
    assert dict(tables["host"].needs) == {"memory": step, "disk": step + 2 * latents, "device": 0}
    assert dict(tables["disk"].needs) == {"memory": 48, "disk": step + 2 * latents, "device": 0}
    assert dict(tables["device"].needs) == {"memory": 0, "disk": step + 2 * latents, "device": step}
    assert tables["host"].largest == 90_000 // step
    assert tables["disk"].largest == min(90_000 // 48, 900_000 // (step + 2 * latents))
    assert tables["device"].largest == 25_000 // step


@pytest.mark.parametrize(
    ("capacity", "free", "kind"),
    [
        (300, 50_000, "device"),
        (300, None, "host"),
        (500, 50_000, "host"),
        (1500, 50_000, "disk"),
        (10**9, None, "disk"),
    ],
)
def test_auto_is_the_fastest_that_fits(tmp_path, monkeypatch, capacity, free, kind):
    monkeypatch.setattr(memory, "machine_memory", lambda: 100_000)
    monkeypatch.setattr(memory, "disk_space", lambda folder: 1_000_000)
    assert choose_storage(FIELDS, capacity, tmp_path, free) == kind


@pytest.mark.parametrize(("storage", "room"), [("disk", "memory"), ("disk", "disk"), ("device", "device")])
def test_what_cannot_fit_is_refused_before_anything_is_allocated(tmp_path, monkeypatch, storage, room):
    monkeypatch.setattr(memory, "machine_memory", lambda: 10_000 if room == "memory" else 10**12)
    monkeypatch.setattr(memory, "disk_space", lambda folder: 10_000 if room == "disk" else 10**12)
    with pytest.raises(ReplayError, match=rf"GB of {room}, of which .* set --replay.capacity (\d+) or less") as info:
        build(storage, tmp_path / "replay", rows=1000, device_bytes=10_000)
    assert not (tmp_path / "replay").exists()
    largest = int(str(info.value).split("--replay.capacity ")[1].split()[0])
    assert build(storage, tmp_path, num_envs=1, rows=largest, device_bytes=10_000).capacity == largest


def test_space_for_replay_counts_what_replay_fills_already(tmp_path):
    before = memory.disk_space(tmp_path / "not" / "yet")
    (tmp_path / "file").write_bytes(bytes(10**6))
    assert memory.disk_space(tmp_path) >= 10**6 and before > 0
