"""The replay buffer: which sequences are drawn, what they contain, what is written back."""

import collections

import ml_dtypes
import numpy as np
import pytest

from dreamer.replay import Replay, ReplayError, Selection, budget, buffer, bytes_per_step, memory
from dreamer.types import Field

FIELDS = {
    "count": Field((), np.dtype(np.int32)),
    "image": Field((2, 2, 3), np.dtype(np.uint8)),
    "deter": Field((3,), np.dtype(ml_dtypes.bfloat16), latent=True),
    "stoch": Field((2,), np.dtype(np.uint8), latent=True),
}


def step_of(num_envs: int, time: int) -> dict[str, np.ndarray]:
    """The step that every environment makes at `time`: count is 1000 * env + time."""
    count = 1000 * np.arange(num_envs, dtype=np.int32) + time
    return {
        "count": count,
        "image": np.broadcast_to((count % 256).astype(np.uint8)[:, None, None, None], (num_envs, 2, 2, 3)),
        "deter": np.full((num_envs, 3), time, ml_dtypes.bfloat16),
        "stoch": np.full((num_envs, 2), time % 256, np.uint8),
    }


def filled(num_envs: int, rows: int, length: int, steps: int, **options) -> Replay:
    replay = Replay(FIELDS, num_envs, num_envs * rows, length, seed=0, **options)
    for time in range(steps):
        replay.add(step_of(num_envs, time))
    return replay


def selection_at(*starts: tuple[int, int], length: int) -> Selection:
    env, row = np.array(starts, np.int64).T
    return Selection(env, row, np.zeros(len(starts), bool), length)


def test_bytes_are_known_before_anything_is_allocated():
    assert bytes_per_step(FIELDS) == 4 + 12 + 3 * 2 + 2
    replay = Replay(FIELDS, 3, 100, 5, seed=0)
    assert (replay.nbytes_per_step, replay.capacity, replay.nbytes) == (24, 99, 99 * 24)


def test_size200m_step_with_a_64x64_image_stays_below_29_kilobytes():
    fields = {
        "image": Field((64, 64, 3), np.dtype(np.uint8)),
        "deter": Field((8192,), np.dtype(ml_dtypes.bfloat16), latent=True),
        "stoch": Field((32,), np.dtype(np.uint8), latent=True),
    }
    assert bytes_per_step(fields) < 29_000


def test_capacity_beyond_the_memory_is_refused_with_the_largest_that_fits(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 24_000)
    assert budget("host", FIELDS).largest == 900
    with pytest.raises(ReplayError, match=r"1000 steps of 24 bytes.*largest that fits is 900 steps"):
        Replay(FIELDS, 2, 1000, 5, seed=0)
    assert Replay(FIELDS, 2, 900, 5, seed=0).capacity == 900


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 1}, "length of at least 2"),
        ({"capacity": 9}, "capacity of at least 10"),
        ({"fields": {"x": Field((), np.dtype(object))}}, "Python objects"),
    ],
)
def test_impossible_buffers_are_refused(change, message):
    options = {"fields": FIELDS, "num_envs": 2, "capacity": 100, "length": 5, "seed": 0} | change
    with pytest.raises(ReplayError, match=message):
        Replay(**options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image", None, r"missing \['image'\]"),
        ("reward", np.zeros(2), r"unknown \['reward'\]"),
        ("count", np.zeros(3, np.int32), r"'count' of shape \(2,\), got \(3,\)"),
        ("image", np.zeros((2, 2, 2, 3), np.float32), "'image' of dtype uint8, got float32"),
    ],
)
def test_steps_that_do_not_fit_are_refused_and_nothing_is_stored(key, value, message):
    replay = Replay(FIELDS, 2, 100, 5, seed=0)
    step = step_of(2, 0)
    step = {k: v for k, v in step.items() if k != key} if value is None else step | {key: value}
    with pytest.raises(ReplayError, match=message):
        replay.add(step)
    assert len(replay) == 0


def test_log_keys_are_not_stored_and_wider_floats_are_narrowed():
    replay = Replay(FIELDS, 2, 100, 2, seed=0)
    for time in range(2):
        replay.add(step_of(2, time) | {"log/health": np.zeros(2), "deter": np.full((2, 3), 1.5, np.float64)})
    batch = replay.gather(replay.select(2))
    assert set(batch) == set(FIELDS)
    assert batch["deter"].dtype == ml_dtypes.bfloat16 and (batch["deter"] == 1.5).all()


