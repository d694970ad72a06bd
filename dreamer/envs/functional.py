"""Environments as functions: written in JAX, so that programs can map, scan and compile them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dreamer.envs.suites import toy
from dreamer.types import Space, Spaces

#: As `interface.Transition`, in JAX arrays.
Transition = dict[str, jax.Array]


class FunctionalEnv(Protocol):
    """One environment whose whole state is a pytree that the caller keeps. Spaces and transitions are those of `Env`.

    All random numbers come from the keys: equal arguments give equal results, bit for bit.
    """

    @property
    def observation_spaces(self) -> Spaces: ...

    @property
    def action_spaces(self) -> Spaces: ...

    def reset(self, key: jax.Array) -> tuple[Any, Transition]:
        """Begin an episode: its state and its first transition."""

    def step(self, state: Any, action: Mapping[str, jax.Array], key: jax.Array) -> tuple[Any, Transition]:
        """Take one agent step. Never resets; after ``is_last`` the caller must."""


class CatchState(NamedTuple):
    """Everything is int32 ()."""

    left: jax.Array
    paddle: jax.Array
    row: jax.Array
    column: jax.Array


class FunctionalCatch:
    """The game of `suites.toy`."""

    def __init__(self, size: int, balls: int) -> None:
        """size: of the image, pixels; balls: in an episode."""
        self.observation_spaces = {"image": Space("image", (size, size, 3))}
        self.action_spaces = {"action": Space("discrete", (), (3,))}
        self._balls = balls
        edges = np.round(np.arange(toy.CELLS + 1) * size / toy.CELLS)
        #: For each row or column of pixels, the cell that it is in.
        self._cells = np.searchsorted(edges, np.arange(size), "right") - 1

    def reset(self, key: jax.Array) -> tuple[CatchState, Transition]:
        paddle_key, ball_key = jax.random.split(key)
        paddle = jax.random.randint(paddle_key, (), 0, toy.CELLS - toy.PADDLE + 1)
        state = CatchState(jnp.int32(self._balls), paddle, jnp.int32(0), _new_column(ball_key))
        return state, self._transition(state, is_first=True)

    def step(self, state: CatchState, action: Mapping[str, jax.Array], key: jax.Array) -> tuple[CatchState, Transition]:
        paddle = jnp.clip(state.paddle + action["action"] - 1, 0, toy.CELLS - toy.PADDLE)
        new = state.row == toy.CELLS - 1
        row = jnp.where(new, 0, state.row + 1)
        column = jnp.where(new, _new_column(key), state.column)
        landed = row == toy.CELLS - 1
        left = state.left - landed
        caught = (paddle <= column) & (column < paddle + toy.PADDLE)
        reward = jnp.where(landed, jnp.where(caught, 1.0, -1.0), 0.0)
        state = CatchState(left, paddle, row, column)
        return state, self._transition(state, reward, landed & (left == 0))

    def _transition(
        self, state: CatchState, reward: jax.Array | float = 0.0, over: jax.Array | bool = False, is_first: bool = False
    ) -> Transition:
        told = {"is_first": is_first, "is_last": over, "is_terminal": over}
        flags = {name: jnp.asarray(flag, bool) for name, flag in told.items()}
        return {"image": self._image(state), "reward": jnp.asarray(reward, jnp.float32), **flags}

    def _image(self, state: CatchState) -> jax.Array:
        """uint8 (size, size, 3), painted in the same order as `suites.toy`."""
        down, across = self._cells[:, None], self._cells[None, :]
        beam = across == state.column
        mark = (down == toy.CELLS - 1) & (across >= state.paddle) & (across < state.paddle + toy.PADDLE)
        ball = (down == state.row) & beam
        image = jnp.array(toy.BACKGROUND, jnp.uint8)
        for where, color in ((beam, toy.BEAM), (mark, toy.MARK), (ball, toy.BALL)):
            image = jnp.where(where[..., None], jnp.array(color, jnp.uint8), image)
        return image


def _new_column(key: jax.Array) -> jax.Array:
    return jax.random.randint(key, (), 0, toy.CELLS)
