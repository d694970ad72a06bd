"""Metrics between two log steps: their means, where the time went, and how long it took to the first update."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from dreamer import transfer

#: How the values of a metric are reduced to one, by the suffix of its name; all others are averaged.
REDUCTIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "_max": np.max,
    "_min": np.min,
    "_sum": np.sum,
    "_last": lambda values: values[-1],
}


class Packed(NamedTuple):
    """Metrics by name as the rows of one array, (M,) or (M, K), which may still be on the device."""

    names: tuple[str, ...]
    rows: Any


class Aggregator:
    """Collects metrics and returns one number for each.

    Values may still be on the device: they are fetched together when the result is asked for, not before. Those added
    together wait there as one array, because a transfer costs about the same for one number as for fifty. An array (the
    updates of one dispatch, say) counts as that many values.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._packed: dict[tuple[str, ...], list[Any]] = {}

    def add(self, values: Mapping[str, Any] | Packed, prefix: str = "") -> None:
        if isinstance(values, Packed):
            self._packed.setdefault(tuple(prefix + name for name in values.names), []).append(values.rows)
            return
        alike: dict[Any, dict[str, jax.Array]] = {}
        for name, value in values.items():
            if isinstance(value, jax.Array):
                alike.setdefault((value.shape, value.dtype), {})[prefix + name] = value
            else:
                self._values.setdefault(prefix + name, []).append(value)
        for group in alike.values():
            self._packed.setdefault(tuple(group), []).append(_pack(list(group.values())))

    def result(self) -> dict[str, float]:
        """One number for each metric added since the last call. Values that are not finite never become finite."""
        flat = self.state()
        self._values, self._packed = {}, {}
        return {name: float(_reduction(name)(array)) for name, array in flat.items() if array.size}

    def state(self) -> dict[str, np.ndarray]:
        """All values added since the last result, float64, those from the host first; waits for the device."""
        values, packed = transfer.read((self._values, list(self._packed.values())))
        found = {name: [np.ravel(x).astype(np.float64) for x in xs] for name, xs in values.items()}
        for names, arrays in zip(self._packed, packed, strict=True):
            rows = np.concatenate([array.reshape(len(names), -1) for array in arrays], 1, dtype=np.float64)
            for name, row in zip(names, rows, strict=True):
                found.setdefault(name, []).append(row)
        return {name: np.concatenate(xs) for name, xs in found.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue with the values of a `state`."""
        self._values, self._packed = {name: [array] for name, array in state.items()}, {}


@jax.jit
def _pack(values: list[jax.Array]) -> jax.Array:
    """Metrics of equal shape and dtype as the rows of one array."""
    return jnp.stack(values)


class Stopwatch:
    """Rates, and the share of time spent in each section of the loop.

    Sections may nest: the time of the inner one is not counted for the outer one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._since = clock()
        self._reset()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def count(self, policy: int = 0, train: int = 0) -> None:
        """Adds agent steps chosen by the policy, and replayed steps trained on."""
        self._policy += policy
        self._train += train

    def result(self) -> dict[str, float]:
        """fps/policy and fps/train (1/s), time/SECTION and time/other (shares that add up to 1) since the last call."""
        self._switch()
        total = max(self._since - self._start, 1e-9)
        shares = {f"time/{name}": spent / total for name, spent in sorted(self._spent.items())}
        shares["time/other"] = max(0.0, 1.0 - sum(shares.values()))
        rates = {"fps/policy": self._policy / total, "fps/train": self._train / total}
        self._reset()
        return {**rates, **shares}

    def _switch(self) -> None:
        """Books the time since the last switch on the innermost open section."""
        now = self._clock()
        if self._open:
            self._spent[self._open[-1]] = self._spent.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def _reset(self) -> None:
        self._start = self._since = self._clock()
        self._spent: dict[str, float] = {}
        self._policy = self._train = 0


def _reduction(name: str) -> Callable[[np.ndarray], Any]:
    return next((reduce for end, reduce in REDUCTIONS.items() if name.endswith(end)), np.mean)


# --- To the first update ---------------------------------------------------------------------------


#: Parts that take fewer seconds are left out.
_SHOWN = 0.05


def process_start() -> float:
    """When this process was started, by `time.time`."""
    return psutil.Process().create_time()


class StartupTimer:
    """Books the time of consecutive parts: `mark` books the time since the previous mark."""

    def __init__(self, begun: float | None = None, clock: Callable[[], float] = time.time) -> None:
        """begun: when the program started; None: now."""
        self._clock = clock
        self._begun = self._last = clock() if begun is None else begun
        self._parts: dict[str, float] | None = {}

    def mark(self, part: str, once: bool = False) -> None:
        """Book the time since the last mark under this part. once: book nothing if the part has been marked before."""
        if self._parts is None or (once and part in self._parts):
            return
        now = self._clock()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def finish(self, part: str) -> str | None:
        """Marks the last part. Returns a line: seconds in all and of each part; None from the second time on."""
        self.mark(part)
        parts, self._parts = self._parts, None
        if parts is None:
            return None
        told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items() if seconds >= _SHOWN)
        return f"{self._last - self._begun:.1f} s to the first update: {told}"
