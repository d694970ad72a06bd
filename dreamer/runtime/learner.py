"""Feeding the train step: batches out of replay to the device, fresh latents back, and a watch on finiteness."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dreamer.agent import Agent, TrainState
from dreamer.replay import DeviceStorage, Replay, Selection, device
from dreamer.runtime.meters import Stopwatch
from dreamer.runtime.nonfinite import NonFiniteUpdateError


@dataclasses.dataclass
class _Dispatched:
    """An update that the device may still be working on. `latents` become None when they have landed."""

    selection: Selection
    batch: Mapping[str, Any]
    latents: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    finite: Any


class Learner:
    """The training state and the batches that change it.

    While update u runs, the batch of u+1 is gathered and on its way to the device. Latents of update u are in the
    buffer before the batch of update u+2 is gathered, always: numbers do not depend on how fast the device is, nor on
    where the buffer lies. With device storage, one compiled exchange writes the latents of u-1 and gathers the batch
    of u+1; nothing but indices crosses over.
    """

    def __init__(
        self, agent: Agent, state: TrainState, replay: Replay, batch_size: int, watch: Stopwatch | None = None
    ) -> None:
        """watch: books the time under replay, transfer and update."""
        self.agent, self.state, self.replay = agent, state, replay
        self._batch_size = batch_size
        self._watch = watch or Stopwatch()
        self._finite = jax.jit(agent.finite)
        self._exchange = jax.jit(_exchange, donate_argnums=0)
        self._landing: tuple[Any, Mapping[str, Any]] | None = None
        self._next: tuple[Selection, Mapping[str, Any], Any] | None = None
        self._newest: _Dispatched | None = None
        self._pending: collections.deque[_Dispatched] = collections.deque()

    @property
    def params(self) -> Any:
        return self.state["params"]

    @property
    def batch(self) -> Mapping[str, Any] | None:
        """The batch of the newest update (B, T+1, ...), where it was gathered, for reports."""
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
        if self._landing is not None:
            (slots, latents), self._landing = self._landing, None
            storage = self._device_storage
            storage.arrays = device.write(storage.arrays, slots, latents)

    def progress(self) -> dict[str, Any]:
        """What is on its way, as host arrays in plain containers: the newest update, its latents if they have not
        landed, and the batch that waits. NonFiniteUpdateError if an update that is under way turns out unsound.
        """
        newest, waiting = self._newest, self._next
        progress: dict[str, Any] = {"newest": None, "next": None}
        if newest is not None:
            latents = None if newest.latents is None else dict(self._fetch(newest))
            selection, batch = dataclasses.asdict(newest.selection), jax.device_get(dict(newest.batch))
            progress["newest"] = {"selection": selection, "batch": batch, "latents": latents}
        if waiting is not None:
            batch = jax.device_get(dict(waiting[1]))
            progress["next"] = {"selection": dataclasses.asdict(waiting[0]), "batch": batch}
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

    def _draw(self) -> tuple[Selection, Mapping[str, Any], Any]:
        with self._watch.section("replay"):
            selection = self.replay.select(self._batch_size)
            if isinstance(self.replay.storage, DeviceStorage):
                batch = self._exchanged(self.replay.slots(selection))
                return selection, batch, batch
            gathered = self.replay.gather(selection)
        return self._send(selection, gathered)

    @property
    def _device_storage(self) -> DeviceStorage:
        assert isinstance(self.replay.storage, DeviceStorage)
        return self.replay.storage

    def _exchanged(self, slots: Any) -> Mapping[str, Any]:
        """The steps at `slots`, after the latents that have landed were written."""
        storage, landing, self._landing = self._device_storage, self._landing, None
        if landing is None:
            return device.gather(storage.arrays, slots)
        storage.arrays, batch = self._exchange(storage.arrays, *landing, slots)
        return batch

    def _send(self, selection: Selection, batch: dict[str, np.ndarray]) -> tuple[Selection, Mapping[str, Any], Any]:
        with self._watch.section("transfer"):
            return selection, batch, jax.device_put(batch)

    def _land(self, done: _Dispatched) -> None:
        if isinstance(self.replay.storage, DeviceStorage):
            self._check(done, jax.device_get(done.finite))
            assert done.latents is not None and self._landing is None
            written = dict(done.latents)
            if (priority := written.pop("priority", None)) is not None:
                self.replay.prioritize(done.selection, jax.device_get(priority))
            self._landing = self.replay.write_slots(done.selection), written
        else:
            latents = self._fetch(done)
            with self._watch.section("replay"):
                self.replay.write(done.selection, latents)
        done.latents = None

    def _fetch(self, done: _Dispatched) -> Mapping[str, np.ndarray]:
        """The latents of an update; NonFiniteUpdateError, naming the loss terms, unless it was sound."""
        with self._watch.section("update"):
            finite, latents = jax.device_get((done.finite, done.latents))
        self._check(done, finite)
        return latents

    def _check(self, done: _Dispatched, finite: np.ndarray) -> None:
        if finite:
            return
        metrics = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
        terms = {k: v for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)}
        terms |= {k: metrics[k] for k in ("opt/grad_norm", "opt/param_rms") if not np.isfinite(metrics[k])}
        raise NonFiniteUpdateError(int(metrics["opt/updates"]), terms, jax.device_get(dict(done.batch)))


def _exchange(
    arrays: device.Arrays, write_slots: jax.Array, latents: device.Arrays, slots: jax.Array
) -> tuple[device.Arrays, device.Arrays]:
    """Device storage with latents written at (B, T) slots, and the steps at other slots (B, 1 + T)."""
    arrays = device.write(arrays, write_slots, latents)
    return arrays, device.gather(arrays, slots)
