"""Whole runs: what they print, what they leave behind, and that a seed decides all of it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import jax
import numpy as np
import pytest
from fake_envs import Script, Scripted
from PIL import Image
from tiny_runs import lines, same, share_agents, tiny_config

import dreamer
from dreamer.cli import main
from dreamer.envs import env_seed
from dreamer.presets import load_config
from dreamer.run.loop import Run
from dreamer.saves.checkpoint import Checkpointer

ROUND: Script = [(0.0, False, False)] * 4 + [(1.0, True, False)]

MakeEnv = Callable[[int, int], gymnasium.Env]


def scripted(index: int, seed: int) -> gymnasium.Env:
    return Scripted(ROUND)


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what depends on how fast the machine is."""
    return [{k: v for k, v in record.items() if not k.startswith(("fps/", "time/", "system/"))} for record in records]


@dataclasses.dataclass
class Finished:
    """A run that went to its end, from the command line."""

    logdir: Path
    output: str


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "dreamer", *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`dreamer train --configs debug`: 200 steps of the built-in game, everything switched on."""
    logdir = tmp_path_factory.mktemp("runs") / "debug run"
    done = command("train", "--configs", "debug", "--logdir", str(logdir), "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(logdir, done.stdout)


def test_a_run_says_what_runs_and_ends_with_its_results(finished):
    text = " ".join(finished.output.split())
    for said in (
        "no accelerator found", "versions python 3.", "jax", "toy_catch, 2 environments (inline), seed 3",
        "image (16, 16, 3) -> action (3,)", "rssm", "policy", "1 per agent step (train ratio 16)",
        "B per step", "about", "200/200 steps (100 %)", "best possible",
    ):  # fmt: skip
        assert said in text, said
    assert f"dream video: {finished.logdir / 'videos' / 'report_dream_image.gif'}" in finished.output
    assert f"--logdir '{finished.logdir}'" in finished.output.splitlines()[-1]  # quoted: it has a space


def test_the_configuration_is_kept_and_can_be_given_back(finished):
    stored = load_config([finished.logdir / "config.yaml"])
    assert stored == load_config(["debug"], {"logdir": str(finished.logdir), "seed": 3})


def test_metrics_are_named_as_documented(finished):
    records = lines(finished.logdir / "metrics.jsonl")
    keys = {key for record in records for key in record}
    expected = {
        "step", "agent_steps", "updates", "train/loss/dyn", "train/loss/rep", "train/loss/image", "train/loss/rew",
        "train/loss/con", "train/loss/policy", "train/loss/value", "train/loss/repval", "train/ret",
        "train/rand/action",
        "train/ent/action", "train/opt/loss", "train/opt/grad_norm", "fps/policy", "fps/train", "replay/items",
        "replay/ratio", "episode/mean_score", "episode/mean_length", "eval/score", "eval/length",
        "report/seen_error/image", "report/imagined_error/image",
    }  # fmt: skip
    assert expected <= keys, expected - keys
    assert all(np.isfinite(value) for record in records for value in record.values())
    assert [r["agent_steps"] for r in records if "fps/policy" in r] == [40, 80, 120, 160, 200, 200]
    assert [r["agent_steps"] for r in records if "eval/score" in r] == [100, 200, 200]
    assert 0.9 < max(r.get("train/rand/action", 0) for r in records) <= 1


def test_updates_and_replay_are_what_the_train_ratio_says(finished):
    last = lines(finished.logdir / "metrics.jsonl")[-1]
    # Batches of 2 x 8 and ratio 16: one update a step. Two environments have 16 starts of 9 steps after 16 steps each.
    assert (last["step"], last["agent_steps"], last["updates"]) == (200, 200, 200 - 32)
    replay = [r for r in lines(finished.logdir / "metrics.jsonl") if "replay/items" in r][-1]
    assert replay["replay/items"] == replay["replay/inserts"] == 200
    # One more batch is drawn than was trained on: it waits.
    assert replay["replay/sequences"] == (168 + 1) * 2


def test_scores_of_all_training_episodes(finished):
    scores = lines(finished.logdir / "scores.jsonl")
    # Episodes of 23 actions are 24 steps, in two environments in step.
    assert [s["step"] for s in scores] == [46, 46, 94, 94, 142, 142, 190, 190]
    assert {s["episode/length"] for s in scores} == {23}
    assert all(s["episode/score"] in (-3, -1, 1, 3) for s in scores)


def test_videos(finished):
    with Image.open(finished.logdir / "videos" / "episode_video.gif") as episode:
        assert episode.n_frames > 10
        assert episode.size == (128, 128)
    with Image.open(finished.logdir / "videos" / "report_dream_image.gif") as dream:
        assert dream.n_frames == 8
        # Two sequences in columns, three rows: true, model, error.
        assert dream.size[0] > 2 * 64 and dream.size[1] > 3 * 64


def test_tensorboard_has_scalars_and_videos(finished):
    (events,) = (finished.logdir / "tensorboard").iterdir()
    data = events.read_bytes()
    for name in (
        b"3_world_model/loss/dyn",
        b"1_score/episode/score",
        b"6_replay/items",
        b"2_health/dream/image",
        b"2_health/health",
        b"1_score/episode/video",
        b"GIF89a",
    ):
        assert name in data, name


def test_checkpoints_of_the_run(finished):
    checkpointer = Checkpointer(finished.logdir, read_only=True)
    assert checkpointer.steps() == [100, 200]
    step, state, meta = checkpointer.restore()
    assert (step, meta["agent_steps"], meta["updates"], int(state["updates"])) == (200, 200, 168, 168)
    evaluated = [r["eval/score"] for r in lines(finished.logdir / "metrics.jsonl") if "eval/score" in r]
    assert checkpointer.best_score() == max(evaluated)


def test_eval_from_the_command_line(finished, tmp_path):
    video = tmp_path / "play.gif"
    done = command("eval", str(finished.logdir), "--episodes", "3", "--video", str(video))
    assert done.returncode == 0, done.stderr
    assert "toy_catch" in done.stdout and "best possible" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "toy_catch" in line)
    assert row.split("│")[2].strip() == "3"
    with Image.open(video) as image:
        assert image.n_frames > 10


# Runs in this process, with environments of our own


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """`dreamer.train` in the test's folder, agents shared with other tests."""
    share_agents(monkeypatch)

    def run(make_env: MakeEnv = scripted, name: str = "run", **overrides: Any) -> int:
        options = {"run__agent_steps": 60, "run__final_eval": False, "run__eval_every": None} | overrides
        return dreamer.train(tiny_config(logdir=str(tmp_path / name), **options), make_env=make_env)

    return run


