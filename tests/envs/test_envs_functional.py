"""Environments as functions against the class that plays the same game; and what that game is painted on."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer.envs.functional import CatchState, FunctionalCatch
from dreamer.envs.suites.toy import BACKGROUND, BALL, CELLS, MARK, PADDLE, Catch
from dreamer.types import TRANSITION_FIELDS


@pytest.mark.parametrize("size", [16, 21])
def test_every_step_from_every_state_is_the_classs(size):
    game, function = Catch(size, 3, seed=0), FunctionalCatch(size, 3)
    step = jax.jit(function.step)
    states = list(itertools.product((1, 3), range(CELLS - PADDLE + 1), (0, 5, CELLS - 2, CELLS - 1), (0, 3, 7)))
    for (left, paddle, row, column), action in itertools.product(states, range(3)):
        before = CatchState(*map(jnp.int32, (left, paddle, row, column)))
        after, ours = step(before, {"action": jnp.int32(action)}, jax.random.key(left + paddle))
        game.left, game.paddle, game.row, game.column = left, paddle, row, column
        game.rng = SimpleNamespace(integers=lambda n, after=after: int(after.column))  # the one thing that is drawn
        theirs = game.step({"action": np.int32(action)})
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=f"{name} {left, paddle, row, column} {action}")
            assert np.asarray(ours[name]).dtype == np.asarray(value).dtype, name
        assert (game.left, game.paddle, game.row, game.column) == tuple(map(int, after))


def test_episodes_of_many_environments_in_one_program():
    """512 games played to the end in a scan over a map: lengths, scores of two policies, and what chance decides."""
    function = FunctionalCatch(16, 3)

    def play(key: jax.Array, clever: bool) -> tuple:
        reset_key, key = jax.random.split(key)
        state, first = function.reset(reset_key)

        def step(carry: tuple, key: jax.Array) -> tuple:
            state, over = carry
            action = jax.random.randint(key, (), 0, 3)
            if clever:
                action = jnp.sign(state.column - state.paddle) + 1
            state, seen = function.step(state, {"action": action}, jax.random.fold_in(key, 1))
            return (state, over | seen["is_last"]), (jnp.where(over, 0, seen["reward"]), ~over, state.column)

        _, (rewards, alive, columns) = jax.lax.scan(step, (state, jnp.bool_(False)), jax.random.split(key, 30))
        return first, rewards.sum(), alive.sum(), columns[8], state.paddle

    keys = jax.random.split(jax.random.key(0), 512)
    for clever in (True, False):
        first, score, length, second, paddle = jax.jit(jax.vmap(lambda key, c=clever: play(key, c)))(keys)
        assert first["is_first"].all() and {*first} == {"image", *TRANSITION_FIELDS}
        assert (length == 3 * CELLS - 1).all()
        assert (score == 3).all() if clever else abs(float(score.mean()) + 1.5) < 0.15
        # Columns and paddles are uniform: 64 and 73 of each are expected.
        assert np.bincount(second, minlength=CELLS).min() > 35 and np.bincount(paddle).min() > 40


def test_a_moving_background_lies_beneath_the_same_game():
    """The same seed plays the same game; only what is behind it differs, from step to step and between episodes."""
    plain, moving, again = Catch(16, 2, 5), Catch(16, 2, 5, "moving"), Catch(16, 2, 5, "moving")
    assert "background" not in plain.get_state()
    rng, firsts = np.random.default_rng(0), []
    for _ in range(3):
        one, two, three = plain.reset(), moving.reset(), again.reset()
        firsts.append(two["image"])
        before = None
        while True:
            for name in TRANSITION_FIELDS:
                assert one[name] == two[name], name
            np.testing.assert_array_equal(two["image"], three["image"])
            behind = (one["image"] == BACKGROUND).all(-1)
            np.testing.assert_array_equal(two["image"][~behind], one["image"][~behind])
            seen = two["image"].astype(int)
            for color in (BALL, MARK):
                assert np.abs(seen[behind] - color).max(-1).min() >= 50, "the game stays readable"
            if before is not None:
                both = behind & before[1]
                assert (seen[both] != before[0][both]).any(-1).mean() > 0.5
            before = seen, behind
            if one["is_last"]:
                break
            action = {"action": np.int32(rng.integers(3))}
            one, two, three = plain.step(action), moving.step(action), again.step(action)
    for one, two in itertools.combinations(firsts, 2):
        assert np.abs(one.astype(int) - two).mean() > 10
    assert len({Catch(16, 2, seed, "moving").reset()["image"].tobytes() for seed in range(5)}) == 5
