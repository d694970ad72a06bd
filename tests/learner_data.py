"""Small agents and random batches for the learner's tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer import distributions
from dreamer.agent import Agent
from dreamer.config import Config
from dreamer.networks import Draws
from dreamer.types import Spaces, replay_fields

#: Compiles in half the time; for tests that run a function a few times only.
CHEAP = {"xla_backend_optimization_level": 0}

B, T = 2, 4

WORLD_TERMS = {"rew", "con", "dyn", "rep"}
BEHAVIOUR_TERMS = {"policy", "value", "repval"}


def small_config(
    model: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    actor_critic: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> Config:
    """A tiny agent with one dense layer everywhere; the arguments change options of their section."""
    layers = ("encoder", "decoder", "prior", "posterior", "reward", "cont", "policy", "value")
    network: dict[str, Any] = dict(deter=16, hidden=8, stoch=4, classes=4, units=8, depth=2, blocks=2, bins=31)
    return Config(
        model=network | {f"{layer}_layers": 1 for layer in layers} | (model or {}),
        run=dict(batch_size=B, batch_length=T) | (run or {}),
        loss=loss or {},
        actor_critic=dict(horizon=3) | (actor_critic or {}),
        optimizer=dict(learning_rate=1e-2, warmup=3) | (optimizer or {}),
    )


def random_batch(agent: Agent, seed: int = 0, length: int = T) -> dict[str, np.ndarray]:
    """(B, length + 1, ...) of everything replay stores; one episode ends inside the first sequence."""
    rng = np.random.default_rng(seed)
    spaces: Spaces = {**agent.observations, **agent.actions}
    batch = {}
    for key, field in replay_fields(agent.observations, agent.actions, agent.extras).items():
        if key in spaces:
            drawn = np.stack([spaces[key].sample(rng) for _ in range(B * (length + 1))])
            batch[key] = drawn.reshape(B, length + 1, *field.shape)
        else:
            batch[key] = np.zeros((B, length + 1, *field.shape), field.dtype)
    batch["reward"] = rng.normal(0, 1, (B, length + 1)).astype(np.float32)
    batch["deter"] = rng.uniform(-1, 1, batch["deter"].shape).astype(batch["deter"].dtype)
    batch["stoch"] = rng.integers(0, 4, batch["stoch"].shape).astype(batch["stoch"].dtype)
    batch["is_last"][0, 1] = batch["is_terminal"][0, 1] = batch["is_first"][0, 2] = True
    batch["reward"][0, 2] = 0
    return batch


def weights(seed: int = 0) -> Draws:
    """Initial weights for one small module, in place of `nnx.Rngs`, which compiles a draw for every shape."""
    return Draws(jax.random.key(seed), 100_000)


def perturb(params: Any, seed: int = 0, size: float = 0.3) -> Any:
    """Parameters none of which is 0, so that every path through the networks carries a gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, size, x.shape), x.dtype), params)


def fix_draws(patch: pytest.MonkeyPatch) -> None:
    """Every draw is the likeliest one, until the patch is undone; functions traced meanwhile keep that."""
    patch.setattr(distributions, "draw_class", fixed_class)
    patch.setattr(distributions, "draw_normal", fixed_normal)


def fixed_class(key: jax.Array, probs: jax.Array) -> jax.Array:
    """In place of `distributions.draw_class`: the most likely class."""
    return probs.argmax(-1)


def fixed_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """In place of `distributions.draw_normal`: always 0.5."""
    return jnp.full(shape, 0.5, dtype)
