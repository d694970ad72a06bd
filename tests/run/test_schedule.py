"""The train ratio is kept exactly, and intervals fire once each."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.run.schedule import Every, UpdateSchedule


def owed(ratio: str, batch: int, length: int, steps: int) -> int:
    """Updates for `steps` agent steps after the start, from the ratio's decimal digits."""
    return math.floor(Fraction(ratio) * steps / (batch * length))


@pytest.mark.parametrize(
    ("ratio", "batch", "length", "envs"),
    [("0.1", 16, 64, 1), ("33.3", 7, 13, 3), ("1e-3", 1, 2, 16), ("1024", 16, 64, 16), ("0.7", 1, 2, 5)],
)
def test_no_drift_over_a_million_steps(ratio, batch, length, envs):
    schedule = UpdateSchedule(float(ratio), batch, length)
    begin, done = 1000, 0
    schedule.start(begin)
    for step in range(begin, begin + 1_000_000, envs * 97):
        due = schedule.due(step)
        schedule.done(due)
        done += due
        assert done == owed(ratio, batch, length, step - begin)


def test_a_million_single_steps_give_every_update_at_its_own_step():
    schedule = UpdateSchedule(0.3, 1, 2)
    schedule.start(0)
    done, wrong = 0, []
    for step in range(1, 1_000_001):
        due = schedule.due(step)
        schedule.done(due)
        done += due
        if done != 3 * step // 20:
            wrong.append(step)
    assert wrong == []


def test_several_updates_are_due_at_once_when_the_ratio_asks_for_them():
    schedule = UpdateSchedule(1024, 16, 64)
    schedule.start(0)
    assert schedule.due(16) == 16
    for left in range(15, -1, -1):
        schedule.done()
        assert schedule.due(16) == left


def test_no_debt_for_the_steps_before_training_starts():
    schedule = UpdateSchedule(64, 4, 16)
    assert not schedule.started
    assert [schedule.due(step) for step in (0, 500, 1000)] == [0, 0, 0]
    schedule.start(1000)
    assert schedule.started
    assert schedule.due(1000) == 0
    assert schedule.due(1001) == 1


@given(
    ratio=st.sampled_from(["0.1", "33.3", "7", "1024", "0.037"]),
    start=st.integers(0, 10**6),
    stops=st.lists(st.integers(1, 10**5), min_size=1, max_size=6),
)
def test_stopping_and_resuming_changes_no_update(ratio, start, stops):
    schedule, step, done = UpdateSchedule(float(ratio), 3, 11), start, 0
    schedule.start(start)
    for advance in stops:
        step += advance
        due = schedule.due(step)
        schedule.done(due)
        done += due
        stored = json.loads(json.dumps(schedule.state()))
        schedule = UpdateSchedule(float(ratio), 3, 11)
        schedule.restore(stored, step, rate_changed=False)
    assert done == owed(ratio, 3, 11, step - start)


def test_a_stop_between_two_updates_of_one_step_leaves_the_rest_due():
    schedule = UpdateSchedule(8, 1, 2)
    schedule.start(0)
    schedule.done(3)
    resumed = UpdateSchedule(8, 1, 2)
    resumed.restore(schedule.state(), 1, rate_changed=False)
    assert resumed.due(1) == 1


def test_a_stop_before_training_has_started():
    resumed = UpdateSchedule(8, 1, 2)
    resumed.restore(UpdateSchedule(8, 1, 2).state(), 50, rate_changed=True)
    assert not resumed.started
    assert resumed.due(1000) == 0


@pytest.mark.parametrize("ratio", [2.0, 32.0])
def test_another_ratio_counts_from_the_resume_on(ratio):
    before = UpdateSchedule(8, 1, 2)
    before.start(10)
    before.done(before.due(110))
    after = UpdateSchedule(ratio, 1, 2)
    after.restore(before.state(), 110, rate_changed=True)
    assert after.due(110) == 0
    assert after.due(120) == 10 * ratio / 2


def fired(every: Every, steps: range | list[int]) -> list[int]:
    return [step for step in steps if every(step)]


def test_every_fires_once_an_interval_and_first_after_one():
    assert fired(Every(10), range(1, 35)) == [10, 20, 30]


def test_every_with_steps_that_do_not_hit_its_multiples():
    assert fired(Every(10), range(3, 64, 16)) == [19, 35, 51]
    assert fired(Every(10), [4, 9, 9, 11, 12, 47, 48, 50]) == [11, 47, 50]


def test_every_does_not_fire_again_after_a_resume_at_its_step():
    assert fired(Every(10, agent_steps=20), [20, 21, 29, 30]) == [30]


def test_every_none_never_fires():
    assert fired(Every(None), range(100)) == []


@given(ratio=st.floats(0.05, 400), start=st.integers(0, 50), stride=st.integers(1, 20), dispatch=st.integers(1, 5))
def test_each_dispatch_announces_the_one_after_it(ratio, start, stride, dispatch):
    schedule, plain = UpdateSchedule(ratio, 4, 8, dispatch), UpdateSchedule(ratio, 4, 8)
    schedule.start(start)
    plain.start(start)
    told: list[tuple[int, int]] = []
    for step in range(start, start + 60 * stride, stride):
        now = list(schedule.dispatches(step, stride))
        due = plain.due(step)
        plain.done(due)
        assert [count for count, _ in now] == [dispatch] * (due // dispatch) + [1] * (due % dispatch)
        told += now
    assert [following for _, following in told[:-1]] == [count for count, _ in told[1:]]
