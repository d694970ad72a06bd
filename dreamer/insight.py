"""What a model makes of replayed sequences, for reports: what it saw, dreamed and expected, without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dreamer.rssm import State
from dreamer.world_model import WorldModel

#: Number of sequences whose observations and predictions are returned, for videos.
SHOWN = 8


def look(
    model: WorldModel, context: State, actions: jax.Array, batch: Mapping[str, jax.Array], key: jax.Array
) -> tuple[State, dict[str, Any]]:
    """Filter sequences with all observations, and again without those of the second half::

        step        0  1  ...  T/2-1   T/2  ...  T-1
        filtered    seen       seen    seen      seen
        open loop   seen       seen    dreamed along the real actions

    context, actions, batch: as in `WorldModel.loss`. Returns the filtered states (B, T, ...) and

    - of the open loop, by observation key as the objective predicts them (nothing where it predicts nothing):
      ``true``, ``pred`` (SHOWN, T, ...), targets and modes, images in [0, 1]; ``error`` (B, T), the mean magnitude of
      their difference; ``guess`` (), the mean error of always predicting the mean of all steps
    - of the open loop: ``open_reward``, ``open_cont`` (B, T); ``disagreement`` (B, T), if there is an ensemble
    - of the filtered states: ``reward``, ``cont`` (B, T); ``kl`` (B, T), from prior to posterior, summed over the
      variables; what the latent reports of the posterior, here ``probs`` (B, T, S, K)

    all float32.
    """
    rssm, latent, half = model.rssm, model.rssm.latent, actions.shape[1] // 2
    observe_key, dream_key = jax.random.split(key)
    seen = model.see(context, actions, batch, observe_key)
    dreamed = rssm.imagine_actions(jax.tree.map(lambda x: x[:, half - 1], seen.states), actions[:, half:], dream_key)
    opened = jax.tree.map(lambda a, b: jnp.concatenate([a[:, :half], b], 1), seen.states, dreamed)
    open_feature = rssm.feature(opened)
    true = model.objective.targets(batch)
    pred = {name: output.mode() for name, output in model.objective.predict(open_feature).items()}
    views: dict[str, Any] = {
        "true": {name: x[:SHOWN] for name, x in true.items()},
        "pred": {name: x[:SHOWN] for name, x in pred.items()},
        "error": {name: _magnitude(pred[name] - x) for name, x in true.items()},
        "guess": {name: _magnitude(x - x.mean((0, 1), keepdims=True)).mean() for name, x in true.items()},
    }
    for prefix, x in (("open_", open_feature), ("", seen.feature)):
        views[f"{prefix}reward"], views[f"{prefix}cont"] = model.reward(x).mode(), model.cont(x).mode()
    views |= model.ensemble.shown(open_feature)
    posterior = latent.dist(seen.posterior)
    views["kl"] = latent.kl(posterior, latent.prior(seen.prior))
    return seen.states, views | latent.shown(posterior)


def _magnitude(x: jax.Array) -> jax.Array:
    """Mean magnitude (B, T) over the axes behind the first two."""
    return jnp.abs(x).reshape(*x.shape[:2], -1).mean(-1)
