"""Behaviour learning: returns by loops and by hand, every factor of the losses, masks, and what gets no gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from learner_data import weights

from dreamer.actor_critic import ActorCritic, Dream, lambda_return, return_range, sample_actions, update_return_scale
from dreamer.config import ActorCriticConfig, ModelConfig
from dreamer.distributions import TwoHot
from dreamer.types import Space
from dreamer.world_model import Head

M, H, F = 4, 3, 5
MODEL = ModelConfig(units=6, policy_layers=1, value_layers=1, bins=15)
ACTIONS = {"walk": Space("vector", (2,)), "act": Space("discrete", (), (3,)), "many": Space("discrete", (2,), (2, 4))}
SCALE = {"low": jnp.float32(0), "high": jnp.float32(0)}


def noisy(module: Any, seed: int) -> Any:
    """The module with weights that are not the trivial initial ones."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), state))


def moderate(critic: Head) -> None:
    """Make the outer bins, up to 5e8, so unlikely that values are of the size of the rewards."""
    critic.out.bias[...] -= 4.0 * jnp.abs(jnp.arange(MODEL.bins) - MODEL.bins // 2)


def build(actions: dict[str, Space] | None = None, **behaviour: Any) -> ActorCritic:
    config = ActorCriticConfig(horizon=H, **behaviour)
    actions = actions or {"act": ACTIONS["act"]}
    actor_critic = noisy(ActorCritic(F, actions, MODEL, config, rngs=weights()), 1)
    moderate(actor_critic.value)
    return actor_critic


def slow() -> Head:
    critic = noisy(Head("two_hot", F, MODEL.units, 1, MODEL.bins, rngs=weights(1)), 2)
    moderate(critic)
    return critic


@dataclasses.dataclass(frozen=True)
class Imagined:
    """What the world model imagines: features (M, H+1, F), actions (M, H, A), reward and cont (M, H+1)."""

    features: jax.Array
    actions: jax.Array
    reward: jax.Array
    cont: jax.Array


def dream_of(actor_critic: ActorCritic, seed: int = 0) -> Imagined:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)  # noqa: E731
    features = draw(M, H + 1, F)
    actions = sample_actions(actor_critic.policy(features[:, :-1]), jax.random.key(seed))
    cont = jnp.asarray(rng.uniform(0.5, 1, (M, H + 1)), jnp.float32)
    return Imagined(features, actions, draw(M, H + 1), cont)


