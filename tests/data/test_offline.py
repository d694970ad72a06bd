"""Data that was collected once and trained on later: `dreamer collect`, `dreamer export`, `--replay.preload`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import numpy as np
import pytest
from fake_envs import Nested, Script, Scripted
from tiny_runs import lines, share_agents, tiny_config

import dreamer
from dreamer.cli import main
from dreamer.config import Config
from dreamer.data.minari import MinariSource
from dreamer.data.preload import PreloadWarning, check_trainable, find_preload, task_spaces
from dreamer.envs.spaces import action_leaves, flatten, observation_leaves, unflatten
from dreamer.presets import ConfigError
from dreamer.replay import Replay
from dreamer.replay.episodes import EpisodeFolder, EpisodeWriter
from dreamer.run.collect_episodes import random_steps
from dreamer.run.factories import replay_capacity
from dreamer.types import Space, replay_fields

WON: Script = [(0.0, False, False), (0.5, False, False), (2.0, True, False)]
CUT: Script = [(-1.0, False, False)] * 4 + [(-1.0, False, True)]


class Masked(Scripted):
    """Allows two of its five actions, other ones at each step, and takes no others; fails in its third episode."""

    observation_space = gs.Dict({"action_mask": gs.MultiBinary(5), "vector": Scripted.observation_space})

    def __init__(self) -> None:
        super().__init__(WON)

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        assert action in (self.position % 5, (self.position + 2) % 5)
        if self.episode == 2 and self.position == 1:
            raise ZeroDivisionError("the third episode")
        return super().step(action)

    def _observation(self, action: int) -> Any:
        mask = np.isin(np.arange(5), [self.position % 5, (self.position + 2) % 5])
        return {"action_mask": mask.astype(np.int8), "vector": super()._observation(action)}


gymnasium.register("Masked-v0", entry_point=Masked)
gymnasium.register("Scripts-v0", entry_point=lambda: Scripted(WON, CUT))
TASK = "gym_Scripts-v0"
OBSERVATIONS, ACTIONS = {"vector": Space("vector", (3,))}, {"action": Space("discrete", (), (5,))}


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    share_agents(monkeypatch)


def read(folder: Path) -> list[dict[str, np.ndarray]]:
    source = EpisodeFolder(folder, OBSERVATIONS, ACTIONS)
    return [dict(source.read(i)) for i in range(len(source.lengths))]


def follows_the_script(episode: dict[str, np.ndarray]) -> bool:
    """Whether an episode of the task is one of its two scripts, or its beginning, with the actions that were taken.

    The observation is [number of the episode, step, last action]; scripts alternate.
    """
    number, actions = int(episode["vector"][0, 0]), len(episode["reward"]) - 1
    script = (WON, CUT)[number % 2]
    assert (episode["vector"][:, 0] == number).all()
    assert episode["vector"][:, 1].tolist() == list(range(actions + 1))
    assert episode["vector"][1:, 2].tolist() == episode["action"][:-1].tolist()
    assert episode["reward"].tolist() == [0.0, *(reward for reward, _, _ in script[:actions])]
    assert episode["is_terminal"][-1] == script[actions - 1][1]
    return actions == len(script)


# --- dreamer collect ---------------------------------------------------------------------------


def test_collect_writes_what_happened(tmp_path, capsys):
    line = ["collect", TASK, str(tmp_path / "out"), "--steps", "999", "--env.num_envs", "2", "--seed", "3"]
    assert main(line) == 0
    episodes = read(tmp_path / "out")
    whole = [follows_the_script(episode) for episode in episodes]
    # Rounded up to 2 x 500 steps: 50 times both scripts (4 and 6 steps) in each environment, nothing is left over.
    assert all(whole) and sum(len(episode["reward"]) for episode in episodes) == 1000
    assert "200 episodes, 1,000 steps, score -1.25 on average (-5 to 2.5)" in capsys.readouterr().out
    taken = np.bincount(np.concatenate([episode["action"] for episode in episodes]), minlength=5)
    assert ((taken - 200.0) ** 2 / 200).sum() < 18.5  # chi-squared, 4 degrees of freedom, one in a thousand


def test_the_seed_decides_what_is_collected(tmp_path):
    def actions(name: str, seed: str) -> list[int]:
        line = ["collect", TASK, str(tmp_path / name), "--steps", "90", "--env.num_envs", "1", "--seed", seed]
        assert main(line) == 0
        return np.concatenate([episode["action"] for episode in read(tmp_path / name)]).tolist()

    first = actions("a", "1")
    assert first == actions("b", "1") and first != actions("c", "2")


@pytest.mark.parametrize("after", [0, 30])
def test_collecting_that_is_asked_to_stop_keeps_what_was_played(tmp_path, monkeypatch, request, after):
    def hung_up(*arguments: Any) -> Iterator[Any]:
        for number, step in enumerate(random_steps(*arguments)):
            if number == after:
                os.kill(os.getpid(), signal.SIGHUP)
            yield step

    monkeypatch.setattr("dreamer.run.collect_episodes.random_steps", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite under nohup ignores it, and so would the command
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    assert main(["collect", TASK, str(tmp_path), "--steps", "900", "--env.num_envs", "1"]) == 0
    # The end is cut, of at least two steps: an episode that has only begun is none.
    assert max(2, after) <= sum(len(episode["reward"]) for episode in read(tmp_path)) <= after + 2


def test_what_goes_on_when_collecting_ends_is_cut(tmp_path):
    assert main(["collect", TASK, str(tmp_path), "--steps", "8", "--env.num_envs", "1"]) == 0
    won, cut = read(tmp_path)
    assert follows_the_script(won) and not follows_the_script(cut)
    assert len(cut["reward"]) == 4 and not cut["is_terminal"].any()


def test_random_play_takes_what_is_allowed_and_outlives_failures(tmp_path, capsys):
    """Each life of the environment is two episodes of 4 steps and 2 steps of a third; one of 10 steps starts over."""
    line = ["collect", "gym_Masked-v0", str(tmp_path), "--steps", "30", "--env.num_envs", "1"]
    assert main([*line, "--env.restart_seconds", "0"]) == 0
    source = EpisodeFolder(tmp_path, OBSERVATIONS | {"action_mask": Space("discrete", (5,), (2,) * 5)}, ACTIONS)
    assert list(source.lengths) == [4, 4, 2] * 3
    assert [bool(source.read(i)["is_terminal"][-1]) for i in range(9)] == [True, True, False] * 3
    assert all(source.read(i)["is_last"][-1] for i in range(9))
    assert "the third episode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("collect toy_catch", ["out"]),
        ("collect toy_katch OUT", ["toy_catch"]),
        ("collect toy_catch OUT --steps 0", ["--steps", "from 1"]),
        ("collect toy_catch OUT --steps 15 --env.num_envs 8", ["--steps", "at least 16", "got 15"]),
        ("collect toy_catch OUT --run.sead 3", ["run.sead"]),
        ("collect toy_catch OUT --policy mode", ["--from"]),
        ("collect toy_catch OUT --policy random --from OUT", ["without --from"]),
        ("collect toy_catch OUT --from OUT", ["config.yaml"]),
        ("collect toy_catch FULL", ["FULL", "without episodes"]),
        ("export", ["logdir"]),
        ("export OUT OUT2", ["OUT", "found none"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, line, words):
    EpisodeWriter(tmp_path / "FULL").write({"reward": np.zeros(3, np.float32)})
    arguments = [str(tmp_path / word) if word.isupper() or word == "OUT2" else word for word in line.split()]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dreamer: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "OUT").exists()


# --- A run that was trained ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of 51 steps in each of two environments; its ring holds the last 30 of each."""
    logdir = tmp_path_factory.mktemp("runs") / "run"
    options = {"run__agent_steps": 102, "run__eval_every": None, "run__final_eval": False, "replay__capacity": 60}
    with pytest.MonkeyPatch.context() as patch:
        share_agents(patch)
        assert dreamer.train(tiny_config(task=TASK, logdir=str(logdir), **options)) == 0
    return logdir


