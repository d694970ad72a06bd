"""Imagination held against reality: open-loop videos and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dreamer.agent import Agent, TrainState, stream_key
from dreamer.runtime.video import dream_grid

#: Sequences of the batch that are dreamed along.
SEQUENCES = 8


def open_loop_report(
    agent: Agent, state: TrainState, batch: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(videos uint8 (T, H, W, 3), mean absolute errors) of dreaming the second half of replayed sequences.

    batch (B, T+1, ...): as trained on. Errors are in the units of the observation, pixels in [0, 1].
    """
    part = {k: v[:SEQUENCES] for k, v in batch.items()}
    key = stream_key(state["key"], "report", state["updates"])
    result: dict[str, Any] = jax.device_get(agent.report(state["params"], part, key))
    videos, errors = {}, {}
    for name, true in result["true"].items():
        pred = result["pred"][name]
        half = true.shape[1] // 2
        gap = np.abs(np.asarray(pred, np.float32) - true)
        errors[f"report/seen_error/{name}"] = float(gap[:, :half].mean())
        errors[f"report/imagined_error/{name}"] = float(gap[:, half:].mean())
        if true.ndim == 5 and true.shape[-1] in (1, 3):
            videos[f"report/dream/{name}"] = dream_grid(true, pred, half)
    return videos, errors
