"""When things happen: exact bookkeeping of the train ratio, and intervals in agent steps."""

from __future__ import annotations

import fractions
import math
import time
from collections.abc import Callable, Iterator
from typing import Any


class UpdateSchedule:
    """How many updates are due: ``train_ratio / (B * T)`` per agent step, counted from the step training started at.

    Counted in exact fractions from two integers, so it never drifts, not even across resumes, and training that starts
    late has no backlog to work off.
    """

    def __init__(self, train_ratio: float, batch_size: int, batch_length: int, dispatch: int = 1) -> None:
        """dispatch: updates that go to the device together, where at least this many are due; others go one by one."""
        self._rate = fractions.Fraction(repr(train_ratio)) / (batch_size * batch_length)
        self._dispatch = dispatch
        self._start: int | None = None
        self._updates = 0

    @property
    def started(self) -> bool:
        return self._start is not None

    def start(self, agent_steps: int) -> None:
        """Training begins: updates are owed for steps after this one."""
        self._start = agent_steps

    def due(self, agent_steps: int) -> int:
        """Updates that are owed at this step and not done yet."""
        return 0 if self._start is None else int((agent_steps - self._start) * self._rate) - self._updates

    def dispatches(self, agent_steps: int, stride: int) -> Iterator[tuple[int, int]]:
        """For each dispatch of owed updates, which it marks as done: its number of updates, and that of the dispatch
        after it, now or at one of the steps agent_steps + stride, + 2 stride, ..."""
        while due := self.due(agent_steps):
            count = self._together(due)
            self.done(count)
            yield count, self._together(due - count or self._due_next(agent_steps, stride))

    def _together(self, due: int) -> int:
        return self._dispatch if due >= self._dispatch else 1

    def _due_next(self, agent_steps: int, stride: int) -> int:
        """Updates owed at the first of the steps agent_steps + stride, + 2 stride, ... that owes any."""
        assert self._start is not None
        step = self._start + (self._updates + 1) / self._rate
        return self.due(agent_steps + stride * max(1, math.ceil((step - agent_steps) / stride)))

    def done(self, updates: int = 1) -> None:
        self._updates += updates

    def state(self) -> dict[str, Any]:
        return {"start": self._start, "updates": self._updates}

    def restore(self, state: dict[str, Any], agent_steps: int, rate_changed: bool) -> None:
        """Continue from a checkpoint taken at `agent_steps`; with another train ratio, count again from there."""
        self._start, self._updates = state["start"], state["updates"]
        if rate_changed and self.started:
            self._start, self._updates = agent_steps, 0


class Every:
    """True once every `interval` agent steps, first after one interval; never for an interval of None."""

    def __init__(self, interval: int | None, agent_steps: int = 0) -> None:
        self._interval = interval
        self._last = 0 if interval is None else agent_steps // interval

    def __call__(self, agent_steps: int) -> bool:
        if self._interval is None:
            return False
        current = agent_steps // self._interval
        fired, self._last = current > self._last, current
        return fired


class SaveTimer:
    """When to save: every N agent steps, every M minutes, and a minute after a failed attempt."""

    RETRY_SECONDS = 60.0

    def __init__(
        self,
        agent_steps: int,
        interval: int | None,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """agent_steps: the current step of the run. interval: agent steps; None: by the clock only."""
        self._due, self._seconds, self._clock = Every(interval, agent_steps), 60 * minutes, clock
        self._next = clock() + self._seconds

    def __call__(self, agent_steps: int) -> bool:
        """Whether to save now; the time to the next save starts over."""
        due = self._due(agent_steps) or self._clock() >= self._next
        if due:
            self._next = self._clock() + self._seconds
        return due

    def failed(self) -> None:
        """The newest save did not succeed."""
        self._next = min(self._next, self._clock() + self.RETRY_SECONDS)
