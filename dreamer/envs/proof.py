"""Whether an environment can be put back exactly is not believed but tried.

Two instances with different seeds: the first plays for a while, its state goes through a pickle into the second, and
then both do the same, through resets too. Every transition and the picture must agree to the bit::

    first    reset, 10 steps, SAVE, 20 steps, reset, 5 steps, up to 200 more
    second   reset,  3 steps,   RESTORE, the same again

What shows only later than that, or only in other situations, is not found.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from dreamer.envs.interface import Env, Restorable, Transition

#: An action, or None for a reset.
Move = Mapping[str, np.ndarray] | None

BEFORE, BEFORE_SECOND, AFTER, AFTER_RESET, LONGER = 10, 3, 20, 5, 200
#: Processor time that a proof may take, and time by the clock, which other work on the machine stretches.
CPU_SECONDS, WALL_SECONDS = 2.0, 10.0


class _SlowError(Exception):
    """The time is up."""


class _Clock:
    def __init__(self, share: float) -> None:
        self.cpu = time.process_time() + share * CPU_SECONDS
        self.wall = time.monotonic() + share * WALL_SECONDS

    def over(self) -> bool:
        return time.process_time() > self.cpu or time.monotonic() > self.wall


def disproof(make: Callable[[int], Env], bounded: bool = True) -> str | None:
    """Why an environment cannot be put back exactly, in words; None if it was put back exactly.

    make     seed -> a fresh environment; called twice. The random streams of Python and numpy are left as they were.
    bounded  Give up after `CPU_SECONDS`, which counts as a disproof.
    """
    kept = random.getstate(), np.random.get_state()
    made: list[Env] = []
    try:
        for seed in (1, 2):
            made.append(make(seed))
        return _try(made[0], made[1], bounded)
    except _SlowError:
        return f"it is too slow to find out: the proof takes longer than {CPU_SECONDS:g} s"
    except Exception as error:  # whatever an environment raises when it is saved or restored
        return f"{type(error).__name__}: {error}"
    finally:
        for env in made:
            env.close()
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _try(first: Env, second: Env, bounded: bool) -> str | None:
    rng = np.random.default_rng(0)
    enough, limit = _Clock(0.3), _Clock(1.0)

    def moves(count: int) -> list[Move]:
        return [{key: space.sample(rng) for key, space in first.action_spaces.items()} for _ in range(count)]

    def played(env: Env, script: list[Move], over: bool = False) -> Iterator[Transition]:
        for result in play(env, script, over):
            if bounded and limit.over():
                raise _SlowError
            yield result

    *_, last = played(first, [None, *moves(BEFORE)])
    list(played(second, [None, *moves(BEFORE_SECOND)]))
    over, picture = bool(last["is_last"]), _copy(first.render())
    state = pickle.dumps(cast(Restorable, first).get_state())
    must, may = [*moves(AFTER), None, *moves(AFTER_RESET)], moves(LONGER)
    results = [copied(result) for result in played(first, must, over)]
    for result in played(first, may, bool(results[-1]["is_last"])):
        if bounded and enough.over():
            break
        results.append(copied(result))
    later = _copy(first.render())

    cast(Restorable, second).set_state(pickle.loads(state))
    if picture is not None and not _same(picture, second.render()):
        return "the picture is another one after restoring"
    again = played(second, [*must, *may][: len(results)], over)
    for step, (one, two) in enumerate(zip(results, again, strict=True), 1):
        wrong = difference(one, two)
        if wrong is not None:
            return f"{wrong!r} is another one {step} steps after restoring"
    if later is not None and not _same(later, second.render()):
        return f"the picture is another one {len(results)} steps after restoring"
    return None


def play(env: Env, moves: list[Move], over: bool) -> Iterator[Transition]:
    """The transitions of these moves. A move after a last step is a reset, like a move that is None."""
    for move in moves:
        result = env.reset() if over or move is None else env.step(move)
        over = bool(result["is_last"])
        yield result


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
