"""Environments that fail during a run: how long to wait before recreating them, and when to give up."""

from __future__ import annotations

import re
import sysconfig
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from dreamer.env_config import EnvConfig
from dreamer.envs.interface import EnvError, Fault, TransitionError
from dreamer.envs.workers.fence import EscapeError, fenced

#: Attempts at recreating an environment, within one step, before the step itself fails.
TRIES = 10
#: The longest wait before an attempt, in seconds.
LONGEST_WAIT = 60.0
#: Characters of an exception's text in a message; its traceback has all of it.
LONGEST_TEXT = 1000
#: Where code is that does not belong to the environment: this package and Python.
_NOT_THEIRS = (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), "<frozen")


class FaultBudget:
    """The failures that a run tolerates: `failure_limit` within `failure_minutes`, and never all of its episodes.

    clock  Returns seconds.
    """

    def __init__(self, config: EnvConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = config.failure_limit
        self._minutes = config.failure_minutes
        self._clock = clock
        self._times: deque[float] = deque()
        self._all = 0
        self._last: Fault | None = None

    def add(self, fault: Fault) -> None:
        """Count a failure. EnvError, naming it, if they are now too many."""
        now = self._clock()
        self._all, self._last = self._all + 1, fault
        self._times.append(now)
        while self._times[0] < now - 60 * self._minutes:
            self._times.popleft()
        if self._limit is not None and len(self._times) > self._limit:
            raise EnvError(
                f"expected at most {self._limit} failures of environments within {self._minutes:g} minutes, got "
                f"{len(self._times)}; repair the environment, or raise env.failure_limit (null: no limit). "
                f"The last one: {fault.message} ({place(fault.traceback)})"
            )

    def check_end(self, episodes: int) -> None:
        """At the end of a run in which this many episodes ended by themselves: EnvError if all ended in failures."""
        if self._last is not None and not episodes:
            raise EnvError(
                f"expected episodes that end by themselves, got none, and {self._all} that ended because an "
                f"environment failed; repair it. The last failure: {self._last.message} ({place(self._last.traceback)})"
            )


class Recovery:
    """What a `VectorEnv` remembers about its environments' failures.

    attempts  Per environment, how often it was recreated.
    """

    def __init__(self, num_envs: int, restart_seconds: float) -> None:
        self.attempts = [0] * num_envs
        self._first_wait = restart_seconds
        self._in_a_row = np.zeros(num_envs, int)  # failures since the last finished episode
        self._faults: list[Fault] = []

    def note(self, fault: Fault) -> None:
        self.attempts[fault.env] += 1
        self._in_a_row[fault.env] += 1
        self._faults.append(fault)

    def pause(self, envs: Iterable[int]) -> None:
        """Wait as long as the environment with the most failures requires."""
        failures = max(int(self._in_a_row[env]) for env in envs)
        time.sleep(min(LONGEST_WAIT, self._first_wait * 2.0 ** min(failures - 1, 30)))

    def finished(self, is_last: np.ndarray) -> None:
        """Environments (N,) bool that finished an episode start again with the shortest wait."""
        self._in_a_row[is_last] = 0

    def last_fault(self) -> Fault:
        return self._faults[-1]

    def take(self) -> list[Fault]:
        """The failures since the last call."""
        faults, self._faults = self._faults, []
        return faults


def fault_of(task: str, env: int, error: BaseException) -> Fault:
    """The failure that an environment's exception stands for; call it where the exception is handled."""
    kind: Literal["garbage", "raised"] = "garbage" if isinstance(error, TransitionError) else "raised"
    return Fault(env, kind, f"{task}, environment {env} failed: {in_words(error)}", trace(error))


def in_words(error: BaseException) -> str:
    """Type and text of an exception, in one line."""
    error = original(error)
    try:
        text = " ".join(fenced(str, error).split())
    except Exception:  # an exception class of the environment's own may fail at this too
        text = "it cannot say more"
    return f"{type(error).__name__}: {text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + ' ...'}"


def trace(error: BaseException) -> str:
    """The traceback of an exception, for people."""
    return "".join(traceback.format_exception(original(error)))


def original(error: BaseException) -> BaseException:
    """What the environment itself raised."""
    return error.__cause__ if isinstance(error, EscapeError) and error.__cause__ is not None else error


def place(found: BaseException | str) -> str:
    """Where in foreign code an exception was raised, given the exception or its traceback."""
    frames = re.findall(r'File "(.+?)", line (\d+), in (\S+)', found if isinstance(found, str) else trace(found))
    own = [frame for frame in frames if not frame[0].startswith(_NOT_THEIRS) and "site-packages" not in frame[0]]
    return "{}, line {}, in {}".format(*(own or frames)[-1]) if frames else "no place is known"


def never_began(fault: Fault) -> EnvError:
    """What to report, in one line, about an environment that failed before its first transition."""
    return EnvError(
        f"expected an environment that can be made and reset, got {fault.message} ({place(fault.traceback)}); correct "
        "the environment"
    )


def describe(fault: Fault) -> str:
    """Message and traceback for people."""
    return f"{fault.message}\nTraceback:\n{fault.traceback}" if fault.traceback else fault.message


def give_up(fault: Fault) -> EnvError:
    return EnvError(f"expected an environment that can be recreated, got {TRIES} failures in a row: {describe(fault)}")
