"""The small pieces of the mathematics against a trusted implementation's (tests/fixtures/reference/units.npz)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer.actor_critic import lambda_return, return_range, update_return_scale
from dreamer.config import ActorCriticConfig, OptimizerConfig
from dreamer.distributions import Bernoulli, Normal, OneHot, TwoHot, symexp, symlog, twohot_bins
from dreamer.networks import RMSNorm
from dreamer.optimizer import make_optimizer

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(Path(__file__).parent / "fixtures" / "reference" / "units.npz"))


def close(ours: jax.Array, theirs: np.ndarray, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert ours.dtype == jnp.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def test_symlog(arrays):
    close(symlog(jnp.asarray(arrays["symlog/in"])), arrays["symlog/out"])


def test_symexp(arrays):
    close(symexp(jnp.asarray(arrays["symexp/in"])), arrays["symexp/out"])


def test_twohot_bins(arrays):
    close(jnp.asarray(twohot_bins(255)), arrays["twohot/bins"])


def test_twohot_loss(arrays):
    close(
        TwoHot(jnp.asarray(arrays["twohot/logits"])).loss(jnp.asarray(arrays["twohot/target"])), arrays["twohot/loss"]
    )


def test_twohot_prediction(arrays):
    close(TwoHot(jnp.asarray(arrays["twohot/logits"])).mode(), arrays["twohot/pred"], rtol=1e-4)


def test_twohot_of_uniform_logits_is_exactly_zero(arrays):
    ours = TwoHot(jnp.zeros((1, 255))).mode()
    assert arrays["twohot/pred_uniform"][0] == 0
    np.testing.assert_array_equal(ours, arrays["twohot/pred_uniform"])


def test_onehot_kl_and_free_nats(arrays):
    p, q = (OneHot(jnp.asarray(arrays[f"onehot/{k}"]), 0.01) for k in "pq")
    kl = p.kl(q).sum(-1)
    close(kl, arrays["onehot/kl_pq"])
    close(jnp.maximum(kl, 1.0), arrays["onehot/kl_pq_free1"])


def test_onehot_entropy(arrays):
    close(OneHot(jnp.asarray(arrays["onehot/p"]), 0.01).entropy().sum(-1), arrays["onehot/entropy_p"])


def test_onehot_log_prob(arrays):
    dist = OneHot(jnp.asarray(arrays["onehot/p"]), 0.01)
    close(dist.log_prob(jnp.asarray(arrays["onehot/event"])).sum(-1), arrays["onehot/logp"])


def test_bounded_normal(arrays):
    raw = [jnp.asarray(arrays[f"bounded_normal/raw_{k}"]) for k in ("mean", "std")]
    dist = Normal.bounded(*raw, 0.1, 1.0)
    close(dist.std, arrays["bounded_normal/std"])
    close(dist.log_prob(jnp.asarray(arrays["bounded_normal/action"])), arrays["bounded_normal/logp"])
    close(dist.entropy(), arrays["bounded_normal/entropy"])


def test_binary(arrays):
    dist = Bernoulli(jnp.asarray(arrays["binary/logit"]))
    close(-dist.loss(jnp.asarray(arrays["binary/event"])), arrays["binary/logp"])


def test_lambda_return_of_a_replayed_sequence(arrays):
    last, terminal, reward, bootstrap = (arrays[f"lambda_return/{k}"] for k in ("last", "term", "rew", "boot"))
    live = (1 - np.float32(terminal)) * np.float32(1 - 1 / 333)
    ours = lambda_return(*map(jnp.transpose, (reward, bootstrap, live, (1 - np.float32(last)) * 0.95)))
    close(ours.T, arrays["lambda_return/ret"])


def test_lambda_return_of_a_dream(arrays):
    reward, value = (jnp.asarray(arrays[f"lambda_return/{k}"]) for k in ("rew", "val"))
    ours = lambda_return(reward.T, value.T, jnp.asarray(arrays["lambda_return_imag/con"]).T, 0.95)
    close(ours.T, arrays["lambda_return_imag/ret"])


def test_return_scale_over_four_updates(arrays):
    config = ActorCriticConfig()
    scale = {"low": jnp.float32(0), "high": jnp.float32(0)}
    for returns, (offset, span) in zip(arrays["percentile/seq"], arrays["percentile/offset_scale"], strict=True):
        scale = update_return_scale(scale, jnp.asarray(returns), config)
        close(scale["low"], offset)
        close(return_range(scale, config), span)


def test_six_optimizer_steps(arrays):
    """Gradients from 1e-3 to 1e1 by turns: clipping, LaProp, bias corrections and warm-up all matter."""
    optimizer = make_optimizer({"": OptimizerConfig(learning_rate=4e-3, warmup=3)})
    names = ("w", "b", "s")
    params = {k: jnp.asarray(arrays[f"opt/init/{k}"]) for k in names}
    state = optimizer.init(params)
    for i in range(6):
        updates, state = optimizer.update({k: jnp.asarray(arrays[f"opt/grad{i}/{k}"]) for k in names}, state, params)
        before, params = params, optax.apply_updates(params, updates)
        for k in names:
            close(params[k], arrays[f"opt/param{i}/{k}"])
        # Learning rate of update 0 is 0: nothing moves.
        assert all(np.array_equal(params[k], before[k]) == (i == 0) for k in names)


def test_rmsnorm(arrays):
    close(RMSNorm(16)(jnp.asarray(arrays["rmsnorm/in"])), arrays["rmsnorm/out"])


def test_every_reference_array_is_used(arrays):
    """A group that is added to the file must get its test here."""
    groups = {name.split("/")[0] for name in arrays}
    assert groups == {
        *("symlog", "symexp", "twohot", "onehot", "bounded_normal", "binary"),
        *("lambda_return", "lambda_return_imag", "percentile", "opt", "rmsnorm"),
    }
