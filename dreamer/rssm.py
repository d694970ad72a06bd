"""The recurrent state-space model: how the world's latent state evolves, with and without looking.

One step of the model, from the state at t-1 and the action taken there::

    deter_{t-1}, stoch_{t-1}, action_{t-1} --GRU--> deter_t --> prior      p(stoch_t | deter_t)
                                                     deter_t, tokens_t --> posterior q(stoch_t | deter_t, tokens_t)

`observe` samples stoch from the posterior, `imagine` from the prior. (Paper v2, eq. 1 and "World model learning".)

States are rows, deter (..., D) and stoch (..., S, K), or inside scans columns, deter (D, B) and stoch (S, K, B):
`axis` says which (see `networks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from dreamer.config import ModelConfig
from dreamer.distributions import OneHot
from dreamer.networks import (
    COLUMNS,
    MLP,
    ROWS,
    BlockLinear,
    Dense,
    Linear,
    RMSNorm,
    columns,
    join_features,
    rows,
    split_features,
)
from dreamer.types import Field

sg = jax.lax.stop_gradient

#: A model state: deter (..., D) and stoch (..., S, K), the latter one-hot with straight-through gradients.
State = dict[str, jax.Array]
#: (state, key) -> action (..., A) and what it notes of the state, if anything; key None: the most likely action.
Policy = Callable[[State, jax.Array | None], tuple[jax.Array, Any]]


def feature(state: State, axis: int = ROWS) -> jax.Array:
    """What heads read: [deter, flattened stoch], (..., F); columns (..., F, M)."""
    return jnp.concatenate([state["deter"], join_features(state["stoch"], axis)], axis)


class RSSM(nnx.Module):
    """Deterministic path of D units in G blocks (a GRU), stochastic path of S categoricals with K classes."""

    #: How `observe` scans.
    layout = COLUMNS

    def __init__(self, tokens: int, action: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        deter, hidden, blocks = config.deter, config.hidden, config.blocks
        latent = config.stoch * config.classes
        self.shape = (config.stoch, config.classes)
        self.deter, self.blocks, self.unimix, self.remat = deter, blocks, config.unimix, config.remat
        self.from_deter = Dense(deter, hidden, rngs=rngs)
        self.from_stoch = Dense(latent, hidden, rngs=rngs)
        self.from_action = Dense(action, hidden, rngs=rngs)
        self.mix = BlockLinear(blocks, deter, deter, shared=3 * hidden, rngs=rngs)
        self.mix_norm = RMSNorm(deter)
        self.gates = BlockLinear(blocks, deter, 3 * deter, rngs=rngs)
        self.prior_mlp = MLP(deter, hidden, config.prior_layers, rngs=rngs)
        self.prior_logits = Linear(hidden, latent, rngs=rngs)
        self.posterior_mlp = MLP(deter + tokens, hidden, config.posterior_layers, rngs=rngs)
        self.posterior_logits = Linear(hidden, latent, rngs=rngs)

    def init(self, batch: int, dtype: jnp.dtype) -> State:
        """The state before an episode's first observation: all zeros."""
        return {"deter": jnp.zeros((batch, self.deter), dtype), "stoch": jnp.zeros((batch, *self.shape), dtype)}

    def step(self, state: State, action: jax.Array, axis: int = ROWS) -> jax.Array:
        """deter_t (B, D) from the state at t-1 and the action (B, A) taken there: a GRU with block-diagonal weights.

        u·tanh(r·c) + (1-u)·deter with u = σ(update - 1), r = σ(reset).
        """
        deter, stoch = state["deter"], join_features(state["stoch"], axis)
        action = action / sg(jnp.maximum(1, jnp.abs(action)))
        inputs = [self.from_deter(deter, axis), self.from_stoch(stoch, axis), self.from_action(action, axis)]
        own = split_features(deter, self.blocks, axis)
        x = join_features(self.mix(own, jnp.concatenate(inputs, axis), axis), axis)
        x = split_features(jax.nn.silu(self.mix_norm(x, axis)), self.blocks, axis)
        reset, candidate, update = jnp.split(self.gates(x, axis=axis), 3, axis)
        update = jax.nn.sigmoid(update - 1)
        own = update * jnp.tanh(jax.nn.sigmoid(reset) * candidate) + (1 - update) * own
        return join_features(own, axis)

    def prior(self, deter: jax.Array, axis: int = ROWS) -> jax.Array:
        """Prior logits (..., S, K), before unimix."""
        return self._split(self.prior_logits(self.prior_mlp(deter, axis), axis), axis)

    def posterior(self, deter: jax.Array, tokens: jax.Array, axis: int = ROWS) -> jax.Array:
        """Posterior logits (..., S, K), before unimix."""
        x = self.posterior_mlp(jnp.concatenate([deter, tokens], axis), axis)
        return self._split(self.posterior_logits(x, axis), axis)

    def dist(self, logits: jax.Array, axis: int = ROWS) -> OneHot:
        """99 % softmax, 1 % uniform; the KL uses it on both sides."""
        return OneHot(logits, self.unimix, axis)

    def observe_step(
        self,
        state: State,
        action: jax.Array,
        tokens: jax.Array,
        is_first: jax.Array,
        key: jax.Array | None,
        axis: int = ROWS,
    ) -> tuple[State, jax.Array]:
        """One posterior step -> (state, posterior logits). Where `is_first`, state and previous action become 0."""
        fresh = lambda x: is_first if axis == COLUMNS else is_first.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
        start = lambda x: jnp.where(fresh(x), jnp.zeros_like(x), x)  # noqa: E731
        deter = self.step(jax.tree.map(start, state), start(action), axis)
        logits = self.posterior(deter, tokens, axis)
        stoch = self.dist(logits, axis).sample(key).astype(deter.dtype)
        return {"deter": deter, "stoch": stoch}, logits

    def observe(
        self, state: State, actions: jax.Array, tokens: jax.Array, is_first: jax.Array, key: jax.Array | None
    ) -> tuple[State, jax.Array]:
        """Filter a sequence: states (B, T, ...) and posterior logits (B, T, S, K).

        state: at the step before the first; actions (B, T, A): ``actions[:, t]`` led *to* step t; tokens (B, T, width);
        is_first (B, T) bool.
        """
        axis = self.layout
        to_scan, from_scan = (columns, rows) if axis == COLUMNS else (time_major, time_major)

        def step(state: State, inputs: tuple) -> tuple[State, tuple[State, jax.Array]]:
            action, token, first, key = inputs
            state, logits = self.observe_step(state, action, token, first, key, axis)
            return state, (state, logits)

        keys = None if key is None else jax.random.split(key, tokens.shape[1])
        inputs = (*jax.tree.map(to_scan, (actions, tokens, is_first)), keys)
        step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
        state = jax.tree.map(columns, state) if axis == COLUMNS else state
        _, outputs = jax.lax.scan(step, state, inputs)
        return jax.tree.map(from_scan, outputs)

    def imagine_step(self, state: State, action: jax.Array, key: jax.Array | None, axis: int = ROWS) -> State:
        """One prior step: the state that follows (M, ...) when `action` (M, A) is taken."""
        deter = self.step(state, action, axis)
        stoch = self.dist(self.prior(deter, axis), axis).sample(key).astype(deter.dtype)
        return {"deter": deter, "stoch": stoch}

    def imagine(
        self, state: State, policy: Policy, horizon: int, key: jax.Array | None, axis: int = ROWS
    ) -> tuple[State, jax.Array, Any]:
        """Dream `horizon` steps from `state` (M, ...): states (M, H, ...) *after* the start, actions (M, H, A), notes.

        ``actions[:, h]`` and ``notes[:, h]`` are what ``policy(state, key)`` gives in the state *before*
        ``states[:, h]``. Gradients are not stopped here; the caller chooses. With columns, time comes first:
        (H, ..., M).
        """

        def step(state: State, key: jax.Array | None) -> tuple[State, tuple[State, jax.Array, Any]]:
            act_key, state_key = (None, None) if key is None else jax.random.split(key)
            action, notes = policy(state, act_key)
            state = self.imagine_step(state, action, state_key, axis)
            return state, (state, action, notes)

        keys = None if key is None else jax.random.split(key, horizon)
        _, outputs = jax.lax.scan(step, state, keys, length=horizon)
        return outputs if axis == COLUMNS else jax.tree.map(time_major, outputs)

    def imagine_actions(self, state: State, actions: jax.Array, key: jax.Array | None) -> State:
        """Dream along given actions (M, H, A): states (M, H, ...) after each."""

        def step(state: State, inputs: tuple) -> tuple[State, State]:
            state = self.imagine_step(state, *inputs)
            return state, state

        keys = None if key is None else jax.random.split(key, actions.shape[1])
        _, states = jax.lax.scan(step, state, (time_major(actions), keys))
        return jax.tree.map(time_major, states)

    def stored(self) -> dict[str, Field]:
        """How replay stores a state: deter as bfloat16 (D,), stoch as class indices (S,)."""
        count, classes = self.shape
        index = np.dtype(np.uint8 if classes <= 256 else np.uint16)
        return {"deter": Field((self.deter,), np.dtype(ml_dtypes.bfloat16)), "stoch": Field((count,), index)}

    def pack(self, state: State) -> State:
        """State -> stored form."""
        dtypes = self.stored()
        index = state["stoch"].argmax(-1).astype(dtypes["stoch"].dtype)
        return {"deter": state["deter"].astype(dtypes["deter"].dtype), "stoch": index}

    def unpack(self, stored: Mapping[str, jax.Array], dtype: jnp.dtype) -> State:
        """Stored form -> state. (The stored all-zero state of before an episode is never needed: is_first resets.)"""
        stoch = jax.nn.one_hot(stored["stoch"], self.shape[1], dtype=dtype)
        return {"deter": stored["deter"].astype(dtype), "stoch": stoch}

    def _split(self, logits: jax.Array, axis: int) -> jax.Array:
        return split_features(logits, self.shape[0], axis)


def time_major(x: jax.Array) -> jax.Array:
    """Swap the batch and time axes, either way."""
    return jnp.swapaxes(x, 0, 1)
