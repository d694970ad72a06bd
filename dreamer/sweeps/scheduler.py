"""The loop of a sweep: fill free slots, see what has ended, retry what failed, stop what is hopeless."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from dreamer.run.signals import StopRequest
from dreamer.sweeps.expand import PlannedRun
from dreamer.sweeps.local import AdoptedJob, in_use
from dreamer.sweeps.progress import (
    FAILED,
    FINISHED,
    HOPELESS,
    LOG_FILE,
    RUNNING,
    WAITING,
    Progress,
    RunState,
    hopeless,
    load_state,
    rung,
    save_state,
)
from dreamer.sweeps.spec import Sweep

#: Exit codes of `dreamer train` that a retry cannot change: a mistake in what was asked, numbers not finite.
FINAL_CODES = (2, 3)
_IN_USE = "is in use by a live run"
_LONGEST_WAIT_SECONDS = 600.0


class Job(Protocol):
    """A started run. where: for people, such as "device 0"."""

    where: str

    def poll(self) -> int | None:
        """The exit code of `dreamer train`, None while it is running."""

    def stop(self) -> None:
        """Ask it to save a checkpoint and exit; returns at once."""

    def kill(self) -> None:
        """End it now."""


class Backend(Protocol):
    """Starts runs. slots: how many at once."""

    slots: int

    def start(self, run: PlannedRun, slot: int) -> Job: ...

    def close(self) -> None: ...


class RunEntry:
    """A run in a sweep. not_before: earliest start by the scheduler's clock. asked: why it was asked to stop, HOPELESS
    or WAITING (the whole sweep stops)."""

    def __init__(self, run: PlannedRun) -> None:
        self.run = run
        self.state: RunState = load_state(run.folder)
        self.progress = Progress(run.folder, run.config.run.seeds)
        self.progress.look()
        self.job: Job | None = None
        self.slot: int | None = None
        self.began = self.not_before = 0.0
        self.asked: str | None = None
        self.rung: int | None = None

    @property
    def length(self) -> int:
        """Agent steps of the whole run."""
        return self.run.config.run.agent_steps

    @property
    def over(self) -> bool:
        return self.state.status in (FINISHED, FAILED, HOPELESS)

    def seconds(self, now: float) -> float:
        """Seconds it has run, over all its starts."""
        return self.state.seconds + (now - self.began if self.job is not None else 0.0)

    def left(self) -> float | None:
        """Seconds to its end at its speed; None: not known."""
        rate = self.progress.rate
        return max(0, self.length - self.progress.agent_steps) / rate if rate and self.job else None

    def save(self) -> None:
        save_state(self.run.folder, self.state)


class Source(Protocol):
    """Where runs come from. `next`: another run, or None while there is none; it is asked whenever a slot is free.
    `told`: a run is over."""

    def next(self) -> RunEntry | None: ...

    def told(self, entry: RunEntry) -> None: ...


class Watcher(Protocol):
    """What shows a sweep to people."""

    def event(self, entry: RunEntry, text: str) -> None: ...

    def update(self, entries: list[RunEntry], now: float) -> None: ...


@dataclasses.dataclass
class Clock:
    """Time, for tests to replace."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Scheduler:
    """One sweep on one backend."""

    def __init__(
        self,
        sweep: Sweep,
        entries: Iterable[RunEntry],
        backend: Backend,
        watcher: Watcher,
        source: Source | None = None,
        clock: Clock | None = None,
        poll_seconds: float = 1.0,
    ) -> None:
        self.sweep, self.entries, self._backend, self._watcher = sweep, list(entries), backend, watcher
        self._source, self._clock, self._poll_seconds = source, clock or Clock(), poll_seconds
        self._free = list(range(backend.slots))
        for entry in self.entries:
            self.take_up(entry)

    def take_up(self, entry: RunEntry) -> None:
        """Take up what an earlier command left of a run: over if it reached its end; failed runs get another chance."""
        state = entry.state
        longer = entry.progress.agent_steps < entry.length
        if (state.status == FINISHED and not longer) or (state.status == HOPELESS and self.sweep.early_stop):
            return
        state.status, state.failures = WAITING, 0

    def run(self, stop: StopRequest) -> None:
        """Run until every run is over, or `stop` is set and all have exited."""
        stopping = False
        try:
            while True:
                if stop and not stopping:
                    stopping = True
                    for entry in self._running():
                        self._ask(entry, WAITING)
                self._collect()
                if not stopping:
                    self._start()
                    self._stop_hopeless()
                self._watcher.update(self.entries, self._clock.now())
                if not self._running() and (stopping or not self._waiting()):
                    return
                self._clock.sleep(self._poll_seconds)
        finally:
            for entry in self._running():  # a second Ctrl-C
                assert entry.job is not None
                entry.job.kill()
                self._ended(entry, WAITING)

    def _running(self) -> list[RunEntry]:
        return [entry for entry in self.entries if entry.job is not None]

    def _waiting(self) -> list[RunEntry]:
        return [entry for entry in self.entries if entry.job is None and not entry.over]

    # --- Starting -------------------------------------------------------------------------------

    def _start(self) -> None:
        while self._free:
            now = self._clock.now()
            ready = [entry for entry in self._waiting() if entry.not_before <= now]
            entry = ready[0] if ready else self._source.next() if self._source else None
            if entry is None:
                return
            if entry not in self.entries:
                self.entries.append(entry)
                self.take_up(entry)
                if entry.over:
                    self._tell(entry)
                    continue
            self._begin(entry, now)

    def _begin(self, entry: RunEntry, now: float) -> None:
        entry.slot, entry.began, entry.asked = self._free.pop(0), now, None
        entry.state.status = RUNNING
        entry.state.starts += 1
        entry.save()
        adopted = in_use(entry.run.folder)
        entry.job = AdoptedJob(entry.run.folder) if adopted else self._backend.start(entry.run, entry.slot)
        verb = "goes on" if entry.progress.agent_steps else "starts"
        self._watcher.event(entry, f"{verb} {entry.job.where}".rstrip())

    # --- Ends -----------------------------------------------------------------------------------

    def _collect(self) -> None:
        for entry in self._running():
            assert entry.job is not None
            code = entry.job.poll()
            entry.progress.look()
            if code is not None:
                self._judge(entry, code)

    def _judge(self, entry: RunEntry, code: int) -> None:
        """Decide what the end of a run means."""
        reached = entry.progress.agent_steps >= entry.length
        further = entry.progress.agent_steps > entry.state.steps
        adopted = isinstance(entry.job, AdoptedJob)
        if entry.asked is not None and not (entry.asked == HOPELESS and reached):
            self._ended(entry, entry.asked)
        elif code == 0 and reached:
            self._ended(entry, FINISHED)
        elif adopted:
            self._ended(entry, WAITING)
        else:
            text = last_line(entry)
            entry.state.reason = "stopped by a signal" if code == 0 else f"exit code {code}: {text}"
            if _IN_USE in text:
                self._ended(entry, WAITING)
                entry.not_before = self._clock.now() + self.sweep.retry_seconds
                return
            entry.state.failures = 1 if further else entry.state.failures + 1
            again = entry.state.failures <= self.sweep.retries and code not in FINAL_CODES
            wait = min(self.sweep.retry_seconds * 2 ** (entry.state.failures - 1), _LONGEST_WAIT_SECONDS)
            self._ended(entry, WAITING if again else FAILED, f"; again in {wait:g} s" if again else "")
            entry.not_before = self._clock.now() + wait

    def _ended(self, entry: RunEntry, status: str, more: str = "") -> None:
        state = entry.state
        state.seconds = entry.seconds(self._clock.now())
        state.status, state.steps = status, max(state.steps, entry.progress.agent_steps)
        assert entry.slot is not None
        self._free.append(entry.slot)
        self._free.sort()
        entry.job = entry.slot = None
        reason = f" ({state.reason})" if state.reason and (status in (FAILED, HOPELESS) or more) else ""
        told = "will go on" if status == WAITING else status
        if status == FINISHED:
            state.reason = ""
        entry.save()
        self._watcher.event(entry, f"{told} at {entry.progress.agent_steps:,} steps{reason}{more}")
        if entry.over:
            self._tell(entry)

    def _tell(self, entry: RunEntry) -> None:
        if self._source is not None:
            self._source.told(entry)

    # --- Stopping -------------------------------------------------------------------------------

    def _ask(self, entry: RunEntry, status: str) -> None:
        assert entry.job is not None
        entry.asked = status
        entry.job.stop()
        self._watcher.event(entry, "is asked to stop")

    def _stop_hopeless(self) -> None:
        rule = self.sweep.early_stop
        if rule is None:
            return
        for entry in self._running():
            at = rung(entry.progress.agent_steps / entry.length, rule)
            if at is None or at == entry.rung or entry.asked is not None:
                continue
            entry.rung = at
            task = entry.run.config.task
            others = [e.progress for e in self.entries if e is not entry and e.run.config.task == task]
            why = hopeless(rule, entry.progress, others, entry.progress.env_frames)
            if why:
                entry.state.reason = why
                self._ask(entry, HOPELESS)


def last_line(entry: RunEntry) -> str:
    """The last line that a run printed."""
    try:
        with (entry.run.folder / LOG_FILE).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in lines]
    return next((line for line in reversed(plain) if line), "")