def test_the_same_seed_gives_the_same_run(run_here, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_here(name=name, seed=seed, run__eval_every=40) == 0
    records = {name: without_clock(lines(tmp_path / name / "metrics.jsonl")) for name in "abc"}
    states = {name: Checkpointer(tmp_path / name, read_only=True).restore()[1] for name in "abc"}
    assert records["a"] == records["b"] != records["c"]
    assert same(states["a"], states["b"])
    assert not same(states["a"], states["c"])


def test_what_is_logged_saved_or_evaluated_changes_no_number(run_here, tmp_path):
    run_here(name="plain")
    run_here(
        name="busy", run__eval_every=10, run__checkpoint_every=14, run__log_every=2, run__report_every=20,
        log__videos=True, log__video_every=10, run__checkpoint_minutes=0.01,
    )  # fmt: skip
    plain, busy = (Checkpointer(tmp_path / name, read_only=True).restore()[1] for name in ("plain", "busy"))
    assert same(plain, busy)
    assert lines(tmp_path / "plain" / "scores.jsonl") == lines(tmp_path / "busy" / "scores.jsonl")


class Maze(gymnasium.Env):
    """A user's own: images of odd sizes and a vector, two choices at once; pays for the first choice being 1."""

    def __init__(self, length: int) -> None:
        self.observation_space = gs.Dict({"view": gs.Box(0, 255, (20, 15, 3), np.uint8), "sense": gs.Box(-5, 5, (2,))})
        self.action_space = gs.MultiDiscrete([2, 3])
        self._length, self._left = length, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._left = self._length
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self._left -= 1
        return self._observation(), float(action[0] == 1), False, self._left == 0, {}

    def _observation(self) -> dict:
        view = np.full((20, 15, 3), 10 * self._left, np.uint8)
        return {"view": view, "sense": self.np_random.uniform(-5, 5, 2).astype(np.float32)}


def test_own_environment_function(run_here, tmp_path, capsys):
    length = 6
    seeds: list[tuple[int, int]] = []

    def make(index: int, seed: int) -> gymnasium.Env:
        seeds.append((index, seed))
        return Maze(length)

    options = {"run__final_eval": True, "log__videos": True, "run__report_every": 60, "env__gym__repeat": 2}
    assert run_here(make, **options) == 0
    text = capsys.readouterr().out
    # It does not go by the name of a game of ours, whose best score is not its best.
    assert "make_env" in text and "toy_catch" not in text and "best possible" not in text
    logdir = tmp_path / "run"
    assert {s["episode/length"] for s in lines(logdir / "scores.jsonl")} == {length // 2}
    last = lines(logdir / "metrics.jsonl")[-1]
    assert (last["step"], last["agent_steps"]) == (120, 60)
    assert (logdir / "videos" / "report_dream_view.gif").exists()
    keys = {key for record in lines(logdir / "metrics.jsonl") for key in record}
    assert {"train/loss/view", "train/loss/sense", "train/rand/action"} <= keys
    # Two training and two evaluation environments, all with seeds of their own.
    # (Others are made for a moment, to see whether their state can be saved.)
    assert [index for index, _ in seeds[:2]] == [0, 1] and {index for index, _ in seeds} == {0, 1}
    assert len({seed for _, seed in seeds}) >= 4


def test_nan_reward_stops_the_run(run_here, tmp_path, capsys, unchecked_envs):
    bad: Script = [(0.0, False, False)] * 3 + [(float("nan"), True, False)]
    code = run_here(lambda index, seed: Scripted(*[ROUND] * 5, bad), run__agent_steps=400, run__checkpoint_every=20)
    assert code == 3
    text = capsys.readouterr().out
    assert "loss/rew = nan" in text and "NaN or infinity in reward" in text
    (dump,) = (tmp_path / "run").glob("nonfinite-update-*.npz")
    assert str(dump) in text
    with np.load(dump) as batch:
        assert np.isnan(batch["reward"]).any()
    update = int(dump.stem.rsplit("-", 1)[1])
    assert f"update {update} was not finite" in text
    step, state, _ = Checkpointer(tmp_path / "run", read_only=True).restore()
    assert step >= 40
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert int(state["updates"]) < update


def test_nan_observation_stops_the_run(run_here, tmp_path, capsys, unchecked_envs):
    class Blind(Scripted):
        def _observation(self, action: int) -> np.ndarray:
            return super()._observation(action) * (np.nan if self.episode == 2 else 1)

    assert run_here(lambda index, seed: Blind(ROUND)) == 3
    assert "NaN or infinity in vector" in capsys.readouterr().out
    (dump,) = (tmp_path / "run").glob("nonfinite-action-*.npz")
    assert dump.stat().st_size


def test_nan_scores_are_never_the_best(run_here, tmp_path, unchecked_envs):
    """Two evaluations; in the first all rewards are NaN."""
    made = 0

    def make(index: int, seed: int) -> gymnasium.Env:
        nonlocal made
        made += 1
        bad: Script = [(float("nan"), True, False)]
        return Scripted(ROUND) if made <= 2 else Scripted(bad, ROUND)

    run_here(make, run__eval_every=30, run__eval_episodes=2, run__agent_steps=60)
    scores = [r["eval/score"] for r in lines(tmp_path / "run" / "metrics.jsonl") if "eval/length" in r]
    assert scores == [None, 1.0]
    assert Checkpointer(tmp_path / "run", read_only=True).best_score() == 1.0


def test_a_request_to_stop_ends_an_evaluation(run_here, tmp_path):
    class Endless(gymnasium.Wrapper):
        def step(self, action: Any) -> tuple:
            os.kill(os.getpid(), signal.SIGTERM)
            observation, _, _, _, info = self.env.step(0)
            self.env.unwrapped.position = 0
            return observation, 0.0, False, False, info

    evaluated = {env_seed(0, False, index) for index in range(2)}

    def make(index: int, seed: int) -> gymnasium.Env:
        return Endless(Scripted(ROUND)) if seed in evaluated else Scripted(ROUND)

    assert run_here(make, run__eval_every=40, run__agent_steps=1000) == 0
    step, _, meta = Checkpointer(tmp_path / "run", read_only=True).restore()
    assert (step, meta["updates"]) == (40, 8)
    assert not any("eval/score" in record for record in lines(tmp_path / "run" / "metrics.jsonl"))


def test_an_attempt_without_a_checkpoint_leaves_no_records(run_here, tmp_path, monkeypatch):
    logdir = tmp_path / "run"
    with monkeypatch.context() as cut_off:
        cut_off.setattr(Run, "loop", lambda run, stop: None)
        run_here(run__agent_steps=20)
    (logdir / "scores.jsonl").write_text('{"step": 77, "episode/score": 1.0, "episode/length": 3}\n')
    (logdir / "metrics.jsonl").write_text('{"step": 77, "agent_steps": 77, "updates": 0}\n')
    run_here(run__agent_steps=20)
    assert [s["step"] for s in lines(logdir / "scores.jsonl")] == [10, 10]
    assert {r["step"] for r in lines(logdir / "metrics.jsonl")} == {20}


# Starting from another run's weights


@pytest.fixture
def begun(run_here, monkeypatch):
    """The training state that a run begins with."""

    def begin(**overrides: Any) -> Any:
        states: list[Any] = []
        monkeypatch.setattr(Run, "loop", lambda run, stop: states.append(jax.device_get(run.learner.state)))
        assert run_here(**overrides) == 0
        return states[0]

    return begin


@pytest.fixture
def teacher(run_here, tmp_path):
    """Weights of a run in tmp_path/teacher."""
    assert run_here(name="teacher", seed=7) == 0
    return Checkpointer(tmp_path / "teacher", read_only=True).restore()[1]


def test_warm_start_with_everything(teacher, begun, tmp_path):
    state = begun(from_checkpoint=str(tmp_path / "teacher"))
    assert same(state["params"], teacher["params"])
    assert same(state["slow"]["value"], teacher["params"]["actor_critic"]["value"])
    # Only weights: the optimizer, the counters and the random streams are this run's own.
    assert int(state["updates"]) == 0 and not same(state["key"], teacher["key"])


@pytest.mark.parametrize("part", ["world_model", "actor", "critic"])
def test_warm_start_in_parts(part, teacher, begun, tmp_path):
    state = begun(from_checkpoint=str(tmp_path / "teacher"), from_checkpoint_parts=(part,))
    fresh = begun(name="fresh")
    assert not same(fresh["params"]["world_model"], teacher["params"]["world_model"])
    source = {name: teacher if name == part else fresh for name in ("world_model", "actor", "critic")}
    assert same(state["params"]["world_model"], source["world_model"]["params"]["world_model"])
    for name, module in (("actor", "policy"), ("critic", "value")):
        assert same(state["params"]["actor_critic"][module], source[name]["params"]["actor_critic"][module])
    assert same(state["slow"]["value"], state["params"]["actor_critic"]["value"])


def test_a_warm_start_that_does_not_fit_names_parameters_and_options(finished, tmp_path, capsys, monkeypatch):
    share_agents(monkeypatch)
    arguments = ["train", "--configs", "debug", "--logdir", str(tmp_path), "--from_checkpoint", str(finished.logdir)]
    assert main([*arguments, "--model.units", "12", "--run.platform", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "parameters differ: world_model." in error and error.count("\n") == 1
    assert "expected float32[" in error and "found float32[" in error
    assert "model.units: 8 -> 12" in error and "--from_checkpoint_parts" in error


def test_parts_that_are_not_copied_may_differ(begun, teacher, tmp_path):
    start = {"from_checkpoint": str(tmp_path / "teacher"), "from_checkpoint_parts": ("world_model",)}
    state = begun(model__policy_layers=2, **start)
    assert same(state["params"]["world_model"], teacher["params"]["world_model"])


def test_a_warm_start_from_nowhere(tmp_path, capsys):
    arguments = ["train", "--configs", "debug", "--logdir", str(tmp_path / "run"), "--run.platform", "cpu"]
    assert main([*arguments, "--from_checkpoint", str(tmp_path / "nothing")]) == 2
    assert "expected a checkpoint in" in capsys.readouterr().err
