"""All networks, their one loss, and what they make of an observation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from dreamer.actor_critic import Dream, ReturnScale, sample_actions
from dreamer.behaviours import BEHAVIOURS, Motive, make_motive
from dreamer.coders import join_actions
from dreamer.config import Config
from dreamer.distributions import sum_of
from dreamer.imagination import imagine
from dreamer.insight import look
from dreamer.optimizer import Slow
from dreamer.planner_config import PlannerConfig
from dreamer.planners.learned import CautiousWorld, LearnedWorld
from dreamer.planners.sequences import add_up, explore
from dreamer.planners.table import make_planner
from dreamer.rssm import State
from dreamer.types import ACTION_MASK, PLANNED, Spaces, masks_actions
from dreamer.world_model import WorldModel

sg = jax.lax.stop_gradient

Batch = Mapping[str, jax.Array]
#: What an `Act` carries from step to step of an episode, (N, ...) by name.
Memory = dict[str, jax.Array]
#: The task's own rewards.
TASK = Motive()
#: The slow copies of parts of the model, by name.
SlowModules = Mapping[str, nnx.Module]


class Act(Protocol):
    """What chooses actions: ``act(model, state, key, allowed, memory) -> (action, extras, memory)``, a pure function.

    state (N, ...): the model's, after the newest observation; key: None asks for the most likely action; allowed: bool
    (N, A), or None if every action is allowed; memory: what it returned as such a step before in the same episode,
    (N, ...) by name, zeros where one begins, {} when it is traced for the first time. action (N, A): one-hot where
    discrete, at least float32; extras: what replay is to remember about the choice, (N, ...) by name, such as the
    return that a planner expects. It returns with the batches.
    """

    def __call__(
        self, model: DreamerModel, state: State, key: jax.Array | None, allowed: jax.Array | None, memory: Memory
    ) -> tuple[jax.Array, dict[str, jax.Array], Memory]: ...


def act_by_policy(
    model: DreamerModel, state: State, key: jax.Array | None, allowed: jax.Array | None, memory: Memory
) -> tuple[jax.Array, dict[str, jax.Array], Memory]:
    """DreamerV3's way: a sample from the policy, with nothing to remember; around it `actor_critic.noise`, if any."""
    x, noise = model.world_model.rssm.feature(state), model.config.actor_critic.noise
    action = sample_actions(model.actor_critic.policy(x, allowed), key)
    if key is not None and noise:
        action = explore(action, allowed, model.actions, noise, jax.random.fold_in(key, 0))
    return sg(action), {}, {}


def act_by_planner(config: PlannerConfig) -> Act:
    """A planner's way; replay remembers the return that it expected, ``planned`` (N,), the next step its plan.

    Without a key it plans with a fixed one, and does not explore.
    """
    exploring, calm = make_planner(config), make_planner(config.calm())

    def act(
        model: DreamerModel, state: State, key: jax.Array | None, allowed: jax.Array | None, memory: Memory
    ) -> tuple[jax.Array, dict[str, jax.Array], Memory]:
        world, root = model.as_world(state, allowed, config.penalty)
        plan_key, noise_key = jax.random.split(jax.random.key(0) if key is None else key)
        plan = calm if key is None else exploring
        action, extras = plan(world, root, plan_key, memory.get("plan"))
        if key is not None and config.noise:
            action = explore(action, allowed, model.actions, config.noise, noise_key)
        kept = {"plan": extras["plan"]} if "plan" in extras else {}
        return sg(action), {PLANNED: sg(extras["planned"])}, sg(kept)

    return act


class Outcome(NamedTuple):
    """What comes with a loss: the new return scale, what to write back into replay (B, T, ...), metrics (), and the
    dream's returns R and R - v (H, M)."""

    return_scale: ReturnScale
    written: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    returns: jax.Array
    advantages: jax.Array


