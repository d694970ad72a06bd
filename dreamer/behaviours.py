"""Other ways for a behaviour to learn in dreams than DreamerV3's REINFORCE: one table, `BEHAVIOURS`; and what it is
rewarded for: the task, or what the model does not know yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dreamer.actor_critic import ActionHead, ActorCritic, Dream, Learned, Policy, ReturnScale
from dreamer.config import ActorCriticConfig, LossConfig, ModelConfig
from dreamer.distributions import Distribution, Normal, OneHot, Point
from dreamer.evolution import cma_es
from dreamer.networks import MLP, Linear, frozen
from dreamer.objectives import Networks, Seen, Targets
from dreamer.planner_config import PlannerConfig
from dreamer.planners.learned import LearnedWorld
from dreamer.planners.mcts import improved
from dreamer.rssm import State
from dreamer.types import Space, Spaces
from dreamer.world_model import Head, WorldModel

sg = jax.lax.stop_gradient


class Dynamics(ActorCritic):
    """The return is differentiated through critic, reward and dynamics, whose weights are frozen, into the actions
    (DreamerV1, Hafner et al., 2020, eq. 7): reparametrised where continuous, straight-through where one-hot.

    The policy reads a dream's features as data: no gradient goes from a later action to an earlier one.
    """

    through_dreams = staticmethod(lambda x: x)

    def frozen_heads(self) -> dict[str, Head]:
        """The critic: its values carry the gradient of the return, but a policy does not train it."""
        return {"value": frozen(self.value)}

    def judge(self, x: jax.Array, dists: Mapping[str, Distribution], actions: jax.Array) -> dict[str, Any]:
        return super().judge(sg(x), dists, sg(actions))

    def objective(self, log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
        """The return: subtracting a constant from it changes no gradient."""
        return advantage


class Mixed(Dynamics):
    """A share of REINFORCE, the rest through the dynamics (DreamerV2, Hafner et al., 2021, eq. 6)."""

    def objective(self, log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
        share = self.config.reinforce_share
        return share * log_prob * sg(advantage) + (1 - share) * advantage


class Untrained(ActorCritic):
    """Nothing is learned in dreams. Without more, policy and critic stay at their initial weights, where a value is 0,
    and a planner acts (PlaNet)."""

    @staticmethod
    def scales(loss: LossConfig) -> dict[str, float]:
        return {}

    def learn(
        self,
        dream: Callable[[State], Dream],
        states: State,
        x: jax.Array,
        batch: Mapping[str, jax.Array],
        slow: Mapping[str, Any],
        scale: ReturnScale,
        factor: jax.Array | None = None,
    ) -> Learned:
        """Nothing, without a dream."""
        nothing = jnp.zeros((0, x.shape[0] * x.shape[1]))
        return Learned({}, nothing, nothing, scale, {})


class Search(Untrained):
    """Policy and critic learn what a tree search finds at every replayed state, with the newest weights: the policy as
    improved by it, and returns with its values (MuZero Reanalyse, Schrittwieser et al., 2021).

    What they learn it by is the objective `value_equivalence`. ValueError unless the action is a single discrete one.
    """

    def __init__(self, feature: int, actions: Spaces, *options: Any, rngs: nnx.Rngs) -> None:
        super().__init__(feature, actions, *options, rngs=rngs)
        if [len(space.classes or ()) for space in actions.values()] != [1]:
            raise ValueError(
                f"expected a single discrete action for actor_critic.gradient search, got {dict(actions)}; name another"
            )
        self.actions = nnx.static(dict(actions))
        self.settings = PlannerConfig(name="mcts", simulations=self.config.simulations).settled()

    def targets(
        self,
        seen: Seen,
        batch: Mapping[str, jax.Array],
        allowed: jax.Array | None,
        networks: Networks,
        key: jax.Array | None,
    ) -> Targets:
        flat = lambda x: sg(x).reshape(-1, *x.shape[2:])  # noqa: E731
        world = LearnedWorld(frozen(networks.world_model), frozen(self), self.actions, dreams_masks=False)
        roots = world.begin(jax.tree.map(flat, seen.states), None if allowed is None else flat(allowed))
        weights, value = improved(self.settings, world, roots, jax.random.key(0) if key is None else key)
        weights, value = (x.reshape(*seen.actions.shape[:2], *x.shape[1:]) for x in (weights, value))
        returns = jnp.concatenate([self.replayed_returns(batch, value), value[:, -1:]], 1)
        (name,) = self.actions
        return sg(Targets(returns, {name: OneHot(jnp.log(jnp.maximum(weights, 1e-9)))}))


class LinearHead(ActionHead):
    """One action of a `Controller`: logits, or the mean of a continuous action through tanh, of the least deviation."""

    def __init__(self, inputs: int, space: Space, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.classes, self.deviation = space.classes, config.min_std
        self.out = Linear(inputs, space.flat_width, scale=0.0, rngs=rngs)

    def __call__(self, x: jax.Array, allowed: jax.Array | None = None) -> Distribution:
        numbers = self.out(x)
        if self.classes is not None:
            return self.choice(numbers, allowed)
        return Normal(jnp.tanh(numbers), jnp.full_like(numbers, self.deviation))


class Controller(Policy):
    """World Models' controller (Ha & Schmidhuber, 2018, section 2.4): linear in the feature, and at first always 0."""

    def __init__(self, inputs: int, actions: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(inputs, inputs, 0, rngs=rngs)
        self.keys = tuple(sorted(actions))
        self.heads = nnx.Dict({key: LinearHead(inputs, actions[key], config, rngs=rngs) for key in self.keys})


class Evolution(Untrained):
    """A controller that CMA-ES evolves by its returns in dreams (Ha & Schmidhuber, 2018, sections 2.4 and 4)."""

    make_policy = Controller

    @staticmethod
    def optimizers(config: ActorCriticConfig) -> dict[str, optax.GradientTransformationExtraArgs]:
        return {"actor_critic.policy": cma_es(config.evolution)}


#: How the policy learns.
BEHAVIOURS: Mapping[str, type[ActorCritic]] = {
    "reinforce": ActorCritic,
    "dynamics": Dynamics,
    "mixed": Mixed,
    "none": Untrained,
    "search": Search,
    "evolution": Evolution,
}


class Motive:
    """What a behaviour is rewarded for: the task, as it is."""

    def dreamt(self, world: WorldModel) -> Callable[[jax.Array], Any]:
        """What predicts the reward (...) of states, its mode, from their features (..., F)."""
        return world.reward

    def lived(self, world: WorldModel, x: jax.Array, reward: jax.Array) -> jax.Array:
        """The reward (B, T) of steps that were seen, with features x (B, T, F), where the task's was `reward`."""
        return reward


class Curiosity(Motive):
    """A share of the task's reward, and the disagreement of the ensemble (Plan2Explore, Sekar et al., 2020, eq. 6)."""

    def __init__(self, task: float, explore: float) -> None:
        self.task, self.explore = task, explore

    def dreamt(self, world: WorldModel) -> Callable[[jax.Array], Any]:
        return lambda x: Point(self._sum(world, x, world.reward(x).mode()))

    def lived(self, world: WorldModel, x: jax.Array, reward: jax.Array) -> jax.Array:
        return sg(self._sum(world, x, reward))

    def _sum(self, world: WorldModel, x: jax.Array, reward: jax.Array) -> jax.Array:
        return self.task * reward + self.explore * world.ensemble.disagreement(x)


def make_motive(config: ActorCriticConfig) -> Motive:
    """What `actor_critic.explore` asks for."""
    return Curiosity(config.task_reward, config.explore) if config.explore else Motive()
