"""Prioritised starts: a sum tree over all positions, and the rules for setting and dropping priorities.

A start is drawn in proportion to a mass, which `MASSES` make of its loss and of how often it was trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamer.replay.files import StoredFile, read_file, write_file
from dreamer.replay.ring import ReplayError, Ring

#: Children of a node. Wide nodes mean few levels, and few levels mean few numpy calls.
FAN = 64


class SumTree:
    """Masses (M,) float64 with their sums, so that drawing by mass and changing a mass cost O(log M).

    Every sum is recomputed from its children, never updated by differences: nothing drifts, and a tree that is
    rebuilt from its leaves equals the one that grew.
    """

    def __init__(self, leaves: int):
        self._levels = [np.zeros(-(-leaves // FAN) * FAN)]
        while (size := len(self._levels[-1]) // FAN) > 1:
            self._levels.append(np.zeros(-(-size // FAN) * FAN))
        self.total = 0.0

    def get(self, index: np.ndarray) -> np.ndarray:
        return self._levels[0][index]

    def set(self, index: np.ndarray, mass: np.ndarray | float) -> None:
        """Give the distinct leaves `index` (M,) the masses (M,), finite and at least 0."""
        self._levels[0][index] = mass
        for low, high in itertools.pairwise(self._levels):
            index = index // FAN
            high[index] = low.reshape(-1, FAN)[index].sum(1)
        self.total = float(self._levels[-1].sum())

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The leaves (M,) at which the running sum of masses exceeds `mass` (M,), each in [0, total)."""
        node = np.zeros(len(mass), np.int64)
        for level in reversed(self._levels):
            children = level.reshape(-1, FAN)[node]
            sums = children.cumsum(1)
            # Rounding may leave a remainder beyond the last child: then the last child is meant.
            last = FAN - 1 - (children[:, ::-1] > 0).argmax(1)
            child = np.minimum((sums <= mass[:, None]).sum(1), last)
            before = np.where(child > 0, np.take_along_axis(sums, np.maximum(child - 1, 0)[:, None], 1)[:, 0], 0)
            node, mass = node * FAN + child, np.maximum(mass - before, 0)
        return node


class Mass(NamedTuple):
    """How masses are made: that of a start that has no loss yet; of losses and visits (M,), with an exponent α."""

    first: float
    of: Callable[[np.ndarray, np.ndarray, float], np.ndarray]


MASSES: Mapping[str, Mass] = {
    # Prioritized experience replay, https://arxiv.org/abs/1511.05952, the proportional variant, lᵅ.
    "loss": Mass(np.inf, lambda loss, visits, alpha: np.maximum(loss, 0) ** alpha),
    # Curious replay, https://arxiv.org/abs/2306.15934: what was seldom trained on, then what is not known well.
    "curious": Mass(1e5, lambda loss, visits, alpha: 1e4 * 0.7**visits + (np.abs(loss) + 0.01) ** alpha),
}


class Priorities:
    """A mass for every start (row of a context step) in the ring: among finite ones, the chance in proportion.

    Where the first one is infinite, such starts are drawn before all finite ones until `prioritize` gives them another,
    and not twice in one draw while others wait.

    mass            A row of `MASSES`.
    exponent        α.
    zero_on_sample  A start that was drawn is not drawn again until it gets a new mass.
    """

    def __init__(self, ring: Ring, length: int, mass: str, exponent: float, zero_on_sample: bool):
        self._ring, self._length = ring, length
        self._mass, self._exponent, self._zero_on_sample = MASSES[mass], exponent, zero_on_sample
        self.clear()

    def extend(self, ids: np.ndarray) -> None:
        """Note that one row was added to each of the environments `ids` (M,)."""
        head = self._ring.head[ids]
        begins = head - self._length
        valid = begins >= self._ring.tail[ids]
        overwritten, fresh = self._ring.slots(ids, head - 1), self._ring.slots(ids[valid], begins[valid])
        masses = np.repeat([0.0, self._mass.first], [len(overwritten), len(fresh)])
        self._set(np.concatenate([overwritten, fresh]), masses)
        self._visits[fresh] = 0

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray] | None:
        """`count` starts (env, row), each (count,) int64; None if all priorities are 0."""
        waiting = int(self._infinite.total)
        first = min(count, waiting)
        slots = self._infinite.find(rng.choice(waiting, first, replace=False) + 0.5) if first else np.zeros(0, np.int64)
        if first < count:
            if not (first or self._finite.total):
                return None
            finite = self._finite if self._finite.total else self._infinite
            slots = np.concatenate([slots, finite.find(rng.random(count - first) * finite.total)])
        if self._zero_on_sample:
            self._set(slots, np.zeros(len(slots)))
        return self._ring.rows_at(slots)

    def prioritize(self, env: np.ndarray, row: np.ndarray, values: np.ndarray) -> None:
        """Starts were trained on, with these losses (B,): of equal starts the later one counts, each is a visit;
        overwritten ones are left alone."""
        if not np.isfinite(values).all():
            raise ReplayError(f"expected finite priorities, got {values[~np.isfinite(values)][:3].tolist()}")
        kept = np.flatnonzero(row >= self._ring.tail[env])
        trained = self._ring.slots(env[kept], row[kept])
        np.add.at(self._visits, trained, 1)
        slots, last = np.unique(trained[::-1], return_index=True)
        self._set(slots, self._mass.of(values[kept][::-1][last], self._visits[slots], self._exponent))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write masses and visits of all starts, by environment, then by row, to a file. Returns its entry for a
        manifest."""
        slots = self._starts()
        mass = np.where(self._infinite.get(slots) > 0, np.inf, self._finite.get(slots))
        stored = write_file(folder, f"priorities-{self._ring.head.max():012d}", [mass, self._visits[slots]])
        return {**stored.entry(), "starts": self._ring.starts(self._length).tolist()}

    def load(self, folder: Path, entry: Mapping[str, Any] | None) -> None:
        """Continue from a save; without one all begin anew. If the ring holds fewer starts, the newest count."""
        self.clear()
        slots = self._starts()
        if entry is None:
            self._set(slots, np.full(len(slots), self._mass.first))
            return
        data, count = read_file(folder, StoredFile.parse(entry)), sum(entry["starts"])
        here = self._ring.starts(self._length)

        def newest(values: np.ndarray) -> np.ndarray:
            parts = np.split(values, np.cumsum(entry["starts"])[:-1])
            return np.concatenate([part[len(part) - n :] for part, n in zip(parts, here, strict=True)])

        self._set(slots, newest(data[: 8 * count].view(np.float64)))
        if len(data) > 8 * count:  # saves of before visits were counted have none
            self._visits[slots] = newest(data[8 * count :].view(np.int32))

    def clear(self) -> None:
        """Forget everything."""
        size = self._ring.num_envs * self._ring.rows
        self._finite, self._infinite = SumTree(size), SumTree(size)
        self._visits = np.zeros(size, np.int32)

    def _set(self, slots: np.ndarray, mass: np.ndarray) -> None:
        infinite = np.isinf(mass)
        self._infinite.set(slots, infinite)
        self._finite.set(slots, np.where(infinite, 0, mass))

    def _starts(self) -> np.ndarray:
        """Slots of all starts, by environment, then by row."""
        begins = zip(self._ring.tail, self._ring.starts(self._length), strict=True)
        return np.concatenate([self._ring.slots(env, np.arange(t, t + n)) for env, (t, n) in enumerate(begins)])
