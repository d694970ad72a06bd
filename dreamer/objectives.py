"""What the latents are trained to predict: one table, `OBJECTIVES`; one row of it, or several at once.

DreamerV3's latents predict the observations. Others predict what the encoder makes of these, so that what is not worth
encoding need not be drawn; a decoder of stopped features can look on. (`WorldModel.loss` adds rewards and the rest.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dreamer import features, scans
from dreamer.coders import Decoder, Observations
from dreamer.config import LossConfig, ModelConfig
from dreamer.distributions import Distribution, Output, sum_of
from dreamer.latents import LATENTS
from dreamer.networks import MLP, Linear, at_least_float32
from dreamer.optimizer import Slow
from dreamer.rssm import RSSM, State
from dreamer.types import ACTION_MASK, Spaces

sg = jax.lax.stop_gradient


class Seen(NamedTuple):
    """What the world model makes of a batch, with gradients, each (B, T, ...).

    actions: those that led to each step; feature: of the states; posterior, prior: logits.
    """

    tokens: jax.Array
    actions: jax.Array
    states: State
    feature: jax.Array
    posterior: jax.Array
    prior: jax.Array


class Targets(NamedTuple):
    """What value (B, T) and policy (B, T, ...) are to be at every step of a batch."""

    value: jax.Array
    policy: Mapping[str, Distribution]


class Judges(Protocol):
    """What an objective may ask of a behaviour: the critic, the policy, and what these are to be."""

    @property
    def value(self) -> Callable[[jax.Array], Output]: ...
    @property
    def policy(self) -> Callable[..., Mapping[str, Distribution]]: ...

    def targets(
        self,
        seen: Seen,
        batch: Observations,
        allowed: jax.Array | None,
        networks: Networks,
        key: jax.Array | None,
    ) -> Targets: ...


class Model(Protocol):
    """What an objective may ask of the world model it is a part of."""

    @property
    def rssm(self) -> RSSM: ...
    @property
    def reward(self) -> Callable[[jax.Array], Output]: ...
    @property
    def cont(self) -> Callable[[jax.Array], Output]: ...
    @property
    def discount(self) -> float: ...


class Networks(NamedTuple):
    """What is trained beside an objective, and all slow copies, by name."""

    world_model: Model
    behaviour: Judges
    slow: Mapping[str, nnx.Module]


class Objective(nnx.Module):
    """One or several losses, and what they teach the model to predict: nothing, unless a subclass says otherwise.

    scales: of every loss, by its name; slow: the weights that need a slow copy, by the copy's name.
    """

    def __init__(self, scales: Mapping[str, float], slow: Mapping[str, Slow] | None = None) -> None:
        self.scales, self.slow = nnx.static(dict(scales)), nnx.static(dict(slow or {}))

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Losses (B, T) by name. batch (B, T, ...): observations, rewards and ends, as `WorldModel.loss` has them."""
        return {}

    def predict(self, x: jax.Array) -> dict[str, Output]:
        """The predicted observations by key, from features (..., F)."""
        return {}

    def targets(self, observations: Observations) -> dict[str, jax.Array]:
        """What `predict` should have returned: these observations in the form that its losses compare with."""
        return {}

    @property
    def predicts_masks(self) -> bool:
        """Whether dreams can tell which actions are allowed; if so, `allowed` says which."""
        return False

    def allowed(self, x: jax.Array) -> jax.Array:
        """The actions that a masked environment is predicted to allow, bool (..., A), from features (..., F)."""
        raise NotImplementedError


