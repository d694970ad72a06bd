"""The agent: what acts, and what one training step does with a batch. Everything a run learns lives in `TrainState`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization

from dreamer import compiler, imagination, kernels
from dreamer.actor_critic import ActorCritic, Dream, return_metrics, return_range, update_return_scale
from dreamer.coders import join_actions, split_actions
from dreamer.config import Config
from dreamer.distributions import sum_of
from dreamer.insight import look, norms
from dreamer.networks import Draws
from dreamer.optimizer import make_optimizer, root_mean_square, update_slow
from dreamer.rssm import RSSM, State, feature
from dreamer.sharding import BATCH, BATCHES, STATE, WEIGHTS, WHOLE, make_devices
from dreamer.types import ACTION_MASK, Field, Spaces, masks_actions, replay_fields
from dreamer.world_model import WorldModel

sg = jax.lax.stop_gradient

#: Nested plain dicts of arrays: params, slow_value, opt, return_scale {low, high}, updates, key (raw uint32 data).
TrainState = dict[str, Any]
Batch = Mapping[str, jax.Array]
Method = TypeVar("Method", bound=Callable[..., Any])

#: Named random streams: every key is fold_in(fold_in(run_key, stream), counter).
STREAMS = {"init": 0, "policy": 1, "train": 2, "eval": 3, "report": 4, "process": 5}


def stream_key(run_key: jax.Array | np.ndarray, stream: str, counter: int | jax.Array) -> jax.Array:
    """The key number `counter` of a named stream. run_key: raw key data, uint32, as checkpoints store it."""
    key = jax.random.wrap_key_data(jnp.asarray(run_key))
    return jax.random.fold_in(jax.random.fold_in(key, STREAMS[stream]), counter)


def seed_key(seed: int) -> np.ndarray:
    """The raw key of a seed below 2**64: `jax.random.key` takes 32 bits of it, the upper ones are folded in."""
    key = jax.random.key(np.uint32(seed & 0xFFFFFFFF))
    if seed >> 32:
        key = jax.random.fold_in(key, np.uint32(seed >> 32))
    return np.asarray(jax.random.key_data(key))


def text_keys(tree: Any) -> Any:
    """Nested dicts with every key as text: NNX numbers the items of lists, checkpoints know only names."""
    return {str(k): text_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def like_keys(template: Any, tree: Any) -> Any:
    """The inverse of `text_keys`, with the keys of `template`."""
    return {k: like_keys(v, tree[str(k)]) for k, v in template.items()} if isinstance(template, dict) else tree


def for_target(method: Method) -> Method:
    """Traces a method of an `Agent` for the agent's own devices."""

    @functools.wraps(method)
    def traced(agent: Agent, *arguments: Any) -> Any:
        with kernels.traced_for(agent.target):
            return method(agent, *arguments)

    return traced  # type: ignore[return-value]


class DreamerModel(nnx.Module):
    """All trained networks."""

    def __init__(self, observations: Spaces, actions: Spaces, config: Config, *, rngs: nnx.Rngs) -> None:
        width = config.model.deter + config.model.stoch * config.model.classes
        action = sum(space.flat_width for space in actions.values())
        discount = 1 - 1 / config.actor_critic.discount_horizon
        # In what the continue head learns, or beside what it predicts.
        learned, beside = (discount, 1.0) if config.loss.discount_in_cont else (1.0, discount)
        self.world_model = WorldModel(observations, action, config.model, config.loss, learned, rngs=rngs)
        self.actor_critic = ActorCritic(width, actions, config.model, config.actor_critic, beside, rngs=rngs)


