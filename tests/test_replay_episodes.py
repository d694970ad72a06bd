"""Episodes spelled out: what a sequence that spans several of them must look like, step by step."""

import numpy as np
import pytest

from dreamer.replay import Replay, Selection
from dreamer.types import Field, Space, replay_fields

# Three short episodes in a row. The action of a row was chosen after seeing its observation; that of a last row was
# chosen but never executed: the next row is the first of a new episode, with reward 0.
#   obs, action, reward, first, last, terminal
TABLE = [
    (10, 1, 0.0, 1, 0, 0),  # row 0: episode A
    (11, 2, 0.5, 0, 0, 0),
    (12, 3, 1.0, 0, 1, 1),  # ... ends by itself
    (20, 4, 0.0, 1, 0, 0),  # row 3: episode B
    (21, 5, -1.0, 0, 1, 0),  # ... is cut by the time limit
    (30, 6, 0.0, 1, 0, 0),  # row 5: episode C
    (31, 7, 0.0, 0, 0, 0),
    (32, 8, 2.0, 0, 1, 1),  # ... ends by itself
    (40, 9, 0.0, 1, 0, 0),  # row 8: episode D goes on
]


class Script:
    """An environment that follows TABLE: reward and flags answer the action executed before."""

    def __init__(self):
        self.row = -1

    def next(self, executed: int | None) -> dict[str, np.ndarray]:
        assert self.row < 0 or executed == TABLE[self.row][1]
        self.row += 1
        obs, _, reward, first, last, terminal = TABLE[self.row]
        return {
            "obs": np.array([[obs]], np.float32),
            "reward": np.array([reward], np.float32),
            "is_first": np.array([first], bool),
            "is_last": np.array([last], bool),
            "is_terminal": np.array([terminal], bool),
        }


@pytest.fixture
def replay() -> Replay:
    """Collected as the training loop does: observe, choose, store both together, execute."""
    spaces = {"obs": Space("vector", (1,)), "log/episode": Space("vector", (1,))}
    fields = replay_fields(spaces, {"action": Space("discrete", (), (10,))}, {"stoch": Field((1,), np.dtype(np.uint8))})
    replay = Replay(fields, 1, 100, 9, seed=0, latent_keys=("stoch",))
    script, action = Script(), None
    for _, chosen, *_ in TABLE:
        transition = script.next(action)
        action = chosen
        extras = {"action": np.array([action]), "stoch": np.zeros((1, 1), np.uint8), "log/episode": np.zeros((1, 1))}
        replay.add(transition | extras)
    return replay


def test_one_sequence_shows_all_three_episodes_as_they_happened(replay):
    batch = replay.gather(replay.select(1))
    assert set(batch) == {"obs", "reward", "is_first", "is_last", "is_terminal", "action", "stoch"}
    row = {key: value[0].reshape(9).tolist() for key, value in batch.items()}
    assert row["obs"] == [10, 11, 12, 20, 21, 30, 31, 32, 40]
    assert row["action"] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row["reward"] == [0, 0.5, 1, 0, -1, 0, 0, 2, 0]
    assert row["is_first"] == [True, False, False, True, False, True, False, False, True]
    assert row["is_last"] == [False, False, True, False, True, False, False, True, False]
    assert row["is_terminal"] == [False, False, True, False, False, False, False, True, False]


def test_dtypes_are_those_of_the_spaces(replay):
    dtypes = {key: value.dtype for key, value in replay.gather(replay.select(1)).items()}
    assert dtypes == {
        "obs": np.float32,
        "reward": np.float32,
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "action": np.int32,
        "stoch": np.uint8,
    }


def test_latents_of_a_sequence_over_episode_ends_land_on_their_own_steps(replay):
    selection = replay.select(1)
    latents = np.array([11, 12, 20, 21, 30, 31, 32, 40], np.uint8).reshape(1, 8, 1)  # named after their observation
    assert replay.write(selection, {"stoch": latents}) == 8
    batch = replay.gather(Selection(np.array([0]), np.array([0]), np.array([False]), 9))
    assert batch["stoch"][0, 1:, 0].tolist() == batch["obs"][0, 1:, 0].tolist()
    assert batch["stoch"][0, 0, 0] == 0