def test_add_copies_and_gather_returns_fresh_contiguous_arrays():
    replay = Replay(FIELDS, 1, 10, 2, seed=0, online=False)
    step = step_of(1, 7)
    replay.add(step)
    replay.add(step)
    step["count"][:] = -1
    selection = selection_at((0, 0), length=2)
    first, second = replay.gather(selection), replay.gather(selection)
    assert first["count"].tolist() == [[7, 7]]
    for key, value in first.items():
        assert value.flags.c_contiguous and value.flags.owndata
        value[...] = 0
        assert not np.shares_memory(value, second[key])
    assert second["count"].tolist() == replay.gather(selection)["count"].tolist() == [[7, 7]]


@pytest.mark.parametrize(("steps", "starts"), [(0, 0), (4, 0), (5, 2), (9, 10), (10, 12), (11, 12), (37, 12)])
def test_number_of_starts(steps, starts):
    # Two rings of 10 rows, sequences of 5: 6 starts each once full, whatever the write position.
    replay = filled(2, 10, 5, steps)
    assert replay.starts == starts
    assert len(replay) == 2 * min(steps, 10)


def test_selecting_from_too_little_says_how_much_is_needed():
    with pytest.raises(ReplayError, match="at least 5 stored steps .* got at most 4"):
        filled(2, 10, 5, steps=4).select(1)
    with pytest.raises(ReplayError, match="batch of at least one"):
        filled(2, 10, 5, steps=5).select(0)


@pytest.mark.parametrize("steps", [10, 13, 25])
def test_sequences_are_consecutive_steps_of_one_environment(steps):
    replay = filled(3, 10, 4, steps)
    batch = replay.gather(replay.select(200))
    assert batch["count"].shape == (200, 4)
    assert (np.diff(batch["count"], axis=1) == 1).all()
    time = batch["count"] % 1000
    assert time.min() == steps - 10 and time.max() == steps - 1
    assert (batch["image"][..., 0, 0, 0] == batch["count"] % 256).all()
    assert (batch["deter"][..., 0].astype(np.float32) == time).all()


@pytest.mark.parametrize("steps", [12, 31])
def test_uniform_over_all_starts(steps):
    replay = filled(4, 12, 4, steps, online=False)
    draws = 200 * replay.starts
    counts = collections.Counter(replay.gather(replay.select(draws))["count"][:, 0].tolist())
    assert len(counts) == replay.starts == 36
    chi_squared = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert 14.7 < chi_squared < 66.6  # 35 degrees of freedom: 0.1 % lie below, 0.1 % above


def test_uniform_over_starts_where_environments_hold_different_amounts():
    replay = Replay(FIELDS, 2, 40, 3, seed=1, online=False)
    for time in range(18):
        step = step_of(2, time)
        if time < 4:
            replay.add(step)
        else:
            replay.add({k: v[1:] for k, v in step.items()}, envs=[1])
    assert replay.starts == 2 + 16
    counts = collections.Counter(replay.gather(replay.select(1800))["count"][:, 0].tolist())
    assert set(counts) == {0, 1} | set(range(1000, 1016))
    chi_squared = sum((n - 100) ** 2 / 100 for n in counts.values())
    assert 4.4 < chi_squared < 40.8  # 17 degrees of freedom: 0.1 % lie below, 0.1 % above
    with pytest.raises(ReplayError, match="distinct environments"):
        replay.add(step, envs=[1, 1])


def test_same_seed_same_selections_and_other_seed_others():
    def draw(seed: int) -> list[int]:
        replay = Replay(FIELDS, 2, 200, 3, seed=seed, online=False)
        for time in range(100):
            replay.add(step_of(2, time))
        return replay.gather(replay.select(20))["count"][:, 0].tolist()

    assert draw(3) == draw(3) != draw(4)


def test_online_queue_serves_each_stretch_once_in_order_ahead_of_uniform():
    # T = 3: trained steps 1-3, 4-6, 7-9 with context 0, 3, 6; the stretch from context 9 is not complete yet.
    replay = filled(2, 100, 4, steps=12)
    first, second = replay.select(4), replay.select(4)
    assert list(zip(first.env, first.row, strict=True)) == [(0, 0), (1, 0), (0, 3), (1, 3)]
    assert list(zip(second.env[:2], second.row[:2], strict=True)) == [(0, 6), (1, 6)]
    assert first.online.tolist() == [True] * 4
    assert second.online.tolist() == [True, True, False, False]
    assert not replay.select(4).online.any()
    replay.add(step_of(2, 12))
    third = replay.select(3)
    assert list(zip(third.env[:2], third.row[:2], strict=True)) == [(0, 9), (1, 9)]
    assert third.online.tolist() == [True, True, False]
    stats = replay.stats()
    assert (stats["online_served"], stats["online_waiting"], stats["online_dropped"]) == (8, 0, 0)


