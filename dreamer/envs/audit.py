"""`dreamer envs check`: plays an environment with random actions and reports what it is and what is wrong with it."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.envs.audit_rules import Findings, Rules, Watch, told
from dreamer.envs.faults import original
from dreamer.envs.interface import Env, Restorable, TaskError, Transition, restorable
from dreamer.envs.restore_check import choose, copied, difference, move, restore_failure
from dreamer.envs.suites.gym import GymEnv
from dreamer.envs.workers.fence import fenced
from dreamer.types import ACTION_MASK, Spaces

#: Steps for which two instances with equal seeds are compared; never more than the steps asked for.
COMPARED = 200
#: A single choice with at most this many classes has each of them tried.
CHOICES = 64
#: Share of the steps after which memory is measured: before that, caches fill.
SETTLED = 0.2


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    steps          Agent steps played; fewer than asked for if the environment failed.
    wall_rate      Agent steps per second by the clock, resets included.
    cpu_rate       Agent steps per second of processor time of this process.
    growth         Growth of this process's memory after the first fifth, bytes per 1000 steps.
    scores         Sums of rewards of the finished episodes.
    repeats        "" if equal seeds and actions gave equal transitions, else what differed.
    state          "" if the state can be saved and restored exactly, else why not.
    violations     Everything that breaks the contract, one sentence each.
    """

    observations: Spaces
    actions: Spaces
    steps: int
    wall_rate: float
    cpu_rate: float
    growth: float
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    repeats: str
    state: str
    violations: tuple[str, ...]


def audit(
    make: Callable[[int], Env], steps: int, fits: Callable[[Spaces, Spaces], object] = lambda seen, done: None
) -> Report:
    """Plays `steps` agent steps.

    make   seed -> a fresh environment. TaskError if it cannot be made.
    fits   ValueError if no agent can be made for (observations, actions).
    """
    findings = Findings()
    env = _made(make, 0)
    try:
        _watch(env, findings)
        rules = Rules(env.observation_spaces, findings)
        played = _Played()
        _guarded(findings, lambda: _play(env, steps, rules, findings, played))
        rules.finish()
        _guarded(findings, lambda: _picture(env, findings))
        _guarded(findings, lambda: _edges(env, findings))
        spaces = env.observation_spaces, env.action_spaces
    finally:
        _guarded(findings, env.close)
    try:
        fits(*spaces)
    except ValueError as error:
        findings.add("fits", f"no agent can be made for it: {error}")
    repeats = _repeats(make, min(steps, COMPARED)) if played.steps else "it was not played"
    if repeats:
        findings.add("repeats", f"equal seeds and actions give different episodes: {repeats}")
    state = _state(make)
    return Report(
        *spaces,
        played.steps,
        played.steps / max(played.wall, 1e-9),
        played.steps / max(played.cpu, 1e-9),
        played.growth,
        tuple(played.scores),
        tuple(played.lengths),
        repeats,
        state,
        tuple(findings.lines()),
    )


@dataclasses.dataclass
class _Played:
    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    growth: float = 0.0
    scores: list[float] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)


def _guarded(findings: Findings, run: Callable[[], object]) -> None:
    """Turns whatever an environment raises into a finding."""
    try:
        fenced(run)
    except Exception as error:
        findings.add(f"raised {type(original(error)).__name__}", f"it raised {told(error)}")


def _made(make: Callable[[int], Env], seed: int) -> Env:
    """A fresh environment. TaskError if it cannot be made."""
    try:
        return fenced(make, seed)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"expected an environment that can be made, it raised {told(error)}; correct it") from error


def _play(env: Env, steps: int, rules: Rules, findings: Findings, played: _Played) -> None:
    rng = np.random.default_rng(0)
    settled, memory = int(SETTLED * steps), 0
    result: Transition | None = None
    score, length = 0.0, 0
    dead = 0  # consecutive episodes that were over before their first action
    while played.steps < steps and dead < 3:
        wall, cpu = time.perf_counter(), time.process_time()
        action = None if result is None else choose(env, rng, result)
        if first := action is None:
            result = env.reset()
        else:
            before = copied(dict(action))
            result = env.step(action)
            played.steps += 1
            if difference(before, dict(action)) is not None:
                findings.add("action", "step writes to the action that it is given")
        played.wall += time.perf_counter() - wall
        played.cpu += time.process_time() - cpu
        findings.step = played.steps
        rules.look(result, first)
        dead = dead + 1 if first and bool(result["is_last"]) else 0
        score, length = (0.0, 0) if first else (score + float(np.sum(result["reward"])), length + 1)
        if not first and bool(result["is_last"]):
            played.scores.append(score)
            played.lengths.append(length)
        if played.steps == settled and not memory:
            memory = _resident()
    played.growth = (_resident() - memory) * 1000 / max(steps - settled, 1)


