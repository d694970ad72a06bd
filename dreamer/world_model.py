"""The world model: encoder, RSSM, the objective of the latents, reward and continue heads; and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from dreamer import features
from dreamer.coders import Encoder
from dreamer.config import LossConfig, ModelConfig
from dreamer.distributions import Bernoulli, Output, TwoHot, UnitNormal
from dreamer.ensemble import make_ensemble
from dreamer.networks import MLP, Linear
from dreamer.objectives import Judges, Networks, Seen, make_objective
from dreamer.rssm import DYNAMICS, State
from dreamer.types import Spaces

sg = jax.lax.stop_gradient


class HeadKind(NamedTuple):
    """The distribution made of a head's outputs; the out-scale of its last layer, where 0 makes the first predictions
    exactly 0; whether there is an output for each bin, or a single one."""

    dist: Callable[[jax.Array], Output]
    scale: float
    binned: bool = False


HEADS: Mapping[str, HeadKind] = {
    "two_hot": HeadKind(TwoHot, 0.0, binned=True),
    "normal": HeadKind(lambda x: UnitNormal(features.single(x)), 0.0),
    "binary": HeadKind(lambda x: Bernoulli(features.single(x)), 1.0),
}

#: A KL (B, T) and free nats -> the same; a constant where it stays below them.
Floor = Callable[[jax.Array, float], jax.Array]


def floor_of_step(kl: jax.Array, nats: float) -> jax.Array:
    return jnp.maximum(kl, nats)


def floor_of_mean(kl: jax.Array, nats: float) -> jax.Array:
    """The mean is max(nats, mean KL), as in PlaNet and DreamerV1."""
    return jnp.where(kl.mean() > nats, kl, nats)


def no_floor(kl: jax.Array, nats: float) -> jax.Array:
    return kl


#: What free nats are of -> what becomes of dyn, of rep.
FREE_NATS: Mapping[str, tuple[Floor, Floor]] = {
    "step": (floor_of_step, floor_of_step),
    "mean": (floor_of_mean, floor_of_mean),
    # As in World Models, whose prior learns a density.
    "rep": (no_floor, floor_of_step),
}


class Head(nnx.Module):
    """Feature (..., F) -> the distribution of a scalar (...), of one of the kinds in `HEADS`."""

    def __init__(self, kind: str, inputs: int, units: int, layers: int, bins: int, *, rngs: nnx.Rngs) -> None:
        self.kind = kind
        self.mlp = MLP(inputs, units, layers, rngs=rngs)
        self.out = Linear(units, bins if HEADS[kind].binned else 1, scale=HEADS[kind].scale, rngs=rngs)

    def __call__(self, x: jax.Array) -> Output:
        return HEADS[self.kind].dist(self.out(self.mlp(x)))


class Observed(NamedTuple):
    """The result of one pass of the world model over a batch, with gradients: losses (B, T), metrics ()."""

    losses: dict[str, jax.Array]
    seen: Seen
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
        self.free_nats, self.free_nats_of, self.discount = loss.free_nats, loss.free_nats_of, discount
        self.encoder = Encoder(observations, config, rngs=rngs)
        self.rssm = DYNAMICS[config.dynamics](self.encoder.width, action, config, rngs=rngs)
        width, units = self.rssm.width, config.units
        self.objective = make_objective(width, self.encoder.width, observations, config, loss, rngs=rngs)
        self.reward = Head(config.reward_head, width, units, config.reward_layers, config.bins, rngs=rngs)
        self.cont = Head("binary", width, units, config.cont_layers, config.bins, rngs=rngs)
        self.ensemble = make_ensemble(self.rssm.latent, config, rngs=rngs)

    def see(
        self, context: State, actions: jax.Array, observations: Mapping[str, jax.Array], key: jax.Array | None
    ) -> Seen:
        """Filter a batch; the arguments as in `loss`."""
        tokens = self.encoder(observations, actions.shape[:2], actions.dtype)
        states, posterior = self.rssm.observe(context, actions, tokens, observations["is_first"], key)
        prior = self.rssm.prior(states["deter"])
        return Seen(tokens, actions, states, self.rssm.feature(states), posterior, prior)

    def loss(
        self,
        context: State,
        actions: jax.Array,
        batch: Mapping[str, jax.Array],
        behaviour: Judges,
        slow: Mapping[str, nnx.Module],
        key: jax.Array | None,
    ) -> Observed:
        """Filter the batch and score every prediction.

        context: state (B, ...) at the step before the first; actions (B, T, A): ``actions[:, t]`` led to step t;
        batch: observations, reward, is_first, is_terminal, each (B, T, ...); behaviour, slow: what
        objectives may ask, see `objectives.Networks`.

        The five terms (paper v2, eq. 2-3), per (B, T) and unweighted::

            the objective's -ln p(x_t | z_t)        here one per observation key
            reward          -ln p(r_t | z_t)
            cont            -ln p(c_t | z_t)        c_t = (1 - is_terminal_t) * gamma
            dyn             max(1, KL(sg(posterior) || prior))
            rep             max(1, KL(posterior || sg(prior)))

        and those of an ensemble, if there is one.
        """
        # `observe` draws with the children 0 to T - 1 of this key.
        objective_key = None if key is None else jax.random.fold_in(key, actions.shape[1])
        seen, latent = self.see(context, actions, batch, key), self.rssm.latent
        losses = self.objective.losses(seen, batch, Networks(self, behaviour, slow), objective_key)
        losses["rew"] = self.reward(seen.feature).loss(batch["reward"])
        losses["con"] = self.cont(seen.feature).loss((1 - batch["is_terminal"].astype(jnp.float32)) * self.discount)
        posterior, prior = latent.dist(seen.posterior), latent.prior(seen.prior)
        frozen_posterior, frozen_prior = latent.dist(sg(seen.posterior)), latent.prior(sg(seen.prior))
        # The KL is summed over the variables first: the free nats apply to the whole state, per (B, T).
        above_dyn, above_rep = FREE_NATS[self.free_nats_of]
        losses["dyn"] = above_dyn(latent.dyn(frozen_posterior, prior, seen.states["stoch"]), self.free_nats)
        losses["rep"] = above_rep(latent.rep(posterior, frozen_prior), self.free_nats)
        others, metrics = self.ensemble.learn(seen)
        losses |= others
        metrics |= {"dyn_ent": latent.entropy(prior).mean(), "rep_ent": latent.entropy(posterior).mean()}
        chex.assert_shape(list(losses.values()), actions.shape[:2])
        return Observed(losses, seen, metrics)
