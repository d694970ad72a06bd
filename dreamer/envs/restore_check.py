"""Whether an environment can be restored exactly is not taken on trust but tried.

Two instances with different seeds: the first plays for a while, its state goes through a pickle into the second, and
then both do the same, through resets too. Every transition and the picture must agree to the bit::

    first    reset, 10 steps, SAVE, 20 steps, reset, 5 steps, up to 200 more
    second   reset,  3 steps,   RESTORE, the same again

A difference that shows only later, or only in other situations, is not found.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from dreamer.envs.faults import in_words
from dreamer.envs.interface import Env, Restorable, Transition
from dreamer.envs.workers.fence import Fence, close, fenced
from dreamer.types import ACTION_MASK

#: An action, or None for a reset.
Move = Mapping[str, np.ndarray] | None

BEFORE, BEFORE_SECOND, AFTER, AFTER_RESET, LONGER = 10, 3, 20, 5, 200
#: Processor time that a check may take, and time by the clock, which other work on the machine stretches.
CPU_SECONDS, WALL_SECONDS = 2.0, 10.0


class _SlowError(Exception):
    """The time is up."""


class _Clock:
    def __init__(self, share: float) -> None:
        self.cpu = time.process_time() + share * CPU_SECONDS
        self.wall = time.monotonic() + share * WALL_SECONDS

    def over(self) -> bool:
        return time.process_time() > self.cpu or time.monotonic() > self.wall


def restore_failure(make: Callable[[int], Env], bounded: bool = True) -> str | None:
    """Why an environment cannot be restored exactly, in words; None if it was restored exactly.

    make     seed -> a fresh environment; called twice. The random streams of Python and numpy are left as they were.
    bounded  Give up after `CPU_SECONDS`, which counts as a restore_failure.
    """
    kept = random.getstate(), np.random.get_state()
    made: list[Env] = []
    try:
        for seed in (1, 2):
            made.append(fenced(make, seed))
        return fenced(_try, made[0], made[1], bounded)
    except _SlowError:
        return f"it is too slow to find out: the check takes longer than {CPU_SECONDS:g} s"
    except Exception as error:  # whatever an environment raises when it is saved or restored
        return in_words(error)
    finally:
        for env in made:
            close(Fence(), env.close)
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _try(first: Env, second: Env, bounded: bool) -> str | None:
    rng = np.random.default_rng(0)
    enough, limit = _Clock(0.3), _Clock(1.0)

    def in_time(result: Transition) -> Transition:
        if bounded and limit.over():
            raise _SlowError
        return copied(result)

    last = in_time(first.reset())
    for _ in range(BEFORE):
        last = in_time(move(first, choose(first, rng, last)))
    other = in_time(second.reset())
    for _ in range(BEFORE_SECOND):
        other = in_time(move(second, choose(second, rng, other)))

    picture = _copy(first.render())
    state = pickle.dumps(cast(Restorable, first).get_state())
    moves, results = [], []
    for count in range(AFTER + 1 + AFTER_RESET + LONGER):
        if count > AFTER + AFTER_RESET and bounded and enough.over():
            break
        moves.append(None if count == AFTER else choose(first, rng, last))
        last = in_time(move(first, moves[-1]))
        results.append(last)
    later = _copy(first.render())

    cast(Restorable, second).set_state(pickle.loads(state))
    if picture is not None and not _same(picture, second.render()):
        return "the picture is another one after restoring"
    for step, (one, action) in enumerate(zip(results, moves, strict=True), 1):
        wrong = difference(one, in_time(move(second, action)))
        if wrong is not None:
            return f"{wrong!r} is another one {step} steps after restoring"
    if later is not None and not _same(later, second.render()):
        return f"the picture is another one {len(results)} steps after restoring"
    return None


def choose(env: Env, rng: np.random.Generator, last: Transition) -> Move:
    """A random action of those that `last` allows, or None, a reset, after the last step of an episode."""
    if last["is_last"]:
        return None
    mask = np.asarray(last.get(ACTION_MASK, ()))
    if not mask.any():
        return {key: np.asarray(space.sample(rng)) for key, space in env.action_spaces.items()}
    ((key, space),) = env.action_spaces.items()
    return {key: np.array(rng.choice(np.flatnonzero(mask)), space.dtype).reshape(space.shape)}


def move(env: Env, action: Move) -> Transition:
    """One step, or a reset where there is no action."""
    return env.reset() if action is None else env.step(action)


def copied(result: Transition) -> Transition:
    """The transition in arrays of its own."""
    return {key: np.array(value) for key, value in result.items()}


def difference(one: Transition, two: Transition) -> str | None:
    """The first key whose values are not the same to the bit, or None."""
    for key in sorted({*one, *two}):
        if key not in one or key not in two or not _same(one[key], two[key]):
            return key
    return None


def _copy(image: np.ndarray | None) -> np.ndarray | None:
    return None if image is None else image.copy()


def _same(one: Any, two: Any) -> bool:
    one, two = np.asarray(one), np.asarray(two)
    return one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()