def test_export_writes_the_whole_episodes_that_are_stored(trained, tmp_path):
    """Row 50 is the newest, step 0 of episode 10; rows 21 to 50 are stored; episodes of 4 and 6 steps begin at 0, 4,
    10, 14, 20, 24, ...: so the beginning of episode 4 (row 20) is gone, and 5 to 9 are whole."""
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    assert main(["export", str(trained), str(tmp_path / "out")]) == 0
    episodes = read(tmp_path / "out")
    assert all(follows_the_script(episode) for episode in episodes)
    assert sorted(int(e["vector"][0, 0]) for e in episodes) == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_export_of_what_has_not_ended(tmp_path):
    options = {"run__agent_steps": 106, "run__eval_every": None, "run__final_eval": False}
    logdir = str(tmp_path / "run")
    assert dreamer.train(tiny_config(task=TASK, logdir=logdir, **options)) == 0
    for name, count in (("closed", 20), ("all", 22)):
        assert main(["export", logdir, str(tmp_path / name), *(["--unfinished"] if name == "all" else [])]) == 0
        episodes = read(tmp_path / name)
        assert len(episodes) == count
        assert sum(follows_the_script(episode) for episode in episodes) == 20
    for episode in episodes[20:]:  # rows 50 to 52, step 0 to 2 of episode 10
        assert len(episode["reward"]) == 3 and episode["vector"][0, 0] == 10