def test_every_step_but_the_first_is_trained_exactly_once_through_the_queue():
    replay = Replay(FIELDS, 2, 2000, 6, seed=0)
    trained = collections.Counter()
    for time in range(101):
        replay.add(step_of(2, time))
        while replay.stats()["online_waiting"]:
            trained.update(replay.gather(replay.select(1))["count"][0, 1:].tolist())
    assert trained == {1000 * env + time: 1 for env in range(2) for time in range(1, 101)}


def test_online_queue_is_bounded_and_drops_the_oldest(monkeypatch):
    monkeypatch.setattr(buffer, "LONGEST_QUEUE", 5)
    replay = filled(1, 1000, 3, steps=101)
    assert replay.stats()["online_waiting"] == 5 and replay.stats()["online_dropped"] == 45
    assert replay.select(5).row.tolist() == [90, 92, 94, 96, 98]


def test_online_queue_never_serves_what_was_overwritten():
    # 10 rows hold rows 21..30 after 31 steps; stretches of 2 that begin at rows 22, 24, 26, 28 are whole.
    replay = filled(1, 10, 3, steps=31)
    selection = replay.select(6)
    assert selection.row[selection.online].tolist() == [22, 24, 26, 28]
    assert replay.stats()["online_dropped"] == 11
    assert (replay.gather(selection)["count"][:, 0] == selection.row).all()


def test_write_reaches_the_trained_steps_and_nothing_else():
    replay = filled(2, 20, 4, steps=10, online=False)
    selection = selection_at((1, 2), length=4)
    values = {"deter": np.full((1, 3, 3), 0.5, np.float32), "stoch": np.arange(6, dtype=np.uint8).reshape(1, 3, 2)}
    assert replay.write(selection, values) == 3
    after = replay.gather(selection_at((1, 1), length=6))
    assert after["deter"][0, :, 0].astype(float).tolist() == [1, 2, 0.5, 0.5, 0.5, 6]
    assert after["stoch"][0].tolist() == [[1, 1], [2, 2], [0, 1], [2, 3], [4, 5], [6, 6]]
    assert after["count"][0].tolist() == [1001, 1002, 1003, 1004, 1005, 1006]
    other = replay.gather(selection_at((0, 1), length=6))
    assert other["stoch"][0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_write_to_overwritten_steps_is_dropped():
    replay = filled(1, 6, 4, steps=6, online=False)
    selection = selection_at((0, 0), length=4)  # trained rows 1, 2, 3
    for time in (6, 7, 8):
        replay.add(step_of(1, time))  # rows 0, 1, 2 are gone; row 3 is the oldest
    written = replay.write(selection, {"stoch": np.full((1, 3, 2), 99, np.uint8)})
    assert written == 1
    assert replay.gather(selection_at((0, 3), length=6))["stoch"][0, :, 0].tolist() == [99, 4, 5, 6, 7, 8]
    assert replay.stats()["write_dropped"] == 2
    with pytest.raises(ReplayError, match="overwritten"):
        replay.gather(selection)


def test_where_sequences_overlap_the_later_in_the_batch_wins():
    replay = filled(1, 30, 4, steps=20, online=False)
    selection = selection_at((0, 4), (0, 6), (0, 5), (0, 4), length=4)
    stoch = np.broadcast_to(np.array([50, 60, 70, 80], np.uint8)[:, None, None], (4, 3, 2))
    assert replay.write(selection, {"stoch": stoch}) == 5
    after = replay.gather(selection_at((0, 4), length=7))["stoch"][0, :, 0].tolist()
    assert after == [4, 80, 80, 80, 70, 60, 10]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": np.zeros((2, 3), np.int32)}, r"latents among \['deter', 'stoch'\], got \['count'\]"),
        ({"stoch": np.zeros((2, 4, 2), np.uint8)}, r"shape \(2, 3, 2\), got \(2, 4, 2\)"),
        ({"stoch": np.zeros((2, 3, 2), np.int64)}, "dtype uint8, got int64"),
    ],
)
def test_latents_that_do_not_fit_are_refused(values, message):
    replay = filled(1, 20, 4, steps=10)
    with pytest.raises(ReplayError, match=message):
        replay.write(replay.select(2), values)


def test_stats_count():
    replay = filled(2, 10, 4, steps=15)
    replay.write(replay.select(5), {"stoch": np.zeros((5, 3, 2), np.uint8)})
    stats = replay.stats()
    assert (stats["items"], stats["fill"], stats["inserts"], stats["sequences"]) == (20, 1, 30, 5)
    assert stats["ratio"] == 5 * 3 / 30
    assert stats["gigabytes"] == 20 * 24 / 1e9
    assert 3 <= stats["written"] <= 15
