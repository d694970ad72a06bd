"""Weights that are evolved, not differentiated: CMA-ES as an optimizer that learns from what its draws bring.

An optimizer of optax is given gradients; this one is given a `Trial` beside them, and asks it what other weights would
bring. So its state is saved, resumed, divided over devices and mapped over seeds like that of any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from dreamer.config import EvolutionConfig

Tree = Any
Evolved = dict[str, Any]


class Trial(NamedTuple):
    """What such an optimizer asks: a random key of this update; the return that each of C candidates would bring, (C,).

    Candidates are one tree of the weights that the optimizer has, each leaf (C, ...).
    """

    key: Callable[[], jax.Array]
    returns: Callable[[Tree], jax.Array]


def cma_es(config: EvolutionConfig) -> optax.GradientTransformationExtraArgs:
    """Covariance matrix adaptation (Hansen, 2016), by evosax. The n weights are the mean of its normal distribution.

    In every generation a population is drawn around the weights and tried; the weights go to where its better half
    lies, weighted by rank, and the distribution is shaped after it. Between generations nothing moves.

    State: count of updates, generation, int32 (); the step size std (), the covariance cov (n, n), the evolution paths
    path_std, path_cov (n,); metrics of the last generation, () by name. ValueError without evosax.
    """
    try:
        from evosax.algorithms import CMA_ES
    except ImportError as error:
        raise ValueError(
            f"expected the package evosax for actor_critic.gradient evolution, got: {error}; "
            "pip install 'dreamer[evolution]'"
        ) from error

    def init(params: Tree) -> Evolved:
        mean, _ = ravel_pytree(params)
        zero, std = jnp.zeros((), jnp.int32), jnp.asarray(config.std, mean.dtype)
        paths = {"path_std": jnp.zeros_like(mean), "path_cov": jnp.zeros_like(mean)}
        told = _told(zero, jnp.zeros(1, mean.dtype), std)
        return {"count": zero, "generation": zero, "std": std, "cov": jnp.eye(mean.size), **paths, "metrics": told}

    def evolve(mean: jax.Array, state: Evolved, unravel: Callable, trial: Trial) -> tuple[jax.Array, Evolved]:
        """How far the mean (n,) moves, and the new state."""
        strategy = CMA_ES(config.population, np.zeros(mean.size, np.float32))
        constants, key = strategy.default_params, trial.key()
        paths = {"C": state["cov"], "p_std": state["path_std"], "p_c": state["path_cov"], "std": state["std"]}
        found = strategy.init(key, mean, constants).replace(generation_counter=state["generation"], **paths)
        population, found = strategy.ask(key, found, constants)
        returns = trial.returns(jax.vmap(unravel)(population))
        # It makes its numbers small.
        found, _ = strategy.tell(key, population, -returns, found, constants)
        paths = {"path_std": found.p_std, "path_cov": found.p_c, "std": found.std, "cov": found.C}
        told = _told(found.generation_counter, returns, found.std)
        return found.mean - mean, {**state, **paths, "generation": found.generation_counter, "metrics": told}

    def update(grads: Tree, state: Evolved, params: Tree, *, trial: Trial, **others: Any) -> tuple[Tree, Evolved]:
        mean, unravel = ravel_pytree(params)
        count = state["count"] + 1
        due = (count > config.after) & ((count - config.after) % config.every == 0)
        still = lambda state: (jnp.zeros_like(mean), state)  # noqa: E731
        move, state = jax.lax.cond(due, lambda state: evolve(mean, state, unravel, trial), still, state)
        return unravel(move), {**state, "count": count}

    return optax.GradientTransformationExtraArgs(init, update)


def _told(generation: jax.Array, returns: jax.Array, std: jax.Array) -> dict[str, jax.Array]:
    numbers = {"generation": generation, "return": returns.mean(), "best": returns.max(), "step_size": std}
    return {f"evolution/{name}": jnp.asarray(number, jnp.float32) for name, number in numbers.items()}


def metrics_of(opt: Any) -> dict[str, jax.Array]:
    """What the optimizers of a training state's ``opt`` tell of themselves, () by name; most tell nothing."""
    if not isinstance(opt, Mapping):
        return {}
    inner = [metrics_of(part) for name, part in opt.items() if name != "metrics"]
    return {**opt.get("metrics", {}), **{name: value for found in inner for name, value in found.items()}}
