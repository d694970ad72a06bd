"""Every file that a checkpoint consists of, damaged in every way: it is noticed, and the one before is taken."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from replay_data import build, everything, make_files_small, train

from dreamer.replay import ReplayError
from dreamer.saves.checkpoint import Checkpointer, CheckpointWarning

STORAGES = ("host", "disk")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def flip(path: Path) -> None:
    """One bit: of the last digit of JSON, which stays JSON; else near the beginning, from where disk storage fills."""
    data = bytearray(path.read_bytes())
    at = max(map(data.rfind, b"0123456789")) if path.suffix == ".json" else len(data) // 100
    data[at] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


#: By name: a file of the checkpoint whose folder and manifest of the replay are given.
OWN: dict[str, Callable[[Path], Path]] = {
    "arrays": lambda folder: max(
        (path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    ),
    "structure": lambda folder: folder / "state" / "_METADATA",
    "meta": lambda folder: folder / "meta.json",
    "manifest": lambda folder: folder / "manifest.json",
    "further file": lambda folder: folder / "files" / "loop",
}
REPLAY: dict[str, Callable[[dict], dict]] = {
    "host chunk": lambda manifest: manifest["chunks"][-1],
    "host patch": lambda manifest: manifest["patches"][-1],
    "disk segment": lambda manifest: manifest["segments"][-1],
    "disk latents": lambda manifest: manifest["latents"]["extents"][-1],
    "disk places": lambda manifest: manifest["latents"]["places"],
}
#: What is said of it, beside the name of the file.
WORDS = {
    cut: "has .* bytes, expected|truncated or was changed|unreadable",
    lengthen: "has .* bytes, expected|truncated or was changed|unreadable",
    flip: "have changed|corrupted: expected checksum|its checksum differs",
    remove: "cannot be read|cannot read|is missing",
}
CASES = [(part, damage) for part in (*OWN, *REPLAY) for damage in WORDS]
CASES.remove(("disk latents", flip))  # rewritten all the time, so without checksums


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By storage: a logdir with checkpoints at steps 10 and 20, and the contents of replay at the first."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        make_files_small(patch)
        for storage in STORAGES:
            logdir = tmp_path_factory.mktemp(storage)
            checkpointer = Checkpointer(logdir)
            replay = build(storage, checkpointer.replay_folder)
            for step, times in ((10, range(30)), (20, range(30, 55))):
                train(replay, times)
                state = {"w": np.full(5, step)}
                checkpointer.save(step, state, {"step": step}, replay, {"loop": bytes(range(200))})
                made.setdefault(storage, (logdir, everything(replay)))
            checkpointer.wait()
    return made


@pytest.mark.parametrize(("part", "damage"), CASES)
def test_damage_is_noticed_and_the_checkpoint_before_is_taken(saved, tmp_path, monkeypatch, part, damage):
    make_files_small(monkeypatch)
    storage = part.split()[0] if part in REPLAY else "host"
    source, content = saved[storage]
    logdir = shutil.copytree(source, tmp_path / "run")
    folder = logdir / "checkpoints" / f"{20:012d}"
    meta = json.loads((folder / "meta.json").read_text())
    path = OWN[part](folder) if part in OWN else logdir / "replay" / REPLAY[part](meta["replay"])["file"]
    damage(path)
    replay = build(storage, logdir / "replay")

    def load(meta, folder):
        try:
            replay.load(logdir / "replay", meta["replay"])
        except ReplayError:
            assert len(replay) == 0 and replay.stats()["inserts"] == 0
            raise

    before = sorted(logdir.rglob("*"))
    with pytest.warns(CheckpointWarning, match=f"{folder.name} is damaged") as told:
        step, state, meta = Checkpointer(logdir, read_only=True).restore(check=load)
    said = str(told[0].message)
    assert path.name in said and re.search(WORDS[damage], said)
    assert step == meta["step"] == state["w"][0] == 10 and everything(replay) == content
    assert sorted(logdir.rglob("*")) == before


def test_what_is_damaged_is_set_aside_and_saved_anew(saved, tmp_path):
    logdir = shutil.copytree(saved["host"][0], tmp_path / "run")
    shutil.rmtree(logdir / "checkpoints" / f"{20:012d}")
    (logdir / "checkpoints" / f"{20:012d}").mkdir()
    checkpointer = Checkpointer(logdir)
    with pytest.warns(CheckpointWarning, match=f"{20:012d} is damaged .* set aside as damaged-{20:012d}"):
        assert checkpointer.restore()[0] == 10
    assert checkpointer.steps() == [10]
    checkpointer.save(20, {"w": np.zeros(1)}, {})
    assert checkpointer.restore()[0] == 20
