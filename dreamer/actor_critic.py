"""Behaviour learned inside the world model's dreams: policy, critic, lambda-returns and their losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dreamer import features, scans
from dreamer.config import ActorCriticConfig, LossConfig, ModelConfig
from dreamer.distributions import Distribution, MaskedOneHot, MultiOneHot, Normal, OneHot, Output, sum_of
from dreamer.networks import MLP, Linear, at_least_float32
from dreamer.objectives import Networks, Seen, Targets
from dreamer.optimizer import Slow
from dreamer.rssm import State
from dreamer.types import Space, Spaces
from dreamer.world_model import Head

sg = jax.lax.stop_gradient

ReturnScale = dict[str, jax.Array]


class ActionHead(nnx.Module):
    """One action's distribution from the policy's last layer (..., units)."""

    def __init__(self, units: int, space: Space, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.classes = space.classes
        self.limits = (config.min_std, config.max_std)
        if space.kind == "discrete":
            self.logits = Linear(units, space.flat_width, scale=0.01, rngs=rngs)
        else:
            self.mean = Linear(units, space.flat_width, scale=0.01, rngs=rngs)
            self.std = Linear(units, space.flat_width, scale=0.01, rngs=rngs)

    def __call__(self, x: jax.Array, allowed: jax.Array | None = None) -> Distribution:
        """allowed: bool (..., classes) of a single discrete action, None where every class is."""
        if self.classes is None:
            return Normal.bounded(self.mean(x), self.std(x), *self.limits)
        return self.choice(self.logits(x), allowed)

    def choice(self, logits: jax.Array, allowed: jax.Array | None) -> Distribution:
        """Of a discrete action."""
        if allowed is not None:
            return MaskedOneHot(logits, allowed)
        return OneHot(logits) if self.classes is None or len(self.classes) == 1 else MultiOneHot(logits, self.classes)


class Policy(nnx.Module):
    """Feature (..., F) -> one distribution per action; sampled, they lie side by side in key order (..., A).

    Where the environment masks its (single discrete) action, `allowed` (..., A) bool says which classes it allows.
    """

    def __init__(self, inputs: int, actions: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(inputs, config.units, config.policy_layers, rngs=rngs)
        self.keys = tuple(sorted(actions))
        self.heads = nnx.Dict({k: ActionHead(config.units, actions[k], config, rngs=rngs) for k in self.keys})

    def __call__(self, x: jax.Array, allowed: jax.Array | None = None) -> dict[str, Distribution]:
        x = self.mlp(x)
        return {key: self.heads[key](x, allowed) for key in self.keys}


def sample_actions(dists: Mapping[str, Distribution], key: jax.Array | None) -> jax.Array:
    """Actions (..., A) at least float32, one-hot where discrete, the mode where key is None.

    Gradients go through what was drawn: reparametrised, or straight through where it is one-hot.
    """
    keys = [None] * len(dists) if key is None else jax.random.split(key, len(dists))
    return features.concat([d.sample(k) for d, k in zip(dists.values(), keys, strict=True)])


def lambda_return(rewards: jax.Array, values: jax.Array, discounts: jax.Array, lambdas: jax.Array | float) -> jax.Array:
    """Returns (T-1, ...) of sequences (T, ...); entry t looks at rewards, values and discounts from t+1 on.

    Rₜ = rₜ₊₁ + γₜ₊₁((1-λₜ₊₁)vₜ₊₁ + λₜ₊₁Rₜ₊₁), bootstrapped with the last value (paper v2, eq. 5)::

        index        0      1      2   ...  T-1
        uses         -      r,v,γ  r,v,γ    r,v,γ
        gives        R0     R1     R2  ...  -
    """
    chex.assert_equal_shape([rewards, values, discounts])
    lambdas = jnp.broadcast_to(jnp.asarray(lambdas, values.dtype), values.shape)[1:]
    rewards, discounts, last = rewards[1:], discounts[1:], values[-1]
    fixed = rewards + discounts * (1 - lambdas) * values[1:]
    return scans.recurrence(fixed, discounts * lambdas, last)


def update_return_scale(scale: ReturnScale, returns: jax.Array, config: ActorCriticConfig) -> ReturnScale:
    """EMA of the 5th and 95th percentile of all returns, starting at 0 without bias correction."""
    low, high = jnp.percentile(sg(returns), jnp.asarray([config.return_low, config.return_high], returns.dtype))
    mix = lambda old, new: (1 - config.return_rate) * old + config.return_rate * new  # noqa: E731
    return {"low": mix(scale["low"], low), "high": mix(scale["high"], high)}


#: What returns are scaled by -> S ().
RETURN_SCALES: Mapping[str, Callable[[ReturnScale, ActorCriticConfig], jax.Array]] = {
    # S = max(1, p95 - p5): small returns are never blown up (paper v2, eq. 7).
    "percentiles": lambda scale, config: jnp.maximum(config.return_limit, scale["high"] - scale["low"]),
    "none": lambda scale, config: jnp.ones_like(scale["high"]),
}


def return_range(scale: ReturnScale, config: ActorCriticConfig) -> jax.Array:
    """S (), which divides the returns."""
    return RETURN_SCALES[config.return_scale](scale, config)


def return_metrics(returns: jax.Array, advantage: jax.Array, low: jax.Array, span: jax.Array) -> dict[str, jax.Array]:
    """Metrics of all returns R and all advantages (R - v) / S. low: the lower percentile; span: S."""
    normed = (returns - low) / span
    return {
        "adv": advantage.mean(),
        "adv_std": advantage.std(),
        "adv_mag": jnp.abs(advantage).mean(),
        "ret": normed.mean(),
        "ret_min": normed.min(),
        "ret_max": normed.max(),
        "ret_rate": (jnp.abs(normed) >= 1).astype(jnp.float32).mean(),
    }


@dataclasses.dataclass(frozen=True)
class Dream:
    """What the heads predict for an imagined batch: M starts, each with the H states after it.

    reward, cont, slow_value, value: (H+1, M) predicted at each state.
    critic: the distributions of these values at the first H states, (H, M).
    log_prob: (H, M) of the actions taken there; entropy: (H, M) of each action by its name.
    actions: (H, M, A); allowed: bool (H, M, A), actions that the dream allows there; None where it allows all.
    """

    reward: jax.Array
    cont: jax.Array
    slow_value: jax.Array
    value: jax.Array
    critic: Output
    log_prob: jax.Array
    entropy: dict[str, jax.Array]
    actions: jax.Array
    allowed: jax.Array | None = None


#: Whose values returns and advantages are made of -> these values (H+1, M).
VALUES: Mapping[str, Callable[[Dream], jax.Array]] = {
    "own": lambda dream: dream.value,
    "slow": lambda dream: dream.slow_value,
}


class Learned(NamedTuple):
    """What behaviour learned from: losses by name, each of its own shape, returns R and R - v (H, M), the new return
    scale, metrics ()."""

    losses: dict[str, jax.Array]
    returns: jax.Array
    advantages: jax.Array
    return_scale: ReturnScale
    metrics: dict[str, jax.Array]


def critic_loss(dist: Output, target: jax.Array, slow_value: jax.Array, slow_scale: float) -> jax.Array:
    """The return's loss (a cross entropy), plus that of the slow critic's prediction as a regulariser."""
    return dist.loss(sg(target)) + slow_scale * dist.loss(sg(slow_value))


class ActorCritic(nnx.Module):
    """Policy and critic. The slow critic's weights are kept outside, in the training state.

    discount: the factor of a predicted probability to continue, 1 where that already includes the discount.
    """

    #: What happens to the gradient where a dream's states, actions and predictions enter this loss. REINFORCE treats a
    #: dream as data; a loss that is differentiated through the dream's dynamics has the identity here.
    through_dreams = staticmethod(sg)
    #: Called with the feature's width, the action spaces and the options of networks.
    make_policy: Callable[..., Policy] = Policy

    def __init__(
        self,
        feature: int,
        actions: Spaces,
        model: ModelConfig,
        config: ActorCriticConfig,
        discount: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.discount = nnx.static(config), discount
        self.policy = self.make_policy(feature, actions, model, rngs=rngs)
        self.value = Head(model.value_head, feature, model.units, model.value_layers, model.bins, rngs=rngs)
        self.slow = nnx.static({"value": Slow(("actor_critic", "value"), config.slow_rate, config.slow_every)})

    @staticmethod
    def scales(loss: LossConfig) -> dict[str, float]:
        """The scale of every loss, by its name."""
        return {"policy": loss.policy, "value": loss.value, "repval": loss.replay_value}

    @staticmethod
    def optimizers(config: ActorCriticConfig) -> dict[str, optax.GradientTransformationExtraArgs]:
        """Optimizers that are not the options' own, by the path of the weights they train."""
        return {}

    def frozen_heads(self) -> dict[str, Head]:
        """Heads that a dream is read by beside those of the world model, by name; here none: the values are what the
        critic says of the dream as data."""
        return {}

    def objective(self, log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
        """What the policy makes large, (H, M): REINFORCE with a baseline."""
        return log_prob * advantage

    def judge(self, x: jax.Array, dists: Mapping[str, Distribution], actions: jax.Array) -> dict[str, Any]:
        """What training needs of features x (..., F) where `actions` (..., A) were drawn from the policy's `dists`.

        critic: the value's distributions (...); log_prob (...): of the actions; entropy (...) of each, by name.
        """
        cuts = np.cumsum([features.size(dist.mode()) for dist in dists.values()])[:-1]
        parts = zip(dists.values(), features.split(actions, cuts), strict=True)
        log_prob = [dist.log_prob(part) for dist, part in parts]
        entropy = {key: dist.entropy() for key, dist in dists.items()}
        return {"critic": self.value(x), "log_prob": sum_of(log_prob), "entropy": entropy}

    def learn(
        self,
        dream: Callable[[State], Dream],
        states: State,
        x: jax.Array,
        batch: Mapping[str, jax.Array],
        slow: Mapping[str, nnx.Module],
        scale: ReturnScale,
        factor: jax.Array | None = None,
    ) -> Learned:
        """All losses of behaviour: in dreams that start at a batch's states, and on the batch itself.

        dream: of starts (M, ...); states, x: filtered, and their features, (B, T, ...); batch: the trained steps
        (B, T, ...); slow: slow copies; factor: see `imagination_loss`.
        """
        length = x.shape[1]
        last = self.config.imagine_last or length
        states, x, batch = jax.tree.map(lambda x: x[:, length - last :], (states, x, dict(batch)))
        dreamed = dream(jax.tree.map(lambda x: sg(x).reshape(-1, *x.shape[2:]), states))
        losses, returns, scale, metrics = self.imagination_loss(dreamed, scale, factor)
        losses["repval"] = self.replay_loss(x, slow, batch, returns[0].reshape(-1, last))
        for key, head in self.policy.heads.items():
            # An action without a choice (each entry has one class) has no randomness to measure.
            if head.classes is not None and max(head.classes) > 1:
                metrics[f"rand/{key}"] = metrics[f"ent/{key}"] / sum(math.log(n) for n in head.classes)
        return Learned(losses, returns, returns - VALUES[self.config.values](dreamed)[:-1], scale, metrics)

    def imagination_loss(
        self, dream: Dream, scale: ReturnScale, factor: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], jax.Array, ReturnScale, dict[str, jax.Array]]:
        """Losses {policy, value: (H, M)}, returns (H, M), new return scale, metrics.

        Policy (REINFORCE with return normalisation, paper v2, eq. 6), value (eq. 5)::

            -w (ln π(a|z) sg(R - v) / S + η H[π])
             w (CE(v, twohot(R)) + CE(v, twohot(slow v)))

        `BEHAVIOURS` has other gradients of the policy, the options other values, scales and critics.
        factor: stands for 1/S, where this dream is only a part of the dreams that S is computed from.
        """
        config = self.config
        value = VALUES[config.values](dream)
        discounts = self.discount * dream.cont
        weight = sg(jnp.cumprod(discounts, 0) / self.discount)
        returns = self.through_dreams(lambda_return(dream.reward, value, discounts, config.lambda_))
        scale = update_return_scale(scale, returns, config)
        advantage = returns - sg(value[:-1])
        span = return_range(scale, config)
        advantage = advantage / span if factor is None else advantage * factor

        entropy = sum_of(list(dream.entropy.values()))
        objective = self.objective(dream.log_prob, advantage)
        losses = {"policy": -weight[:-1] * (objective + config.entropy * entropy)}
        losses["value"] = weight[:-1] * critic_loss(dream.critic, returns, dream.slow_value[:-1], config.slow_scale)

        metrics = return_metrics(returns, advantage, scale["low"], span) | {
            "rew": dream.reward.mean(),
            "con": dream.cont.mean(),
            "val": dream.value.mean(),
            "slowval": dream.slow_value.mean(),
            "weight": weight.mean(),
            "tar": returns.mean(),
        }
        metrics.update({f"ent/{key}": entropy.mean() for key, entropy in dream.entropy.items()})
        return losses, returns, scale, metrics

    def targets(
        self,
        seen: Seen,
        batch: Mapping[str, jax.Array],
        allowed: jax.Array | None,
        networks: Networks,
        key: jax.Array | None,
    ) -> Targets:
        """What value and policy are to be at a batch's steps (B, T), for objectives that are about them: what the slow
        critic and this policy make of the filtered states. allowed: bool (B, T, A), None where all actions are."""
        x = sg(seen.feature)
        return sg(Targets(networks.slow["value"](x).mode(), self.policy(x, allowed)))

    def replayed_returns(self, batch: Mapping[str, jax.Array], bootstrap: jax.Array) -> jax.Array:
        """Returns (B, T-1) of replayed sequences, where b (B, T) is what follows each state::

        Rₜ = rₜ₊₁ + liveₜ₊₁((1-contₜ₊₁)bₜ₊₁ + contₜ₊₁Rₜ₊₁), live = (1-is_terminal)γ, cont = (1-is_last)λ
        """
        last, terminal = batch["is_last"].astype(jnp.float32), batch["is_terminal"].astype(jnp.float32)
        live = (1 - terminal) * (1 - 1 / self.config.discount_horizon)
        sequences = at_least_float32(batch["reward"]), bootstrap, live, (1 - last) * self.config.lambda_
        return jax.vmap(lambda_return)(*sequences)

    def replay_loss(
        self, x: jax.Array, slow: Mapping[str, nnx.Module], batch: Mapping[str, jax.Array], bootstrap: jax.Array
    ) -> jax.Array:
        """Critic loss (B, T-1) on replayed sequences, with gradient through features x (B, T, F) into the world model.

        bootstrap (B, T): the imagined return that starts at each state. Last steps have weight 0: their successor in
        the sequence belongs to another episode.
        """
        config = self.config
        last, returns = batch["is_last"].astype(jnp.float32), self.replayed_returns(batch, bootstrap)
        slow_value = slow["value"](sg(x)).mode()[:, :-1]
        dist = jax.tree.map(lambda logits: logits[:, :-1], self.value(x))
        return (1 - last)[:, :-1] * critic_loss(dist, returns, slow_value, config.slow_scale)