@pytest.mark.parametrize("policy", ["sample", "mode"])
def test_collect_with_a_trained_agent(trained, tmp_path, policy):
    line = ["collect", TASK, str(tmp_path), "--from", str(trained), "--steps", "40", "--policy", policy]
    assert main([*line, "--env.num_envs", "1"]) == 0
    episodes = read(tmp_path)
    assert [follows_the_script(episode) for episode in episodes] == [True] * 8
    actions = {tuple(episode["action"].tolist()) for episode in episodes if len(episode["action"]) == 6}
    assert policy == "mode" or len(actions) > 1, "sampled actions differ between episodes of the same script"


def test_collect_with_an_agent_of_another_task(trained, tmp_path, capsys):
    assert main(["collect", "toy_catch", str(tmp_path), "--from", str(trained), "--steps", "40"]) == 2
    assert "that the agent was trained with" in capsys.readouterr().err


# --- Preloading --------------------------------------------------------------------------------


def write(folder: Path, *lengths: int) -> None:
    """Episodes of which number i observes i everywhere."""
    writer = EpisodeWriter(folder)
    for number, length in enumerate(lengths):
        steps = np.arange(length)
        writer.write(
            {
                "vector": np.full((length, 3), number, np.float32),
                "action": (steps % 5).astype(np.int32),
                "reward": np.zeros(length, np.float32),
                "is_first": steps == 0,
                "is_last": steps == length - 1,
                "is_terminal": np.zeros(length, bool),
            }
        )


def preload_config(folder: Path, **overrides: Any) -> Config:
    return tiny_config(task=TASK, replay__preload=str(folder), **overrides)


def rings(capacity: int, num_envs: int = 2) -> Replay:
    return Replay(replay_fields(OBSERVATIONS, ACTIONS, {}), num_envs, capacity, 9, seed=0)


def numbers(replay: Replay) -> set[int]:
    """Numbers of the stored episodes, as far as 200 draws of sequences show them."""
    return set(replay.gather(replay.select(200))["vector"].astype(int).reshape(-1).tolist())


def test_preloading_fills_the_replay(tmp_path):
    write(tmp_path / "random", 10, 12)
    write(tmp_path / "trained", 11, 9)
    found = find_preload(preload_config(tmp_path), *task_spaces(preload_config(tmp_path)))
    assert found is not None and found.steps == 42
    assert found.room(2) == 42 + 2 * 12
    replay = rings(found.room(2))
    assert found.fill(replay) == f"4 episodes, 42 steps from {tmp_path}"
    assert len(replay) == 42


def test_the_newest_episodes_win_where_not_all_have_room(tmp_path):
    write(tmp_path, *[10] * 12)
    found = find_preload(preload_config(tmp_path), OBSERVATIONS, ACTIONS)
    assert found is not None
    replay = rings(48)
    with pytest.warns(PreloadWarning, match="120 steps, the replay has room for the newest 40.*replay.capacity"):
        found.fill(replay)
    assert numbers(replay) == {8, 9, 10, 11}


def test_of_an_episode_longer_than_its_ring_the_end_stays(tmp_path):
    write(tmp_path, 100)
    found = find_preload(preload_config(tmp_path), OBSERVATIONS, ACTIONS)
    assert found is not None
    replay = rings(40)
    with pytest.warns(PreloadWarning):
        found.fill(replay)
    assert len(replay) == 20
    assert replay.gather(replay.select(200))["is_last"].any()


def test_a_run_without_preloading_needs_nothing():
    assert find_preload(tiny_config(task=TASK), OBSERVATIONS, ACTIONS) is None


def test_capacity_has_room_for_what_is_given_and_what_is_collected(tmp_path):
    options: dict[str, Any] = {"run__agent_steps": 100, "env__num_envs": 2, "replay__capacity": 1000}
    config = preload_config(tmp_path, **options)
    assert replay_capacity(tiny_config(**options)) == 102
    assert replay_capacity(config, 300) == 402
    assert replay_capacity(config, 3000) == 1000
    assert replay_capacity(preload_config(tmp_path, run__collect=False, **options), 300) == 300


