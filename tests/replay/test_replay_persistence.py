"""Replay on disk: what is loaded is what was saved, it goes on the same, and damage is noticed."""

import errno
import functools
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import replay_data
from replay_data import FIELDS, LATENT_BYTES, STEP_BYTES, collect, everything, rewrite, save

from dreamer.replay import Replay, ReplayError, Selection, persistence, prune
from dreamer.types import Field

build = functools.partial(replay_data.build, rows=20, length=4)


def draws(replay: Replay, count: int = 5) -> list[dict[str, bytes]]:
    """The next batches, byte for byte."""
    return [{k: v.tobytes() for k, v in replay.gather(replay.select(6)).items()} for _ in range(count)]


def chunk_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("steps", [0, 3, 20, 47])
def test_a_loaded_buffer_goes_on_as_the_saved_one(tmp_path, steps):
    original, copy = build(), build(seed=99)
    collect(original, range(steps))
    if original.starts:
        original.select(5)
    manifest = save(original, tmp_path)
    copy.load(tmp_path, manifest)
    assert len(copy) == len(original) and copy.stats() == original.stats()
    for begin in (100, 110, 130):
        collect(original, range(begin, begin + 10))
        collect(copy, range(begin, begin + 10))
        assert draws(copy) == draws(original)
        assert copy.stats() == original.stats()


def test_saving_changes_nothing_for_the_running_buffer(tmp_path):
    saved, unsaved = build(), build()
    for begin in range(0, 60, 7):
        collect(saved, range(begin, begin + 7))
        collect(unsaved, range(begin, begin + 7))
        saved.save(tmp_path)
        assert draws(saved) == draws(unsaved)


def test_each_save_writes_only_what_is_new(tmp_path):
    replay = build(rows=100)
    collect(replay, range(30))
    save(replay, tmp_path)
    (first,) = chunk_files(tmp_path)
    before = (tmp_path / first).stat()
    assert before.st_size == 30 * 2 * STEP_BYTES
    collect(replay, range(30, 35))
    manifest = save(replay, tmp_path)
    second = [f for f in chunk_files(tmp_path) if f != first]
    assert [(tmp_path / f).stat().st_size for f in second] == [5 * 2 * STEP_BYTES]
    after = (tmp_path / first).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [c["file"] for c in manifest["chunks"]] == [first, *second]
    assert save(replay, tmp_path) == manifest


def test_large_saves_are_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "CHUNK_BYTES", 6 * 2 * STEP_BYTES)
    original, copy = build(), build()
    collect(original, range(33))
    manifest = save(original, tmp_path)
    assert [c["bytes"] // (2 * STEP_BYTES) for c in manifest["chunks"]] == [6, 6, 6, 2]
    copy.load(tmp_path, manifest)
    assert draws(copy) == draws(original)


def test_overwritten_chunks_leave_the_manifest_and_prune_removes_them(tmp_path):
    replay = build(rows=20)
    manifests = []
    for begin in range(0, 60, 10):
        collect(replay, range(begin, begin + 10))
        manifests.append(save(replay, tmp_path))
    assert [[c["start"][0] for c in m["chunks"]] for m in manifests[2:]] == [[10, 20], [20, 30], [30, 40], [40, 50]]
    (tmp_path / "rows-torn.partial").write_bytes(b"half")
    (tmp_path / "state.json").write_text("{}")
    removed = prune(tmp_path, manifests[-2:])
    assert len(removed) == 4 and "rows-torn.partial" in removed
    assert "state.json" in chunk_files(tmp_path) and len(chunk_files(tmp_path)) == 4
    for manifest in manifests[-2:]:
        build().load(tmp_path, manifest)
    assert prune(tmp_path / "absent", []) == []


def test_a_run_resumed_from_an_older_save_does_not_disturb_the_newer_one(tmp_path):
    first = build()
    collect(first, range(10))
    older = save(first, tmp_path)
    collect(first, range(10, 15))
    newer = save(first, tmp_path)
    second = build()
    second.load(tmp_path, older)
    collect(second, range(70, 75))
    other = save(second, tmp_path)
    assert newer["head"] == other["head"]
    for manifest, replay in ((newer, first), (other, second)):
        copy = build()
        copy.load(tmp_path, manifest)
        assert draws(copy) == draws(replay)


def test_saving_elsewhere_or_after_files_were_removed_writes_everything(tmp_path):
    replay = build()
    collect(replay, range(10))
    save(replay, tmp_path / "a")
    collect(replay, range(10, 15))
    elsewhere = save(replay, tmp_path / "b")
    (tmp_path / "b" / elsewhere["chunks"][0]["file"]).unlink()
    again = save(replay, tmp_path / "b")
    for manifest in (elsewhere, again):
        assert sum(chunk["bytes"] for chunk in manifest["chunks"]) == 30 * STEP_BYTES
    copy = build()
    copy.load(tmp_path / "b", again)
    assert draws(copy) == draws(replay)


def test_a_smaller_ring_keeps_the_newest_steps_and_a_larger_one_all(tmp_path):
    original = build(rows=20)
    collect(original, range(35))
    manifest = save(original, tmp_path)
    small, large = build(rows=8), build(rows=50)
    small.load(tmp_path, manifest)
    large.load(tmp_path, manifest)
    assert (len(small), small.starts, len(large), large.starts) == (16, 10, 40, 34)
    assert {int(r) for r in small.gather(small.select(300))["reward"].ravel()} == set(range(27, 35))
    assert {int(r) for r in large.gather(large.select(300))["reward"].ravel()} == set(range(15, 35))
    collect(large, range(35, 50))
    assert len(large) == 70
    copy = build(rows=60)
    copy.load(tmp_path, save(large, tmp_path))
    assert len(copy) == 70 and draws(copy) == draws(large)


def test_rewritten_latents_come_back_as_they_were(tmp_path):
    original = build()
    manifests, contents = [], []
    for begin in range(0, 90, 5):
        collect(original, range(begin, begin + 5))
        rewrite(original, begin)
        manifests.append(save(original, tmp_path))
        contents.append(everything(original))
        prune(tmp_path, manifests[-2:])
        for manifest, content in zip(manifests[-2:], contents[-2:], strict=True):
            copy = build()
            copy.load(tmp_path, manifest)
            assert everything(copy) == content
    assert draws(copy) == draws(original)


def test_a_patch_holds_what_was_rewritten_and_no_more(tmp_path):
    replay = build(rows=100, online=False)
    collect(replay, range(60))
    assert save(replay, tmp_path)["patches"] == []
    selection = Selection(np.array([0, 0, 1]), np.array([3, 4, 40]), np.zeros(3, bool), 4)
    values = {"stoch": np.full((3, 3, 2), 7, np.uint8), "deter": np.ones((3, 3, 3), np.float32)}
    replay.write(selection, values)
    manifest = save(replay, tmp_path)
    assert [(p["bytes"], p["stop"]) for p in manifest["patches"]] == [((4 + 3) * (12 + LATENT_BYTES), [8, 44])]
    assert save(replay, tmp_path) == manifest
    replay.write(selection, values)
    assert len(save(replay, tmp_path)["patches"]) == 2


def test_patches_never_outgrow_the_latents(tmp_path):
    replay = build(rows=40)
    collect(replay, range(40))
    for seed in range(30):
        rewrite(replay, seed)
        manifest = save(replay, tmp_path)
        prune(tmp_path, [manifest])
        assert sum(p["bytes"] for p in manifest["patches"]) <= 80 * (12 + LATENT_BYTES)
    assert len(chunk_files(tmp_path)) == len(manifest["chunks"]) + len(manifest["patches"])
    copy = build(rows=40)
    copy.load(tmp_path, manifest)
    assert everything(copy) == everything(replay)


def test_large_patches_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "CHUNK_BYTES", 5 * (12 + LATENT_BYTES))
    original, copy = build(), build()
    collect(original, range(20))
    save(original, tmp_path)
    for seed in range(5):
        rewrite(original, seed)
    manifest = save(original, tmp_path)
    sizes = [p["bytes"] for p in manifest["patches"]]
    assert len(sizes) > 2 and set(sizes[:-1]) == {100}
    copy.load(tmp_path, manifest)
    assert everything(copy) == everything(original)


