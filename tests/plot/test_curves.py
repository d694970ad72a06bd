"""Scores out of files: our logdirs, other code's, JSON lists; and what tells runs apart."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from dreamer.plot import curves
from dreamer.plot.curves import OURS, THEIRS, Run
from dreamer.plot.variants import variant, variants
from dreamer.presets import load_config, save_config
from dreamer.records.logger import Logger, Steps
from dreamer.schema import ConfigError


def logdir(folder: Path, seed: int = 0, scores=((8, 1.0), (16, 3.0)), task="dmc_walker_walk", **options) -> Path:
    """A run's folder as the program writes it: action repeat 2, an update every second agent step, 100 of them a
    second."""
    logger = Logger(folder)
    configs = ["dmc_proprio", "cpu"] if task.startswith("dmc") else ["gym", "cpu"]
    save_config(load_config(configs, {"task": task, "seed": seed, **options}), folder / "config.yaml")
    for frames, score in scores:
        steps = Steps(frames // 2, frames, frames // 4)
        logger.episode(steps, score, 4)
        logger.scalars(steps, {"fps/policy": 100.0})
    logger.close()
    return folder


def read(*arguments, **options) -> list[Run]:
    """Runs of files in which nothing is wrong."""
    found = curves.read(*arguments, **options)
    assert found.remarks == []
    return found.runs


def test_a_logdir_of_ours(tmp_path):
    (run,) = read([str(logdir(tmp_path / "run", seed=3))])
    assert (run.task, run.label, run.seed) == ("dmc_walker_walk", OURS, "3")
    assert run.config["run.train_ratio"] and run.config["seed"] == 3
    np.testing.assert_array_equal(run.xs, [8.0, 16.0])
    np.testing.assert_array_equal(run.ys, [1.0, 3.0])


@pytest.mark.parametrize(
    ("axis", "expected"),
    [("env_frames", [8, 16]), ("agent_steps", [4, 8]), ("updates", [2, 4]), ("hours", [4 / 360_000, 8 / 360_000])],
)
def test_axes_of_a_logdir(tmp_path, axis, expected):
    (run,) = read([str(logdir(tmp_path / "run"))], axis)
    np.testing.assert_allclose(run.xs, expected)


def test_hours_leave_out_lines_without_a_rate_and_go_on_beyond_the_last(tmp_path):
    """Evaluations have lines of their own; an episode can end after the last line."""
    folder = logdir(tmp_path / "run", scores=())
    lines = [
        {"step": 200, "agent_steps": 100, "fps/policy": 10.0},
        {"step": 200, "agent_steps": 100, "eval/score": 1.0},
        {"step": 400, "agent_steps": 200, "fps/policy": 5.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ends = [{"step": step, "episode/score": 0.0} for step in (100, 200, 300, 400, 800)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ends))
    (run,) = read([str(folder)], "hours")
    np.testing.assert_allclose(run.xs * 3600, [5.0, 10.0, 20.0, 30.0, 60.0])


def test_folders_are_searched_and_globs_expanded_each_file_once(tmp_path):
    for name in ("a/seed_0", "a/deep/seed_1", "b/seed_0"):
        logdir(tmp_path / name, seed=int(name[-1]))
    (tmp_path / "a" / "seed_0" / "replay").mkdir()
    (tmp_path / "a" / "seed_0" / "replay" / "scores.jsonl").write_text("")
    assert len(read([str(tmp_path)])) == 3
    assert sorted(run.seed for run in read([str(tmp_path / "a")])) == ["0", "1"]
    assert len(read([str(tmp_path / "*"), str(tmp_path / "a" / "**" / "seed_*")])) == 3
    named = read([f"mine={tmp_path / 'a'}", str(tmp_path)])
    assert sorted(run.label for run in named) == [OURS, "mine", "mine"]


def test_several_files_of_scores_in_one_folder(tmp_path):
    folder = logdir(tmp_path / "results")
    for seed in (0, 1):
        (folder / f"scores-seed{seed}.jsonl").write_text((folder / "scores.jsonl").read_text())
    (folder / "scores.jsonl").unlink()
    assert [(run.task, run.seed) for run in read([str(folder)])] == [("dmc_walker_walk", "0"), ("dmc_walker_walk", "1")]
    assert len(read([str(folder / "scores-seed1.jsonl")])) == 1


def test_scores_of_other_dreamerv3_code(tmp_path):
    """Same keys, another config.yaml; or no config, and the task in the folder's name."""
    first = tmp_path / "one"
    second = tmp_path / "20240101T120000-atari_pong-small-4"
    for folder in (first, second):
        folder.mkdir()
        (folder / "scores.jsonl").write_text('{"step": 4.0, "episode/score": -21.0}\n{"step": 8, "epi')
    (first / "config.yaml").write_text("task: atari_pong\nseed: 7\nagent: {dyn: {typ: rssm}}\njax: {}\n")
    runs = read([str(first), str(second)])
    assert [(r.task, r.label, r.seed) for r in runs] == [("atari_pong", THEIRS, "7"), ("atari_pong", "small", "4")]
    assert all(run.config is None and run.xs.tolist() == [4.0] and run.ys.tolist() == [-21.0] for run in runs)


