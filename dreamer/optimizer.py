"""The optimizer as an optax chain, by default whole-tensor adaptive gradient clipping and LaProp; and slow weights.

optax's own adaptive clip is unit-wise and it has no LaProp, so these two transforms are written here.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamer import kernels
from dreamer.config import OptimizerConfig

Tree = Any


def clip_by_tensor_norm(clip: float, min_norm: float) -> optax.GradientTransformation:
    """Adaptive gradient clipping: scale each tensor to a norm of at most ``clip * max(min_norm, ||param||)``."""

    def update(grads: Tree, params: Tree) -> Tree:
        def one(grad: jax.Array, size: jax.Array, param_size: jax.Array) -> jax.Array:
            limit = clip * jnp.maximum(min_norm, jnp.sqrt(param_size))
            return grad / jnp.maximum(1.0, jnp.sqrt(size) / limit)

        return jax.tree.map(one, grads, squares(grads), squares(params))

    return optax.stateless(update)


def scale_by_laprop(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """LaProp (Ziyin et al. 2020): divide by the RMS of the gradient first, *then* take the momentum.

    ν ← β₂ν + (1-β₂)g²,  m ← β₁m + (1-β₁) g / (√(ν/(1-β₂ᵗ)) + ε),  update = m / (1-β₁ᵗ); corrections in float32.
    State: {"count": int32 (), "rms": ν, "momentum": m}, the latter two like the parameters.
    """

    def init(params: Tree) -> dict[str, Tree]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.zeros((), jnp.int32), "rms": zeros, "momentum": jax.tree.map(jnp.zeros_like, params)}

    def update(grads: Tree, state: dict[str, Tree], params: Tree = None) -> tuple[Tree, dict[str, Tree]]:
        del params
        count = state["count"] + 1
        steps = count.astype(jnp.float32)
        correct1, correct2 = 1 - beta1**steps, 1 - beta2**steps
        rms = jax.tree.map(lambda g, v: beta2 * v + (1 - beta2) * jnp.square(g), grads, state["rms"])
        scaled = jax.tree.map(lambda g, v: g / (jnp.sqrt(v / correct2) + eps), grads, rms)
        momentum = jax.tree.map(lambda g, m: beta1 * m + (1 - beta1) * g, scaled, state["momentum"])
        updates = jax.tree.map(lambda m: m / correct1, momentum)
        return updates, {"count": count, "rms": rms, "momentum": momentum}

    return optax.GradientTransformation(init, update)


def make_optimizer(
    groups: Mapping[str, OptimizerConfig], own: Mapping[str, optax.GradientTransformationExtraArgs] | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for each group of parameters, named by where they lie.

    groups: ``{"": options}`` for all parameters, as DreamerV3 has it; ``{"": ..., "actor_critic.policy": ...}`` gives
    those below this path options of their own. own: groups that have an optimizer of their own. A parameter belongs to
    the longest name that its path begins with. Updates get a `evolution.Trial` beside the gradients.
    """
    chains = {name: optax.named_chain(*OPTIMIZERS[config.kind](config)) for name, config in groups.items()}
    chains |= own or {}
    if list(chains) == [""]:
        return chains[""]

    def name_of(path: tuple, _: jax.Array) -> str:
        dotted = ".".join(entry.key for entry in path) + "."
        return max((name for name in chains if not name or dotted.startswith(f"{name}.")), key=len)

    labels = lambda params: jax.tree.map_with_path(name_of, params)  # noqa: E731
    return optax.partition(chains, labels)


def filled(part: Tree, whole: Tree) -> Tree:
    """`whole`, with the leaves that an optimizer of a group was given from `part`, where the others are masked."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda own, x: x if masked(own) else own, part, whole, is_leaf=masked)


def groups_of(config: OptimizerConfig, apart: Sequence[str] = ()) -> dict[str, OptimizerConfig]:
    """The options of every group of parameters that has options of its own; see `make_optimizer`.

    apart: where parameters lie that are trained with the same options as the rest, but as if they were alone.
    """
    own = {"actor_critic.policy": config.policy_rate, "actor_critic.value": config.value_rate}
    rates = {name: rate for name, rate in own.items() if rate is not None}
    return {"": config, **dict.fromkeys(apart, config)} | {
        name: dataclasses.replace(config, learning_rate=rate) for name, rate in rates.items()
    }


Chain = tuple[tuple[str, optax.GradientTransformation], ...]


def _rate(config: OptimizerConfig) -> optax.GradientTransformation:
    """``lr * min(1, n / warmup)`` at update n, counted from 0."""
    rate = optax.constant_schedule(config.learning_rate)
    if config.warmup:
        rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    return optax.scale_by_learning_rate(rate)


def _laprop(config: OptimizerConfig) -> Chain:
    """DreamerV3's: clip each tensor -> LaProp -> learning rate."""
    return (
        ("clip", clip_by_tensor_norm(config.clip, config.clip_min_norm)),
        ("laprop", scale_by_laprop(config.beta1, config.beta2, config.eps)),
        ("rate", _rate(config)),
    )


