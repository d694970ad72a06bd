"""Reports: imagination compared with reality, as videos, as the health page of the world model, and as numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dreamer.agent import Agent, TrainState, stream_key
from dreamer.records.health import Arrays, measure
from dreamer.records.health_page import draw
from dreamer.records.video import dream_grid
from dreamer.types import PLANNED

#: Fields of a batch that say what happened.
_HAPPENED = ("reward", "is_first", "is_last", "is_terminal")
#: What is used of `Agent.report` for the newest sequences.
_OF_NEWEST = ("value", "dream_reward", "dream_cont")
#: Predicted probabilities to continue, compared with the discount included.
_CONTINUES = ("cont", "open_cont", "dream_cont")
_GRADIENTS = "opt/module_grad_norm/"


class Report(NamedTuple):
    """Numbers, and functions that draw the pictures (slow): videos (T, H, W, 3) by name, a page (H, W, 3)."""

    scalars: dict[str, float]
    videos: dict[str, Callable[[], np.ndarray]]
    page: Callable[[], np.ndarray]


def make_report(
    agent: Agent, state: TrainState, batch: Arrays, newest: Arrays | None, metrics: Mapping[str, Any]
) -> Report:
    """batch, newest: (B, T+1, ...) as trained on, the latter collected by the current policy, None if there is none.
    metrics: of the newest update.
    """
    key = stream_key(state["key"], "report", state["updates"])
    params = state["params"]
    # Start both before waiting for the first.
    views = agent.report(params, dict(batch), key)
    recent = None if newest is None else agent.report(params, dict(newest), key)
    views, happened = jax.device_get((dict(views), {name: batch[name] for name in _HAPPENED}))
    discount = 1 - 1 / agent.config.actor_critic.discount_horizon
    missing = 1.0 if agent.config.loss.discount_in_cont else discount
    found = None
    if newest is not None and recent is not None:
        happened_too = {k: newest[k] for k in (*_HAPPENED, PLANNED) if k in newest}
        seen, followed = jax.device_get(({k: recent[k] for k in _OF_NEWEST}, happened_too))
        found = _discounted(seen, missing), followed
    views = _discounted(views, missing)
    config = agent.config
    health = measure(views, happened, found, discount, config.loss.free_nats, config.planner.critic)
    gradients = {
        name.removeprefix(_GRADIENTS): float(np.ravel(value)[-1])
        for name, value in metrics.items()
        if name.startswith(_GRADIENTS)
    }
    updates = int(np.asarray(state["updates"]))
    scalars = {f"report/{name}": value for name, value in health.scalars().items()}
    return Report(scalars, _videos(views), functools.partial(draw, health, gradients, f"{updates:,} updates"))


def _discounted(views: Arrays, factor: float) -> dict[str, Any]:
    return {name: view * factor if name in _CONTINUES else view for name, view in views.items()}


def _videos(views: Arrays) -> dict[str, Callable[[], np.ndarray]]:
    """The dream video of every image observation."""
    videos: dict[str, Callable[[], np.ndarray]] = {}
    for name, true in views["true"].items():
        if true.ndim == 5 and true.shape[-1] in (1, 3):
            grid = functools.partial(dream_grid, true, views["pred"][name], true.shape[1] // 2)
            videos[f"report/dream/{name}"] = grid
    return videos
