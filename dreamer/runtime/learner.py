"""Feeding the train step: batches out of replay to the device, fresh latents back, and a watch on finiteness."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dreamer.agent import Agent, TrainState
from dreamer.replay import Replay, Selection


class NonFiniteError(RuntimeError):
    """An update gave NaN or infinity; the message names the terms and the update."""

    def __init__(self, update: int, terms: dict[str, float], batch: dict[str, np.ndarray]) -> None:
        bad = ", ".join(f"{name} = {value}" for name, value in terms.items()) or "the weights"
        super().__init__(f"update {update} was not finite: {bad}")
        self.update, self.terms, self.batch = update, terms, batch

    def dump(self, logdir: Path) -> Path:
        """Write the batch of the failed update; returns the file."""
        path = logdir / f"nonfinite-update-{self.update}.npz"
        plain: dict[str, Any] = {
            k: v.astype(np.float32) if v.dtype.name == "bfloat16" else v for k, v in self.batch.items()
        }
        np.savez_compressed(path, **plain)
        return path


@dataclasses.dataclass
class _Dispatched:
    """An update that the device may still be working on."""

    selection: Selection
    batch: dict[str, np.ndarray]
    latents: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    finite: jax.Array


class Learner:
    """The training state and the batches that change it.

    While update u runs, the batch of u+1 is gathered and on its way to the device. Latents of update u are in the
    buffer before the batch of update u+2 is gathered, always: numbers do not depend on how fast the device is.
    """

    def __init__(self, agent: Agent, state: TrainState, replay: Replay, batch_size: int) -> None:
        self.agent, self.state, self.replay = agent, state, replay
        self._batch_size = batch_size
        self._finite = jax.jit(agent.finite)
        self._next: tuple[Selection, dict[str, np.ndarray], Any] | None = None
        self._pending: collections.deque[_Dispatched] = collections.deque()
        #: The batch of the newest update, on the host, for reports.
        self.batch: dict[str, np.ndarray] | None = None

    @property
    def params(self) -> Any:
        return self.state["params"]

    def update(self) -> dict[str, jax.Array]:
        """Dispatch one update; returns its metrics, which are still on the device."""
        selection, host, device = self._next or self._draw()
        self.state, latents, metrics = self.agent.train_step(self.state, device)
        self._pending.append(_Dispatched(selection, host, latents, metrics, self._finite(metrics)))
        while len(self._pending) > 1:
            self._land(self._pending.popleft())
        self._next = self._draw()
        self.batch = host
        return metrics

    def settle(self) -> None:
        """Wait for every dispatched update and write its latents back: before a checkpoint and at the end."""
        while self._pending:
            self._land(self._pending.popleft())

    def _draw(self) -> tuple[Selection, dict[str, np.ndarray], Any]:
        selection = self.replay.select(self._batch_size)
        batch = self.replay.gather(selection)
        return selection, batch, jax.device_put(batch)

    def _land(self, done: _Dispatched) -> None:
        finite, latents = jax.device_get((done.finite, done.latents))
        if not finite:
            metrics = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
            terms = {k: v for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)}
            terms |= {k: metrics[k] for k in ("opt/grad_norm", "opt/param_rms") if not np.isfinite(metrics[k])}
            raise NonFiniteError(int(metrics["opt/updates"]), terms, done.batch)
        self.replay.write(done.selection, latents)