def turned(tree: Any) -> Any:
    """Time first, or items first again."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def loss_of(actor_critic: ActorCritic, imagined: Imagined, critic: Head, scale: Any) -> tuple:
    """The imagination loss of what the heads say of an imagined batch; losses and returns (M, H)."""
    imagined = Imagined(**turned(vars(imagined)))
    x = imagined.features[:-1]
    judged = actor_critic.judge(x, actor_critic.policy(x), imagined.actions)
    numbers = {"slow_value": critic(imagined.features).mode(), "value": actor_critic.value(imagined.features).mode()}
    numbers = jax.tree.map(jax.lax.stop_gradient, numbers)
    given = {"reward": imagined.reward, "cont": imagined.cont, "actions": imagined.actions}
    dream = Dream(**given, **numbers, **judged)
    losses, returns, scale, metrics = actor_critic.imagination_loss(dream, scale)
    return *turned((losses, returns)), scale, metrics


@pytest.fixture(scope="module")
def evaluate():
    """Imagination loss of the one-action agent, compiled once for all return scales and dreams."""
    graph, state = nnx.split(build())
    slow_graph, slow_state = nnx.split(slow())

    @jax.jit
    def call(dream: dict[str, jax.Array], scale: dict[str, jax.Array]) -> tuple:
        actor_critic, critic = nnx.merge(graph, state), nnx.merge(slow_graph, slow_state)
        return loss_of(actor_critic, Imagined(**dream), critic, scale)

    return lambda dream, scale=SCALE: call(dataclasses.asdict(dream), scale)


# Returns


def fast_returns(rewards: Any, values: Any, discounts: Any, lambdas: Any) -> jax.Array:
    """`lambda_return` of sequences (M, T)."""
    sequences = jnp.broadcast_arrays(*map(jnp.asarray, (rewards, values, discounts, lambdas)))
    return turned(lambda_return(*turned(sequences)))


def slow_returns(rewards: Any, values: Any, discounts: Any, lambdas: Any) -> np.ndarray:
    """One return at a time, backwards."""
    m, t = np.shape(values)
    returns = np.zeros((m, t - 1))
    for i in range(m):
        ret = float(values[i][t - 1])
        for k in reversed(range(1, t)):
            mixed = (1 - lambdas[i][k]) * float(values[i][k]) + lambdas[i][k] * ret
            ret = float(rewards[i][k]) + float(discounts[i][k]) * mixed
            returns[i, k - 1] = ret
    return returns


def test_lambda_return_by_hand():
    ours = fast_returns(
        jnp.array([[99.0, 1, 2]]), jnp.array([[99.0, 10, 20]]), jnp.array([[99.0, 0.5, 0.5]]), jnp.float32(0.5)
    )
    # R1 = 2 + 0.5 * 20 = 12;  R0 = 1 + 0.5 * (0.5 * 10 + 0.5 * 12) = 6.5
    np.testing.assert_allclose(ours, [[6.5, 12.0]])


@pytest.mark.parametrize("seed", range(3))
def test_lambda_return_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(0, 3, (2, 5, 9))
    discounts, lambdas = rng.uniform(0, 1, (2, 5, 9))
    ours = fast_returns(*(jnp.asarray(x, jnp.float32) for x in (rewards, values, discounts, lambdas)))
    np.testing.assert_allclose(ours, slow_returns(rewards, values, discounts, lambdas), rtol=1e-4, atol=1e-5)
    with jax.enable_x64(True):
        ours = fast_returns(*(jnp.asarray(x) for x in (rewards, values, discounts, lambdas)))
        np.testing.assert_allclose(ours, slow_returns(rewards, values, discounts, lambdas), rtol=1e-12)


def test_lambda_return_at_the_ends_of_lambda():
    rewards, values = jnp.array([[0.0, 1, 2, 3]]), jnp.array([[5.0, 6, 7, 8]])
    discounts = jnp.full((1, 4), 0.9)
    np.testing.assert_allclose(fast_returns(rewards, values, discounts, 0.0), [[6.4, 8.3, 10.2]], rtol=1e-6)
    monte_carlo = 1 + 0.9 * (2 + 0.9 * (3 + 0.9 * 8))
    np.testing.assert_allclose(fast_returns(rewards, values, discounts, 1.0)[0, 0], monte_carlo, rtol=1e-6)


def test_nothing_crosses_a_discount_of_zero():
    rewards, values, discounts = jnp.ones((1, 5)), jnp.full((1, 5), 100.0), jnp.array([[1, 1, 0.0, 1, 1]])
    np.testing.assert_allclose(fast_returns(rewards, values, discounts, 1.0)[0, :2], [2, 1])


# Return scale


def test_return_scale_follows_the_percentiles_of_all_returns():
    config = ActorCriticConfig(return_rate=0.25)
    rng, low, high = np.random.default_rng(0), 0.0, 0.0
    scale = SCALE
    for _ in range(3):
        returns = rng.normal(3, 20, (6, 7)).astype(np.float32)
        scale = update_return_scale(scale, jnp.asarray(returns), config)
        low, high = (0.75 * old + 0.25 * np.percentile(returns, q) for old, q in ((low, 5), (high, 95)))
        np.testing.assert_allclose([scale["low"], scale["high"]], [low, high], rtol=1e-5)
        np.testing.assert_allclose(return_range(scale, config), max(1, high - low), rtol=1e-5)


def test_return_scale_has_a_floor_of_one():
    config = ActorCriticConfig()
    for low, high, span in ((0, 0, 1), (-0.1, 0.2, 1), (5, 5.99, 1), (-1, 2, 3), (3, -3, 1)):
        assert return_range({"low": jnp.float32(low), "high": jnp.float32(high)}, config) == span


def test_no_gradient_reaches_returns_through_the_scale():
    slope = jax.grad(lambda r: update_return_scale(SCALE, r, ActorCriticConfig())["high"])(jnp.arange(9.0))
    assert not slope.any()


# Losses in imagination


def test_imagined_losses_spelled_out(evaluate):
    """Every factor in numpy: weights, advantage, log-probability, entropy, the two cross entropies."""
    actor_critic, critic = build(), slow()
    dream = dream_of(actor_critic)
    losses, returns, scale, metrics = evaluate(dream, {"low": jnp.float32(-2), "high": jnp.float32(3)})
    features = dream.features
    value, slow_value = np.float64(actor_critic.value(features).mode()), np.float64(critic(features).mode())
    expected = slow_returns(dream.reward, value, dream.cont, np.full((M, H + 1), 0.95))
    np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-4)
    low, high = 0.99 * -2 + 0.01 * np.percentile(expected, 5), 0.99 * 3 + 0.01 * np.percentile(expected, 95)
    np.testing.assert_allclose([scale["low"], scale["high"]], [low, high], rtol=1e-4)
    advantage = (expected - value[:, :-1]) / (high - low)
    weight = np.cumprod(np.float64(dream.cont), 1)[:, :-1]
    np.testing.assert_array_equal(weight[:, 0], np.float64(dream.cont)[:, 0])
    dist = actor_critic.policy(features[:, :-1])["act"]
    logs = np.float64(dist.log_probs)
    log_prob, entropy = (logs * np.float64(dream.actions)).sum(-1), -(np.exp(logs) * logs).sum(-1)
    policy = -weight * (log_prob * advantage + 3e-4 * entropy)
    np.testing.assert_allclose(losses["policy"], policy, rtol=1e-3, atol=1e-4)
    first = TwoHot(actor_critic.value(features).logits[:, :-1])
    cross = first.loss(jnp.asarray(expected, jnp.float32)) + first.loss(jnp.asarray(slow_value[:, :-1], jnp.float32))
    np.testing.assert_allclose(losses["value"], weight * np.float64(cross), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["adv"], advantage.mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["ret"], ((expected - low) / (high - low)).mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["tar"], expected.mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["weight"], np.cumprod(np.float64(dream.cont), 1).mean(), rtol=1e-5)


def test_losses_are_not_divided_by_the_sum_of_the_weights(evaluate):
    """Half the continue probability at every start: no return changes, and every loss is exactly halved."""
    dream = dream_of(build())
    half = dataclasses.replace(dream, cont=dream.cont.at[:, 0].multiply(0.5))
    (full_losses, full_returns, *_), (half_losses, half_returns, *_) = evaluate(dream), evaluate(half)
    np.testing.assert_array_equal(full_returns, half_returns)
    for name in ("policy", "value"):
        np.testing.assert_allclose(half_losses[name], full_losses[name] / 2, rtol=1e-6)


def test_states_after_an_imagined_end_weigh_nothing(evaluate):
    dream = dream_of(build())
    ended = dataclasses.replace(dream, cont=dream.cont.at[:, 1].set(0))
    losses = evaluate(ended)[0]
    for name in ("policy", "value"):
        assert np.asarray(losses[name])[:, 0].all() and not np.asarray(losses[name])[:, 1:].any()


def test_small_returns_are_not_blown_up(evaluate):
    dream = dream_of(build())
    spread = {"low": jnp.float32(-500), "high": jnp.float32(500)}
    small, wide = evaluate(dream)[3], evaluate(dream, spread)[3]
    value = np.float64(build().value(dream.features).mode())
    returns = slow_returns(dream.reward, value, dream.cont, np.full((M, H + 1), 0.95))
    np.testing.assert_allclose(small["adv_mag"], np.abs(returns - value[:, :-1]).mean(), rtol=1e-3)
    np.testing.assert_allclose(wide["adv_mag"], small["adv_mag"] / 990, rtol=1e-2)


@pytest.fixture(scope="module")
def slopes():
    """Gradient of each imagined loss's sum by every input: parameters, slow critic, features, rewards, continues."""
    graph, state = nnx.split(build())
    slow_graph, slow_state = nnx.split(slow())
    dream = dream_of(build())

    def total(inputs: dict[str, Any]) -> dict[str, jax.Array]:
        actor_critic, critic = nnx.merge(graph, inputs["state"]), nnx.merge(slow_graph, inputs["slow"])
        changed = dataclasses.replace(dream, **inputs["dream"])
        losses = loss_of(actor_critic, changed, critic, SCALE)[0]
        return {k: v.sum() for k, v in losses.items()}

    parts = {"reward": dream.reward, "cont": dream.cont, "actions": dream.actions}
    return jax.jit(jax.jacrev(total))({"state": state, "slow": slow_state, "dream": parts})


