"""Feeding the train step: batches out of replay to the device, fresh latents back, and a watch on finiteness."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dreamer.agent import Agent, TrainState
from dreamer.replay import Replay, ReplayError, Selection
from dreamer.runtime.nonfinite import NonFiniteUpdateError


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
        #: The batch of the newest update (B, T+1, ...), on the host, for reports.
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

    def prefetched(self) -> dict[str, Any] | None:
        """Positions of the batch that waits for the next update, JSON-able; None: there is none."""
        if self._next is None:
            return None
        selection = self._next[0]
        return {name: getattr(selection, name).tolist() for name in ("env", "row", "online")}

    def prefetch(self, positions: Mapping[str, Any] | None) -> None:
        """Let the batch at these positions be the next, after a resume: new data in it would not be drawn again."""
        if positions is None:
            return
        env, row = (np.array(positions[name], np.int64) for name in ("env", "row"))
        selection = Selection(env, row, np.array(positions["online"], bool), self.replay.length)
        try:
            self._next = self._fetch(selection)
        except ReplayError:  # A replay that is smaller now holds it no more.
            self._next = None

    def _draw(self) -> tuple[Selection, dict[str, np.ndarray], Any]:
        return self._fetch(self.replay.select(self._batch_size))

    def _fetch(self, selection: Selection) -> tuple[Selection, dict[str, np.ndarray], Any]:
        batch = self.replay.gather(selection)
        return selection, batch, jax.device_put(batch)

    def _land(self, done: _Dispatched) -> None:
        finite, latents = jax.device_get((done.finite, done.latents))
        if not finite:
            metrics = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
            terms = {k: v for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)}
            terms |= {k: metrics[k] for k in ("opt/grad_norm", "opt/param_rms") if not np.isfinite(metrics[k])}
            raise NonFiniteUpdateError(int(metrics["opt/updates"]), terms, done.batch)
        self.replay.write(done.selection, latents)
