"""What was played, step by step: the dream, the real environment beside it; rewound to any step, and branched there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dreamer.dreaming import Dreams, Glimpse
from dreamer.play.real_world import RealWorld, Seen
from dreamer.rssm import State
from dreamer.types import Spaces

#: Bytes of history that one session keeps; then it has to begin anew.
MOST_BYTES = 200_000_000
#: Dream and reality have parted where their observations differ this many times as much as they did at the start, where
#: the model had just seen the real one, and by this share of their range at least; or their rewards by this much.
PARTED, LEAST, REWARDS = 2.0, 0.01, 0.5
#: The model is unsure where the entropy of the next latent exceeds its median over the latest steps by this factor,
#: which is known from so many steps on.
UNSURE, LATELY, BEFORE = 1.25, 100, 3

Action = dict[str, np.ndarray]


@dataclasses.dataclass
class Moment:
    """One step of an episode.

    state: (1, ...), the model's; glimpse: what it tells (1, ...), on the host; seen: the real step beside it.
    difference: of their observations, a share of the range; parted: the first step at which they differed visibly.
    unsure: whether the model was about this step. scores: sums of the rewards so far, dreamed and real.
    ended: whether the dream, and the real episode, are over. action: taken after it, by `actor`; None: not yet.
    """

    state: State
    glimpse: Glimpse
    seen: Seen | None
    difference: float | None
    parted: int | None
    unsure: bool
    scores: tuple[float, float]
    ended: tuple[bool, bool]
    action: Action | None = None
    actor: str = ""


class Timeline:
    """One episode of one person. `at` is the moment that is shown; the next step is taken from there.

    start: gives the state (1, ...) after a first real observation, or, called with None, a state to begin in.
    """

    def __init__(self, dreams: Dreams, start: Callable[[Seen | None], State], world: RealWorld | None) -> None:
        self.dreams, self.world, self._start = dreams, world, start
        self._idle = {k: np.zeros((1, *space.shape), space.dtype) for k, space in dreams.agent.actions.items()}
        self.moments: list[Moment] = []
        self.at = 0
        self._seed = np.zeros(1, np.uint32)
        self._most = 1

    def begin(self, seed: int) -> None:
        """Begin an episode; equal seeds and actions give equal dreams of equal starts."""
        self._seed = np.array([seed], np.uint32)
        seen = None if self.world is None else self.world.reset()
        state = self._start(seen)
        self.moments, self.at = [], 0
        first = self._moment(*self._dream(state, self._idle, 0), seen)
        self.moments.append(first)
        self._most = max(100, MOST_BYTES // max(1, _bytes(first)))

    @property
    def now(self) -> Moment:
        return self.moments[self.at]

    @property
    def full(self) -> bool:
        return len(self.moments) >= self._most

    def seek(self, at: int) -> None:
        """Show another moment; what comes after it stays until the next step is taken."""
        self.at = min(max(at, 0), len(self.moments) - 1)

    def step(self, action: Mapping[str, np.ndarray], actor: str) -> None:
        """Take an action, by name without batch axis, in the moment shown. Later moments are forgotten."""
        now, branching = self.now, self.at < len(self.moments) - 1
        del self.moments[self.at + 1 :]
        now.action, now.actor = {key: np.asarray(value) for key, value in action.items()}, actor
        state, glimpse = self._dream(now.state, {key: value[None] for key, value in now.action.items()}, self.at + 1)
        seen = None
        # An environment that has no earlier state to go back to has lost this branch for good.
        if self.world is not None and now.seen is not None and not now.ended[1]:
            seen = self.world.step(now.action) if not branching or self.world.back(self.at) else None
        self.moments.append(self._moment(state, glimpse, seen))
        self.at += 1

    def _dream(self, state: State, actions: Action, count: int) -> tuple[State, Glimpse]:
        """The next state, or at count 0 this one, and what it tells."""
        zero, counts = np.zeros(1, np.int32), np.array([count], np.uint32)
        state, glimpse = self.dreams.step(state, state, actions, counts == 0, zero, self._seed, counts)
        return state, jax.device_get(glimpse)

    def _moment(self, state: State, glimpse: Glimpse, seen: Seen | None) -> Moment:
        """The moment that follows those there are."""
        step, past = len(self.moments), self.moments[-1] if self.moments else None
        reward, ended = float(glimpse.reward[0]), bool(glimpse.ended[0])
        scores, parted, over = ((0.0, 0.0), None, False) if past is None else (past.scores, past.parted, past.ended[1])
        differs = None
        if seen is not None:
            told = seen.transition
            real, last = float(told["reward"]), bool(told["is_last"])
            differs = difference(glimpse.observation, told, self.dreams.observations)
            most = differs if past is None else max(PARTED * (self.moments[0].difference or 0), LEAST)
            if parted is None and (differs > most or abs(reward - real) > REWARDS or ended != last):
                parted = step
            scores, over = (scores[0], scores[1] + real), last
        entropies = [float(moment.glimpse.entropy[0]) for moment in self.moments[1:][-LATELY:]]
        unsure = len(entropies) >= BEFORE and float(glimpse.entropy[0]) > UNSURE * float(np.median(entropies))
        scores = (scores[0] + reward, scores[1])
        return Moment(state, glimpse, seen, differs, parted, unsure, scores, (ended, over))


def difference(dreamed: Mapping[str, Any], real: Mapping[str, Any], spaces: Spaces) -> float:
    """Mean difference of observations, (1, ...) dreamed and (...) real: of images as a share of 255, of vectors after
    symlog, of choices the share that is not the same; averaged over the keys."""
    found = []
    for key, space in spaces.items():
        ours, theirs = np.asarray(dreamed[key][0]), np.asarray(real[key])
        if space.kind == "image":
            found.append(np.abs(ours.astype(np.float32) - theirs).mean() / 255)
        elif space.kind == "discrete":
            found.append((ours != theirs).mean())
        else:
            found.append(np.abs(_symlog(ours) - _symlog(theirs)).mean())
    return float(np.mean(found))


def _symlog(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.log1p(np.abs(x))


def _bytes(moment: Moment) -> int:
    """About what one moment needs in memory."""
    real = [] if moment.seen is None else [*moment.seen.transition.values(), moment.seen.picture]
    leaves = [*jax.tree.leaves((moment.state, tuple(moment.glimpse))), *real]
    return 1000 + sum(int(leaf.nbytes) for leaf in leaves if leaf is not None)