def test_data_that_cannot_be_trained_on_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--replay\.preload: expected a folder with episodes.*found none"):
        find_preload(preload_config(tmp_path / "none"), OBSERVATIONS, ACTIONS)
    write(tmp_path, 10, 12)
    found = find_preload(preload_config(tmp_path), {"vector": Space("vector", (4,))}, ACTIONS)
    assert found is not None
    with pytest.raises(ConfigError, match=r"--replay\.preload .*000000000_9_0\.npz: expected 'vector' of shape"):
        found.fill(Replay(replay_fields({"vector": Space("vector", (4,))}, ACTIONS, {}), 1, 99, 9, 0))


def test_too_little_data_to_train_on_alone_is_told(tmp_path):
    """Two rings of 23 steps have 2 x 15 positions at which 9 steps begin; a batch of 2 x 8 needs 16 of them."""
    write(tmp_path, 10, 10, 13, 13)
    config = preload_config(tmp_path, run__collect=False)
    found = find_preload(config, OBSERVATIONS, ACTIONS)
    assert found is not None
    replay = rings(found.room(2))
    found.fill(replay)
    check_trainable(config, replay)
    short = preload_config(tmp_path, run__collect=False, run__batch_size=4)
    with pytest.raises(ConfigError, match="at least 32 positions at which 9 steps in a row begin.*got 30 in 46 steps"):
        check_trainable(short, replay)
    check_trainable(preload_config(tmp_path, run__batch_size=4), replay)


def test_training_on_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"run\.collect false.*--replay\.preload"):
        tiny_config(run__collect=False)


# --- Training on data alone --------------------------------------------------------------------


def test_a_run_that_collects_nothing_trains_on_its_data(tmp_path):
    """60 steps are counted, though none is taken; it goes on without the files; the data is what it was."""
    assert main(["collect", TASK, str(tmp_path / "data"), "--steps", "100", "--env.num_envs", "2"]) == 0
    data, logdir = tmp_path / "data", tmp_path / "run"
    options: dict[str, Any] = {"run__collect": False, "run__eval_every": 20, "run__final_eval": False}

    def train(agent_steps: int) -> dict[str, Any]:
        config = preload_config(data, logdir=str(logdir), run__agent_steps=agent_steps, **options)
        assert dreamer.train(config) == 0
        return [record for record in lines(logdir / "metrics.jsonl") if "train/loss/rew" in record][-1]

    first = train(40)
    # Train ratio 16, batches of 2 x 8: an update for each counted step after the first of the two environments.
    assert (first["agent_steps"], first["updates"], first["replay/items"]) == (40, 38, 100)
    shutil.rmtree(data)
    second = train(60)
    assert (second["agent_steps"], second["updates"], second["replay/items"]) == (60, 58, 100)
    assert not (logdir / "scores.jsonl").exists()
    assert sum("eval/score" in record for record in lines(logdir / "metrics.jsonl")) == 3
    assert main(["export", str(logdir), str(tmp_path / "again")]) == 0
    episodes = read(tmp_path / "again")
    assert len(episodes) == 20 and all(follows_the_script(episode) for episode in episodes)


def test_a_run_can_begin_with_data_and_collect(tmp_path):
    assert main(["collect", TASK, str(tmp_path / "data"), "--steps", "100", "--env.num_envs", "2"]) == 0
    logdir = tmp_path / "run"
    options: dict[str, Any] = {"run__agent_steps": 40, "run__eval_every": None, "run__final_eval": False}
    assert dreamer.train(preload_config(tmp_path / "data", logdir=str(logdir), **options)) == 0
    last = [record for record in lines(logdir / "metrics.jsonl") if "replay/items" in record][-1]
    assert last["replay/items"] == 100 + 40
    assert len(lines(logdir / "scores.jsonl")) == 8
    assert main(["export", str(logdir), str(tmp_path / "out")]) == 0
    episodes = read(tmp_path / "out")
    assert len(episodes) == 20 + 8 and all(follows_the_script(episode) for episode in episodes)


# --- Minari ------------------------------------------------------------------------------------

minari = pytest.importorskip("minari")


def dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, env: gymnasium.Env, choose: Callable[[], Any], episodes: int
) -> tuple[Path, list[list[Any]]]:
    """(dataset as Minari's own collector writes it, the observations that came)."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    seen: list[list[Any]] = []
    with minari.DataCollector(env, data_format="hdf5", jpeg_encoding=False) as collector:
        for seed in range(episodes):
            seen.append([collector.reset(seed=seed)[0]])
            over = False
            while not over:
                observation, _, terminated, truncated, _ = collector.step(choose())
                seen[-1].append(observation)
                over = terminated or truncated
        collector.create_dataset("made/here-v0", algorithm_name="x", author="x", author_email="x", code_permalink="x")
    return folder / "made" / "here-v0", seen


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_a_dataset_is_converted_as_its_environment_is(tmp_path, monkeypatch):
    """Every kind of space: our actions go out through the environment's door, and come back from the file."""
    env = Nested()
    rng = np.random.default_rng(0)
    see, act = observation_leaves(env.observation_space), action_leaves(env.action_space)
    spaces = {leaf.key: leaf.space for leaf in see}, {leaf.key: leaf.space for leaf in act}
    ours: list[dict[str, np.ndarray]] = []

    def choose() -> Any:
        action = {leaf.key: leaf.space.sample(rng) for leaf in act}
        action["action/whole"] = np.array([rng.integers(11) / 5 - 1], np.float32)  # what whole numbers can mean
        ours.append(action)
        return unflatten(env.action_space, act, action)

    folder, seen = dataset(tmp_path, monkeypatch, env, choose, episodes=3)
    source, taken = MinariSource(folder / "data", *spaces), iter(ours)
    assert list(source.lengths) == [len(observations) for observations in seen]
    for index, observations in enumerate(seen):
        episode, length = source.read(index), len(observations)
        for t, observation in enumerate(observations):
            for key, value in flatten(see, observation).items():
                assert np.array_equal(episode[key][t], value)
        for t, action in zip(range(length - 1), taken, strict=False):
            for key, value in action.items():
                np.testing.assert_allclose(episode[key][t], value, atol=1e-6)
        assert episode["reward"].tolist() == [0.0] + [1.0] * (length - 1)
        assert np.flatnonzero(episode["is_first"]).tolist() == [0]
        assert (
            np.flatnonzero(episode["is_last"]).tolist()
            == [length - 1]
            == np.flatnonzero(episode["is_terminal"]).tolist()
        )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_a_dataset_as_preloaded_data(tmp_path, monkeypatch):
    """By the folder that Minari names after the dataset; a time limit is an end, but not a terminal one."""
    rng = np.random.default_rng(0)
    folder, _ = dataset(tmp_path, monkeypatch, Scripted(WON, CUT), lambda: rng.integers(5), episodes=4)
    found = find_preload(preload_config(folder), OBSERVATIONS, ACTIONS)
    assert found is not None and found.steps == 2 * (4 + 6)
    for index in range(4):
        assert follows_the_script(dict(found.source.read(index)))
    replay = rings(found.room(2))
    found.fill(replay)
    assert len(replay) == 20


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_a_dataset_of_another_task_is_refused(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder, _ = dataset(tmp_path, monkeypatch, Scripted(WON), lambda: rng.integers(5), episodes=1)
    with pytest.raises(ConfigError, match="expected a dataset with the actions of the task"):
        find_preload(preload_config(folder), OBSERVATIONS, {"action": Space("discrete", (), (6,))})
    with pytest.raises(ConfigError, match="action repeat of 1"):
        find_preload(preload_config(folder, env__gym__repeat=2), OBSERVATIONS, ACTIONS)
    (folder / "data" / "metadata.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_preload(preload_config(folder), OBSERVATIONS, ACTIONS)


# --- Learning ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_play_is_enough_to_learn_from(tmp_path):
    """A fresh agent, trained on 20,000 steps of random play without one of its own, plays almost perfectly."""

    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "dreamer", *arguments, "--run.platform", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    data, logdir = str(tmp_path / "data"), tmp_path / "run"
    run("collect", "toy_catch", data, "--steps", "20000", "--env.num_envs", "8")
    offline = ("--replay.preload", data, "--run.collect", "false", "--seed", "1")
    run("train", "--configs", "quickstart", *offline, "--logdir", str(logdir))
    records = lines(logdir / "metrics.jsonl")
    assert not (logdir / "scores.jsonl").exists() or (logdir / "scores.jsonl").read_text() == ""
    assert [record["eval/score"] for record in records if "eval/score" in record][-1] >= 0.8 * 3
