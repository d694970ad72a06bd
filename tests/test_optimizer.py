"""Adam spelled out, and groups of parameters with options of their own; `test_units.py` has LaProp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer.config import OptimizerConfig
from dreamer.optimizer import Slow, groups_of, make_optimizer


@pytest.mark.parametrize("clip", [1e6, 0.5])
def test_adam_spelled_out(clip):
    """Clipping of the norm of all gradients, both moments in float64, warm-up, and decay without the rate."""
    options = OptimizerConfig(
        kind="adam", learning_rate=3e-2, warmup=2, clip_norm=clip, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=1e-2
    )
    rng, optimizer = np.random.default_rng(0), make_optimizer({"": options})
    params = {name: jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for name, shape in (("w", (2, 3)), ("b", (3,)))}
    weights = {name: np.float64(x) for name, x in params.items()}
    first = {name: np.zeros(x.shape) for name, x in params.items()}
    second = {name: np.zeros(x.shape) for name, x in params.items()}
    state = optimizer.init(params)
    for step in range(6):
        grads = {name: rng.normal(0, 10.0 ** (step % 3 - 1), x.shape) for name, x in params.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        size = sum((g**2).sum() for g in grads.values()) ** 0.5
        for name, grad in grads.items():
            grad = grad * min(1, clip / size)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            mean, spread = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
            rate = 3e-2 * min(1, step / 2)
            weights[name] = weights[name] - rate * mean / (np.sqrt(spread) + 1e-5) - 1e-2 * weights[name]
            np.testing.assert_allclose(params[name], weights[name], rtol=2e-4, atol=1e-5)


def test_policy_and_critic_may_have_rates_of_their_own():
    assert list(groups_of(OptimizerConfig())) == [""]
    groups = groups_of(OptimizerConfig(learning_rate=3e-4, policy_rate=8e-5, clip=0.2))
    assert {name: options.learning_rate for name, options in groups.items()} == {"": 3e-4, "actor_critic.policy": 8e-5}
    assert {options.clip for options in groups.values()} == {0.2}


def test_groups_of_parameters_are_trained_as_if_they_were_alone():
    """Three groups in one tree, against an optimizer for each group's own tree."""
    options = {
        "": OptimizerConfig(learning_rate=1e-2, warmup=0),
        "actor_critic": OptimizerConfig(learning_rate=1e-3, warmup=3),
        "actor_critic.policy": OptimizerConfig(learning_rate=1e-1, warmup=0, clip=1e6),
    }
    rng = np.random.default_rng(0)
    draw = lambda: {"kernel": jnp.asarray(rng.normal(0, 1, (3, 4)), jnp.float32)}  # noqa: E731
    tree = lambda: {"world_model": draw(), "actor_critic": {"policy": draw(), "policy_2": draw()}}  # noqa: E731
    params = tree()
    paths = {
        "": ("world_model",),
        "actor_critic": ("actor_critic", "policy_2"),
        "actor_critic.policy": ("actor_critic", "policy"),
    }
    part = lambda whole, name: Slow(paths[name], 1.0).of(whole)  # noqa: E731
    whole, alone = make_optimizer(options), {name: make_optimizer({"": one}) for name, one in options.items()}
    state, states = whole.init(params), {name: one.init(part(params, name)) for name, one in alone.items()}
    for _ in range(4):
        grads = tree()
        updates, state = whole.update(grads, state, params)
        for name, one in alone.items():
            expected, states[name] = one.update(part(grads, name), states[name], part(params, name))
            np.testing.assert_array_equal(part(updates, name)["kernel"], expected["kernel"], err_msg=name)
