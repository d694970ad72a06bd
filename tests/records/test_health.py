"""The health of the model, against slow loops and examples small enough to reckon by hand; and its page."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from dreamer.records import drawing, health
from dreamer.records.health_page import draw

GAMMA = 0.9


def flagged(count: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """(B, T) rewards and flags of consistent episodes, some of which a time limit ends."""
    rng = np.random.default_rng(seed)
    last = rng.random((count, length)) < 0.2
    terminal = last & (rng.random((count, length)) < 0.6)
    first = np.concatenate([np.zeros((count, 1), bool), last[:, :-1]], 1)
    reward = np.where(first, 0, rng.normal(0, 1, (count, length)))
    return {"reward": reward, "is_first": first, "is_last": last, "is_terminal": terminal}


def test_open_loops_are_judged_within_the_episode_they_saw_last():
    first = np.zeros((4, 6), bool)
    first[1, 3] = first[2, 5] = first[3, 1] = True
    expected = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(health.reachable(first, 3), np.array(expected, bool))


def test_means_are_over_what_is_left():
    values = np.array([[1.0, 2.0, np.nan], [3.0, 6.0, 9.0]])
    mask = np.array([[True, False, False], [True, True, False]])
    np.testing.assert_array_equal(health.masked_mean(values, mask), [2.0, 6.0, np.nan])


def test_use_of_latents():
    """Four states, three variables of four classes: always the same class, all evenly, never sure."""
    one, none = np.array([1.0, 0, 0, 0]), np.full(4, 0.25)
    probs = np.stack([np.stack([one, np.eye(4)[i], none]) for i in range(4)]).reshape(2, 2, 3, 4)
    found = health.latent_usage(probs)
    ln4 = math.log(4)
    np.testing.assert_allclose(found.entropy, [0, 0, ln4], atol=1e-12)
    np.testing.assert_allclose(found.spread, [0, ln4, ln4], atol=1e-12)
    np.testing.assert_array_equal(found.dead, [0.75, 0, 0])
    np.testing.assert_array_equal(found.mean[1], none)


def test_a_class_is_dead_below_a_tenth_of_an_even_share():
    mean = np.array([0.024, 0.026, 0.45, 0.5])
    assert health.latent_usage(mean.reshape(1, 1, 1, 4)).dead == 0.25


def test_a_calibrated_prediction_is_on_the_diagonal_and_a_shifted_one_is_not():
    rng = np.random.default_rng(0)
    chance = rng.uniform(0, 1, 200_000)
    happened = (rng.random(200_000) < chance).astype(float)
    found = health.calibrate(chance, happened)
    np.testing.assert_allclose(found.predicted, found.observed, atol=0.02)
    assert found.error < 0.01 and abs(found.bias) < 0.005 and found.states.sum() == 200_000
    shifted = health.calibrate(chance + 0.3, happened)
    assert shifted.error == pytest.approx(0.3, abs=0.01) and shifted.bias == pytest.approx(0.3, abs=0.01)


def test_groups_of_a_calibration_are_means_over_ranks():
    predicted = np.arange(100.0)
    found = health.calibrate(predicted, -predicted)
    np.testing.assert_array_equal(found.states, [1, 2, 7, 10, 10, 10, 10, 10, 10, 10, 10, 7, 2, 1])
    np.testing.assert_allclose(found.predicted[:4], [0, 1.5, 6, 14.5])
    np.testing.assert_allclose(found.observed, -found.predicted)


def test_rare_predictions_are_a_group_of_their_own():
    """Three ends in a hundred states: the many equal predictions do not swallow them."""
    predicted, happened = np.full(100, 0.99), np.ones(100)
    predicted[[5, 50, 95]], happened[[5, 50]] = 0.1, 0.0
    found = health.calibrate(predicted, happened)
    np.testing.assert_allclose(found.predicted, [0.1, 0.99])
    np.testing.assert_allclose(found.observed, [1 / 3, 1])
    assert found.error == pytest.approx(0.03 * abs(0.1 - 1 / 3) + 0.97 * 0.01)
    same = health.calibrate(np.ones((2, 3)), np.zeros((2, 3)))
    assert same.predicted.tolist() == [1.0] and same.bias == 1


def slow_return(data: dict[str, np.ndarray], value: np.ndarray, b: int, t: int) -> float:
    """Walk along one sequence."""
    total, weight = 0.0, 1.0
    while True:
        t += 1
        total += weight * data["reward"][b, t]
        weight *= GAMMA
        if data["is_terminal"][b, t]:
            return total
        if data["is_last"][b, t] or t == data["reward"].shape[1] - 1:
            return total + weight * value[b, t]


def test_observed_returns_follow_the_episode_to_its_end():
    data = flagged(20, 12, seed=1)
    value = np.random.default_rng(2).normal(0, 1, (20, 12))
    returns, known = health.observed_returns(data["reward"], value, data["is_terminal"], data["is_last"], GAMMA)
    assert not known[:, 6:].any() and not (known & data["is_last"]).any() and 60 < known.sum() < 120
    for b, t in np.argwhere(known):
        assert returns[b, t] == pytest.approx(slow_return(data, value, b, t)), (b, t)


def test_imagined_returns_weigh_rewards_by_what_continues():
    reward, cont = np.array([[100.0, 1.0, 10.0, 100.0]]), np.array([[0.0, 0.5, 0.2, 0.0]])
    np.testing.assert_allclose(health.imagined_returns(reward, cont), [[1, 1 + 5, 1 + 5 + 10]])


@pytest.mark.parametrize("horizon", [1, 3, 11])
def test_real_returns_stop_at_terminal_steps_and_are_unknown_where_data_ends(horizon):
    data = flagged(20, 12, seed=3)
    reward, last, terminal = data["reward"], data["is_last"], data["is_terminal"]
    sums, known = health.real_returns(reward, terminal, last, GAMMA, horizon)
    for b in range(20):
        for t in range(12):
            expected, total = [], 0.0
            for k in range(1, horizon + 1):
                if t + k > 11 or last[b, t] or (last[b, t + 1 : t + k].any() and not terminal[b, t + 1 : t + k].any()):
                    break
                ended = last[b, t + 1 : t + k]
                if ended.any() and not terminal[b, t + 1 + int(ended.argmax())]:
                    break
                if not ended.any():
                    total += GAMMA ** (k - 1) * reward[b, t + k]
                expected.append(total)
            whole = len(expected) == horizon
            if not whole and expected and t + len(expected) == 11:  # the sequence is over, but the episode was before
                ended = last[b, t + 1 :]
                whole = ended.any() and terminal[b, t + 1 + int(ended.argmax())]
                expected += [total] * (horizon - len(expected))
            assert known[b, t] == whole, (b, t)
            if whole:
                np.testing.assert_allclose(sums[b, t], expected, err_msg=f"{b, t}")


def full_batch(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With a context step in front, as from replay."""
    return {k: np.concatenate([np.zeros_like(v[:, :1]), v], 1) for k, v in data.items()}


