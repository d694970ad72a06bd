"""The agent: how it acts, and what one training step does with a batch. Everything a run learns is in `TrainState`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization

from dreamer import compiler, features, kernels
from dreamer.actor_critic import ReturnScale, return_metrics, return_range, update_return_scale
from dreamer.coders import split_actions
from dreamer.config import Config
from dreamer.evolution import Trial, metrics_of
from dreamer.model import Act, Batch, DreamerModel, Outcome, SlowModules, act_by_policy
from dreamer.networks import Draws
from dreamer.optimizer import filled, groups_of, make_optimizer, norm, norms, squares
from dreamer.sharding import BATCH, BATCHES, STATE, WEIGHTS, WHOLE, make_devices
from dreamer.types import ACTION_MASK, Field, Spaces, replay_fields

#: Nested plain dicts of arrays: params, slow {name: some of the params}, opt, return_scale {low, high}, updates,
#: key (raw uint32 data).
TrainState = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])

#: Named random streams: every key is fold_in(fold_in(run_key, stream), counter).
STREAMS = {"init": 0, "policy": 1, "train": 2, "eval": 3, "report": 4, "process": 5, "evolution": 6}


def stream_key(run_key: jax.Array | np.ndarray, stream: str, counter: int | jax.Array) -> jax.Array:
    """The key number `counter` of a named stream. run_key: raw key data, uint32, as checkpoints store it."""
    key = jax.random.wrap_key_data(jnp.asarray(run_key))
    return jax.random.fold_in(jax.random.fold_in(key, STREAMS[stream]), counter)


def seed_key(seed: int) -> np.ndarray:
    """The raw key of a seed below 2**64: `jax.random.key` takes its lower 32 bits, the upper ones are folded in."""
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


class Agent:
    """Pure functions over a `TrainState`, and their compiled programs: `policy` of `act`, `train_step` of `learn`,
    `train_steps` of `learn_in_turn`, `report` of `examine`, `init` of `create`.

    observations, actions: spaces by name; config: the whole configuration; dtype: of activations; devices: what to
    compute on, as many as the options ask for, none for JAX's default device; chooses: what chooses actions. ValueError
    if they do not fit.
    """

    def __init__(
        self,
        observations: Spaces,
        actions: Spaces,
        config: Config,
        dtype: jnp.dtype = jnp.float32,
        devices: Sequence[jax.Device] = (),
        chooses: Act = act_by_policy,
    ) -> None:
        self.observations, self.actions, self.config = dict(observations), dict(sorted(actions.items())), config
        self.dtype, self._chooses = jnp.dtype(dtype), chooses
        model = nnx.eval_shape(lambda: self._build(nnx.Rngs(params=0)))
        groups = groups_of(config.optimizer, model.world_model.ensemble.apart)
        self.optimizer = make_optimizer(groups, model.actor_critic.optimizers(config.actor_critic))
        self._graph, state = nnx.split(model)
        self._numbered = nnx.to_pure_dict(state)
        self._initial_state, self.masked, self._slow = model.world_model.rssm.init, model.masked, dict(model.slow)
        self._slow_graphs = {name: nnx.graphdef(where.within(model)) for name, where in self._slow.items()}
        #: The parameters, as ShapeDtypeStructs.
        self.shapes = text_keys(self._numbered)
        self._parameters = sum(leaf.size for leaf in jax.tree.leaves(self.shapes))
        self._opt_shapes = jax.eval_shape(self.optimizer.init, self.shapes)
        remembered, self._memory = self.noted(chooses)
        #: What replay stores of a step beside the environment's data: latents, and what is remembered of the choice.
        self.extras: dict[str, Field] = {**model.world_model.rssm.stored(), **remembered}
        replay_fields(self.observations, self.actions, self.extras)  # names that are taken
        shapes = functools.partial(jax.eval_shape, self.create, 0)
        self.devices = over = make_devices(devices, config.run, config.optimizer.accumulate, shapes)
        platform = (devices or jax.devices())[0].platform
        self.target = kernels.target(platform, math.prod(over.shape), config.run.without)
        options = {"donate_argnums": 0, "compiler_options": compiler.options(self.target)}
        self.init = over.jit(self.create, [WHOLE], STATE)
        self.train_step = over.jit(self.learn, [STATE, BATCH], [STATE, BATCH, WHOLE], **options)
        self.train_steps = over.jit(self.learn_in_turn, [STATE, BATCH], [STATE, BATCHES, WHOLE], **options)
        self.policy = over.jit_local(self.act, [WEIGHTS, WHOLE, WHOLE, WHOLE], donate_argnums=1)
        self.report = over.jit_local(self.examine, [WEIGHTS, WHOLE, WHOLE])

    def _build(self, rngs: Any) -> DreamerModel:
        return DreamerModel(self.observations, self.actions, self.config, self.dtype, rngs=rngs)

    def model(self, params: Any) -> DreamerModel:
        """The networks with these parameters in them."""
        return nnx.merge(self._graph, like_keys(self._numbered, params))

    def slow_modules(self, slow: Any) -> SlowModules:
        """The modules that have slow copies, with the slow weights in them."""
        keys = {name: where.of(self._numbered) for name, where in self._slow.items()}
        return {name: nnx.merge(graph, like_keys(keys[name], slow[name])) for name, graph in self._slow_graphs.items()}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A pure function of these networks, compiled for the agent's own devices."""

        def traced(*arguments: Any) -> Any:
            with kernels.traced_for(self.target):
                return function(*arguments)

        return jax.jit(traced)

    # Acting

    def init_policy(self, envs: int) -> dict[str, jax.Array]:
        """The policy's carry before the first observation: model state (N, ...), previous action (N, A), and what
        else the choice of actions carries along, (N, ...)."""
        width = sum(space.flat_width for space in self.actions.values())
        memory = {name: jnp.zeros((envs, *field.shape), field.dtype) for name, field in self._memory.items()}
        return {**self._initial_state(envs, self.dtype), "action": jnp.zeros((envs, width), self.dtype), **memory}

    @for_target
    def act(
        self, params: Any, carry: dict[str, jax.Array], obs: Batch, key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
        """Look at `obs` (N, ...) incl. is_first, choose actions: (carry, action by name, extras to store in replay).

        key=None takes the most likely action from the most likely state.
        """
        model = self.model(params)
        observe_key, act_key = (None, None) if key is None else jax.random.split(key)
        previous = {k: v for k, v in carry.items() if k != "action" and k not in self._memory}
        first = obs["is_first"]
        memory = {k: jnp.where(features.per_item(first, carry[k]), 0, carry[k]) for k in self._memory}
        rssm = model.world_model.rssm
        tokens = model.world_model.encoder(obs, first.shape, self.dtype)
        state, _ = rssm.observe_step(previous, carry["action"], tokens, first, observe_key)
        allowed = obs[ACTION_MASK] > 0 if self.masked else None
        flat, remembered, memory = self._chooses(model, state, act_key, allowed, memory)
        carry = {**state, "action": flat.astype(self.dtype), **memory}
        return carry, split_actions(flat, self.actions), {**rssm.pack(state), **remembered}

    def noted(self, chooses: Act) -> list[dict[str, Field]]:
        """What an `Act` returns beside actions, for one environment: extras and memory; found by tracing it. ValueError
        if it cannot act in these spaces."""
        width = sum(space.flat_width for space in self.actions.values())
        allowed = jax.ShapeDtypeStruct((1, width), jnp.bool_) if self.masked else None

        def choose(params: Any, state: Any, key: jax.Array, allowed: jax.Array | None) -> tuple:
            return chooses(self.model(params), state, key, allowed, {})[1:]

        state = jax.eval_shape(lambda: self._initial_state(1, self.dtype))
        found = jax.eval_shape(choose, self.shapes, state, jax.eval_shape(lambda: jax.random.key(0)), allowed)
        return [{name: Field(leaf.shape[1:], np.dtype(leaf.dtype)) for name, leaf in one.items()} for one in found]

    # Learning

    def create(self, seed: int | jax.Array) -> TrainState:
        """A fresh TrainState; `seed` is the run's seed if that is below 2**31, else what `seed_key` makes of it."""
        run_key = jnp.asarray(seed) if np.ndim(seed) else jax.random.key_data(jax.random.key(seed))
        # At least as many draws as there are weights; biases and norm scales need none.
        model = self._build(Draws(stream_key(run_key, "init", 0), self._parameters))
        params = text_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return {
            "params": params,
            "slow": self.slow_copies(params),
            "opt": serialization.to_state_dict(self.optimizer.init(params)),
            "return_scale": {"low": jnp.zeros((), jnp.float32), "high": jnp.zeros((), jnp.float32)},
            "updates": jnp.zeros((), jnp.int32),
            "key": run_key,
        }

    @for_target
    def learn(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
        """One update: (new state, latents (B, T, ...) to write back, metrics).

        Where replay draws by priority, "priority" (B, T) comes beside the latents: the world model's loss.

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
        opt = serialization.from_state_dict(self._opt_shapes, state["opt"])
        updates, opt = self.optimizer.update(grads, opt, params, trial=self.trial(state, latents))
        params, count = optax.apply_updates(params, updates), state["updates"] + 1
        new = {
            "params": params,
            "slow": {name: where.update(state["slow"][name], params, count) for name, where in self._slow.items()},
            "opt": serialization.to_state_dict(opt),
            "return_scale": scale,
            "updates": count,
            "key": state["key"],
        }
        metrics |= metrics_of(new["opt"])
        root = self._parameters**0.5
        of_grads = squares(grads)
        metrics["opt/grad_norm"] = norm(of_grads)
        metrics |= {f"opt/module_grad_norm/{name}": size for name, size in norms(of_grads).items()}
        metrics["opt/grad_rms"] = metrics["opt/grad_norm"] / root
        metrics["opt/update_rms"] = norm(squares(updates)) / root
        metrics["opt/param_rms"] = norm(squares(params)) / root
        metrics["opt/updates"] = new["updates"]
        return new, latents, metrics

    def learn_in_turn(
        self, state: TrainState, batches: Sequence[Batch]
    ) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
        """K updates that are due together: the new state, and their latents (K, B, T, ...) and metrics (K,)."""

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, tuple]:
            state, *outputs = self.learn(state, batch)
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
        params, slow = self.devices.gathered((state["params"], state["slow"]))
        grads, outcome = jax.grad(self.loss, has_aux=True)(params, slow, state["return_scale"], batch, key)
        return self.devices.divided(grads), outcome[:3]

    def _accumulate(self, state: TrainState, parts: Batch, keys: jax.Array) -> tuple[Any, tuple]:
        """The same gradients from equal slices (slices, B/slices, T+1, ...), one in memory at a time.

        The return scale S depends on all returns, so it is known only after the last slice. But the loss is affine in
        1/S, the factor of the advantages, and so is its gradient. So its value at 0 and its slope are summed up; the
        slope is 0 except for the policy.
        """
        params, slow = self.devices.gathered((state["params"], state["slow"]))

        def at(factor: jax.Array, batch: Batch, key: jax.Array) -> tuple[Any, tuple]:
            """What has a slope, and what is summed or collected beside it."""
            gradients = jax.grad(self.loss, has_aux=True)
            grads, outcome = gradients(params, slow, state["return_scale"], batch, key, factor)
            sloping = {name: outcome.metrics[name] for name in ("loss/policy", "opt/loss")}
            return (grads["actor_critic"]["policy"], sloping), (self.devices.divided(grads), outcome[1:])

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

    @for_target
    def loss(
        self,
        params: Any,
        slow: Any,
        return_scale: ReturnScale,
        batch: Batch,
        key: jax.Array | None,
        factor: jax.Array | None = None,
    ) -> tuple[jax.Array, Outcome]:
        """`DreamerModel.loss` with these weights."""
        return self.model(params).loss(self.slow_modules(slow), return_scale, batch, key, factor)

    def trial(self, state: TrainState, latents: Batch) -> Trial:
        """What other weights would bring in dreams from states of a batch, its latents (B, T, ...), the same for all;
        for optimizers that ask it."""

        def keys() -> jax.Array:
            return jax.random.split(stream_key(state["key"], "evolution", state["updates"]), 3)

        def returns(candidates: Any) -> jax.Array:
            _, start_key, dream_key = keys()
            params = self.devices.gathered(state["params"])
            rssm, count = self.model(params).world_model.rssm, self.config.actor_critic.evolution.rollouts
            states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rssm.unpack(latents, self.dtype))
            places = jax.random.permutation(start_key, jax.tree.leaves(states)[0].shape[0])[:count]
            starts = jax.tree.map(lambda x: x[places], states)
            bring = lambda candidate: self.model(filled(candidate, params)).returns(starts, dream_key).mean()  # noqa: E731
            return jax.vmap(bring)(candidates)

        return Trial(lambda: keys()[0], returns)

    def slow_copies(self, params: Any) -> dict[str, Any]:
        """Slow copies that start equal to the parameters."""
        return {name: jax.tree.map(jnp.array, where.of(params)) for name, where in self._slow.items()}

    # Looking

    @for_target
    def examine(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, Any]:
        """`DreamerModel.look` of a batch (B, T+1, ...), and ``param_norm`` () by module."""
        return self.model(params).look(batch, key) | {"param_norm": norms(squares(params))}
