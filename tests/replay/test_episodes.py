"""Episodes on disk: what is written is what happened, and what is read fits the task or says which key does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.replay import Replay, ReplayError, Selection
from dreamer.replay.episodes import EpisodeCutter, EpisodeFolder, EpisodeWriter, add_episodes, read_episode
from dreamer.types import Field, Space, replay_fields

OBSERVATIONS = {"image": Space("image", (4, 4, 3)), "file/pose": Space("vector", (2,)), "log/x": Space("vector", ())}
ACTIONS = {"action": Space("discrete", (2,), (3, 2)), "push": Space("vector", ())}
LATENTS = {
    "deter": Field((3,), np.dtype(np.float16), latent=True),
    "stoch": Field((2,), np.dtype(np.uint8), latent=True),
}
FIELDS = replay_fields(OBSERVATIONS, ACTIONS, LATENTS)


def episode(length: int, terminal: bool = True, number: int = 0) -> dict[str, np.ndarray]:
    """`length` steps whose every value tells the number of the episode and the step; rewards 1, 2, 3, ..."""
    steps = np.arange(length)
    return {
        "image": np.full((length, 4, 4, 3), number, np.uint8) + steps.astype(np.uint8)[:, None, None, None],
        "file/pose": np.stack([np.full(length, number), steps], 1).astype(np.float32),
        "action": np.stack([steps % 3, steps % 2], 1).astype(np.int32),
        "push": np.linspace(-1, 1, length).astype(np.float32),
        "reward": steps.astype(np.float32),
        "is_first": steps == 0,
        "is_last": steps == length - 1,
        "is_terminal": (steps == length - 1) & terminal,
    }


def write(folder: Path, *episodes: dict[str, np.ndarray]) -> list[Path]:
    writer = EpisodeWriter(folder)
    return [writer.write(e) for e in episodes]


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


# --- Files -------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    first, second = episode(5), episode(2, terminal=False, number=7)
    paths = write(tmp_path / "new" / "folder", first, second)
    assert [path.name for path in paths] == ["000000000_4_10.npz", "000000001_1_1.npz"]
    assert same(read_episode(paths[0], OBSERVATIONS, ACTIONS), first)
    folder = EpisodeFolder(tmp_path / "new", OBSERVATIONS, ACTIONS)
    assert folder.lengths == [5, 2]
    assert same(folder.read(1), second)


def test_anybody_can_read_them_with_numpy(tmp_path):
    (path,) = write(tmp_path, episode(5))
    with np.load(path, allow_pickle=False) as file:
        assert same(dict(file), episode(5))


def test_anybody_can_write_them_with_numpy(tmp_path):
    """Other names, plain savez, wider numbers, and a key to be logged."""
    wide = {k: v.astype({"f": np.float64, "i": np.int64}.get(v.dtype.kind, v.dtype)) for k, v in episode(4).items()}
    np.savez(tmp_path / "mine.npz", **wide, **{"log/x": np.zeros(4)})
    assert same(EpisodeFolder(tmp_path, OBSERVATIONS, ACTIONS).read(0), episode(4))


def test_files_sort_in_the_order_they_were_written(tmp_path):
    paths = write(tmp_path, *(episode(2 + i % 3) for i in range(12)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]


def test_a_disk_that_refuses_leaves_no_file(tmp_path, monkeypatch):
    writer = EpisodeWriter(tmp_path)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(np.lib.format, "write_array", full)
        writer.write(episode(3))
    assert list(tmp_path.iterdir()) == []
    assert writer.write(episode(3)).name == "000000000_2_3.npz"


def test_a_folder_with_episodes_is_not_written_to(tmp_path):
    write(tmp_path, episode(3))
    with pytest.raises(ReplayError, match="without episodes"):
        EpisodeWriter(tmp_path)


def change(key: str, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(data: dict[str, np.ndarray]) -> None:
        if value is None:
            del data[key]
        else:
            data[key] = value(data[key].copy()) if callable(value) else value

    return apply


def put(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change("push", None), ["missing ['push']"]),
        (change("speed", np.zeros(5)), ["got ['speed']"]),
        (
            change("image", np.zeros((5, 4, 4, 1), np.uint8)),
            ["'image'", "(steps (2 or more), 4, 4, 3)", "(5, 4, 4, 1)"],
        ),
        (change("file/pose", lambda a: a[:4]), ["'file/pose'", "(4, 2)"]),
        (change("reward", np.float32(1)), ["'reward'", "()"]),
        (change("image", lambda a: a / np.float32(255)), ["'image'", "uint8", "float32"]),
        (change("is_first", lambda a: a.astype(np.uint8)), ["'is_first'", "bool", "uint8"]),
        (change("file/pose", put((3, 1), np.nan)), ["'file/pose'", "finite"]),
        (change("reward", put(2, np.inf)), ["reward", "finite"]),
        (change("action", put((2, 1), 2)), ["'action'", "(3, 2)", "another task"]),
        (change("action", put((2, 0), -1)), ["'action'", "-1"]),
        (change("reward", put(0, 0.5)), ["reward 0 at the first step"]),
        (change("is_first", put(0, False)), ["is_first true at the first step only"]),
        (change("is_first", put(2, True)), ["is_first true at the first step only"]),
        (change("is_last", put(-1, False)), ["is_last true at the last step only"]),
        (change("is_last", put(2, True)), ["is_last true at the last step only"]),
        (change("is_terminal", put(1, True)), ["is_terminal true at the last step or nowhere"]),
    ],
)
def test_what_is_no_episode_of_the_task_is_refused_by_file_and_key(tmp_path, damage, words):
    data = episode(5)
    damage(data)
    path = tmp_path / "some.npz"
    np.savez(path, **data)
    with pytest.raises(ReplayError) as caught:
        read_episode(path, OBSERVATIONS, ACTIONS)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_single_step_is_no_episode(tmp_path):
    data = episode(1)
    data["is_last"] = np.array([True])
    np.savez(tmp_path / "one.npz", **data)
    with pytest.raises(ReplayError, match="2 or more"):
        EpisodeFolder(tmp_path, OBSERVATIONS, ACTIONS).read(0)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (path,) = write(tmp_path / "whole", episode(50))
    whole = path.read_bytes()
    half, flipped, pickled = (tmp_path / name / "x.npz" for name in ("half", "flipped", "pickled"))
    for broken in (half, flipped, pickled):
        broken.parent.mkdir()
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReplayError, match=str(half)):
        EpisodeFolder(half.parent, OBSERVATIONS, ACTIONS)
    at = whole.index(b"image.npy") + 60
    flipped.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    with pytest.raises(ReplayError, match=str(flipped)):
        EpisodeFolder(flipped.parent, OBSERVATIONS, ACTIONS).read(0)
    np.savez(pickled, **{**episode(3), "push": np.array([{}, {}, {}], object)})
    with pytest.raises(ReplayError, match=f"{pickled}.*pickle"):
        EpisodeFolder(pickled.parent, OBSERVATIONS, ACTIONS).read(0)


def test_a_folder_without_episodes_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ReplayError, match="found none"):
            EpisodeFolder(folder, OBSERVATIONS, ACTIONS)


# --- Cutting -----------------------------------------------------------------------------------


def letters(text: str) -> dict[str, np.ndarray]:
    """One letter for each step: f(irst), l(ast), t(erminal), or a dot; `at` counts them."""
    flags = np.array(list(text))
    return {
        "at": np.arange(len(text)),
        "is_first": flags == "f",
        "is_last": (flags == "l") | (flags == "t"),
        "is_terminal": flags == "t",
    }


def spelled(done: dict[str, np.ndarray]) -> tuple[int, int, str]:
    """(first step, last step, letters) of an episode that was cut out."""
    at = done["at"]
    assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
    text = np.where(done["is_terminal"], "t", np.where(done["is_last"], "l", np.where(done["is_first"], "f", ".")))
    return int(at[0]), int(at[-1]), "".join(text)


#   0123456789012345678901
FLOW = "..lf.tf...f..lff.lf..."
WHOLE = [(3, 5, "f.t"), (6, 9, "f..l"), (10, 13, "f..l"), (15, 17, "f.l")]
OPEN = [(18, 21, "f..l")]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 22])
def test_cutting_does_not_depend_on_the_pieces(piece):
    """The start that is missing and the lone first step are left out; what stops without an end gets one."""
    cutter, flow, done = EpisodeCutter(2), letters(FLOW), []
    for start in range(0, len(FLOW), piece):
        part = {key: value[start : start + piece] for key, value in flow.items()}
        done += cutter.add(1, part)
        assert cutter.add(0, letters("." * piece)) == []
    assert [spelled(one) for one in done] == WHOLE
    assert [spelled(one) for one in cutter.rest()] == OPEN
    assert cutter.rest() == []
    assert same(flow, letters(FLOW)), "what was given is not written to"


# --- Into the rings ----------------------------------------------------------------------------


def row(replay: Replay, env: int, start: int, length: int) -> dict[str, np.ndarray]:
    where = Selection(np.array([env]), np.array([start]), np.array([False]), length)
    return {key: value[0] for key, value in replay.gather(where).items()}


def test_each_ring_gets_whole_episodes_one_after_another():
    """Three rings; lengths are such that the fourth episode goes to ring 1, the fifth to ring 2 and so on."""
    lengths = [6, 2, 3, 4, 5, 2]
    replay = Replay(FIELDS, 3, 60, 4, seed=0)
    add_episodes(replay, (episode(length, number=10 * i) for i, length in enumerate(lengths)))
    rings = [[0, 5], [1, 3], [2, 4]]
    assert len(replay) == sum(lengths)
    for env, numbers in enumerate(rings):
        parts = [episode(lengths[i], number=10 * i) for i in numbers]
        expected = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        found = row(replay, env, 0, len(expected["reward"]))
        assert not found.pop("deter").any() and not found.pop("stoch").any()
        assert same(found, expected)


def test_episodes_are_read_one_by_one():
    """No more than one of each ring is held at a time."""
    given = []

    def source():
        for i in range(20):
            given.append(i)
            assert len(given) <= 2 + len(replay) // 5
            yield episode(5)

    replay = Replay(FIELDS, 2, 200, 4, seed=0)
    add_episodes(replay, source())
    assert len(replay) == 100