def test_runs_that_do_not_say_their_task(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"step": 4, "episode/score": 1.0}\n')
    with pytest.raises(ConfigError, match="--task"):
        read([str(tmp_path)])
    assert read([str(tmp_path)], task="gym_Mine-v0")[0].task == "gym_Mine-v0"


@pytest.mark.parametrize("name", ["curves.json", "curves.json.gz"])
def test_json_lists(tmp_path, name):
    curves = [
        {"task": "atari_pong", "method": "ppo", "seed": 0, "xs": [1, 2, 3], "ys": [1.0, None, 3.0]},
        {"task": "atari_pong", "method": "ppo", "seed": 1, "xs": [1], "ys": [2.0]},
    ]
    text = json.dumps(curves).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    first, second = read([str(tmp_path / name)])
    assert (first.task, first.label, first.seed) == ("atari_pong", "ppo", "0")
    np.testing.assert_array_equal(first.xs, [1.0, 3.0])
    np.testing.assert_array_equal(first.ys, [1.0, 3.0])
    assert second.seed == "1"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"task": "a", "xs": [1]}]', "no ys"),
        ('[{"xs": [1], "ys": [1]}]', "no task"),
        ('{"xs": []}', "list of objects"),
        ("[3]", "no task, xs, ys"),
    ],
)
def test_bad_json_lists_are_named(tmp_path, content, words):
    (tmp_path / "curves.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"curves\.json.*{words}"):
        read([str(tmp_path / "curves.json")])


@pytest.mark.parametrize("pattern", ["nothing", "nothing/*", "name=nothing", "empty"])
def test_no_runs_is_an_error_that_says_what_was_expected(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no runs found at '.*expected folders of runs"):
        read([pattern])


def test_other_axes_need_what_only_our_logdirs_have(tmp_path):
    folder = logdir(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"--x hours: expected .*metrics\.jsonl"):
        read([str(folder)], "hours")
    (tmp_path / "curves.json").write_text("[]")
    with pytest.raises(ConfigError, match="environment frames only"):
        read([str(tmp_path / "curves.json")], "updates")


# --- What tells runs apart ---------------------------------------------------------------------


def test_runs_are_told_apart_by_the_options_that_matter(tmp_path):
    """Not by names, lengths, logging; options that always differ together count once."""
    small = {"model.deter": 512, "model.hidden": 64}
    large = {"model.deter": 2048, "model.hidden": 256}
    settings = [
        {"run.train_ratio": 64, **small, "run.agent_steps": 1000},
        {"run.train_ratio": 64, **large, "log.video_every": 7},
        {"run.train_ratio": 32, **small, "run.platform": "cpu"},
    ]
    folders = [logdir(tmp_path / str(i), seed=i, **options) for i, options in enumerate(settings)]
    configs = [read([str(folder)])[0].config for folder in folders]
    differing = variants({"dmc_walker_walk": configs})
    assert [names[0] for names in differing] == ["run.train_ratio", "model.deter"]
    assert differing[1] == ["model.deter", "model.hidden"]
    assert [variant(config, differing) for config in configs] == [
        "train_ratio 64.0, deter 512",
        "train_ratio 64.0, deter 2048",
        "train_ratio 32.0, deter 512",
    ]


def test_tasks_with_presets_of_their_own_are_no_variants(tmp_path):
    walker, cartpole = logdir(tmp_path / "a"), logdir(tmp_path / "b", task="gym_CartPole-v1")
    runs = read([str(walker), str(cartpole)])
    assert variants({run.task: [run.config] for run in runs}) == []


def test_an_option_that_an_older_run_does_not_know_has_its_default(tmp_path):
    (run,) = read([str(logdir(tmp_path / "run"))])
    older = {name: value for name, value in run.config.items() if name != "replay.online"}
    assert variants({"dmc_walker_walk": [run.config, older]}) == []
