"""From environment to batch, spelled out: what is stored is what happened, and what is counted is what was scored."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import gymnasium.spaces as gs
import jax
import numpy as np
import pytest
from fake_envs import Script, Scripted, Spaced
from tiny_runs import Collection, tiny_agent, vector_env

from dreamer.env_config import EnvConfig
from dreamer.envs import make_vector_env, transition
from dreamer.run import collector
from dreamer.run.collector import run_episodes
from dreamer.run.nonfinite import NonFiniteActionError
from dreamer.types import Space

# Ends: by itself after three actions; at a time limit after one; both at once after two.
WIN: Script = [(1.0, False, False), (2.0, False, False), (3.0, True, False)]
LIMIT: Script = [(5.0, False, True)]
BOTH: Script = [(0.5, False, False), (-1.0, True, True)]

F, T = False, True

Columns = dict[str, list]


@contextlib.contextmanager
def scripted(*scripts: list[Script], length: int, workers: str = "inline") -> Iterator[Collection]:
    """One environment for each list of scripts."""
    envs = vector_env(lambda index, seed: Scripted(*scripts[index]), len(scripts), workers)
    try:
        yield Collection(envs, length)
    finally:
        envs.close()


def sequence(batch: dict[str, np.ndarray], index: int = 0) -> Columns:
    """One sequence of a batch as lists; `seen`: [episode, step, action that led here]."""
    columns = {key: batch[key][index].tolist() for key in ("reward", "is_first", "is_last", "is_terminal", "action")}
    return columns | {"seen": batch["vector"][index].astype(int).tolist()}


def check_sequence(columns: Columns) -> None:
    """That a sequence of `Scripted` is what happened: the action of a step is the one that led to the next.

    The environment reports the action that it was given, -1 at a reset: the one witness that cannot be shifted along.
    """
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        assert row["is_first"] == (row["seen"][1] == 0)
        assert row["reward"] == 0 or not row["is_first"]
        assert row["is_last"] or not row["is_terminal"]
    for before, after in itertools.pairwise(rows):
        assert after["is_first"] == before["is_last"]
        assert after["seen"][2] == (-1 if before["is_last"] else before["action"])
        assert after["seen"][0] == before["seen"][0] + before["is_last"]


def test_several_episodes_in_one_sequence():
    with scripted([WIN, LIMIT, BOTH], length=10) as collection:
        collection.steps(10)
        batch = collection.replay.gather(collection.replay.select(1))
    columns = sequence(batch)
    a = columns["action"]
    # step                       0  1  2  3  | 0  1  | 0  1  2  | 0
    assert columns["reward"] == [0, 1, 2, 3, 0, 5, 0, 0.5, -1, 0]
    assert columns["is_first"] == [T, F, F, F, T, F, T, F, F, T]
    assert columns["is_last"] == [F, F, F, T, F, T, F, F, T, F]
    assert columns["is_terminal"] == [F, F, F, T, F, F, F, F, T, F]
    # The actions 3, 5 and 8 were chosen and stored, and never executed.
    assert columns["seen"] == [
        [0, 0, -1], [0, 1, a[0]], [0, 2, a[1]], [0, 3, a[2]],
        [1, 0, -1], [1, 1, a[4]],
        [2, 0, -1], [2, 1, a[6]], [2, 2, a[7]],
        [3, 0, -1],
    ]  # fmt: skip
    assert len(set(a)) > 1
    check_sequence(columns)


@pytest.mark.parametrize("workers", ["inline", "process"])
def test_two_environments_keep_to_themselves(workers):
    with scripted([WIN], [LIMIT, BOTH], length=8, workers=workers) as collection:
        collection.steps(8)
        selection = collection.replay.select(64)
        batch = collection.replay.gather(selection)
    assert set(selection.env) == {0, 1}
    first, second = (sequence(batch, int(np.flatnonzero(selection.env == env)[0])) for env in (0, 1))
    assert first["reward"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert first["is_first"] == [T, F, F, F, T, F, F, F]
    assert first["is_last"] == [F, F, F, T, F, F, F, T]
    assert first["is_terminal"] == [F, F, F, T, F, F, F, T]
    assert second["reward"] == [0, 5, 0, 0.5, -1, 0, 5, 0]
    assert second["is_first"] == [T, F, T, F, F, T, F, T]
    assert second["is_last"] == [F, T, F, F, T, F, T, F]
    assert second["is_terminal"] == [F, F, F, F, T, F, F, F]
    assert first["action"] != second["action"]
    check_sequence(first)
    check_sequence(second)


def test_every_sequence_of_a_long_collection():
    with scripted([WIN, LIMIT, BOTH], [BOTH, WIN], length=6) as collection:
        collection.steps(60)
        batch = collection.replay.gather(collection.replay.select(100))
    for index in range(100):
        check_sequence(sequence(batch, index))


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_check_finds_a_shifted_action(shift):
    with scripted([WIN, LIMIT, BOTH], length=20) as collection:
        collection.steps(20)
        columns = sequence(collection.replay.gather(collection.replay.select(1)))
    check_sequence(columns)
    with pytest.raises(AssertionError):
        check_sequence(columns | {"action": np.roll(columns["action"], shift).tolist()})


@pytest.mark.parametrize("key", ["is_first", "is_last"])
def test_the_check_finds_a_missing_boundary(key):
    with scripted([WIN], length=8) as collection:
        collection.steps(8)
        columns = sequence(collection.replay.gather(collection.replay.select(1)))
    with pytest.raises(AssertionError):
        check_sequence(columns | {key: [F] * 8})


def test_what_the_world_model_is_given():
    """The action at trained step t is the one that led there, which the environment itself reports."""
    with scripted([WIN, LIMIT, BOTH], length=10) as collection:
        collection.steps(30)
        batch = collection.replay.gather(collection.replay.select(8))
        agent, params = collection.agent, collection.state["params"]
    context, actions, trained = agent.model(params).split_batch(batch)
    assert actions.shape == (8, 9, 5)
    first, executed = trained["is_first"], trained["vector"][..., 2]
    assert first.any() and not first.all()
    np.testing.assert_array_equal(np.argmax(actions, -1)[~first], executed[~first])
    # At first steps the slot holds the action that was never executed; the reset mask of the RSSM removes it.
    assert (executed[first] == -1).all()
    np.testing.assert_array_equal(trained["vector"], batch["vector"][:, 1:])
    np.testing.assert_array_equal(context["deter"], batch["deter"][:, 0].astype(np.float32))


def test_stored_latents_are_those_the_policy_had():
    """Observing a stored sequence again, from its stored context, gives the latents that are stored with it."""
    envs = vector_env(lambda index, seed: Scripted(WIN, LIMIT, BOTH))
    collection = Collection(envs, length=12, sample=False)
    collection.steps(12)
    envs.close()
    batch = collection.replay.gather(collection.replay.select(1))
    agent = collection.agent
    whole = agent.model(collection.state["params"])
    model, (context, actions, trained) = whole.world_model, whole.split_batch(batch)
    tokens = model.encoder(trained, actions.shape[:2], agent.dtype)
    states, _ = model.rssm.observe(context, actions, tokens, trained["is_first"], None)
    again = model.rssm.pack(states)
    np.testing.assert_array_equal(again["stoch"], batch["stoch"][:, 1:])
    # The context is stored as bfloat16, whose rounding the first steps still show.
    stored = batch["deter"][:, 1:].astype(np.float32)
    np.testing.assert_allclose(np.asarray(again["deter"], np.float32), stored, atol=0.02)


def test_scores_and_lengths():
    with scripted([WIN, LIMIT, BOTH], [LIMIT], length=5) as collection:
        episodes = collection.steps(8)
    mine = [(e.score, e.length) for e in episodes if e.env == 0]
    other = [(e.score, e.length) for e in episodes if e.env == 1]
    assert mine == [(6.0, 3), (5.0, 1), (-0.5, 2)]
    assert other == [(5.0, 1)] * 4
    assert [e.env for e in episodes] == [1, 0, 1, 0, 1, 1, 0]


class Counting:
    """An environment of our own interface with a key to be logged: 1, 2, 3 at its three steps."""

    observation_spaces = {"vector": Space("vector", (3,)), "log/level": Space("vector", ())}
    action_spaces = {"action": Space("discrete", (), (5,))}

    def __init__(self) -> None:
        self.level = 0

    def reset(self) -> dict:
        self.level = 1
        return self._transition(is_first=True)

    def step(self, action: dict) -> dict:
        self.level += 1
        return self._transition(is_last=self.level == 3)

    def render(self) -> None:
        return None

    def close(self) -> None:
        self.level = 0

    def _transition(self, **flags: bool) -> dict:
        return transition({"vector": np.zeros(3, np.float32), "log/level": np.float32(self.level)}, **flags)


def test_log_keys_are_counted_and_never_seen_or_stored():
    envs = make_vector_env("own", EnvConfig(workers="inline"), 1, 0, True, lambda index, seed: Counting())
    collection = Collection(envs)
    episodes = collection.steps(9)
    assert [e.logs for e in episodes] == [{"level/mean": 2.0, "level/max": 3.0}] * 3
    assert "log/level" not in collection.replay.fields


@pytest.mark.parametrize(("count", "share"), [(5, [3, 2]), (4, [2, 2]), (1, [1, 0]), (2, [1, 1])])
def test_every_environment_plays_its_share(count, share):
    slow = [(0.0, False, False)] * 6 + [(1.0, True, False)]
    with scripted([LIMIT], [slow], length=5) as collection:
        episodes = run_episodes(collection.collector, collection.state["params"], count)
    assert [sum(e.env == env for e in episodes) for env in (0, 1)] == share
    assert all(e.score == (5.0, 1.0)[e.env] for e in episodes)


def test_episodes_can_be_given_up():
    with scripted([LIMIT], length=5) as collection:
        calls = iter([False, False, False, True])
        episodes = run_episodes(collection.collector, collection.state["params"], 100, lambda: next(calls))
    # Four steps: an episode ends, a new one begins, ends, begins.
    assert len(episodes) == 2


def test_episodes_that_do_not_end_are_told(monkeypatch):
    monkeypatch.setattr("dreamer.run.collector.ENDLESS", 4)
    on: Script = [(0.0, False, False)]
    with scripted([on * 40], [on * 40], length=41) as collection:
        calls = iter([False] * 5 + [True])
        with pytest.warns(
            RuntimeWarning, match=r"no episode of 2 has ended in 4 steps; the option env\.time_limit"
        ) as told:
            run_episodes(collection.collector, collection.state["params"], 100, lambda: next(calls))
    assert len(told) == 1
    with scripted([on * 2 + LIMIT], [on * 40], length=41) as collection:  # any other warning is an error
        calls = iter([False] * 5 + [True])
        run_episodes(collection.collector, collection.state["params"], 100, lambda: next(calls))


class Filmed(Scripted):
    """Its picture is all of one grey: 10 * episode + step."""

    render_mode = "rgb_array"

    def render(self) -> np.ndarray:
        return np.full((4, 6, 3), 10 * self.episode + self.position, np.uint8)


def greys(frames: list[np.ndarray]) -> list[int]:
    assert all(frame.shape == (4, 6, 3) and np.ptp(frame) == 0 for frame in frames)
    return [int(frame[0, 0, 0]) for frame in frames]


@pytest.mark.parametrize("workers", ["inline", "process"])
def test_an_episode_is_recorded_from_its_first_to_its_last_picture(workers):
    envs = vector_env(lambda index, seed: Filmed(WIN, BOTH, WIN) if index == 0 else Filmed(LIMIT), 2, workers)
    collection = Collection(envs)
    collection.collector.record()
    episodes = collection.steps(2)
    collection.collector.record()  # while the first is being recorded: the next one too
    episodes += collection.steps(10)
    envs.close()
    mine = [e for e in episodes if e.env == 0]
    assert [greys(e.frames) for e in mine] == [[0, 1, 2, 3], [10, 11, 12], []]
    assert all(not e.frames for e in episodes if e.env == 1)


def test_a_recording_that_was_asked_for_late_waits_for_the_next_episode():
    envs = vector_env(lambda index, seed: Filmed(WIN, BOTH))
    collection = Collection(envs)
    episodes = collection.steps(1)
    collection.collector.record()
    episodes += collection.steps(7)
    assert [greys(e.frames) for e in episodes] == [[], [10, 11, 12]]


def test_a_recording_has_a_limited_number_of_pictures(monkeypatch):
    monkeypatch.setattr(collector, "VIDEO_FRAMES", 3)
    collection = Collection(vector_env(lambda index, seed: Filmed(WIN)))
    collection.collector.record()
    assert [greys(e.frames) for e in collection.steps(4)] == [[0, 1, 2]]


def test_without_pictures_nothing_is_recorded():
    with scripted([WIN], length=5) as collection:
        collection.collector.record()
        assert [e.frames for e in collection.steps(4)] == [[]]


def test_the_same_stream_gives_the_same_actions_and_another_counter_others():
    def actions(counter: int) -> list[int]:
        with scripted([WIN], length=31) as collection:
            collection.collector.counter = counter
            collection.steps(31)
            return collection.replay.gather(collection.replay.select(1))["action"][0].tolist()

    assert actions(0) == actions(0)
    assert actions(0) != actions(500)


class Broken(Scripted):
    """Its third observation is not a number."""

    def _observation(self, action: int) -> np.ndarray:
        value = super()._observation(action)
        return value * np.nan if self.position == 2 else value


def test_an_observation_that_is_not_finite_is_named(tmp_path, unchecked_envs):
    collection = Collection(vector_env(lambda index, seed: Broken(WIN)))
    collection.steps(2)
    with pytest.raises(NonFiniteActionError, match="NaN or infinity in vector$") as caught:
        collection.steps(1)
    assert len(collection.replay) == 2
    with np.load(caught.value.dump(tmp_path)) as stored:
        assert np.isnan(stored["vector"]).all()
        assert {"vector", "is_first", "action", "deter", "stoch"} <= set(stored)


def test_an_action_that_is_not_finite_is_named():
    box = gs.Box(-1.0, 1.0, (2,))
    envs = vector_env(lambda index, seed: Spaced(gs.Box(-1.0, 1.0, (3,)), box))
    collection = Collection(envs)
    collection.steps(2)
    policy = collection.state["params"]["actor_critic"]["policy"]
    collection.state["params"]["actor_critic"]["policy"] = jax.tree.map(lambda x: x * np.nan, policy)
    with pytest.raises(NonFiniteActionError, match="NaN or infinity in action$"):
        collection.steps(1)


def test_agents_are_shared():
    spaces = ({"vector": Space("vector", (3,))}, {"action": Space("discrete", (), (5,))})
    assert tiny_agent(*spaces) is tiny_agent(*spaces)


def test_scores_are_of_unscaled_rewards():
    """Two steps of 8: the learner sees a quarter of each."""
    script = [(8.0, False, False), (8.0, True, False)]
    config = EnvConfig(workers="inline", reward_scale=0.25)
    envs = make_vector_env("own", config, 1, 0, True, lambda index, seed: Scripted(script))
    collection = Collection(envs)
    episode, _ = collection.steps(5)
    assert (episode.score, episode.length, episode.logs["unscaled_reward/max"]) == (16, 2, 8)
    rewards = []
    for _ in range(3):
        rewards.append(collection.collector.act(collection.state["params"])["reward"].item())
        collection.collector.wait()
    assert sorted(rewards) == [0, 2, 2]
    envs.close()