def _picture(env: Env, findings: Findings) -> None:
    picture = env.render()
    if picture is None:
        return
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        shown = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        findings.add("render", f"render returns {shown}, not a picture uint8 (H, W, 3) or None")


def _edges(env: Env, findings: Findings) -> None:
    """Tries the bounds of the action space, each at the start of an episode, where they are allowed there."""
    for words, action in edges(env.action_spaces):
        mask = np.asarray(env.reset().get(ACTION_MASK, ()))
        if mask.size and not all(mask[value] for value in action.values()):
            continue
        try:
            fenced(env.step, action)
        except Exception as error:
            findings.add("edges", f"it rejects {words}, an action of its own space, with {told(error)}")


def edges(spaces: Spaces) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """(in words, action): everything lowest, everything highest, and each choice where there is only one to make."""
    low = {
        key: np.full(space.shape, -1.0 if space.classes is None else 0, space.dtype) for key, space in spaces.items()
    }
    high = {
        key: np.ones(space.shape, np.float32)
        if space.classes is None
        else (np.array(space.classes) - 1).reshape(space.shape).astype(np.int32)
        for key, space in spaces.items()
    }
    yield "the lowest action", low
    yield "the highest action", high
    if len(spaces) == 1:
        ((key, space),) = spaces.items()
        if space.shape == () and space.classes is not None:
            for choice in range(1, min(space.classes[0] - 1, CHOICES)):
                yield f"the action {choice}", {key: np.array(choice, np.int32)}


def _repeats(make: Callable[[int], Env], steps: int) -> str:
    """ "" if two environments with the same seed, played one after the other, agree; else where they differ."""
    both: list[list[Transition]] = []
    failed = Findings()  # this error was reported before; here it only says why there is nothing to compare
    for _ in range(2):
        _guarded(failed, lambda: both.append(_rollout(make, steps)))
    if len(both) < 2:
        return "; ".join(words for words, *_ in failed.found.values())
    for step, (one, two) in enumerate(zip(*both, strict=False)):
        wrong = difference(one, two)
        if wrong is not None:
            return f"{wrong!r} differs at step {step}"
    return ""


def _rollout(make: Callable[[int], Env], steps: int) -> list[Transition]:
    rng, env = np.random.default_rng(1), make(7)
    try:
        results = [copied(env.reset())]
        for _ in range(steps):
            results.append(copied(move(env, choose(env, rng, results[-1]))))
    finally:
        _guarded(Findings(), env.close)
    return results


def _state(make: Callable[[int], Env]) -> str:
    """ "" if the state can be saved and restored exactly, else why not."""
    said: list[str] = []
    failed = Findings()
    _guarded(failed, lambda: said.append(_why_no_state(make)))
    return said[0] if said else "; ".join(words for words, *_ in failed.found.values())


def _why_no_state(make: Callable[[int], Env]) -> str:
    env = make(0)
    try:
        inner = _innermost(env)
        if isinstance(inner, GymEnv):
            return inner.why_not_restorable
        if not isinstance(inner, Restorable):
            return "it has no get_state and set_state"
        if not restorable(env):
            return "it says itself that it cannot"
    finally:
        _guarded(Findings(), env.close)
    return restore_failure(make, bounded=False) or ""


def _innermost(env: Any) -> Any:
    while not isinstance(env, GymEnv) and isinstance(getattr(env, "env", None), Env):
        env = env.env
    return env


def _watch(env: Env, findings: Findings) -> None:
    inner = _innermost(env)
    if isinstance(inner, GymEnv):
        try:
            inner.put_between(lambda made: Watch(made, findings))
        except TaskError:
            return  # observed through its picture: its own observation may be of any kind


def _resident() -> int:
    """Bytes of memory that this process uses now, or its peak so far where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