class Reconstruction(Objective):
    """DreamerV3's choice: predict every observation from the model state (paper v2, eq. 3, L_pred)."""

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.decoder = Decoder(width, spaces, config, rngs=rngs)
        super().__init__(dict.fromkeys(self.decoder.spaces, loss.reconstruction))

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """One loss for each predicted observation."""
        targets = self.targets(batch)
        return {name: output.loss(targets[name]) for name, output in self.predict(seen.feature).items()}

    def predict(self, x: jax.Array) -> dict[str, Output]:
        return self.decoder(x)

    def targets(self, observations: Observations) -> dict[str, jax.Array]:
        return self.decoder.targets(observations)

    @property
    def predicts_masks(self) -> bool:
        return ACTION_MASK in self.decoder.spaces

    def allowed(self, x: jax.Array) -> jax.Array:
        """The actions that are more likely allowed than not."""
        entries = sg(self.decoder.vectors(x, [ACTION_MASK])[ACTION_MASK].mode())
        forbidden, allowed = features.split(features.group(entries, features.size(entries) // 2), 2)
        return features.single(allowed) > 0.5


class Autoencoding(Reconstruction):
    """The decoder of an autoencoder: every observation from its own latent alone, without what came before (World
    Models, Ha & Schmidhuber, 2018, section 2.2)."""

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.before = config.deter
        super().__init__(width, tokens, spaces, config, loss, rngs=rngs)

    def predict(self, x: jax.Array) -> dict[str, Output]:
        return super().predict(self.own(x))

    def allowed(self, x: jax.Array) -> jax.Array:
        return super().allowed(self.own(x))

    def own(self, x: jax.Array) -> jax.Array:
        """The features of a state, with zeros for its deterministic part."""
        deter, stoch = features.split(x, [self.before])
        return features.concat([jnp.zeros_like(deter), stoch])


class Probe(Reconstruction):
    """A decoder that looks on: it learns to draw the observations from the states, and teaches them nothing.

    Other objectives keep their videos, dreams and reports with it.
    """

    def predict(self, x: jax.Array) -> dict[str, Output]:
        return super().predict(sg(x))


class RedundancyReduction(Objective):
    """Barlow Twins between feature and encoding (R2-Dreamer): no decoder, no augmentation.

    A projection of the feature is correlated with the encoding, which is data, over the N = B * T steps of a batch:
    C (tokens, tokens). Each number of the encoding is to be told by its own number of the projection, and by no other::

        sum_i (1 - C_ii)^2 + 5e-4 sum_{i != j} C_ij^2
    """

    OFF_DIAGONAL = 5e-4

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.projection = Linear(width, tokens, bias=False, rngs=rngs)
        super().__init__({"barlow": loss.redundancy_reduction})

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """One number, of the whole batch, at every step."""
        x, y = _standardised(self.projection(seen.feature)), _standardised(sg(seen.tokens))
        correlation = jnp.einsum("bti,btj->ij", x, y) / (x.shape[0] * x.shape[1])
        own = jnp.diagonal(correlation)
        others = jnp.square(correlation).sum() - jnp.square(own).sum()
        loss = jnp.square(1 - own).sum() + self.OFF_DIAGONAL * others
        return {"barlow": jnp.broadcast_to(loss, x.shape[:2])}


class PredictEncoding(Objective):
    """The encoding, which is data, from the deterministic state alone, by their cosine (Dreamer-CDP)."""

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.mlp = MLP(config.deter, config.units, 1, rngs=rngs)
        self.out = Linear(config.units, tokens, rngs=rngs)
        super().__init__({"encoding": loss.predict_encoding})

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        return {"encoding": 1 - _cosine(self.out(self.mlp(seen.states["deter"])), sg(seen.tokens))}


class SelfPrediction(Objective):
    """What the state becomes by an action, before anything is seen, tells the encoding of what then comes (SPR).

    The encoding is that of a slow copy of the encoder, and data: a target that could come to meet its prediction would
    be the same whatever is seen.
    """

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.latent = LATENTS[config.latent](config)
        self.mlp = MLP(width, config.units, 1, rngs=rngs)
        self.out = Linear(config.units, tokens, rngs=rngs)
        encoder = Slow(("world_model", "encoder"), loss.target_rate)
        super().__init__({"self": loss.self_prediction}, {"encoder": encoder})

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """2 - 2 cos, the squared distance of the two as unit vectors."""
        deter = seen.states["deter"]
        stoch = self.latent.prior(seen.prior).sample(key).astype(deter.dtype)
        x = self.out(self.mlp(features.concat([deter, self.latent.flat(stoch)])))
        return {"self": 2 - 2 * _cosine(x, self.target(seen, batch, networks.slow["encoder"]))}

    def target(self, seen: Seen, observations: Observations, encoder: nnx.Module) -> jax.Array:
        """What is to be predicted, (B, T, tokens)."""
        return sg(encoder(observations, seen.actions.shape[:2], seen.actions.dtype))


class ValueEquivalence(Objective):
    """What matters to who acts, and no observation: rewards, ends, values and policy along the K actions that were
    really taken from every state (MuZero, Schrittwieser et al., 2020, eq. 1 and appendix G).

    Before anything of it is seen, the k-th state after an action must tell what the k-th step after it gave. The first
    state counts as much as the K after it together, and the gradient is halved from each step to the one before.
    What value and policy should be, the behaviour says.
    """

    def __init__(
        self, width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
    ) -> None:
        self.steps = loss.unroll
        own = {"rew": loss.reward, "con": loss.cont, "val": loss.value, "pol": loss.policy}
        super().__init__({f"unroll_{name}": loss.value_equivalence * scale for name, scale in own.items()})

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Each is that of a step itself, where reward and end have losses elsewhere, and the mean of the K after it;
        steps of another episode count as 0, and so do value and policy where an episode has ended."""
        target_key, unroll_key = (None, None) if key is None else jax.random.split(key)
        world = networks.world_model
        allowed = batch[ACTION_MASK] > 0 if ACTION_MASK in batch else None
        ended, terminal = (batch[name].astype(jnp.float32) for name in ("is_last", "is_terminal"))
        wanted = networks.behaviour.targets(seen, batch, allowed, networks, target_key)

        def judged(x: jax.Array, wanted: Targets, allowed: jax.Array | None, ended: jax.Array) -> list[jax.Array]:
            """The losses of value and policy at features x."""
            policy = networks.behaviour.policy(x, allowed)
            apart = sum_of([wanted.policy[name].kl(dist) for name, dist in policy.items()])
            return [(1 - ended) * loss for loss in (networks.behaviour.value(x).loss(wanted.value), apart)]

        ahead = functools.partial(self._ahead, first=1)
        x = world.rssm.feature(self._unrolled(seen, ahead(seen.actions), world.rssm, unroll_key))
        # The k-th step is of the same episode if none of the k steps before has ended it.
        same = jnp.cumprod(1 - self._ahead(ended, first=0), 2) * ahead(jnp.ones_like(ended))
        reward = world.reward(x).loss(ahead(batch["reward"]))
        cont = world.cont(x).loss((1 - ahead(terminal)) * world.discount)
        later = jax.tree.map(ahead, (wanted, allowed, ended))
        unrolled = [(same * loss).mean(2) for loss in (reward, cont, *judged(x, *later))]
        nothing = jnp.zeros_like(ended)
        now = [nothing, nothing, *judged(seen.feature, wanted, allowed, ended)]
        return dict(zip(self.scales, map(jnp.add, now, unrolled), strict=True))

    def _ahead(self, steps: jax.Array, first: int) -> jax.Array:
        """(B, T, ...) to (B, T, K, ...): those that come `first` steps later and on, zeros beyond the batch's end."""
        far = range(first, first + self.steps)
        return jnp.stack([jnp.concatenate([steps[:, k:], jnp.zeros_like(steps[:, :k])], 1) for k in far], 2)

    def _unrolled(self, seen: Seen, actions: jax.Array, rssm: RSSM, key: jax.Array | None) -> State:
        """The states (B, T, K, ...) to which `actions` (B, T, K, A) lead from each state."""
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

        def step(state: State, action: jax.Array, key: jax.Array | None) -> tuple[State, State]:
            state = rssm.imagine_step(state, action, key)
            return jax.tree.map(lambda x: x / 2 + sg(x / 2), state), state

        states = scans.over_time(step, jax.tree.map(flat, seen.states), flat(actions), key)
        return jax.tree.map(lambda x: x.reshape(*actions.shape[:2], *x.shape[1:]), states)


class Several(Objective):
    """Several objectives at once: all their losses, and the predictions of the one that predicts observations."""

    def __init__(self, parts: Mapping[str, Objective]) -> None:
        self.parts = nnx.Dict(dict(parts))
        scales = {name: scale for part in parts.values() for name, scale in part.scales.items()}
        super().__init__(scales, {name: slow for part in parts.values() for name, slow in part.slow.items()})
        self._drawn = next((name for name, part in parts.items() if isinstance(part, Reconstruction)), None)

    def losses(
        self, seen: Seen, batch: Observations, networks: Networks, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for i, part in enumerate(self.parts.values()):
            found |= part.losses(seen, batch, networks, None if key is None else jax.random.fold_in(key, i))
        return found

    @property
    def _draws(self) -> Objective:
        return self.parts[self._drawn] if self._drawn else Objective({})

    def predict(self, x: jax.Array) -> dict[str, Output]:
        return self._draws.predict(x)

    def targets(self, observations: Observations) -> dict[str, jax.Array]:
        return self._draws.targets(observations)

    @property
    def predicts_masks(self) -> bool:
        return self._draws.predicts_masks

    def allowed(self, x: jax.Array) -> jax.Array:
        return self._draws.allowed(x)


def _standardised(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 of each number over the steps of a batch, (B, T, tokens)."""
    x = at_least_float32(x)
    x = x - x.mean((0, 1))
    return x * jax.lax.rsqrt(jnp.square(x).mean((0, 1)) + 1e-5)


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine (B, T) of the angle between vectors (B, T, tokens)."""
    unit = lambda x: x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-8)  # noqa: E731
    return (unit(at_least_float32(x)) * unit(at_least_float32(y))).sum(-1)


#: Called with the widths of features and tokens, the observation spaces, the options of model and losses.
OBJECTIVES = {
    "reconstruction": Reconstruction,
    "autoencoding": Autoencoding,
    "redundancy_reduction": RedundancyReduction,
    "predict_encoding": PredictEncoding,
    "self_prediction": SelfPrediction,
    "value_equivalence": ValueEquivalence,
    "probe": Probe,
}


def make_objective(
    width: int, tokens: int, spaces: Spaces, config: ModelConfig, loss: LossConfig, *, rngs: nnx.Rngs
) -> Objective:
    """What `loss.objective` names."""
    made: dict[str, Objective] = {
        name: OBJECTIVES[name](width, tokens, spaces, config, loss, rngs=rngs) for name in loss.objective
    }
    return next(iter(made.values())) if len(made) == 1 else Several(made)
