"""Numbers that no option can mean, contradictions, values from Python, YAML texts: one line, or a configuration that
can be written down and read back."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from dreamer import cli
from dreamer.agent import seed_key
from dreamer.config import Config, RunConfig
from dreamer.contradictions import filling_steps, least_capacity, unmet
from dreamer.env_config import EnvConfig, GymConfig
from dreamer.presets import ConfigError, load_config, save_config
from dreamer.schema import describe, options
from dreamer.sweeps.spec_file import load_sweep

#: What people type, and what a division, a cast or a typing error makes of it.
EXTREMES = ["0", "-1", "inf", "-inf", "nan", "1e300", str(2**63), str(2**200), "", "[]", "0,0", "64,-1", "9" * 5000]
NUMBERS = [name for name, option in options().items() if option.limits]


def refusal(configs: list[str | Path], overrides: dict[str, Any]) -> str:
    """The one line in which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(configs, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 2000
    return text


# Numbers


def test_every_number_has_a_least_and_a_largest_value():
    for name, option in options().items():
        if re.search(r"integer|number", describe(option.annotation)):
            assert ">" in option.limits and "<" in option.limits, name


@pytest.mark.parametrize("text", EXTREMES)
def test_extremes_are_refused_in_one_line_or_can_be_written_and_read(tmp_path, text):
    accepted: dict[str, Any] = {}
    for name in options():
        try:
            load_config([], {name: text})
            accepted |= {name: text}
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, name
    accepted = {
        name: value for name, value in accepted.items() if not name.startswith(("model.", "run.", "optimizer."))
    }
    config = load_config([], accepted)
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config


def test_no_number_is_infinite_or_none():
    for name in NUMBERS:
        for value in (math.inf, -math.inf, math.nan):
            assert name in refusal([], {name: value})


@pytest.mark.parametrize("name", ["run.report_every", "run.eval_every", "run.checkpoint_every", "env.time_limit"])
def test_an_interval_of_zero_names_null(name):
    for value in ("0", "-5"):
        text = refusal([], {name: value})
        assert f"--{name}" in text and "or null" in text and f"got {value}" in text


@pytest.mark.parametrize(
    "line", ["eval x --episodes 0", "eval x --seed -1", "collect toy_catch x --steps 1e9", "plot x --bins 99999999999"]
    + ["plot x --window nan", "bench loop --seconds inf", "sweep x --jobs 0", "envs check toy_catch --steps 0"]
)  # fmt: skip
def test_numbers_of_other_commands_have_bounds_too(capsys, line):
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_networks_that_memory_has_no_room_for_are_refused_before_they_are_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dreamer.run.factories.machine_memory", lambda: 200 * 10**9)  # whatever this machine has
    line = ["train", "--configs", "debug", "--model.deter", "131072", "--logdir", str(tmp_path / "large")]
    assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert told.startswith("dreamer: error: expected networks that memory has room for, got 17.2B parameters, 206.")
    assert told.count("\n") == 1 and "of 200.0 GB" in told and "model.deter" in told


# Seeds


def test_a_seed_of_64_bits_is_one_of_its_own():
    now = time.time_ns()
    assert load_config([], {"seed": now}).seed == now
    assert "seed" in refusal([], {"seed": 2**64})
    keys = {seed: tuple(seed_key(seed)) for seed in (0, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, now, 2**64 - 1)}
    assert len(set(keys.values())) == len(keys)
    for seed in (0, 7, 2**31 - 1):
        np.testing.assert_array_equal(seed_key(seed), jax.random.key_data(jax.random.key(seed)))


def test_seeds_of_a_group_stay_below_64_bits():
    assert "run.seeds" in refusal([], {"seed": 2**64 - 2, "run.seeds": 3})


# Contradictions


def test_a_replay_that_training_can_never_begin_with_is_refused():
    common = {"env.num_envs": 3, "run.batch_size": 5, "run.batch_length": 8}
    config = load_config([], common)
    least = least_capacity(config)
    assert load_config([], {**common, "replay.capacity": least}).replay.capacity == least
    text = refusal([], {**common, "replay.capacity": 3 * 10})
    assert "replay.capacity" in text and str(least) in text
    # Nothing to train: nothing to wait for.
    load_config([], {**common, "replay.capacity": 30, "run.train_ratio": 1e-9, "run.agent_steps": 100})


@hypothesis.given(envs=st.integers(1, 9), size=st.integers(1, 9), length=st.integers(2, 9))
def test_filling_counts_the_places_where_sequences_can_begin(envs, size, length):
    """Row by row: a sequence of T steps and the one before it begins at every step that has T behind it."""
    config = load_config([], {"env.num_envs": envs, "run.batch_size": size, "run.batch_length": length})
    rows = 0
    while envs * max(rows - length, 0) < size * length:
        rows += 1
    assert rows == filling_steps(config)


def test_what_will_not_happen_is_told():
    short = load_config(["debug"], {"run.agent_steps": 10})
    assert any("training begins after agent step" in text for text in unmet(short))
    assert not unmet(load_config(["debug"]))
    late = load_config(["debug"], {"run.eval_every": 10_000, "run.final_eval": False})
    assert any("run.eval_every 10000" in text for text in unmet(late))


@pytest.mark.parametrize(
    "overrides",
    [{"actor_critic.return_low": 95, "actor_critic.return_high": 5}, {"model.encoder_keys": "(?P<"}]
    + [{"run.process_id": 4, "run.processes": 4}, {"model.depth_multipliers": "[]"}],
)
def test_contradictions_are_refused(overrides):
    refusal([], overrides)


# Values from Python


class Colour(enum.StrEnum):
    RED = "toy_catch"


class Number(enum.IntEnum):
    FOUR = 4


def test_numpy_numbers_enums_and_paths_count_as_what_they_stand_for(tmp_path):
    given = {"seed": np.int64(3), "run.train_ratio": np.float32(32), "env.num_envs": Number.FOUR}
    given |= {"task": Colour.RED, "logdir": tmp_path / "x", "run.final_eval": np.bool_(True)}
    config = load_config([], given)
    assert (config.seed, config.run.train_ratio, config.env.num_envs) == (3, 32.0, 4)
    assert (config.task, config.logdir, config.run.final_eval) == ("toy_catch", str(tmp_path / "x"), True)
    values = (config.seed, config.env.num_envs, config.task, config.logdir)
    assert [type(value) for value in values] == [int, int, str, str]
    direct = Config(seed=np.int64(3), logdir=tmp_path / "x", run=RunConfig(train_ratio=np.float32(32)))
    assert dataclasses.replace(direct, logdir=Path("y")).logdir == str(Path("y").absolute())


def test_keyword_arguments_are_settled_before_a_run_starts(tmp_path):
    kwargs = {"size": (3, 4), "nan": np.nan, "deep": {"a": [np.float64(0.5), Path("p")], 3: "three"}}
    config = Config(env=EnvConfig(gym=GymConfig(kwargs=kwargs)))
    assert config.env.gym.kwargs["size"] == [3, 4] and config.env.gym.kwargs["deep"] == {"a": [0.5, "p"], 3: "three"}
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize(
    "value", [print, object(), {1, 2}, b"x", 1j, np.ones(2), 10**5000, "\udcff"], ids=lambda value: type(value).__name__
)
def test_what_no_file_can_hold_is_refused_when_it_is_given(value):
    with pytest.raises(ConfigError, match="make_env|expected"):
        Config(env=EnvConfig(gym=GymConfig(kwargs={"x": value})))
    refusal([], {"env.gym.kwargs.x": value})


def test_a_mapping_that_holds_itself_ends():
    kwargs: dict[str, Any] = {}
    kwargs["self"] = kwargs
    with pytest.raises(ConfigError, match="nested at most"):
        GymConfig(kwargs=kwargs)


# YAML

TEXTS = {
    "an alias of itself": "env: &a {gym: {kwargs: *a}}",
    "brackets": "env: {gym: {kwargs: " + "[" * 2000 + "]" * 2000 + "}}",
    "digits": f"seed: {'9' * 5000}",
    "a group twice": "run:\n  batch_size: 2\nrun:\n  batch_length: 8",
    "a group twice, dotted": "run.batch_size: 2\nrun:\n  batch_size: 4",
    "an option twice": "seed: 1\nseed: 2",
    "a list as a name": "? [a, b]\n: 1",
    "a tab": "run:\n\tbatch_size: 2",
    "an object": "task: !!python/object:os.system x",
    "an impossible date": "seed: 2024-13-45",
    "a merge of nothing": "run: {<<: 3}",
    "two documents": "seed: 1\n---\nseed: 2",
    "zero bytes": "seed: \x00",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_configuration_are_refused_in_one_line(tmp_path, capsys, name):
    path = tmp_path / "f.yaml"
    path.write_text(TEXTS[name])
    for line in (["train", "--configs", str(path)], ["sweep", str(path), "--dry-run"]):
        assert cli.main(line) == 2, name
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "f.yaml" in told, told


def test_files_that_are_none(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * 2_000_000)
    for name in ("fifo.yaml", "folder.yaml", "binary.yaml", "large.yaml", "none.yaml", f"{'x' * 300}.yaml", "\0.yaml"):
        for line in (["train", "--configs", str(tmp_path / name)], ["sweep", str(tmp_path / name), "--dry-run"]):
            assert cli.main(line) == 2, name
            assert capsys.readouterr().err.count("\n") == 1, name


@pytest.mark.parametrize(
    "text",
    ["seeds: 1000000000000", "seeds: [18446744073709551616]", "retries: .inf", "hours: .nan", "random: {runs: 0}"]
    + ["random: {runs: 2, options: {run.train_ratio: {uniform: [0, .inf]}}}", "retry_seconds: -1", "{a: {b: 1}: 2}"],
)
def test_numbers_of_a_sweep_have_bounds(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(f"configs: [debug]\n{text}\n" if not text.startswith("{") else text)
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert len(str(caught.value).splitlines()) == 1