def _adam(config: OptimizerConfig) -> Chain:
    """PlaNet's to DreamerV2's: clip the norm of a group's whole gradient -> Adam -> learning rate -> weight decay,
    which is not multiplied by the rate."""
    return (
        ("clip", optax.clip_by_global_norm(config.clip_norm)),
        ("adam", optax.scale_by_adam(config.beta1, config.beta2, config.eps)),
        ("rate", _rate(config)),
        ("decay", optax.add_decayed_weights(-config.weight_decay)),
    )


#: Kind of optimizer -> the steps of its chain, by name.
OPTIMIZERS: Mapping[str, Callable[[OptimizerConfig], Chain]] = {"laprop": _laprop, "adam": _adam}


#: Rows of which `square_sums` makes its array at most, and their least width.
_ROWS, _WIDTH = 4096, 1024


def plain_square_sums(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of the squares of each array, ()."""
    return [jnp.square(x).sum() for x in arrays]


@kernels.rewrite(plain=plain_square_sums, on=kernels.one_accelerator)
def square_sums(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of the squares of each array, (), in a few launches, not in two for each array.

    The arrays are laid out below each other in rows of one width, whose sums are then added up by array.
    """
    width = max(_WIDTH, -(-sum(x.size for x in arrays) // _ROWS))
    rows = [-(-x.size // width) for x in arrays]
    padded = [jnp.pad(x.reshape(-1), (0, n * width - x.size)) for x, n in zip(arrays, rows, strict=True)]
    sums = jnp.square(jnp.concatenate(padded).reshape(-1, width)).sum(1)
    own = np.repeat(np.arange(len(arrays)), rows) == np.arange(len(arrays))[:, None]
    return list(jnp.where(own, sums, 0).sum(1))


def squares(tree: Tree) -> Tree:
    """The sum of the squares () of each leaf, which is its norm squared."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, square_sums(leaves))


def norm(of_leaves: Tree) -> jax.Array:
    """The norm () of all elements, from the `squares` of the leaves."""
    return jnp.sqrt(functools.reduce(jnp.add, jax.tree.leaves(of_leaves)))


def norms(of_leaves: Tree) -> dict[str, jax.Array]:
    """The norm () of each module, by name, from the `squares` of the parameters or of a tree shaped like them."""
    return {name: norm(module) for part in of_leaves.values() for name, module in part.items()}


@dataclasses.dataclass(frozen=True)
class Slow:
    """A slow copy of some of the weights, their exponential moving average.

    path: where they lie among the parameters, keys from the top; rate: of the average; every: updates between two of
    its steps. At rate 1 it is a copy of the weights as they were then.
    """

    path: tuple[str, ...]
    rate: float
    every: int = 1

    def of(self, tree: Tree) -> Tree:
        """What `tree`, parameters or something like them, has at this path."""
        return functools.reduce(operator.getitem, self.path, tree)

    def within(self, module: Any) -> Any:
        """The part of a module that has these weights."""
        return functools.reduce(getattr, self.path, module)

    def update(self, slow: Tree, params: Tree, updates: jax.Array) -> Tree:
        """slow ← rate fast + (1 - rate) slow, after so many updates ().

        In this order a fused multiply-add rounds the large term last, which keeps an EMA of equal weights unbiased.
        """
        new = jax.tree.map(lambda s, f: self.rate * f + (1 - self.rate) * s, slow, self.of(params))
        if self.every == 1:
            return new
        return jax.tree.map(lambda s, n: jnp.where(updates % self.every == 0, n, s), slow, new)
