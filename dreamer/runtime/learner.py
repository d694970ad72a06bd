"""Feeding the train step: batches out of replay to the device, fresh latents back, and a watch on finiteness."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dreamer.agent import Agent, TrainState
from dreamer.replay import Replay, Selection
from dreamer.runtime.meters import Stopwatch
from dreamer.runtime.nonfinite import NonFiniteUpdateError


@dataclasses.dataclass
class _Dispatched:
    """An update that the device may still be working on. `latents` become None when they have landed."""

    selection: Selection
    batch: dict[str, np.ndarray]
    latents: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    finite: Any


class Learner:
    """The training state and the batches that change it.

    While update u runs, the batch of u+1 is gathered and on its way to the device. Latents of update u are in the
    buffer before the batch of update u+2 is gathered, always: numbers do not depend on how fast the device is.
    """

    def __init__(
        self, agent: Agent, state: TrainState, replay: Replay, batch_size: int, watch: Stopwatch | None = None
    ) -> None:
        """watch: books the time under replay, transfer and update."""
        self.agent, self.state, self.replay = agent, state, replay
        self._batch_size = batch_size
        self._watch = watch or Stopwatch()
        self._finite = jax.jit(agent.finite)
        self._next: tuple[Selection, dict[str, np.ndarray], Any] | None = None
        self._newest: _Dispatched | None = None
        self._pending: collections.deque[_Dispatched] = collections.deque()

    @property
    def params(self) -> Any:
        return self.state["params"]

    @property
    def batch(self) -> dict[str, np.ndarray] | None:
        """The batch of the newest update (B, T+1, ...), on the host, for reports."""
        return None if self._newest is None else self._newest.batch

    def update(self) -> Mapping[str, jax.Array]:
        """Dispatch one update; returns its metrics, which are still on the device."""
        selection, host, device = self._next or self._draw()
        with self._watch.section("update"):
            self.state, latents, metrics = self.agent.train_step(self.state, device)
            self._newest = _Dispatched(selection, host, latents, metrics, self._finite(metrics))
        self._pending.append(self._newest)
        while len(self._pending) > 1:
            self._land(self._pending.popleft())
        self._next = self._draw()
        return metrics

    def settle(self) -> None:
        """Wait for every dispatched update and write its latents back: before an evaluation and at the end."""
        while self._pending:
            self._land(self._pending.popleft())

    def progress(self) -> dict[str, Any]:
        """What is on its way, as host arrays in plain containers: the newest update, its latents if they have not
        landed, and the batch that waits. NonFiniteUpdateError if an update that is under way turns out unsound.
        """
        newest, waiting = self._newest, self._next
        progress: dict[str, Any] = {"newest": None, "next": None}
        if newest is not None:
            latents = None if newest.latents is None else dict(self._fetch(newest))
            selection = dataclasses.asdict(newest.selection)
            progress["newest"] = {"selection": selection, "batch": newest.batch, "latents": latents}
        if waiting is not None:
            progress["next"] = {"selection": dataclasses.asdict(waiting[0]), "batch": waiting[1]}
        return progress

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on from `progress`: the numbers that follow are those of a run that was never stopped."""
        newest, waiting = progress["newest"], progress["next"]
        if newest is not None:
            selection = Selection(**newest["selection"])
            self._newest = _Dispatched(selection, newest["batch"], newest["latents"], {}, np.bool_(True))
            if newest["latents"] is not None:
                self._pending.append(self._newest)
        if waiting is not None:
            self._next = self._send(Selection(**waiting["selection"]), waiting["batch"])

    def _draw(self) -> tuple[Selection, dict[str, np.ndarray], Any]:
        with self._watch.section("replay"):
            selection = self.replay.select(self._batch_size)
            batch = self.replay.gather(selection)
        return self._send(selection, batch)

    def _send(self, selection: Selection, batch: dict[str, np.ndarray]) -> tuple[Selection, dict[str, np.ndarray], Any]:
        with self._watch.section("transfer"):
            return selection, batch, jax.device_put(batch)

    def _land(self, done: _Dispatched) -> None:
        latents = self._fetch(done)
        with self._watch.section("replay"):
            self.replay.write(done.selection, latents)
        done.latents = None

    def _fetch(self, done: _Dispatched) -> Mapping[str, np.ndarray]:
        """The latents of an update; NonFiniteUpdateError, naming the loss terms, unless it was sound."""
        with self._watch.section("update"):
            finite, latents = jax.device_get((done.finite, done.latents))
        if finite:
            return latents
        metrics = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
        terms = {k: v for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)}
        terms |= {k: metrics[k] for k in ("opt/grad_norm", "opt/param_rms") if not np.isfinite(metrics[k])}
        raise NonFiniteUpdateError(int(metrics["opt/updates"]), terms, done.batch)