class Agent:
    """Pure functions over a `TrainState`, jit-compiled once each.

    observations, actions: spaces by name; config: the whole configuration; dtype: of activations; devices: what to
    compute on, as far as the options ask for them, none for JAX's default device. ValueError if they do not fit.
    """

    def __init__(
        self,
        observations: Spaces,
        actions: Spaces,
        config: Config,
        dtype: jnp.dtype = jnp.float32,
        devices: Sequence[jax.Device] = (),
    ) -> None:
        self.observations, self.actions, self.config = dict(observations), dict(sorted(actions.items())), config
        self.dtype = jnp.dtype(dtype)
        self.optimizer = make_optimizer(config.optimizer)
        model = nnx.eval_shape(lambda: DreamerModel(self.observations, self.actions, config, rngs=nnx.Rngs(params=0)))
        self.extras: dict[str, Field] = model.world_model.rssm.stored()
        replay_fields(self.observations, self.actions, self.extras)  # names that are taken
        self._initial_state = model.world_model.rssm.init
        self.graph, state = nnx.split(model)
        self.critic_graph = nnx.graphdef(model.actor_critic.value)
        self.masked = masks_actions(self.observations, self.actions)
        self.dreams_masks = self._dreams_masks(model)
        self.loss_scales = self._loss_scales(model)
        self.numbered = nnx.to_pure_dict(state)
        self.opt_template = jax.eval_shape(self.optimizer.init, text_keys(self.numbered))
        shapes = functools.partial(jax.eval_shape, self._init, 0)
        self.devices = over = make_devices(devices, config.run, config.optimizer.accumulate, shapes)
        self.target = kernels.target((devices or jax.devices())[0].platform, math.prod(over.shape))
        options = {"donate_argnums": 0, "compiler_options": compiler.options(self.target)}
        self.init = over.jit(self._init, [WHOLE], STATE)
        self.train_step = over.jit(self._train_step, [STATE, BATCH], [STATE, BATCH, WHOLE], **options)
        self.train_steps = over.jit(self._train_steps, [STATE, BATCH], [STATE, BATCHES, WHOLE], **options)
        self.policy = over.jit_local(self._policy, [WEIGHTS, WHOLE, WHOLE, WHOLE], donate_argnums=1)
        self.report = over.jit_local(self._report, [WEIGHTS, WHOLE, WHOLE])

    # Acting

    def init_policy(self, envs: int) -> dict[str, jax.Array]:
        """The policy's carry before the first observation: model state (N, ...) and previous action (N, A)."""
        width = sum(space.flat_width for space in self.actions.values())
        return {**self._initial_state(envs, self.dtype), "action": jnp.zeros((envs, width), self.dtype)}

    @for_target
    def _policy(
        self, params: Any, carry: dict[str, jax.Array], obs: Batch, key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
        """Look at `obs` (N, ...) incl. is_first, choose actions: (carry, action by name, extras to store in replay).

        key=None takes the most likely action from the most likely state.
        """
        model = self._merge(params)
        observe_key, act_key = (None, None) if key is None else jax.random.split(key)
        previous = {k: carry[k] for k in ("deter", "stoch")}
        rssm = model.world_model.rssm
        tokens = model.world_model.encoder(obs, obs["is_first"].shape, self.dtype)
        state, _ = rssm.observe_step(previous, carry["action"], tokens, obs["is_first"], observe_key)
        allowed = obs[ACTION_MASK] > 0 if self.masked else None
        flat = model.actor_critic.policy.sample(feature(state), act_key, allowed)
        carry = {**state, "action": flat.astype(self.dtype)}
        return carry, split_actions(flat, self.actions), rssm.pack(state)

    # Learning

    def _init(self, seed: int | jax.Array) -> TrainState:
        """A fresh TrainState; `seed` is the run's, if it is below 2**31, or what `seed_key` makes of it."""
        run_key = jnp.asarray(seed) if np.ndim(seed) else jax.random.key_data(jax.random.key(seed))
        # At least as many draws as there are weights; biases and norm scales need none.
        count = sum(leaf.size for leaf in jax.tree.leaves(self.numbered))
        rngs: Any = Draws(stream_key(run_key, "init", 0), count)
        model = DreamerModel(self.observations, self.actions, self.config, rngs=rngs)
        params = text_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return {
            "params": params,
            "slow_value": jax.tree.map(jnp.array, params["actor_critic"]["value"]),
            "opt": serialization.to_state_dict(self.optimizer.init(params)),
            "return_scale": {"low": jnp.zeros((), jnp.float32), "high": jnp.zeros((), jnp.float32)},
            "updates": jnp.zeros((), jnp.int32),
            "key": run_key,
        }

    def _train_step(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
        """One update: (new state, latents (B, T, ...) to write back, metrics).

        Where replay draws by priority, beside the latents: "priority" (B, T), the world model's loss.

        batch (B, T+1, ...): one context step and T trained steps of everything `replay_fields` names.
        """
        key = stream_key(state["key"], "train", state["updates"])
        slices = self.config.optimizer.accumulate
        if slices == 1:
            grads, (scale, latents, metrics) = self._gradients(state, batch, key)
        else:
            # Each slice has sequences of every device, which then has nothing to exchange.
            part = lambda x: x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
            parts = self.devices.slices(jax.tree.map(part, dict(batch)))
            grads, (scale, latents, metrics) = self._accumulate(state, parts, jax.random.split(key, slices))
        params = state["params"]
        opt = serialization.from_state_dict(self.opt_template, state["opt"])
        updates, opt = self.optimizer.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        slow_rate = self.config.actor_critic.slow_rate
        new = {
            "params": params,
            "slow_value": update_slow(state["slow_value"], params["actor_critic"]["value"], slow_rate),
            "opt": serialization.to_state_dict(opt),
            "return_scale": scale,
            "updates": state["updates"] + 1,
            "key": state["key"],
        }
        metrics["opt/grad_norm"] = optax.tree.norm(grads)
        metrics |= {f"opt/module_grad_norm/{name}": norm for name, norm in norms(grads).items()}
        metrics["opt/grad_rms"] = root_mean_square(grads)
        metrics["opt/update_rms"] = root_mean_square(updates)
        metrics["opt/param_rms"] = root_mean_square(params)
        metrics["opt/updates"] = new["updates"]
        return new, latents, metrics

    def _train_steps(
        self, state: TrainState, batches: Sequence[Batch]
    ) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
        """K updates that are due together: the new state, latents (K, B, T, ...) and metrics (K,) of each."""

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, tuple]:
            state, *outputs = self._train_step(state, batch)
            return state, tuple(outputs)

        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *map(dict, batches))
        state, (latents, metrics) = jax.lax.scan(step, state, stacked)
        return state, latents, metrics

    @staticmethod
    def finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
        """Whether the update that gave these metrics was sound, bool (): every loss term, the gradient, the weights."""
        checked = [v for k, v in metrics.items() if k.startswith("loss/")]
        checked += [metrics["opt/loss"], metrics["opt/grad_norm"], metrics["opt/param_rms"]]
        return jnp.isfinite(jnp.stack(checked)).all()

    def _gradients(self, state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, tuple]:
        params, slow_value = self.devices.gathered((state["params"], state["slow_value"]))
        grads, outputs = jax.grad(self.loss, has_aux=True)(params, slow_value, state["return_scale"], batch, key)
        return self.devices.divided(grads), outputs

    def _accumulate(self, state: TrainState, parts: Batch, keys: jax.Array) -> tuple[Any, tuple]:
        """The same gradients from equal slices (slices, B/slices, T+1, ...), one in memory at a time.

        The return scale S is taken over all returns, so it is known after the last slice. But the loss is affine in
        1/S, the factor of the advantages, and so is its gradient. Summed up are its value at 0 and its slope, which is
        0 but for the policy.
        """
        params, slow_value = self.devices.gathered((state["params"], state["slow_value"]))

        def at(factor: jax.Array, batch: Batch, key: jax.Array) -> tuple[Any, tuple]:
            """What has a slope, and what is summed up or collected beside it."""
            gradients = jax.grad(self._loss, has_aux=True)
            grads, outputs = gradients(params, slow_value, state["return_scale"], batch, key, factor)
            sloping = {name: outputs[2][name] for name in ("loss/policy", "opt/loss")}
            return (grads["actor_critic"]["policy"], sloping), (self.devices.divided(grads), outputs[1:])

        def step(total: Any, inputs: tuple) -> tuple[Any, tuple]:
            _, (slopes, changes), (grads, outputs) = jax.jvp(lambda x: at(x, *inputs), (0.0,), (1.0,), has_aux=True)
            return jax.tree.map(jnp.add, total, (grads, slopes)), (*outputs, changes)

        zeros = jax.tree.map(jnp.zeros_like, (state["params"], state["params"]["actor_critic"]["policy"]))
        total, (latents, metrics, *seen, changes) = jax.lax.scan(step, zeros, (parts, keys))
        grads, slopes = jax.tree.map(lambda x: x / keys.shape[0], total)
        metrics, changes = jax.tree.map(lambda x: x.mean(0), (metrics, changes))
        returns, advantages = (x.reshape(-1, x.shape[-1]) for x in seen)
        scale = update_return_scale(state["return_scale"], returns, self.config.actor_critic)
        span = return_range(scale, self.config.actor_critic)
        behaviour = grads["actor_critic"]
        behaviour["policy"] = jax.tree.map(lambda g, slope: g + slope / span, behaviour["policy"], slopes)
        metrics |= {name: metrics[name] + change / span for name, change in changes.items()}
        metrics |= return_metrics(returns, advantages / span, scale["low"], span)
        latents = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), latents)
        return grads, (scale, latents, metrics)

    def loss(
        self, params: Any, slow_value: Any, return_scale: dict[str, jax.Array], batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple]:
        """The one weighted sum of all loss terms, and (new return scale, latents to write back, metrics)."""
        total, (*outputs, _, _) = self._loss(params, slow_value, return_scale, batch, key)
        return total, tuple(outputs)

    @for_target
    def _loss(
        self,
        params: Any,
        slow_value: Any,
        return_scale: dict[str, jax.Array],
        batch: Batch,
        key: jax.Array | None,
        factor: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """`loss`, its outputs followed by returns R and R - v (H, M). factor: see `ActorCritic.imagination_loss`."""
        config, model = self.config, self._merge(params)
        world_key, dream_key = (None, None) if key is None else jax.random.split(key)
        slow_critic = self.slow_critic(slow_value)
        rssm, behaviour = model.world_model.rssm, model.actor_critic

        context, actions, trained = self.split_batch(rssm, batch)
        observed = model.world_model.loss(context, actions, trained, world_key)

        length = actions.shape[1]
        last = config.actor_critic.imagine_last or length
        recent = jax.tree.map(lambda x: x[:, length - last :], (observed.states, dict(trained)))
        starts = jax.tree.map(lambda x: sg(x).reshape(-1, *x.shape[2:]), recent[0])
        dream = self.dream(model, slow_critic, starts, dream_key)
        losses, returns, return_scale, metrics = behaviour.imagination_loss(dream, return_scale, factor)
        bootstrap = returns[0].reshape(-1, last)
        losses["repval"] = behaviour.replay_loss(feature(recent[0]), slow_critic, recent[1], bootstrap)
        losses.update(observed.losses)

        scales = self.loss_scales
        if set(scales) != set(losses):
            raise ValueError(f"loss terms {sorted(losses)} and their scales {sorted(scales)} differ")
        means = {name: term.mean() for name, term in losses.items()}
        total = sum_of([scales[name] * mean for name, mean in means.items()])
        metrics.update(observed.metrics)
        for name, space in self.actions.items():
            # An action without a choice (all entries of one class) has no randomness to measure.
            if space.classes is not None and max(space.classes) > 1:
                metrics[f"rand/{name}"] = metrics[f"ent/{name}"] / sum(math.log(n) for n in space.classes)
        metrics.update({f"loss/{name}": mean for name, mean in means.items()})
        metrics["opt/loss"] = total
        written = rssm.pack(sg(observed.states))
        if config.replay.selection.prioritised:
            written["priority"] = sg(sum_of([scales[name] * term for name, term in observed.losses.items()]))
        return total, (return_scale, written, metrics, returns, returns - dream.value[:-1])

    @for_target
    def dream(self, model: DreamerModel, slow_critic: nnx.Module, starts: State, key: jax.Array | None) -> Dream:
        """Imagine from `starts` (M, ...) and read the states; see `imagination`."""
        return imagination.imagine(
            model.world_model,
            model.actor_critic,
            slow_critic,
            starts,
            self.config.actor_critic.horizon,
            key,
            masked=self.dreams_masks,
        )

    def _dreams_masks(self, model: DreamerModel) -> bool:
        """Whether masks hold in imagination too. ValueError if they should, and the decoder does not predict them."""
        if not self.masked or self.config.actor_critic.imagine_mask == "ignore":
            return False
        if ACTION_MASK not in model.world_model.objective.decoder.spaces:
            raise ValueError(
                f"expected model.decoder_keys to match {ACTION_MASK!r}, which imagination needs, got "
                f"{self.config.model.decoder_keys!r}; extend it or pass --actor_critic.imagine_mask ignore"
            )
        return True

    def split_batch(self, rssm: RSSM, batch: Batch) -> tuple[State, jax.Array, dict[str, jax.Array]]:
        """(context state (B, ...), actions (B, T, A) that led to each trained step, trained steps (B, T, ...))::

        stored step      0 (context)   1        2      ...  T
        trained as       -             t=0      t=1         t=T-1
        action used      a0 ---------> t=0
                                       a1 ----> t=1
        """
        chex.assert_tree_shape_prefix(dict(batch), batch["is_first"].shape)
        context = rssm.unpack({k: batch[k][:, 0] for k in self.extras}, self.dtype)
        taken = join_actions({k: batch[k][:, :-1] for k in self.actions}, self.actions, self.dtype)
        skip = (*self.extras, *self.actions)
        return context, taken, {k: v[:, 1:] for k, v in batch.items() if k not in skip}

    def _loss_scales(self, model: DreamerModel) -> dict[str, float]:
        """Scale of every loss term by name; one per reconstructed observation key."""
        config = self.config.loss
        scales = {"rew": config.reward, "con": config.cont, "dyn": config.dyn, "rep": config.rep}
        scales |= {"policy": config.policy, "value": config.value, "repval": config.replay_value}
        keys = model.world_model.objective.decoder.spaces
        if taken := sorted(set(keys) & set(scales)):
            raise ValueError(
                f"expected observations named unlike the loss terms {sorted(scales)}, got {taken}; rename these keys "
                "of the environment or leave them out with model.decoder_keys"
            )
        return scales | {key: config.reconstruction for key in keys}

    # Looking

    @for_target
    def _report(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, Any]:
        """What the model makes of a batch (B, T+1, ...): see `insight.look`, and from the filtered states

        - ``value`` (B, T), the critic's
        - ``dream_reward``, ``dream_cont`` (B, T, H+1): imagined from each, the state itself first
        - ``param_norm`` () by module
        """
        model = self._merge(params)
        look_key, dream_key = jax.random.split(key)
        context, actions, trained = self.split_batch(model.world_model.rssm, batch)
        states, views = look(model.world_model, context, actions, trained, look_key)
        views["value"] = model.actor_critic.value(feature(states)).mode()
        starts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
        dream = self.dream(model, model.actor_critic.value, starts, dream_key)
        for name in ("reward", "cont"):
            views[f"dream_{name}"] = jnp.moveaxis(getattr(dream, name), 0, -1).reshape(*actions.shape[:2], -1)
        return views | {"param_norm": norms(params)}

    # Plumbing

    def _merge(self, params: Any) -> DreamerModel:
        return nnx.merge(self.graph, like_keys(self.numbered, params))

    def slow_critic(self, slow_value: Any) -> nnx.Module:
        """The critic's module with the slow weights in it."""
        return nnx.merge(self.critic_graph, like_keys(self.numbered["actor_critic"]["value"], slow_value))