def test_the_online_queue_may_be_switched_and_recut(tmp_path):
    original = build()
    collect(original, range(11))
    manifest = save(original, tmp_path)
    off, recut = build(online=False), build(length=5)
    off.load(tmp_path, manifest)
    assert not off.select(6).online.any()
    recut.load(tmp_path, manifest)
    assert recut.stats()["online_waiting"] == 0
    collect(recut, range(11, 15))
    selection = recut.select(3)
    assert selection.online.tolist() == [True, True, False] and selection.row[:2].tolist() == [10, 10]


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    original = build()
    collect(original, range(10))
    manifest = save(original, tmp_path)
    with pytest.raises(ReplayError, match="replay of 3 environments, got one of 2"):
        build(num_envs=3).load(tmp_path, manifest)
    fields = {k: v for k, v in FIELDS.items() if k != "reward"} | {
        "deter": Field((5,), np.dtype(ml_dtypes.bfloat16), latent=True)
    }
    with pytest.raises(
        ReplayError, match=r"deter: expected .*\[5\].*, got .*\[3\].*reward: expected no such field"
    ) as info:
        Replay(fields, 2, 40, 4, seed=0).load(tmp_path, manifest)
    assert "image" not in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 2, got 1"),
        ({"chunks": []}, "expected chunks with rows"),
        ({"head": [10, "x"]}, "manifest is damaged"),
        ({"counters": {}}, "manifest is damaged"),
        ({"selector": {}}, "manifest is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change, message):
    original, copy = build(), build()
    collect(original, range(10))
    manifest = save(original, tmp_path)
    with pytest.raises(ReplayError, match=message):
        copy.load(tmp_path, manifest | change)
    assert len(copy) == 0
    path = dict(manifest["chunks"][0], file="../" + manifest["chunks"][0]["file"])
    with pytest.raises(ReplayError, match="contradicts itself"):
        copy.load(tmp_path, manifest | {"chunks": [path]})


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, writes):
    """The disk is full after so many files; the next save finds room again."""
    monkeypatch.setattr(persistence, "CHUNK_BYTES", 3 * 2 * STEP_BYTES)
    replay, copy = build(), build()
    collect(replay, range(10))
    older = save(replay, tmp_path)
    content = everything(replay)
    collect(replay, range(10, 25))
    rewrite(replay, 0)
    left, sync = [writes], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replay.save(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    copy.load(tmp_path, older)
    assert everything(copy) == content
    rewrite(replay, 1)
    newer = save(replay, tmp_path)
    prune(tmp_path, [older, newer])
    copy.load(tmp_path, newer)
    assert len(copy) == 40 and everything(copy) == everything(replay) and draws(copy) == draws(replay)
    copy.load(tmp_path, older)
    assert everything(copy) == content
