"""What a model makes of replayed sequences, against the parts of the model asked one by one; reports of a run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from learner_data import B, T, perturb, random_batch, small_config

from dreamer.agent import Agent
from dreamer.optimizer import norms, squares
from dreamer.replay import Replay
from dreamer.run.reports import make_report
from dreamer.types import Field, Space

OBSERVATIONS = {"image": Space("image", (8, 8, 3)), "item": Space("discrete", (), (3,))}
ACTIONS = {"action": Space("vector", (2,))}


@pytest.fixture(scope="module")
def agent():
    return Agent(OBSERVATIONS, ACTIONS, small_config())


@pytest.fixture(scope="module")
def state(agent):
    state = agent.init(0)
    return state | {"params": perturb(state["params"])}


@pytest.fixture(scope="module")
def batch(agent):
    return random_batch(agent, seed=3)


@pytest.fixture(scope="module")
def views(agent, state, batch):
    return jax.device_get(agent.report(state["params"], batch, jax.random.key(5)))


def test_everything_has_its_shape(views):
    for name in ("reward", "cont", "open_reward", "open_cont", "kl", "value"):
        assert views[name].shape == (B, T) and views[name].dtype == np.float32, name
    assert views["probs"].shape == (B, T, 4, 4)
    assert views["dream_reward"].shape == views["dream_cont"].shape == (B, T, 4)
    assert {k: v.shape for k, v in views["true"].items()} == {"image": (B, T, 8, 8, 3), "item": (B, T, 3)}
    np.testing.assert_allclose(views["probs"].sum(-1), 1, atol=1e-5)


def test_errors_are_those_of_the_pictures_handed_out(views, batch):
    np.testing.assert_allclose(views["true"]["image"], batch["image"][:, 1:] / 255, atol=1e-6)
    np.testing.assert_array_equal(views["true"]["item"], np.eye(3)[batch["item"][:, 1:]])
    for name, true in views["true"].items():
        for b, t in np.ndindex(B, T):
            assert views["error"][name][b, t] == pytest.approx(
                np.abs(views["pred"][name][b, t] - true[b, t]).mean(), 1e-4
            )
        mean = true.reshape(B * T, -1).mean(0)
        assert views["guess"][name] == pytest.approx(np.abs(true.reshape(B * T, -1) - mean).mean(), 1e-4)


def test_the_open_loop_sees_the_first_half_only(agent, state, batch):
    """With other observations in the second half, nothing of the open loop changes, all of the filter does."""
    other = dict(batch) | {"image": batch["image"].copy()}
    other["image"][:, 1 + T // 2 :] = 255 - other["image"][:, 1 + T // 2 :]
    a, b = (jax.device_get(agent.report(state["params"], x, jax.random.key(5))) for x in (batch, other))
    for name in ("open_reward", "open_cont"):
        np.testing.assert_array_equal(a[name], b[name])
        # Until then the open loop is the filter.
        np.testing.assert_allclose(a[name][:, : T // 2], a[name.removeprefix("open_")][:, : T // 2], atol=1e-5)
    np.testing.assert_array_equal(a["pred"]["image"], b["pred"]["image"])
    assert (a["kl"][:, T // 2 :] != b["kl"][:, T // 2 :]).all() and (a["kl"][:, : T // 2] == b["kl"][:, : T // 2]).all()


def test_heads_kl_and_value_are_those_of_the_filtered_states(agent, state, batch, views):
    """The same keys, the modules called one by one, the KL summed by hand."""
    model = agent.model(state["params"])
    world = model.world_model
    context, actions, trained = model.split_batch(batch)
    tokens = world.encoder(trained, (B, T), agent.dtype)
    observe_key = jax.random.split(jax.random.split(jax.random.key(5))[0])[0]
    states, logits = world.rssm.observe(context, actions, tokens, trained["is_first"], observe_key)
    x = world.rssm.feature(states)
    expected = {"reward": world.reward(x).mode(), "cont": world.cont(x).mode()}
    expected["value"] = model.actor_critic.value(x).mode()
    for name, values in expected.items():
        np.testing.assert_allclose(views[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
        if name != "value":  # Dreams begin with the state itself.
            np.testing.assert_allclose(views[f"dream_{name}"][..., 0], values, rtol=1e-4, atol=1e-4)

    def mixed(logits: Any) -> np.ndarray:
        odds = np.exp(np.asarray(logits, np.float64))
        return 0.99 * odds / odds.sum(-1, keepdims=True) + 0.01 / 4

    post, prior = mixed(logits), mixed(world.rssm.prior(states["deter"]))
    np.testing.assert_allclose(views["probs"], post, atol=1e-4)
    np.testing.assert_allclose(views["kl"], (post * np.log(post / prior)).sum((-1, -2)), atol=1e-3)


def test_norms_by_module(agent, state, views):
    expected = {
        name: np.sqrt(sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(tree)))
        for part in jax.device_get(state["params"]).values()
        for name, tree in part.items()
    }
    assert set(expected) == {"encoder", "rssm", "objective", "reward", "cont", "policy", "value"}
    assert views["param_norm"] == pytest.approx(expected, rel=1e-5)
    total = np.sqrt(sum(float(x) ** 2 for x in norms(squares(state["params"])).values()))
    everything = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(state["params"]))])
    assert total == pytest.approx(float(np.linalg.norm(everything)), rel=1e-5)


def test_a_report_has_numbers_videos_and_a_page(agent, state, batch):
    metrics = {"opt/module_grad_norm/rssm": np.array([1.0, 2.0]), "loss/dyn": 1.0}
    found = make_report(agent, state, batch, random_batch(agent, seed=4), metrics)
    assert {"report/kl", "report/imagined_error/item", "report/bias/cont"} <= set(found.scalars)
    assert all(np.isfinite(value) for value in found.scalars.values())
    assert set(found.videos) == {"report/dream/image"} and found.videos["report/dream/image"]().shape[0] == T
    assert found.page().shape[-1] == 3
    again = make_report(agent, state, batch, random_batch(agent, seed=4), metrics)
    assert again.scalars == found.scalars
    assert not {"report/return_gap", "report/bias/value"} & set(make_report(agent, state, batch, None, {}).scalars)


def test_a_discount_beside_the_continue_head_changes_no_figure(agent, views, batch):
    """A head that learns it and one that leaves it to the returns, both with the same idea of the world."""
    bare = {name: view / (1 - 1 / 333) if name.endswith("cont") else view for name, view in views.items()}

    def figures(views: Any, **loss: bool) -> dict[str, float]:
        stand_in = mock.Mock(report=lambda *inputs: views, config=small_config(loss=loss))
        return make_report(
            stand_in, {"key": np.zeros(2, np.uint32), "updates": 0, "params": {}}, batch, batch, {}
        ).scalars

    whole = figures(views)
    assert {"report/bias/cont", "report/seen_error/cont", "report/imagined_return"} <= set(whole)
    assert figures(bare, discount_in_cont=False) == pytest.approx(whole, rel=1e-5)
    assert figures(bare)["report/bias/cont"] != pytest.approx(whole["report/bias/cont"], rel=1e-3)


def test_the_newest_sequences_of_replay():
    """Two environments, sequences of 1 + 3 steps: side by side, then one behind the other, the newest first."""
    replay = Replay({"step": Field((), np.dtype(np.int64)), "is_first": Field((), np.dtype(bool)),
                     "is_last": Field((), np.dtype(bool))}, 2, 100, 4, 0)  # fmt: skip
    flags = dict.fromkeys(("is_first", "is_last"), np.zeros(2, bool))
    for step in range(8):
        assert (replay.newest(3) is None) == (step < 7)
        replay.add({"step": np.array([step, 100 + step]), **flags})
    before = replay.stats()
    found = replay.newest(3)
    assert found is not None
    steps = replay.gather(found)["step"]
    np.testing.assert_array_equal(steps, [[4, 5, 6, 7], [104, 105, 106, 107], [1, 2, 3, 4]])
    assert replay.stats() == before