def moved(tree: Any) -> bool:
    return any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


def test_policy_loss_trains_the_policy_alone_and_value_loss_the_critic_alone(slopes):
    for loss, trained, other in (("policy", "policy", "value"), ("value", "value", "policy")):
        slope = slopes[loss]
        assert moved(slope["state"][trained]) and not moved(slope["state"][other])
        assert not moved(slope["slow"])
        assert not moved(slope["dream"]["reward"]) and not moved(slope["dream"]["cont"])


def test_policy_gradient_by_hand(slopes, evaluate):
    """REINFORCE by the logits' bias: -w (A (a - p) + eta dH/dl), with dH/dl = -p (ln p + H)."""
    actor_critic = build()
    dream = dream_of(actor_critic)
    returns = np.float64(evaluate(dream)[1])
    advantage = returns - np.float64(actor_critic.value(dream.features).mode())[:, :-1]
    logs = np.float64(actor_critic.policy(dream.features[:, :-1])["act"].log_probs)
    probs = np.exp(logs)
    entropy = -(probs * logs).sum(-1, keepdims=True)
    score = advantage[..., None] * (np.float64(dream.actions) - probs) - 3e-4 * probs * (logs + entropy)
    weight = np.cumprod(np.float64(dream.cont), 1)[:, :-1, None]
    ours = slopes["policy"]["state"]["policy"]["heads"]["act"]["logits"]["bias"][...]
    np.testing.assert_allclose(ours, -(weight * score).sum((0, 1)), rtol=1e-3, atol=1e-4)


