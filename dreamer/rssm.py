"""The recurrent state-space model: how the world's latent state evolves, with and without looking.

One step of the model, from the state at t-1 and the action taken there::

    deter_{t-1}, stoch_{t-1}, action_{t-1} --GRU--> deter_t --> prior      p(stoch_t | deter_t)
                                                     deter_t, tokens_t --> posterior q(stoch_t | deter_t, tokens_t)

`observe` samples stoch from the posterior, `imagine` from the prior. (Paper v2, eq. 1 and "World model learning".)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from dreamer import features, scans
from dreamer.config import ModelConfig
from dreamer.latents import LATENTS
from dreamer.networks import MLP, BlockLinear, Dense, LayerNorm, Linear, RMSNorm
from dreamer.types import Field

sg = jax.lax.stop_gradient

#: A model state: deter (..., D) and stoch (..., S, K), or whatever the latent is.
State = dict[str, jax.Array]
#: (state, key) -> action (..., A) and what it notes of the state, if anything; key None: the most likely action.
Policy = Callable[[State, jax.Array | None], tuple[jax.Array, Any]]


def bounded(action: jax.Array) -> jax.Array:
    """Actions (..., A) scaled into [-1, 1], as if that were no part of the function."""
    return action / sg(jnp.maximum(1, jnp.abs(action)))


def gated(deter: jax.Array, reset: jax.Array, candidate: jax.Array, update: jax.Array) -> jax.Array:
    """A gated recurrent unit: u·tanh(r·c) + (1-u)·deter with u = σ(update - 1), r = σ(reset)."""
    update = jax.nn.sigmoid(update - 1)
    return update * jnp.tanh(jax.nn.sigmoid(reset) * candidate) + (1 - update) * deter


class RSSM(nnx.Module):
    """Deterministic path of D units in G blocks (a GRU), stochastic path of a `latent`: S categoricals of K classes.

    How the deterministic state follows is what `make_step` and `step` say; `DYNAMICS` has other ways.
    """

    def __init__(self, tokens: int, action: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        deter, hidden = config.deter, config.hidden
        self.latent = latent = LATENTS[config.latent](config)
        self.deter, self.remat = deter, config.remat
        self.width = deter + latent.width
        self.make_step(action, config, rngs=rngs)
        of_prior, of_posterior = self.widths_read(tokens)
        self.prior_mlp = MLP(of_prior, hidden, config.prior_layers, rngs=rngs)
        self.prior_logits = Linear(hidden, latent.prior_numbers, rngs=rngs)
        self.posterior_mlp = MLP(of_posterior, hidden, config.posterior_layers, rngs=rngs)
        self.posterior_logits = Linear(hidden, latent.numbers, rngs=rngs)

    def make_step(self, action: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """The layers of `step`."""
        deter, hidden, self.blocks = config.deter, config.hidden, config.blocks
        self.from_deter = Dense(deter, hidden, rngs=rngs)
        self.from_stoch = Dense(self.latent.width, hidden, rngs=rngs)
        self.from_action = Dense(action, hidden, rngs=rngs)
        self.mix = BlockLinear(self.blocks, deter, deter, shared=3 * hidden, rngs=rngs)
        self.mix_norm = RMSNorm(deter)
        self.gates = BlockLinear(self.blocks, deter, 3 * deter, rngs=rngs)

    def widths_read(self, tokens: int) -> tuple[int, int]:
        """How many numbers the prior reads, and the posterior; tokens: the width of an encoding."""
        return self.deter, self.deter + tokens

    def init(self, batch: int, dtype: jnp.dtype) -> State:
        """The state before an episode's first observation: all zeros."""
        return {"deter": jnp.zeros((batch, self.deter), dtype), "stoch": self.latent.init(batch, dtype)}

    def feature(self, state: State) -> jax.Array:
        """What heads read: [deter, flat stoch], (..., F)."""
        return features.concat([state["deter"], self.latent.flat(state["stoch"])])

    def step(self, state: State, action: jax.Array) -> jax.Array:
        """deter_t (B, D) from the state at t-1 and the action (B, A) taken there: a GRU with block-diagonal weights."""
        deter, stoch = state["deter"], self.latent.flat(state["stoch"])
        action = bounded(action)
        inputs = [self.from_deter(deter), self.from_stoch(stoch), self.from_action(action)]
        own = features.group(deter, self.blocks)
        x = features.ungroup(self.mix(own, features.concat(inputs)))
        x = features.group(jax.nn.silu(self.mix_norm(x)), self.blocks)
        reset, candidate, update = features.split(self.gates(x), 3)
        return features.ungroup(gated(own, reset, candidate, update))

    def prior(self, deter: jax.Array) -> jax.Array:
        """Prior logits (..., S, K), before unimix."""
        return self.latent.shaped(self.prior_logits(self.prior_mlp(self.told(deter))))

    def posterior(self, deter: jax.Array, tokens: jax.Array) -> jax.Array:
        """Posterior logits (..., S, K), before unimix."""
        return self.latent.shaped(self.posterior_logits(self.posterior_mlp(self.seen(deter, tokens))))

    def told(self, deter: jax.Array) -> jax.Array:
        """What the prior reads, as wide as `widths_read` says."""
        return deter

    def seen(self, deter: jax.Array, tokens: jax.Array) -> jax.Array:
        """What the posterior reads, likewise."""
        return features.concat([deter, tokens])

    def observe_step(
        self, state: State, action: jax.Array, tokens: jax.Array, is_first: jax.Array, key: jax.Array | None
    ) -> tuple[State, jax.Array]:
        """One posterior step -> (state, posterior logits). Where `is_first`, state and previous action become 0."""
        start = lambda x: jnp.where(features.per_item(is_first, x), jnp.zeros_like(x), x)  # noqa: E731
        deter = self.step(jax.tree.map(start, state), start(action))
        logits = self.posterior(deter, tokens)
        stoch = self.latent.dist(logits).sample(key).astype(deter.dtype)
        return {"deter": deter, "stoch": stoch}, logits

    def observe(
        self, state: State, actions: jax.Array, tokens: jax.Array, is_first: jax.Array, key: jax.Array | None
    ) -> tuple[State, jax.Array]:
        """Filter a sequence: states (B, T, ...) and posterior logits (B, T, S, K).

        state: at the step before the first; actions (B, T, A): ``actions[:, t]`` led *to* step t; tokens (B, T, width);
        is_first (B, T) bool.
        """

        def step(state: State, inputs: tuple, key: jax.Array | None) -> tuple[State, tuple[State, jax.Array]]:
            action, token, first = inputs
            state, logits = self.observe_step(state, action, token, first, key)
            return state, (state, logits)

        return scans.over_time(step, state, (actions, tokens, is_first), key, self.remat)

    def imagine_step(self, state: State, action: jax.Array, key: jax.Array | None) -> State:
        """One prior step: the state that follows (M, ...) when `action` (M, A) is taken."""
        deter = self.step(state, action)
        stoch = self.latent.prior(self.prior(deter)).sample(key).astype(deter.dtype)
        return {"deter": deter, "stoch": stoch}

    def imagine(
        self, state: State, policy: Policy, horizon: int, key: jax.Array | None
    ) -> tuple[State, jax.Array, Any]:
        """Dream `horizon` steps from `state` (M, ...), time first: states (H, M, ...), actions (H, M, A), notes.

        ``actions[h]`` and ``notes[h]`` are what ``policy(state, key)`` gives in the state *before* ``states[h]``.
        Gradients are not stopped here; the caller chooses.
        """

        def step(state: State, key: jax.Array | None) -> tuple[State, tuple[State, jax.Array, Any]]:
            act_key, state_key = (None, None) if key is None else jax.random.split(key)
            action, notes = policy(state, act_key)
            state = self.imagine_step(state, action, state_key)
            return state, (state, action, notes)

        keys = None if key is None else jax.random.split(key, horizon)
        return scans.scan(step, state, keys, horizon, False)

    def imagine_actions(self, state: State, actions: jax.Array, key: jax.Array | None) -> State:
        """Dream along given actions (M, H, A): states (M, H, ...) after each."""

        def step(state: State, action: jax.Array, key: jax.Array | None) -> tuple[State, State]:
            state = self.imagine_step(state, action, key)
            return state, state

        return scans.over_time(step, state, actions, key)

    def stored(self) -> dict[str, Field]:
        """How replay stores a state: deter as bfloat16 (D,), stoch as the latent says."""
        return {"deter": Field((self.deter,), np.dtype(ml_dtypes.bfloat16), latent=True), "stoch": self.latent.stored()}

    def pack(self, state: State) -> State:
        """State -> stored form."""
        return {"deter": state["deter"].astype(jnp.bfloat16), "stoch": self.latent.pack(state["stoch"])}

    def unpack(self, stored: Mapping[str, jax.Array], dtype: jnp.dtype) -> State:
        """Stored form -> state."""
        return {"deter": stored["deter"].astype(dtype), "stoch": self.latent.unpack(stored["stoch"], dtype)}


