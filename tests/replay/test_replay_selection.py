"""How sequences are drawn: by priority, by age, by a mixture; each against its distribution, spelled out."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.config import SelectionConfig
from dreamer.replay import Replay, ReplayError, Selection
from dreamer.replay.priorities import FAN, SumTree
from dreamer.types import Field

FIELDS = {"serial": Field((), np.dtype(np.int32))}


def build(steps: list[int], rows: int, length: int = 3, seed: int = 0, online: bool = False, **mixture) -> Replay:
    """Environment i has made steps[i] steps."""
    config = SelectionConfig(**({"uniform": 0.0} | mixture))
    replay = Replay(FIELDS, len(steps), len(steps) * rows, length, seed, online, selection=config)
    for time in range(max(steps)):
        envs = [env for env, count in enumerate(steps) if time < count]
        replay.add({"serial": np.zeros(len(envs), np.int32)}, envs)
    return replay


def draw(replay: Replay, count: int) -> collections.Counter:
    selection = replay.select(count)
    return collections.Counter(zip(selection.env.tolist(), selection.row.tolist(), strict=True))


def starts(*envs_and_rows: tuple[int, int], length: int = 3) -> Selection:
    env, row = np.array(envs_and_rows, np.int64).T
    return Selection(env, row, np.zeros(len(env), bool), length)


def set_priorities(replay: Replay, priorities: dict[tuple[int, int], float]) -> None:
    values = np.array(list(priorities.values()))
    replay.prioritize(starts(*priorities), np.stack([values - 0.5, values + 0.5], 1))  # their mean counts


def assert_distributed(counts: collections.Counter, weights: dict[tuple[int, int], float]) -> None:
    """Pearson's chi-squared at 0.1 % on either side, by Wilson and Hilferty's normal approximation."""
    expected = {start: weight * counts.total() / sum(weights.values()) for start, weight in weights.items() if weight}
    assert set(counts) <= set(expected) and min(expected.values()) > 5
    chi_squared = sum((counts[start] - n) ** 2 / n for start, n in expected.items())
    free = len(expected) - 1
    low, high = (free * (1 - 2 / (9 * free) + z * (2 / (9 * free)) ** 0.5) ** 3 for z in (-3.09, 3.09))
    assert low < chi_squared < high


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3 * FAN), st.integers(1, 60))
def test_sum_tree_finds_the_leaf_that_a_running_sum_finds(masses, extra):
    tree = SumTree(len(masses) + extra * FAN)
    tree.set(np.arange(len(masses)), np.array(masses, float))
    assert tree.total == sum(masses)
    owners = [leaf for leaf, mass in enumerate(masses) for _ in range(mass)]
    assert tree.find(np.arange(len(owners)) + 0.25).tolist() == owners


def test_sum_tree_never_finds_an_empty_leaf_and_does_not_drift():
    rng = np.random.default_rng(0)
    grown, leaves = SumTree(20_000), np.zeros(20_000)
    for _ in range(200):
        index = rng.choice(20_000, 50, replace=False)
        leaves[index] = rng.random(50) ** 8 * (rng.random(50) < 0.7)
        grown.set(index, leaves[index])
    rebuilt = SumTree(20_000)
    rebuilt.set(np.arange(20_000), leaves)
    assert grown.total == rebuilt.total
    mass = np.append(rng.random(5000) * grown.total, [0, np.nextafter(grown.total, 0), grown.total])
    found = grown.find(mass)
    assert (leaves[found] > 0).all() and (found == rebuilt.find(mass)).all()


def test_priorities_are_proportions():
    replay = build([7, 9], rows=8, prioritised=1.0, priority_exponent=0.5)  # environment 1 has lost its row 0
    priorities = {(0, r): float(r) ** 2 for r in range(5)} | {(1, r): float(10 * r) for r in range(1, 7)}
    set_priorities(replay, priorities)
    assert_distributed(draw(replay, 20_000), {start: p**0.5 for start, p in priorities.items()})


def test_new_starts_come_first_and_none_of_them_twice():
    replay = build([9, 5], rows=20, prioritised=1.0)
    every = {(0, r) for r in range(7)} | {(1, r) for r in range(3)}
    assert draw(replay, 10) == dict.fromkeys(every, 1)
    set_priorities(replay, {(0, r): 1.0 for r in range(7)} | {(1, 0): 0.0})
    for _ in range(5):  # they stay first until they have a priority
        selection = replay.select(6)
        assert {(1, 1), (1, 2)} == set(zip(selection.env[:2].tolist(), selection.row[:2].tolist(), strict=True))
        assert (selection.env[2:] == 0).all()
    set_priorities(replay, {(1, 1): 1.0, (1, 2): 1.0})
    assert_distributed(draw(replay, 2000), dict.fromkeys(every - {(1, 0)}, 1.0))
    replay.add({"serial": np.zeros(1, np.int32)}, [1])
    assert replay.select(3).row[0] == 3


def test_only_new_starts_are_drawn_again_when_nothing_else_is_left():
    assert_distributed(draw(build([5], 20, prioritised=1.0), 999), dict.fromkeys([(0, 0), (0, 1), (0, 2)], 1.0))


def test_curious_replay_prefers_what_was_seldom_trained_on():
    """1e4 * 0.7^visits + (|loss| + 0.01)^0.7; 1e5 until the first visit."""
    replay = build([9], rows=20, uniform=0.0, prioritised=1.0, priority="curious", priority_exponent=0.7)
    visits = {(0, row): row % 4 for row in range(7)}
    for turn in range(4):
        trained = [start for start, count in visits.items() if count > turn]
        if trained:
            set_priorities(replay, {start: 40.0 * start[1] for start in trained})
    expected = {
        start: 1e4 * 0.7**count + (40 * start[1] + 0.01) ** 0.7 if count else 1e5 for start, count in visits.items()
    }
    assert_distributed(draw(replay, 20_000), expected)
    # Once it was visited often enough, only the loss counts.
    for _ in range(60):
        set_priorities(replay, dict.fromkeys(visits, 1.0) | {(0, 3): -99.0})
    assert_distributed(draw(replay, 20_000), dict.fromkeys(visits, 1.01**0.7) | {(0, 3): 99.01**0.7})


def test_zero_on_sample_waits_for_the_next_priority():
    replay = build([8], rows=20, prioritised=1.0, priority_zero_on_sample=True)
    assert draw(replay, 4) + draw(replay, 2) == dict.fromkeys([(0, r) for r in range(6)], 1)
    assert len(draw(replay, 500)) == 6  # nothing has a priority: uniform
    set_priorities(replay, {(0, 2): 3.0})
    assert set(draw(replay, 1)) == {(0, 2)}


def test_priorities_end_with_their_rows():
    replay = build([8], rows=8, prioritised=1.0)
    set_priorities(replay, {(0, r): 1.0 for r in range(6)})
    old = starts((0, 0), (0, 1), (0, 5))
    for _ in range(2):
        replay.add({"serial": np.zeros(1, np.int32)})
    assert {row for _, row in draw(replay, 2)} == {6, 7}
    replay.prioritize(old, np.array([[9.0, 9], [9, 9], [0, 0]]))  # rows 0 and 1 lie where 8 and 9 are now
    set_priorities(replay, {(0, 6): 1.0, (0, 7): 1.0})
    assert_distributed(draw(replay, 2000), {(0, r): 1.0 for r in (2, 3, 4, 6, 7)})


def test_the_later_of_equal_sequences_gives_the_priority():
    replay = build([6], rows=20, prioritised=1.0)
    set_priorities(replay, {(0, r): 1.0 for r in range(4)})
    replay.write(starts((0, 1), (0, 2), (0, 1)), {"priority": np.array([[9, 9], [0, 0], [-1, 0]], np.float32)})
    assert set(draw(replay, 200)) == {(0, 0), (0, 3)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, np.nan]], "finite priorities, got"),
        ([[1.0, np.inf]], "finite priorities, got"),
        ([1.0], r"shape \(1, 2\), got \(1,\)"),
    ],
)
def test_priorities_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ReplayError, match=message):
        build([5], 10, prioritised=1.0).prioritize(starts((0, 0)), np.array(values))
    assert not build([5], 10, uniform=1.0).prioritised
    with pytest.raises(ReplayError, match="set --replay.selection.prioritised"):
        build([5], 10, uniform=1.0).write(starts((0, 0)), {"priority": np.array(values)})


@pytest.mark.parametrize(("steps", "half_life"), [([30], 4.0), ([12, 7, 40], 15.0), ([3, 3], 1e9), ([60], 1e5)])
def test_recency_halves_with_age(steps, half_life):
    replay = build(steps, rows=25, recency=1.0, recency_half_life=half_life)
    weights = {
        (env, row): 2 ** -((count - 3 - row) * len(steps) / half_life)
        for env, count in enumerate(steps)
        for row in range(max(0, count - 25), count - 2)
    }
    expected = {start: w for start, w in weights.items() if 40_000 * w / sum(weights.values()) > 8}
    counts = draw(replay, 40_000)
    rare = sum(n for start, n in counts.items() if start not in expected)
    assert (
        set(counts) <= set(weights) and abs(rare / 40_000 - 1 + sum(expected.values()) / sum(weights.values())) < 3e-3
    )
    assert_distributed(collections.Counter({s: n for s, n in counts.items() if s in expected}), expected)


def test_recency_with_a_tiny_half_life_draws_the_newest():
    assert set(draw(build([30, 30], rows=25, recency=1.0, recency_half_life=0.01), 500)) == {(0, 27), (1, 27)}


def test_mixture_has_the_fractions_it_was_given():
    replay = build([14, 14], rows=20, uniform=1.0, prioritised=2.0, recency=1.0, recency_half_life=10.0)
    every = [(env, row) for env in range(2) for row in range(12)]
    priorities = {start: float(i % 5) for i, start in enumerate(every)}
    set_priorities(replay, priorities)
    weights = {}
    for start in every:
        recency = 2 ** -((11 - start[1]) / 5)
        weights[start] = (
            0.25 / 24
            + 0.5 * priorities[start] ** 0.8 / sum(p**0.8 for p in priorities.values())
            + 0.25 * recency / (2 * sum(2 ** -(age / 5) for age in range(12)))
        )
    assert_distributed(draw(replay, 30_000), weights)


def test_the_online_queue_is_ahead_of_every_mixture():
    replay = build([9], rows=20, online=True, uniform=1.0, prioritised=1.0, recency=1.0)
    selection = replay.select(30)
    assert selection.row[:4].tolist() == [0, 2, 4, 6] and selection.online.sum() == 4


def test_nothing_to_draw_from_is_no_mixture():
    with pytest.raises(ValueError, match="fraction above 0"):
        SelectionConfig(uniform=0.0)
    with pytest.raises(ValueError, match="fraction above 0 for prioritised with priority curious"):
        SelectionConfig(priority="curious")


@pytest.mark.parametrize(
    "rule", [{}, {"priority_zero_on_sample": True}, {"priority": "curious"}], ids=["loss", "zero", "curious"]
)
def test_priorities_and_draws_go_on_after_a_save(tmp_path, rule):
    mixture = {"uniform": 1.0, "prioritised": 2.0, "recency": 1.0, **rule}
    original = build([30, 30], rows=25, **mixture)

    def go_on(replay: Replay, seed: int) -> list[int]:
        rng, drawn = np.random.default_rng(seed), []
        for _ in range(20):
            replay.add({"serial": np.zeros(2, np.int32)})
            selection = replay.select(8)
            drawn += selection.row.tolist()
            replay.prioritize(selection, rng.random((8, 2)))
        return drawn

    go_on(original, 1)
    manifest = json.loads(json.dumps(original.save(tmp_path)))
    drawn = go_on(original, 2)
    copy = build([1, 1], rows=25, seed=5, **mixture)
    copy.load(tmp_path, manifest)
    assert go_on(copy, 2) == drawn
    small = build([1, 1], rows=10, **mixture)
    small.load(tmp_path, manifest)
    assert (small.select(100).row >= 40).all()
    (tmp_path / manifest["selector"]["priorities"]["file"]).write_bytes(b"short")
    with pytest.raises(ReplayError, match="truncated"):
        copy.load(tmp_path, manifest)


def test_priorities_of_sequences_of_another_length_begin_anew(tmp_path):
    original = build([10], rows=25, prioritised=1.0)
    set_priorities(original, {(0, r): 0.0 for r in range(8)})
    longer = build([1], rows=25, length=5, prioritised=1.0)
    longer.load(tmp_path, original.save(tmp_path))
    assert len(draw(longer, 6)) == 6