# Discount and slow critic


def loss_of_numbers(seed: int = 0, discount: float = 1.0, inside: float = 1.0, **options: float) -> tuple:
    """Imagination loss (M, H) and what goes into it, of numbers from nowhere; inside: a factor of the continues."""
    rng = np.random.default_rng(seed)
    numbers = {k: rng.normal(0, 2, (M, H + 1)).astype(np.float32) for k in ("reward", "value", "slow_value")}
    numbers["cont"] = rng.uniform(0.5, 1, (M, H + 1)).astype(np.float32)
    numbers["log_prob"], entropy = (rng.normal(0, 1, (M, H)).astype(np.float32) for _ in range(2))
    logits = rng.normal(0, 1, (M, H, MODEL.bins)).astype(np.float32)
    config = ActorCriticConfig(horizon=H, **options)
    actor_critic = ActorCritic(F, {"act": ACTIONS["act"]}, MODEL, config, discount, rngs=weights())

    def loss(numbers: dict[str, Any]) -> tuple:
        given = turned({**numbers, "entropy": {"act": jnp.asarray(entropy)}, "actions": jnp.zeros((M, H, 3))})
        dream = Dream(**given, critic=TwoHot(turned(jnp.asarray(logits))))
        losses, returns, scale, metrics = actor_critic.imagination_loss(dream, SCALE)
        return *turned((losses, returns)), scale, metrics

    found = jax.jit(loss)({**numbers, "cont": numbers["cont"] * np.float32(inside)})
    return (*found, {**numbers, "entropy": entropy}, TwoHot(logits))


def test_a_discount_beside_the_continues_spelled_out():
    """Product and recursion in slow Python: the discount of a step is gamma c, but nothing discounts the start."""
    gamma = 0.9
    losses, returns, _, metrics, numbers, critic = loss_of_numbers(discount=gamma)
    cont, value = np.float64(numbers["cont"]), np.float64(numbers["value"])
    expected = slow_returns(numbers["reward"], value, gamma * cont, np.full((M, H + 1), 0.95))
    np.testing.assert_allclose(returns, expected, rtol=1e-5)
    weight = np.zeros((M, H + 1))
    for m in range(M):
        alive = 1.0
        for t in range(H + 1):
            alive *= cont[m, t] * (gamma if t else 1)
            weight[m, t] = alive
    cross = critic.loss(returns) + critic.loss(jnp.asarray(numbers["slow_value"][:, :-1]))
    np.testing.assert_allclose(losses["value"], weight[:, :-1] * np.float64(cross), rtol=1e-5)
    span = max(1, 0.01 * (np.percentile(expected, 95) - np.percentile(expected, 5)))
    bonus = 3e-4 * np.float64(numbers["entropy"])
    policy = -weight[:, :-1] * (numbers["log_prob"] * (expected - value[:, :-1]) / span + bonus)
    np.testing.assert_allclose(losses["policy"], policy, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["con"], cont.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-5)