def perfect_views(data: dict[str, np.ndarray], horizon: int = 3) -> dict[str, Any]:
    """What a model would say that knows everything: of observations, rewards, ends and values."""
    reward, live = data["reward"], 1.0 - data["is_terminal"]
    count, length = reward.shape
    dream_reward, dream_cont = np.zeros((count, length, horizon + 1)), np.zeros((count, length, horizon + 1))
    for h in range(horizon + 1):
        dream_reward[:, : length - h, h] = reward[:, h:]
        dream_cont[:, : length - h, h] = GAMMA * live[:, h:]
    value = np.zeros((count, length))
    for t in range(length - 2, -1, -1):
        value[:, t] = reward[:, t + 1] + GAMMA * live[:, t + 1] * value[:, t + 1]
    return {
        "error": {"image": np.zeros((count, length))}, "guess": {"image": 0.5},
        "open_reward": reward, "open_cont": GAMMA * live, "reward": reward, "cont": GAMMA * live,
        "kl": np.tile([0.5, 2.0], (count, length // 2)), "probs": np.full((count, length, 2, 4), 0.25),
        "value": value, "dream_reward": dream_reward, "dream_cont": dream_cont, "param_norm": {"rssm": 3.0},
    }  # fmt: skip


@pytest.fixture
def data():
    """Episodes that end for good only: what a time limit cuts, no model can know."""
    data = flagged(20, 12, seed=4)
    return data | {"is_terminal": data["is_last"].copy()}


def test_a_model_that_knows_everything_is_perfectly_healthy(data):
    views, batch = perfect_views(data), full_batch(data)
    found = health.measure(views, batch, (views, batch), GAMMA, free_nats=1.0)
    scalars = found.scalars()
    zero = [name for name in scalars if name.startswith(("seen_error", "imagined_error", "calibration_error", "bias"))]
    assert len(zero) == 3 + 3 + 3 + 3 and {name: round(scalars[name], 9) for name in zero} == dict.fromkeys(zero, 0)
    assert scalars["return_gap"] == pytest.approx(0) and abs(scalars["real_return"]) > 1e-3
    assert scalars["kl"] == 1.25 and scalars["kl_free"] == 0.5 and scalars["param_norm/rssm"] == 3
    assert {name: curve.shape for name, curve in found.curves.items()} == dict.fromkeys(
        ("image", "reward", "cont"), (6,)
    )
    assert scalars["guess_error/reward"] == pytest.approx(np.abs(data["reward"] - data["reward"].mean()).mean())
    assert found.guess["cont"] == pytest.approx(2 * data["is_terminal"].mean() * (1 - data["is_terminal"].mean()))


def test_a_policy_that_exploits_its_model_shows_as_a_gap(data):
    views, batch = perfect_views(data), full_batch(data)
    dreamt = views | {"dream_reward": views["dream_reward"] + 1, "value": views["value"] + 5}
    found = health.measure(views, batch, (dreamt, batch), GAMMA, 1.0).scalars()
    # One more for each imagined step that counts; the value's promise is off by 5, or less where it bootstraps.
    assert 1 < found["return_gap"] < 1 + GAMMA + GAMMA**2
    assert 2 < found["bias/value"] < 5 and found["bias/reward"] == pytest.approx(0, abs=1e-9)


def test_plans_are_compared_with_what_came_by_horizon(data):
    """Spelled out for one sequence: rewards 1, 2, 3, 4, critic 10 everywhere, an end for good at the last step."""
    flags = np.zeros((1, 5), bool)
    ends = flags.copy()
    ends[0, 4] = True
    value = np.full((1, 5), 10.0)
    found = health.values_after(value, ends, ends, 0.5, 3)
    np.testing.assert_array_equal(found[0, 0], [5, 2.5, 1.25])
    np.testing.assert_array_equal(found[0, 2], [5, 0, 0])
    np.testing.assert_array_equal(found[0, 3:], 0)
    views, batch = perfect_views(data), full_batch(data)
    planned = {"planned": np.full(batch["reward"].shape, 7.0)}
    measured = health.measure(views, batch, (views, batch | planned), GAMMA, 1.0)
    assert measured.planned == 7
    # With a perfect critic it makes no difference after how many steps it takes over.
    np.testing.assert_allclose(measured.came, measured.came[0], rtol=1e-6)
    scalars = measured.scalars()
    np.testing.assert_allclose(scalars["planned_gap"], 7 - measured.came[-1])
    alone = health.measure(views, batch, (views, batch | planned), GAMMA, 1.0, with_critic=False)
    np.testing.assert_allclose(alone.came, alone.real)


def test_errors_are_those_of_each_imagined_step(data):
    quiet = {name: np.zeros_like(values) for name, values in data.items()}
    views = perfect_views(quiet)
    views["error"] = {"image": np.tile(np.arange(12.0), (20, 1))}
    found = health.measure(views, full_batch(quiet), None, GAMMA, 1.0)
    np.testing.assert_array_equal(found.curves["image"], [6, 7, 8, 9, 10, 11])
    scalars = found.scalars()
    assert scalars["seen_error/image"] == 2.5 and scalars["imagined_error/image"] == 8.5
    assert "return_gap" not in scalars and "bias/value" not in scalars


def test_disagreement_is_held_against_errors_step_by_step(data):
    """Over the imagined steps that belong to the episode seen last, against numpy's own correlation."""
    rng, views, batch = np.random.default_rng(0), perfect_views(data), full_batch(data)
    assert health.measure(views, batch, None, GAMMA, 1.0).disagreement is None
    error = rng.random((20, 12))
    views |= {"disagreement": 2 * error + 0.3 * rng.random((20, 12)), "error": {"image": error}}
    found = health.measure(views, batch, None, GAMMA, 1.0)
    inside = [(b, t) for b in range(20) for t in range(6, 12) if not data["is_first"][b, 6 : t + 1].any()]
    assert 20 < len(inside) < 120
    pairs = np.array([(views["disagreement"][at], error[at]) for at in inside])
    scalars, curve = found.scalars(), found.disagreement.curve
    assert scalars["disagreement_correlation/image"] == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    assert "disagreement_correlation/reward" not in scalars, "nothing is wrong with it, so nothing can be told"
    for step in range(6):
        values = [views["disagreement"][b, t] for b, t in inside if t == 6 + step]
        assert curve[step] == pytest.approx(np.mean(values))
    assert scalars["seen_disagreement"] == pytest.approx(views["disagreement"][:, :6].mean())
    assert scalars["imagined_disagreement"] == pytest.approx(curve.mean())
    with_it, without = (
        draw(dataclasses.replace(found, disagreement=one), {}, "") for one in (found.disagreement, None)
    )
    changed = np.argwhere((with_it != without).any(-1))
    assert len(changed) and changed[:, 0].max() < 340 and changed[:, 1].max() < 400, "a curve in the first chart"


@pytest.mark.parametrize("empty", [False, True])
def test_the_page_draws_whatever_there_is(data, empty):
    if empty:
        data = {name: np.zeros_like(values) for name, values in data.items()}
    views, batch = perfect_views(data), full_batch(data)
    found = health.measure(views, batch, None if empty else (views, batch), GAMMA, 1.0)
    image = draw(found, {} if empty else {"rssm": 0.01}, "3 updates")
    assert image.dtype == np.uint8 and image.shape == (626, 1600, 3)
    inked = (image != 255).any(-1).reshape(2, 313, 4, 400).mean((1, 3))
    assert (inked > 0.005).all(), "every panel has something on it"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-38])
