"""The world model: encoder, RSSM, what the latents must predict, reward and continue heads; and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from dreamer import features
from dreamer.coders import Encoder
from dreamer.config import LossConfig, ModelConfig
from dreamer.distributions import Bernoulli, TwoHot
from dreamer.networks import MLP, Linear
from dreamer.objectives import OBJECTIVES
from dreamer.rssm import RSSM, State, feature
from dreamer.types import Spaces

sg = jax.lax.stop_gradient


class TwoHotHead(nnx.Module):
    """Feature (..., F) -> TwoHot scalar. The output layer starts at 0, so the first predictions are exactly 0."""

    def __init__(self, inputs: int, units: int, layers: int, bins: int, *, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(inputs, units, layers, rngs=rngs)
        self.out = Linear(units, bins, scale=0.0, rngs=rngs)

    def __call__(self, x: jax.Array) -> TwoHot:
        return TwoHot(self.out(self.mlp(x)))


class BinaryHead(nnx.Module):
    """Feature (..., F) -> Bernoulli of shape (...)."""

    def __init__(self, inputs: int, units: int, layers: int, *, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(inputs, units, layers, rngs=rngs)
        self.out = Linear(units, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> Bernoulli:
        return Bernoulli(features.single(self.out(self.mlp(x))))


@dataclasses.dataclass(frozen=True)
class Observed:
    """What one pass of the world model over a batch gives, with gradients: everything (B, T, ...)."""

    losses: dict[str, jax.Array]
    states: State
    posterior: jax.Array
    prior: jax.Array
    metrics: dict[str, jax.Array]


class WorldModel(nnx.Module):
    """Learns how the environment evolves (paper v2, eq. 1-3)."""

    def __init__(
        self,
        observations: Spaces,
        action: int,
        config: ModelConfig,
        loss: LossConfig,
        discount: float,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.free_nats, self.discount = loss.free_nats, discount
        self.encoder = Encoder(observations, config, rngs=rngs)
        self.rssm = RSSM(self.encoder.width, action, config, rngs=rngs)
        self.objective = OBJECTIVES[loss.objective](observations, config, rngs=rngs)
        width = config.deter + config.stoch * config.classes
        self.reward = TwoHotHead(width, config.units, config.reward_layers, config.bins, rngs=rngs)
        self.cont = BinaryHead(width, config.units, config.cont_layers, rngs=rngs)

    def loss(
        self, context: State, actions: jax.Array, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> Observed:
        """Filter the batch and score every prediction.

        context: state (B, ...) at the step before the first; actions (B, T, A): ``actions[:, t]`` led to step t;
        batch: observations, reward, is_first, is_terminal, each (B, T, ...).

        The five terms (paper v2, eq. 2-3), per (B, T) and unweighted::

            reconstruction  -ln p(x_t | z_t)        one per observation key
            reward          -ln p(r_t | z_t)
            cont            -ln p(c_t | z_t)        c_t = (1 - is_terminal_t) * gamma
            dyn             max(1, KL(sg(posterior) || prior))
            rep             max(1, KL(posterior || sg(prior)))
        """
        tokens = self.encoder(batch, actions.shape[:2], actions.dtype)
        states, posterior_logits = self.rssm.observe(context, actions, tokens, batch["is_first"], key)
        prior_logits = self.rssm.prior(states["deter"])
        posterior, prior = self.rssm.dist(posterior_logits), self.rssm.dist(prior_logits)
        frozen_posterior, frozen_prior = self.rssm.dist(sg(posterior_logits)), self.rssm.dist(sg(prior_logits))
        losses = self.objective.losses(states, batch)
        x = feature(states)
        losses["rew"] = self.reward(x).loss(batch["reward"])
        losses["con"] = self.cont(x).loss((1 - batch["is_terminal"].astype(jnp.float32)) * self.discount)
        # The KL is summed over the S variables first: the free nats are for the whole state, per (B, T).
        losses["dyn"] = jnp.maximum(frozen_posterior.kl(prior).sum(-1), self.free_nats)
        losses["rep"] = jnp.maximum(posterior.kl(frozen_prior).sum(-1), self.free_nats)
        metrics = {"dyn_ent": prior.entropy().sum(-1).mean(), "rep_ent": posterior.entropy().sum(-1).mean()}
        chex.assert_shape(list(losses.values()), actions.shape[:2])
        return Observed(losses, states, posterior_logits, prior_logits, metrics)