def test_a_discount_beside_the_continues_is_the_one_inside_them_but_for_the_start():
    (inside, one, *_), (beside, two, *_) = loss_of_numbers(inside=0.9), loss_of_numbers(discount=0.9)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for name in ("policy", "value"):
        np.testing.assert_allclose(inside[name], 0.9 * np.asarray(beside[name]), rtol=1e-5)


@pytest.mark.parametrize("slow_scale", [0.0, 2.0])
def test_the_slow_critic_regularises_by_its_scale(slow_scale):
    """In imagination and on replayed sequences; at 0 there is the cross entropy with the return alone."""
    losses, returns, _, _, numbers, critic = loss_of_numbers(slow_scale=slow_scale)
    weight = np.cumprod(np.float64(numbers["cont"]), 1)[:, :-1]
    slow_part = np.float64(critic.loss(jnp.asarray(numbers["slow_value"][:, :-1])))
    expected = weight * (np.float64(critic.loss(returns)) + slow_scale * slow_part)
    np.testing.assert_allclose(losses["value"], expected, rtol=1e-5)

    actor_critic, regulariser = build(slow_scale=slow_scale), slow()
    batch = {k: v[:1, -3:] for k, v in replay_batch().items()}  # within an episode
    features = jnp.asarray(np.random.default_rng(3).normal(0, 1, (1, 3, F)), jnp.float32)
    bootstrap = jnp.ones((1, 3))
    loss = actor_critic.replay_loss(features, {"value": regulariser}, batch, bootstrap)
    reward, gamma = np.float64(batch["reward"][0]), 1 - 1 / 333
    second = reward[2] + gamma
    first = reward[1] + gamma * (0.05 + 0.95 * second)
    dist = TwoHot(actor_critic.value(features).logits[:, :-1])
    expected = np.float64(dist.loss(jnp.asarray([[first, second]], jnp.float32)))
    expected += slow_scale * np.float64(dist.loss(regulariser(features).mode()[:, :-1]))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


# Several actions


def test_log_probs_and_entropies_of_several_actions_add_up():
    actor_critic, critic = build(ACTIONS, entropy=0.5), slow()
    dream = dream_of(actor_critic)
    # Side by side in key order: act (3), many (2 + 4), walk (2).
    actions = np.asarray(dream.actions)
    assert actions.shape == (M, H, 11)
    for cut in (slice(0, 3), slice(3, 5), slice(5, 9)):
        np.testing.assert_array_equal(actions[..., cut].sum(-1), 1)
    losses, returns, _, metrics = jax.jit(lambda: loss_of(actor_critic, dream, critic, SCALE))()
    dists = actor_critic.policy(dream.features[:, :-1])
    assert list(dists) == ["act", "many", "walk"]
    parts = {"act": actions[..., :3], "many": actions[..., 3:9], "walk": actions[..., 9:]}
    log_prob = sum(np.float64(dists[k].log_prob(jnp.asarray(v))) for k, v in parts.items())
    entropy = {k: np.float64(dist.entropy()) for k, dist in dists.items()}
    advantage = np.float64(returns) - np.float64(actor_critic.value(dream.features).mode())[:, :-1]
    weight = np.cumprod(np.float64(dream.cont), 1)[:, :-1]
    expected = -weight * (log_prob * advantage + 0.5 * sum(entropy.values()))
    np.testing.assert_allclose(losses["policy"], expected, rtol=1e-3, atol=1e-3)
    for key in ACTIONS:
        np.testing.assert_allclose(metrics[f"ent/{key}"], entropy[key].mean(), rtol=1e-4)


def test_the_most_likely_action_is_taken_without_a_key():
    policy = build(ACTIONS).policy
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (7, F)), jnp.float32)
    modes = jnp.concatenate([dist.mode() for dist in policy(x).values()], -1)
    np.testing.assert_array_equal(sample_actions(policy(x), None), modes)
    samples = np.asarray(jax.jit(lambda x, key: sample_actions(policy(x), key))(x, jax.random.key(0)))
    assert (samples != np.asarray(modes)).any(0)[-2:].all()


def test_a_new_policy_is_nearly_uniform_and_a_new_critic_says_zero():
    fresh = ActorCritic(F, ACTIONS, MODEL, ActorCriticConfig(), rngs=weights())
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (7, F)), jnp.float32)
    dists = fresh.policy(x)
    np.testing.assert_allclose(dists["act"].probs, 1 / 3, atol=0.02)
    np.testing.assert_allclose(dists["walk"].mode(), 0, atol=0.05)
    np.testing.assert_array_equal(fresh.value(x).mode(), 0)


