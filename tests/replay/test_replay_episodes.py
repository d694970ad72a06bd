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
def replay():
    """Collected as the training loop does: observe, choose, store both together, execute."""
    spaces = {"obs": Space("vector", (1,)), "log/episode": Space("vector", (1,))}
    fields = replay_fields(
        spaces, {"action": Space("discrete", (), (10,))}, {"stoch": Field((1,), np.dtype(np.uint8), latent=True)}
    )
    replay = Replay(fields, 1, 100, 9, seed=0)
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


def small_replay(num_envs: int = 2, rows: int = 6) -> Replay:
    fields = replay_fields({"obs": Space("vector", ())}, {"action": Space("discrete", (), (2,))}, {})
    return Replay(fields, num_envs, num_envs * rows, 3, seed=0)


def add_flags(replay: Replay, *rows: list[str]) -> None:
    """One string for each step, one letter for each environment: f(irst), l(ast), t(erminal), or a dot."""
    for row in rows:
        flags = np.array(list(row))
        replay.add(
            {
                "obs": np.zeros(len(row), np.float32),
                "action": np.zeros(len(row), np.int32),
                "reward": np.zeros(len(row), np.float32),
                "is_first": flags == "f",
                "is_last": (flags == "l") | (flags == "t"),
                "is_terminal": flags == "t",
            }
        )


def flags_of(replay: Replay, env: int, row: int, length: int) -> tuple[list, list]:
    batch = replay.gather(Selection(np.array([env]), np.array([row]), np.array([False]), length))
    return batch["is_last"][0].astype(int).tolist(), batch["is_terminal"][0].astype(int).tolist()


def test_episodes_that_a_stop_has_cut_get_an_end(tmp_path):
    replay = small_replay()
    # Environment 0 stops in the middle of an episode, environment 1 right after a terminal end.
    add_flags(replay, "ff", "..", "l.", "f.", ".t")
    manifest = replay.save(tmp_path)

    resumed = small_replay()
    resumed.load(tmp_path, manifest)
    assert resumed.close_open_episodes() == 1
    add_flags(resumed, "ff")
    assert flags_of(resumed, 0, 0, 6) == ([0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0])
    assert flags_of(resumed, 1, 0, 6) == ([0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0])


def test_abandoned_episodes_stay_so_over_saves_and_wraps(tmp_path):
    replay = small_replay()
    add_flags(replay, "ff", "..", "..", "..")
    replay.save(tmp_path)
    replay.abandon([0])  # row 3 is in a chunk file already, and that is never rewritten
    add_flags(replay, "f.", ".f")
    replay.abandon([1, 0])
    add_flags(replay, "ff", "..")
    manifest = replay.save(tmp_path)

    resumed = small_replay()
    resumed.load(tmp_path, manifest)
    for found in (replay, resumed):
        assert flags_of(found, 0, 2, 6) == ([0, 1, 0, 1, 0, 0], [0] * 6)
        assert flags_of(found, 1, 2, 6) == ([0, 0, 0, 1, 0, 0], [0] * 6)
    assert resumed.close_open_episodes() == 3  # also row 4 of environment 1, which nobody had abandoned before
    add_flags(resumed, "ff", "..", "..", "..", "..", "..", "..")
    assert resumed.save(tmp_path)["marks"] == []


def test_nothing_to_abandon_in_an_empty_environment():
    replay = small_replay()
    replay.abandon([0, 1])
    assert len(replay) == 0


def test_an_empty_replay_has_no_open_episode():
    assert small_replay().close_open_episodes() == 0
