"""What share of its parts' speed the training loop reaches: `dreamer bench loop`.

The loop itself runs, in a temporary folder, paused between passes to time its parts alone. A pass takes at least ::

    policy + max(environments, updates)     environments step while an accelerator works
    policy + environments + updates         on a CPU, whose cores they share

where updates are the dispatched ones, each dispatch timed alone. The share is this bound over the time of a pass.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dreamer.bench.alone import EnvsAlone, PolicyAlone, UpdateAlone
from dreamer.bench.measuring import Report, Rows, clocks, figure, spent
from dreamer.config import Config
from dreamer.envs import EnvError
from dreamer.run.devices import keep_compiled_programs, reuse_freed_memory
from dreamer.run.factories import training_envs
from dreamer.run.learner import Learner
from dreamer.run.loop import Run
from dreamer.run.signals import StopRequest
from dreamer.terminal import Console

#: Passes with updates before anything is timed: each program has been compiled by then.
_WARM_UP = 3
#: Calls of policy and environments alone in each round.
_CALLS = 20
#: A dispatch of at least this many milliseconds is timed once per round, not three times.
_LONG = 500.0
_COLUMNS = (
    "agent_steps_per_s",
    "bound_per_s",
    "share",
    "cpu_share",
    "policy_ms",
    "envs_ms",
    "update_ms",
    "updates_per_pass",
)

Line = dict[str, float]


def bench_loop(configs: Mapping[str, Config], ratios: Sequence[float], seconds: float, rounds: int) -> Report:
    """Each configuration at each train ratio; `seconds` of the loop in `rounds` rounds, parts not counted."""
    reuse_freed_memory()
    keep_compiled_programs()
    rows: Rows = {}
    for name, config in configs.items():
        for ratio in ratios:
            found = measure(_quiet(config, ratio), seconds, rounds)
            rows[f"{name}, train ratio {ratio:g}"] = found
            print(f"{name}, train ratio {ratio:g}: {found['share']:.0%} of the bound", flush=True)
    how = (
        "policy + environments + updates, which share the cores of this CPU"
        if cores_are_shared()
        else "policy + max(environments, updates): environments step while the device works"
    )
    request = {
        "tasks": {name: config.task for name, config in configs.items()},
        "num_envs": {name: config.env.num_envs for name, config in configs.items()},
        "train_ratios": list(ratios),
        "seconds": seconds,
        "rounds": rounds,
    }
    note = (
        f"The bound of a pass: {how}. update ms: of one update, alone. share: of the bound, paired round by round; cpu "
        "share: the same in processor time, which other work on the machine hardly lengthens."
    )
    return Report("loop", request, _COLUMNS, rows, note)


def cores_are_shared() -> bool:
    """Whether environments and updates compute on the same cores."""
    return jax.devices()[0].platform == "cpu"


def measure(config: Config, seconds: float, rounds: int) -> dict[str, Any]:
    """The row of one configuration."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        run = Run(dataclasses.replace(config, logdir=folder), None, Console(file=nowhere))
        stack.callback(run.close)
        pauses = _Pauses(run, seconds, rounds)
        stack.callback(pauses.close)
        run.loop(pauses)
        if run.failed:
            raise EnvError(run.failed)
        return _row(pauses.lines, run.envs.num_envs)


def _row(lines: Sequence[Line], num_envs: int) -> dict[str, Any]:
    """Medians and quartiles over the rounds."""
    columns = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    row = figure("agent_steps_per_s", num_envs * 1e3 / columns["pass_ms"])
    row |= figure("bound_per_s", num_envs * 1e3 / columns["bound_ms"])
    row |= figure("share", columns["bound_ms"] / columns["pass_ms"])
    if cores_are_shared():
        row |= figure("cpu_share", columns["bound_cpu_ms"] / columns["pass_cpu_ms"])
    for name in ("pass_ms", "policy_ms", "envs_ms", "update_ms"):
        row |= figure(name, columns[name][~np.isnan(columns[name])])
    return row | {"updates_per_pass": float(columns["updates_per_pass"].mean())}


def _quiet(config: Config, ratio: float) -> Config:
    """The same run at another train ratio, without evaluations, videos and checkpoints, on a small buffer."""
    run = dataclasses.replace(
        config.run,
        train_ratio=ratio,
        agent_steps=max(config.run.agent_steps, 10_000_000),
        eval_every=None,
        report_every=None,
        checkpoint_every=None,
        checkpoint_minutes=1e6,
        final_eval=False,
    )
    replay = dataclasses.replace(config.replay, capacity=min(config.replay.capacity, 100_000), gigabytes=None)
    return dataclasses.replace(config, run=run, replay=replay, log=dataclasses.replace(config.log, videos=False))