# Replayed sequences


def replay_batch() -> dict[str, np.ndarray]:
    """Two sequences: a terminal end then a new episode; a time limit then a new episode."""
    batch = {
        "is_last": [[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]],
        "is_terminal": [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        "is_first": [[0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]],
    }
    rewards = np.random.default_rng(5).normal(0, 2, (2, 6)).astype(np.float32)
    batch = {k: np.array(v, bool) for k, v in batch.items()}
    return batch | {"reward": np.where(batch["is_first"], np.float32(0), rewards)}


@pytest.fixture(scope="module")
def replayed():
    """(loss (2, 5), features, bootstrap, gradient by features) for a batch."""
    actor_critic, critic = build(), slow()
    rng = np.random.default_rng(3)
    features = jnp.asarray(rng.normal(0, 1, (2, 6, F)), jnp.float32)
    bootstrap = jnp.asarray(rng.normal(0, 5, (2, 6)), jnp.float32)

    @jax.jit
    def call(features: jax.Array, batch: dict[str, jax.Array], bootstrap: jax.Array) -> tuple:
        loss, pull = jax.vjp(lambda x: actor_critic.replay_loss(x, {"value": critic}, batch, bootstrap), features)
        return loss, pull(jnp.ones_like(loss))[0]

    def evaluate(batch: dict[str, np.ndarray], bootstrap: jax.Array = bootstrap) -> tuple:
        return (*call(features, batch, bootstrap), features, bootstrap)

    return evaluate


def test_replay_loss_spelled_out(replayed):
    batch = replay_batch()
    loss, _, features, bootstrap = replayed(batch)
    last, terminal, reward = batch["is_last"], batch["is_terminal"], batch["reward"]
    returns = np.zeros((2, 5))
    for i in range(2):
        ret = float(bootstrap[i, 5])
        for t in reversed(range(5)):
            if terminal[i, t + 1]:
                ahead = 0.0
            elif last[i, t + 1]:
                ahead = (1 - 1 / 333) * float(bootstrap[i, t + 1])
            else:
                ahead = (1 - 1 / 333) * (0.05 * float(bootstrap[i, t + 1]) + 0.95 * ret)
            ret = float(reward[i, t + 1]) + ahead
            returns[i, t] = ret
    dist = TwoHot(build().value(features).logits[:, :-1])
    cross = dist.loss(jnp.asarray(returns, jnp.float32)) + dist.loss(slow()(features).mode()[:, :-1])
    np.testing.assert_allclose(loss, np.where(last[:, :-1], 0, cross), rtol=1e-4)


def test_replay_loss_of_last_steps_is_masked(replayed):
    batch = replay_batch()
    loss, slope, _, _ = replayed(batch)
    last = batch["is_last"]
    np.testing.assert_array_equal(np.asarray(loss) == 0, last[:, :-1])
    # Gradient into the features (and so into the world model) everywhere but at last steps and the final one.
    expected = ~last
    expected[:, -1] = False
    np.testing.assert_array_equal((np.asarray(slope) != 0).any(-1), expected)


def test_nothing_of_the_next_episode_enters_a_replayed_return(replayed):
    batch = replay_batch()
    loss, _, _, bootstrap = replayed(batch)
    other = batch | {"reward": batch["reward"].copy()}
    other["reward"][0, 3:] += 7
    other["reward"][1, 2:] += 7
    after = np.array([[False] * 3 + [True] * 3, [False] * 2 + [True] * 4])
    changed, *_ = replayed(other, jnp.where(after, bootstrap - 3, bootstrap))
    np.testing.assert_array_equal(np.asarray(loss)[0, :3], np.asarray(changed)[0, :3])
    np.testing.assert_array_equal(np.asarray(loss)[1, :2], np.asarray(changed)[1, :2])
    assert (np.asarray(loss) != np.asarray(changed))[:, 3:].all()


def test_a_terminal_step_has_no_bootstrap_and_a_time_limit_has(replayed):
    batch = replay_batch()
    loss, _, _, bootstrap = replayed(batch)
    changed, *_ = replayed(batch, bootstrap.at[0, 2].add(9.0).at[1, 1].add(9.0))
    differs = np.asarray(loss) != np.asarray(changed)
    assert not differs[0].any()
    np.testing.assert_array_equal(differs[1], [True, False, False, False, False])
