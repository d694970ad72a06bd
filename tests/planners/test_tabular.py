"""Tables: exact values, models counted from experience, worlds made of them; and the gridworld that they describe."""

from __future__ import annotations

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dreamer.env_config import EnvConfig, GridworldConfig
from dreamer.envs import make_env
from dreamer.envs.suites.gridworld import Grid, GridworldEnv
from dreamer.planners.tabular import Counts, Table, TabularWorld, greedy, policy_values, uniform, value_iteration

LAKE = Grid.of(GridworldConfig())
TRUTH = Table(*LAKE.probabilities())


def episodes(steps: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Random play on the lake, as episode files have it."""
    env, rng = (
        make_env("toy_gridworld", EnvConfig(toy={"grid": {"observe": "cell"}}), seed),
        np.random.default_rng(seed),
    )
    found, rows = [], []
    now = env.reset()
    for _ in range(steps):
        action = rng.integers(4)
        rows.append({**now, "action": action})
        if now["is_last"]:
            found.append({key: np.stack([row[key] for row in rows]) for key in rows[0]})
            rows, now = [], env.reset()
        else:
            now = env.step({"action": np.int32(action)})
    return found


def test_value_iteration_on_the_lake_gives_the_known_chance_to_succeed():
    values = value_iteration(TRUTH)
    np.testing.assert_allclose(values[LAKE.start], 0.8235, atol=1e-4)
    np.testing.assert_allclose(policy_values(TRUTH, greedy(TRUTH, values)), values, atol=1e-6)
    np.testing.assert_allclose(policy_values(TRUTH, uniform(TRUTH))[LAKE.start], 0.0139, atol=1e-4)


def test_the_table_is_gymnasium_s():
    theirs = gymnasium.make("FrozenLake-v1", is_slippery=True).unwrapped.P
    for cell in range(16):
        for action in range(4):
            chance, reward = np.zeros(16), np.zeros(16)
            for p, new, gain, _ in theirs[cell][action]:
                chance[new] += p
                reward[new] = gain
            np.testing.assert_allclose(TRUTH.transition[cell, action], chance, atol=1e-12)
            if not TRUTH.terminal[cell]:
                np.testing.assert_array_equal(TRUTH.reward[cell, action][chance > 0], reward[chance > 0])


def test_values_against_a_case_done_by_hand():
    """Two cells and an end. Staying in 0 pays 1; leaving it pays 0 and leads to 1, from where 10 ends it."""
    transition, reward = np.zeros((3, 2, 3)), np.zeros((3, 2, 3))
    transition[0, 0, 0] = transition[0, 1, 1] = transition[1, :, 2] = transition[2, :, 2] = 1
    reward[0, 0, 0], reward[1, :, 2], reward[2] = 1, 10, 99
    table = Table(transition, reward, np.array([False, False, True]))
    np.testing.assert_allclose(value_iteration(table, 0.5), [5, 10, 0])  # leaving: 0 + 0.5 * 10; staying: 1 / (1 - 0.5)
    np.testing.assert_allclose(value_iteration(table, 0.95), [20, 10, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="settle within 50 rounds.* lower discount"):
        value_iteration(table, 1.0, rounds=50)


def test_a_policy_that_may_stay_for_ever_is_worth_what_it_earns_before():
    """From 0 it ends with 1, or in 1, which it never leaves: half a chance."""
    transition, reward = np.zeros((3, 1, 3)), np.zeros((3, 1, 3))
    transition[0, 0] = 0, 0.5, 0.5
    transition[1, 0, 1] = transition[2, 0, 2] = reward[0, 0, 2] = 1
    table = Table(transition, reward, np.array([False, False, True]))
    np.testing.assert_allclose(policy_values(table, np.ones((3, 1))), [0.5, 0, 0])
    np.testing.assert_allclose(policy_values(table, np.ones((3, 1)), 0.9), [0.5, 0, 0])


def test_a_counted_model_approaches_the_truth():
    counts = Counts(16, 4)
    for episode in episodes(30_000, 0):
        counts.add(episode)
    found, seen = counts.table(), counts.transitions.sum(-1) > 400
    assert seen.sum() > 15 and found.terminal[5] and found.terminal[7] and not found.terminal[0]
    np.testing.assert_allclose(found.transition.sum(-1), 1)
    np.testing.assert_allclose(found.transition[seen], TRUTH.transition[seen], atol=0.1)
    np.testing.assert_array_equal(found.reward[14][..., 15], counts.transitions[14][..., 15] > 0)


def test_caution_counts_imagined_failures():
    counts = Counts(2, 1)
    counts.add({"cell": [0, 1], "action": [0, 0], "reward": [0, 1], "is_terminal": [False, True]})
    assert value_iteration(counts.table())[0] == 1
    np.testing.assert_allclose(value_iteration(counts.table(caution=3.0)), [0.25, 0, 0])


def test_a_world_of_beliefs_and_of_draws():
    """Expectations along actions, against all paths; draws, against the expectations."""
    world = TabularWorld(TRUTH, 0.9)
    state, total, weight = world.at([0, 14]), jnp.zeros(2), jnp.ones(2)
    plans = np.array([[2, 1, 1], [2, 1, 2]])
    for move in plans.T:
        state, reward, cont = world.step(state, jax.nn.one_hot(move, 4), None)
        total, weight = total + weight * reward, weight * cont
    total = total + weight * world.value(state)
    values = policy_values(TRUTH, uniform(TRUTH), 0.9)

    def expected(cell: int, moves: list[int]) -> float:
        if TRUTH.terminal[cell] or not moves:
            return 0.0 if TRUTH.terminal[cell] else values[cell]
        parts = zip(TRUTH.transition[cell, moves[0]], TRUTH.reward[cell, moves[0]], range(16), strict=True)
        return sum(p * (r + 0.9 * expected(new, moves[1:])) for p, r, new in parts if p)

    np.testing.assert_allclose(total, [expected(0, [*plans[0]]), expected(14, [*plans[1]])], rtol=1e-5)
    many = 20_000
    start = jnp.tile(world.at([14]), (many, 1))
    state, reward, cont = world.step(start, jnp.tile(jax.nn.one_hot(jnp.array([2]), 4), (many, 1)), jax.random.key(0))
    np.testing.assert_allclose(reward.mean(), 1 / 3, atol=0.02)
    np.testing.assert_allclose(cont.mean(), 0.9 * 2 / 3, atol=0.02)
    assert set(np.unique(reward)) <= {0.0, 1.0} and set(np.asarray(state.argmax(-1))[np.asarray(cont) > 0]) == {14, 10}


def test_random_maps_have_a_way_and_depend_on_the_seed_alone():
    maps = {}
    for seed in range(30):
        grid = Grid.of(GridworldConfig(layout="random", side=6, seed=seed, slip=0.0))
        assert grid.rows == Grid.of(GridworldConfig(layout="random", side=6, seed=seed)).rows
        assert value_iteration(Table(*grid.probabilities()))[grid.start] == 1
        maps[grid.rows] = seed
    assert len(maps) == 30


def test_episodes_that_begin_anywhere_begin_in_every_free_cell_alike():
    env = GridworldEnv(observe="cell", starts="anywhere")
    found = np.bincount([env.reset(seed=None if i else 0)[0] for i in range(2200)], minlength=16)
    free = np.array([letter in "SF" for letter in LAKE.letters])
    assert free.sum() == 11 and not found[~free].any()
    np.testing.assert_allclose(found[free], 200, atol=60)
    assert {GridworldEnv(observe="cell").reset()[0] for _ in range(20)} == {LAKE.start}


def test_the_grid_for_gymnasium():
    for options in ({"observe": "cell"}, {"layout": "random", "side": 5, "seed": 3}):
        env = GridworldEnv(render_mode="rgb_array", **options)
        check_env(env, skip_render_check=True)
        assert env.render().shape == (32, 32, 3)