class DreamerModel(nnx.Module):
    """All trained networks.

    slow: the weights that have a slow copy, by the copy's name; scales: of every loss term, by name. dtype: of
    activations. ValueError if the options do not fit the spaces.
    """

    def __init__(
        self, observations: Spaces, actions: Spaces, config: Config, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        self.config, self.actions, self.dtype = nnx.static(config), nnx.static(dict(sorted(actions.items()))), dtype
        action = sum(space.flat_width for space in actions.values())
        discount = 1 - 1 / config.actor_critic.discount_horizon
        # The discount is in what the continue head learns, or multiplies what it predicts.
        learned, beside = (discount, 1.0) if config.loss.discount_in_cont else (1.0, discount)
        self.world_model = WorldModel(observations, action, config.model, config.loss, learned, rngs=rngs)
        width = self.world_model.rssm.width
        behaviour = BEHAVIOURS[config.actor_critic.gradient]
        self.actor_critic = behaviour(width, actions, config.model, config.actor_critic, beside, rngs=rngs)
        self.motive = nnx.static(make_motive(config.actor_critic))
        self.masked = masks_actions(observations, actions)
        self.dreams_masks = self._dreams_masks()
        self.scales = nnx.static(self._scales())
        self.slow: Mapping[str, Slow] = nnx.static({**self.world_model.objective.slow, **self.actor_critic.slow})

    def _dreams_masks(self) -> bool:
        """Whether masks hold in imagination too. ValueError if they should but nothing predicts them."""
        if not self.masked or self.config.actor_critic.imagine_mask == "ignore":
            return False
        if not self.world_model.objective.predicts_masks:
            raise ValueError(
                f"expected model.decoder_keys to match {ACTION_MASK!r}, which imagination needs, got "
                f"{self.config.model.decoder_keys!r}; extend it or pass --actor_critic.imagine_mask ignore"
            )
        return True

    def _scales(self) -> dict[str, float]:
        config, ours = self.config.loss, self.world_model.objective.scales
        scales = {"rew": config.reward, "con": config.cont, "dyn": config.dyn, "rep": config.rep}
        scales |= self.actor_critic.scales(config) | self.world_model.ensemble.scales
        if taken := sorted(set(ours) & set(scales)):
            raise ValueError(
                f"expected observations not named like the loss terms {sorted(scales)}, got {taken}; rename these "
                "keys of the environment or leave them out with model.decoder_keys"
            )
        return scales | dict(ours)

    def loss(
        self,
        slow: SlowModules,
        return_scale: ReturnScale,
        batch: Batch,
        key: jax.Array | None,
        factor: jax.Array | None = None,
    ) -> tuple[jax.Array, Outcome]:
        """The weighted sum () of all loss terms, and what comes with it.

        batch (B, T+1, ...): one context step and T trained steps of everything `replay_fields` names.
        factor: see `ActorCritic.imagination_loss`.
        """
        world_key, dream_key = (None, None) if key is None else jax.random.split(key)
        context, actions, trained = self.split_batch(batch)
        observed = self.world_model.loss(context, actions, trained, self.actor_critic, slow, world_key)

        dream = functools.partial(self.dream, slow, key=dream_key, motive=self.motive)
        states, x = observed.seen.states, observed.seen.feature
        lived = trained | {"reward": self.motive.lived(self.world_model, x, trained["reward"])}
        learned = self.actor_critic.learn(dream, states, x, lived, slow, return_scale, factor)
        losses, metrics = learned.losses | observed.losses, learned.metrics | observed.metrics

        scales = self.scales
        if set(scales) != set(losses):
            raise ValueError(f"loss terms {sorted(losses)} and their scales {sorted(scales)} differ")
        means = {name: term.mean() for name, term in losses.items()}
        total = sum_of([scales[name] * mean for name, mean in means.items()])
        metrics.update({f"loss/{name}": mean for name, mean in means.items()})
        metrics["opt/loss"] = total
        written = self.world_model.rssm.pack(sg(observed.seen.states))
        if self.config.replay.selection.prioritised:
            counted = [name for name in observed.losses if name not in self.world_model.ensemble.scales]
            written["priority"] = sg(sum_of([scales[name] * observed.losses[name] for name in counted]))
        return total, Outcome(learned.return_scale, written, metrics, learned.returns, learned.advantages)

    def as_world(self, state: State, allowed: jax.Array | None, penalty: float = 0.0) -> tuple[LearnedWorld, State]:
        """A world to plan in, and where: `state` (N, ...), with these actions allowed, bool (N, A), None: all. penalty:
        see `CautiousWorld`."""
        kind = functools.partial(CautiousWorld, penalty=penalty) if penalty else LearnedWorld
        world = kind(self.world_model, self.actor_critic, self.actions, dreams_masks=self.dreams_masks)
        return world, world.begin(state, allowed)

    def dream(self, slow: SlowModules, starts: State, key: jax.Array | None, motive: Motive = TASK) -> Dream:
        """Imagine from `starts` (M, ...); see `imagination`."""
        parts, horizon = (self.world_model, self.actor_critic, slow), self.config.actor_critic.horizon
        return imagine(*parts, starts, horizon, key, masked=self.dreams_masks, motive=motive)

    def returns(self, starts: State, key: jax.Array) -> jax.Array:
        """The return (M,) of the policy's most likely actions, in a drawn dream of H steps from each start (M, ...).

        Without the critic; see `planners.sequences.add_up`.
        """
        x = self.world_model.rssm.feature(starts)
        world, begin = self.as_world(starts, self.world_model.objective.allowed(x) if self.dreams_masks else None)

        def step(state: State, key: jax.Array) -> tuple[State, jax.Array, jax.Array, None]:
            return *world.step(state, sample_actions(world.policy(state), None), key), None

        _, total, _, _ = add_up(step, begin, jax.random.split(key, self.config.actor_critic.horizon))
        return total

    def split_batch(self, batch: Batch) -> tuple[State, jax.Array, dict[str, jax.Array]]:
        """(context state (B, ...), actions (B, T, A) that led to each trained step, trained steps (B, T, ...))::

        stored step      0 (context)   1        2      ...  T
        trained as       -             t=0      t=1         t=T-1
        action used      a0 ---------> t=0
                                       a1 ----> t=1
        """
        chex.assert_tree_shape_prefix(dict(batch), batch["is_first"].shape)
        rssm = self.world_model.rssm
        latents = rssm.stored()
        context = rssm.unpack({k: batch[k][:, 0] for k in latents}, self.dtype)
        taken = join_actions({k: batch[k][:, :-1] for k in self.actions}, self.actions, self.dtype)
        return context, taken, {k: v[:, 1:] for k, v in batch.items() if k not in {*latents, *self.actions}}

    def look(self, batch: Batch, key: jax.Array) -> dict[str, Any]:
        """What the model makes of a batch (B, T+1, ...): the results of `insight.look`, and from the filtered states

        - ``value`` (B, T), the critic's
        - ``dream_reward``, ``dream_cont`` (B, T, H+1): imagined from each, the state itself first
        """
        look_key, dream_key = jax.random.split(key)
        context, actions, trained = self.split_batch(batch)
        states, views = look(self.world_model, context, actions, trained, look_key)
        views["value"] = self.actor_critic.value(self.world_model.rssm.feature(states)).mode()
        starts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
        dream = self.dream({"value": self.actor_critic.value}, starts, dream_key)
        for name in ("reward", "cont"):
            views[f"dream_{name}"] = jnp.moveaxis(getattr(dream, name), 0, -1).reshape(*actions.shape[:2], -1)
        return views