class Cost(NamedTuple):
    """Milliseconds of the parts, each alone, by both `clocks`, (2,); of dispatches by the number of their updates."""

    policy: np.ndarray
    envs: np.ndarray
    dispatches: dict[int, np.ndarray]

    def mean(self, other: Cost) -> Cost:
        """The mean of two costs, before and after. A dispatch that is only in `other` costs what that says."""
        dispatches = {count: (self.dispatches.get(count, cost) + cost) / 2 for count, cost in other.dispatches.items()}
        return Cost((self.policy + other.policy) / 2, (self.envs + other.envs) / 2, dispatches)


def line_of(loop: np.ndarray, passes: int, dispatches: Mapping[int, int], cost: Cost) -> Line:
    """loop: milliseconds over `passes` passes, by both clocks; dispatches: how many, by number of updates."""
    work = sum((number * cost.dispatches[count] for count, number in dispatches.items()), np.zeros(2)) / passes
    updates = sum(count * number for count, number in dispatches.items()) / passes
    work_of_all = cost.policy + cost.envs + work
    return {
        "pass_ms": loop[0] / passes,
        "bound_ms": work_of_all[0] if cores_are_shared() else cost.policy[0] + max(cost.envs[0], work[0]),
        "pass_cpu_ms": loop[1] / passes,
        "bound_cpu_ms": work_of_all[1],
        "policy_ms": cost.policy[0],
        "envs_ms": cost.envs[0],
        "update_ms": work[0] / updates if updates else float("nan"),
        "updates_per_pass": updates,
    }


class _Pauses(StopRequest):
    """A stop request that the loop checks before each pass: while it does, its parts are timed."""

    def __init__(self, run: Run, seconds: float, rounds: int) -> None:
        """seconds: of the loop in all; at least one pass in each round."""
        super().__init__()
        self.lines: list[Line] = []
        self._run, self._seconds, self._rounds = run, seconds / rounds, rounds
        self._dispatches = _counted(run.learner)
        self._parts: _Parts | None = None
        self._passes = self._trained = 0
        self._since = time.perf_counter()

    def __bool__(self) -> bool:
        if len(self.lines) == self._rounds:
            return True
        self._passes += 1
        if self._parts is None:
            self._trained += bool(self._dispatches)
            if self._trained == _WARM_UP:
                self._wait()
                self._parts = _Parts(self._run)
                self._cost = self._parts.cost(self._dispatches)
                self._begin()
            self._dispatches.clear()
        elif time.perf_counter() - self._since >= self._seconds:
            self._wait()
            loop = (clocks() - self._start) * 1e3
            # The machine changes: a round is compared with its parts before and after it.
            after = self._parts.cost({*self._dispatches, *self._cost.dispatches})
            cost, self._cost = self._cost.mean(after), after
            self.lines.append(line_of(loop, self._passes, self._dispatches, cost))
            self._begin()
        return len(self.lines) == self._rounds

    def _wait(self) -> None:
        """Wait for the updates under way, which belong to the previous passes."""
        jax.block_until_ready(self._run.learner.state)

    def _begin(self) -> None:
        self._dispatches.clear()
        self._start = clocks()
        self._passes, self._since = 0, time.perf_counter()

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()


def _counted(learner: Learner) -> collections.Counter[int]:
    """Counts the dispatches from now on, by the number of their updates."""
    counts: collections.Counter[int] = collections.Counter()
    update = learner.update

    def counting(count: int = 1, following: int = 1) -> Mapping[str, jax.Array]:
        counts[count] += 1
        return update(count, following)

    learner.update = counting  # type: ignore[method-assign]
    return counts


class _Parts:
    """Policy, environments and updates of a run, each alone."""

    def __init__(self, run: Run) -> None:
        self._run = run
        key = np.asarray(run.learner.state["key"])
        num_envs = run.envs.num_envs
        self._policy = PolicyAlone(run.agent, lambda: run.learner.params, num_envs, key)
        self._envs = EnvsAlone(training_envs(run.config, 1, None))
        self._updates: dict[int, UpdateAlone] = {}
        for part in (self._policy, self._envs):
            spent(part, _CALLS)

    def cost(self, counts: Iterable[int]) -> Cost:
        """counts: numbers of updates per dispatch to be timed."""
        return Cost(
            spent(self._policy, _CALLS), spent(self._envs, _CALLS), {count: self._dispatch(count) for count in counts}
        )

    def _dispatch(self, count: int) -> np.ndarray:
        """Milliseconds of a dispatch of `count` updates, by both clocks."""
        if count not in self._updates:
            agent, batch = self._run.agent, self._run.learner.batch
            assert batch is not None
            self._updates[count] = UpdateAlone(agent, agent.devices.place_state(agent.init(0)), [batch] * count)
            self._updates[count]()
        times = [spent(self._updates[count])]
        if times[0][0] < _LONG:
            times += [spent(self._updates[count]) for _ in range(2)]
        return np.median(times, 0)

    def close(self) -> None:
        self._envs.close()
