"""Feeds the train step: batches from replay to the device, fresh latents back, and a check for finite numbers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dreamer import transfer
from dreamer.agent import Agent, TrainState
from dreamer.records.meters import Stopwatch
from dreamer.replay import Replay, Selection
from dreamer.run.feed import Drawn, make_feed
from dreamer.run.nonfinite import NonFiniteUpdateError


@dataclasses.dataclass
class _Dispatched:
    """K updates that the device may still be working on. `latents` become None when they have landed.

    arrived: whether the host has what it needs of them, and found them finite.
    """

    drawn: list[Drawn]
    latents: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    finite: Any
    arrived: bool = False


class Learner:
    """The training state and the batches that change it.

    While dispatch u of K updates runs, the batches of u+1 are gathered and on their way to the device. Latents of u are
    always in the buffer before the batches of u+2 are gathered: numbers do not depend on how fast the device is, nor on
    where the buffer is, which only the feed knows.
    """

    def __init__(
        self, agent: Agent, state: TrainState, replay: Replay, batch_size: int, watch: Stopwatch | None = None
    ) -> None:
        """watch: books the time under replay, transfer and update."""
        self.agent, self.replay = agent, replay
        self._state: Any = state
        self._lender: Callable[[], TrainState] | None = None
        self._batch_size = batch_size
        self._watch = watch or Stopwatch()
        self._finite = jax.jit(agent.finite)
        self._feed = make_feed(replay, agent.devices.place, self._watch)
        self._waiting: list[Drawn] = []
        self._taken: list[Drawn] = []
        self._newest: _Dispatched | None = None
        self._pending: collections.deque[_Dispatched] = collections.deque()

    @property
    def state(self) -> TrainState:
        return self._state if self._lender is None else self._lender()

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    def lend(self, lender: Callable[[], TrainState]) -> None:
        """From now on somebody else keeps and changes the training state, and returns it when asked."""
        self._state, self._lender = None, lender

    @property
    def params(self) -> Any:
        return self.state["params"]

    @property
    def batch(self) -> Mapping[str, Any] | None:
        """The batch of the newest update (B, T+1, ...), in the memory where it was gathered, for reports."""
        return None if self._newest is None else self._newest.drawn[-1].batch

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics of the newest dispatch, for reports; none after a resume, until the next dispatch."""
        return {} if self._newest is None else self._newest.metrics

    def update(self, count: int = 1, following: int = 1) -> Mapping[str, jax.Array]:
        """Dispatch `count` updates in one program; returns their metrics, () or (count,), still on the device.

        following: number of updates in the next dispatch, whose batches are gathered meanwhile.
        """
        batches = self.take(count)
        with self._watch.section("update"):
            if count == 1:
                self.state, latents, metrics = self.agent.train_step(self.state, batches[0])
            else:
                self.state, latents, metrics = self.agent.train_steps(self.state, batches)
            finite = self._finite(metrics)
        self.dispatched(latents, metrics, finite, following)
        return metrics

    def take(self, count: int) -> list[Any]:
        """The batches of the next `count` updates, on the device."""
        self._draw(count)
        self._taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return [one.device for one in self._taken]

    def dispatched(self, latents: Mapping[str, Any], metrics: Mapping[str, Any], finite: Any, following: int) -> None:
        """The updates on the taken batches are on their way, with these outputs; prepare for the next."""
        self._newest = _Dispatched(self._taken, latents, metrics, finite)
        transfer.begin(self._needed(self._newest))
        self._pending.append(self._newest)
        while len(self._pending) > 1:
            self._land(self._pending.popleft())
        self._draw(following)

    def under_way(self) -> list[Any]:
        """What the host needs of updates that it has not read yet: for the same read as the actions."""
        return [self._needed(done) for done in self._pending if not done.arrived]

    def arrived(self, values: list[Any]) -> None:
        """What was `under_way` has been read. NonFiniteUpdateError, naming the loss terms, if it is not finite."""
        waiting = [done for done in self._pending if not done.arrived]
        for done, found in zip(waiting, values, strict=True):
            self._arrive(done, *found)

    def settle(self) -> None:
        """Wait for every dispatched update and write its latents back: before an evaluation and at the end."""
        while self._pending:
            self._land(self._pending.popleft())
        self._feed.settle()

    def progress(self) -> dict[str, Any]:
        """What is on its way, as host arrays in plain containers: the newest updates, their latents if they have not
        landed, and the batches that wait. NonFiniteUpdateError if an update under way turns out not to be finite.
        """
        newest = None
        if self._newest is not None:
            if self._newest.latents is not None:
                self._fetch(self._newest)
            newest = {"drawn": _on_host(self._newest.drawn), "latents": transfer.read(self._newest.latents)}
        return {"newest": newest, "waiting": _on_host(self._waiting)}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Continue from `progress`: the numbers that follow are those of a run that was never stopped."""
        newest = progress["newest"]
        if newest is not None:
            drawn = [Drawn(Selection(**one["selection"]), one["batch"], None) for one in newest["drawn"]]
            self._newest = _Dispatched(drawn, newest["latents"], {}, np.bool_(True))
            if newest["latents"] is not None:
                self._pending.append(self._newest)
        self._waiting = [self._feed.send(Selection(**one["selection"]), one["batch"]) for one in progress["waiting"]]

    def _draw(self, count: int) -> None:
        """Ensure that `count` batches are waiting."""
        with self._watch.section("replay"):
            selections = [self.replay.select(self._batch_size) for _ in range(count - len(self._waiting))]
        self._waiting += self._feed.draw(selections)

    def _land(self, done: _Dispatched) -> None:
        """Write latents back."""
        self._fetch(done)
        assert done.latents is not None
        with self._watch.section("replay"):
            self._feed.land([one.selection for one in done.drawn], dict(done.latents))
        done.latents = None

    def _needed(self, done: _Dispatched) -> tuple[Any, dict[str, Any]]:
        """What the host needs of a dispatch: whether it was finite, and what goes into replay from there."""
        return done.finite, self._feed.needed(done.latents or {})

    def _arrive(self, done: _Dispatched, finite: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        self._check(done, finite)
        done.latents, done.arrived = {**(done.latents or {}), **latents}, True

    def _fetch(self, done: _Dispatched) -> None:
        """Read what the host needs of a dispatch."""
        if not done.arrived:
            with self._watch.section("update"):
                found = transfer.read(self._needed(done))
            self._arrive(done, *found)

    def _check(self, done: _Dispatched, finite: np.ndarray) -> None:
        if finite:
            return
        found = {k: np.atleast_1d(v).astype(float) for k, v in transfer.read(dict(done.metrics)).items()}
        first = next(i for i in range(len(done.drawn)) if not self.agent.finite({k: v[i] for k, v in found.items()}))
        metrics = {k: float(v[first]) for k, v in found.items()}
        terms = {k: v for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)}
        terms |= {k: metrics[k] for k in ("opt/grad_norm", "opt/param_rms") if not np.isfinite(metrics[k])}
        batch = transfer.read(dict(done.drawn[first].batch))
        raise NonFiniteUpdateError(int(metrics["opt/updates"]), terms, batch)


def _on_host(drawn: list[Drawn]) -> list[dict[str, Any]]:
    return [{"selection": dataclasses.asdict(one.selection), "batch": transfer.read(dict(one.batch))} for one in drawn]