def test_numbers_that_are_not_finite_or_absurd_end_no_report(data, value):
    """Everywhere at once, and in each view alone; warnings are errors."""
    batch, good = full_batch(data), perfect_views(data)
    bad = {name: jax.tree.map(lambda x: np.full_like(x, value, np.float32), view) for name, view in good.items()}
    for views in [bad, *(good | {name: view} for name, view in bad.items())]:
        found = health.measure(views, batch, (views, batch), GAMMA, 1.0)
        assert all(np.isfinite(number) for number in found.scalars().values())
        if views is bad or views["kl"] is bad["kl"] or views["probs"] is bad["probs"]:
            assert draw(found, {"rssm": value}, "3 updates").shape == (626, 1600, 3)


def test_ticks_are_round_and_within():
    assert drawing.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert drawing.ticks(-3.2, 14) == [0, 5, 10]
    assert drawing.decades(0.01, 1000) == [0.01, 0.1, 1, 10, 100, 1000]
    assert [drawing.number(x) for x in (0.0, 0.25, 12000, 1e-5)] == ["0", "0.25", "12,000", "1e-05"]


def test_points_lie_where_the_scales_say():
    page = drawing.Page(400, 300)
    axes = drawing.Axes(page, (0, 0), (400, 300), "", "", ("", ""), (1, 100), (0, 2), log_x=True)
    assert axes.at(1, 0) == (axes.left, axes.bottom) and axes.at(100, 2) == (axes.right, axes.top)
    assert axes.at(10, 1) == ((axes.left + axes.right) / 2, (axes.top + axes.bottom) / 2)
    axes.curve(np.array([1.0, 10.0, 100.0]), np.array([1.0, np.nan, 1.0]), (255, 0, 0))
    row = page.array()[round((axes.top + axes.bottom) / 2)]
    assert (row[round(axes.left) + 2 : round(axes.right) - 2, 0] > 200).all(), "the line goes on over the gap"