class GRU(RSSM):
    """Other than `RSSM`, the step of PlaNet and DreamerV1: a hidden layer of latent and action, then a dense GRU."""

    def make_step(self, action: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.from_inputs = Dense(self.latent.width + action, config.hidden, rngs=rngs)
        self.all_gates = Linear(config.hidden + config.deter, 3 * config.deter, rngs=rngs)

    def step(self, state: State, action: jax.Array) -> jax.Array:
        """deter_t (B, D) from the state at t-1 and the action (B, A) taken there."""
        inputs = [self.latent.flat(state["stoch"]), bounded(action)]
        x = self.from_inputs(features.concat(inputs))
        reset, candidate, update = features.split(self.mixed(features.concat([x, state["deter"]])), 3)
        return gated(state["deter"], reset, candidate, update)

    def mixed(self, x: jax.Array) -> jax.Array:
        """Reset, candidate and update (..., 3D) side by side, before their nonlinearities."""
        return self.all_gates(x)


class NormedGRU(GRU):
    """DreamerV2's step: the same with layer normalisation of the gates (Hafner et al., 2021, appendix)."""

    def make_step(self, action: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().make_step(action, config, rngs=rngs)
        self.gates_norm = LayerNorm(3 * config.deter)

    def mixed(self, x: jax.Array) -> jax.Array:
        return self.gates_norm(self.all_gates(x))


class LSTM(RSSM):
    """World Models' memory (Ha & Schmidhuber, 2018, section 2.3): a long short-term memory of D/2 units.

    deter is [h, c], hidden and cell state side by side. The prior reads h; the posterior reads the encoding alone, as
    that of an autoencoder does, so that what is seen says the same of itself whatever came before.
    """

    def make_step(self, action: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        units = config.deter // 2
        self.all_gates = Linear(self.latent.width + action + units, 4 * units, rngs=rngs)

    def widths_read(self, tokens: int) -> tuple[int, int]:
        return self.deter // 2, tokens

    def step(self, state: State, action: jax.Array) -> jax.Array:
        """deter_t (B, D) from the state at t-1 and the action (B, A) taken there.

        c = σ(forget + 1)·c + σ(enter)·tanh(candidate), h = σ(out)·tanh(c).
        """
        hidden, cell = features.split(state["deter"], 2)
        inputs = [self.latent.flat(state["stoch"]), bounded(action), hidden]
        enter, candidate, forget, out = features.split(self.all_gates(features.concat(inputs)), 4)
        cell = jax.nn.sigmoid(forget + 1) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
        return features.concat([jax.nn.sigmoid(out) * jnp.tanh(cell), cell])

    def told(self, deter: jax.Array) -> jax.Array:
        hidden, _ = features.split(deter, 2)
        return hidden

    def seen(self, deter: jax.Array, tokens: jax.Array) -> jax.Array:
        return tokens


#: How the next state follows; called with the widths of tokens and actions, and the options.
DYNAMICS = {"block_gru": RSSM, "gru": GRU, "normed_gru": NormedGRU, "lstm": LSTM}
