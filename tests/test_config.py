"""Options, presets, files, overrides, and what may change when a run is resumed."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer import schema
from dreamer.commands.arguments import split_arguments
from dreamer.commands.train import train_config
from dreamer.config import Config
from dreamer.envs import frames_per_step
from dreamer.presets import (
    ConfigError,
    check_resume,
    configs_folder,
    diff,
    load_config,
    preset_names,
    save_config,
    stored_config,
    value_of,
)

ROOT = Path(__file__).resolve().parent.parent


def error_of(configs=(), overrides=None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(configs, overrides)
    message = str(caught.value)
    assert "\n" not in message, "errors are one line"
    return message


def write(folder: Path, text: str, name: str = "my.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


# --- What the files say ------------------------------------------------------------------------

SIZES = {  # deter, hidden and units, classes, depth: the table of the algorithm
    "size1m": (512, 64, 4, 4),
    "size12m": (2048, 256, 16, 16),
    "size25m": (3072, 384, 24, 24),
    "size50m": (4096, 512, 32, 32),
    "size100m": (6144, 768, 48, 48),
    "size200m": (8192, 1024, 64, 64),
    "size400m": (12288, 1536, 96, 96),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model = load_config([name]).model
    assert (model.deter, model.hidden, model.classes, model.depth) == SIZES[name]
    assert model.units == model.hidden and model.stoch == 32


def test_every_size_has_its_file():
    assert {p.stem for p in configs_folder().glob("sizes/*.yaml")} == set(SIZES)


BENCHMARKS = {  # environments, train ratio, agent steps, action repeat
    "atari100k": (1, 256, 110_000, 4),
    "atari100k_official": (1, 256, 110_000, 4),
    "atari": (16, 32, 51_000_000, 4),
    "crafter": (1, 512, 1_100_000, 1),
    "dmc_proprio": (16, 1024, 1_100_000, 1),
    "dmc_vision": (16, 256, 1_100_000, 1),
    "procgen": (16, 64, 110_000_000, 1),
    "bsuite": (1, 1024, 1_100_000, 1),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_presets_keep_the_published_protocol(name):
    config = load_config([name])
    got = (
        config.env.num_envs,
        config.run.train_ratio,
        config.run.agent_steps,
        frames_per_step(config.task, config.env),
    )
    assert got == BENCHMARKS[name]
    assert (config.run.batch_size, config.run.batch_length) == (16, 64)
    assert config.optimizer.learning_rate == 4e-5


def test_the_two_atari_protocols():
    full, short = load_config(["atari"]).env.atari, load_config(["atari100k"]).env.atari
    assert (full.size, full.gray, full.actions, full.sticky, full.noops) == ((96, 96), True, "all", 0.25, 30)
    assert (short.size, short.gray, short.actions, short.sticky, short.noops) == ((64, 64), False, "minimal", 0, 30)
    changes = diff(load_config(["atari100k"]), load_config(["atari100k_official"]))
    assert [str(change) for change in changes] == ["env.atari.sticky: 0.0 -> 0.25"]


def test_dmc_presets_differ_in_what_is_seen():
    assert not load_config(["dmc_proprio"]).env.dmc.pixels
    assert load_config(["dmc_vision"]).env.dmc.pixels


@pytest.mark.parametrize("name", ["atari", "atari100k", "crafter", "dmc_proprio", "dmc_vision", "gym", "quickstart"])
def test_cpu_after_a_preset(name):
    config, before = load_config([name, "cpu"]), load_config([name])
    assert (config.run.batch_size, config.run.batch_length, config.run.train_ratio) == (8, 32, 128)
    assert config.updates_per_step == 0.5
    assert config.run.batch_size * config.actor_critic.imagine_last == 64
    assert (config.optimizer.learning_rate, config.optimizer.warmup) == (3e-4, 200)
    assert config.env.num_envs == 4 and config.run.compute_dtype == "float32"
    assert config.model == before.model and config.run.agent_steps == before.run.agent_steps


@pytest.mark.parametrize("name", sorted(preset_names()))
def test_every_file_opens_with_its_claim_and_a_command_that_parses(name):
    head = [line for line in preset_names()[name].read_text().splitlines() if line.startswith("#")]
    heading = "\n".join(head)
    for word in ("Claim", "Hardware", "Hours", "Command"):
        assert f"# {word}: " in heading
    assert re.match(r"# (Task|Size): ", head[0])
    for command in re.findall(r"dreamer train([^,(\n]*)", heading):
        assert isinstance(train_config(command.split()), Config)


# --- Order and reading -------------------------------------------------------------------------


def test_files_apply_in_order_then_overrides(tmp_path):
    mine = write(tmp_path, "run: {train_ratio: 5, log_every: 7}\n")
    assert load_config(["gym", "cpu", mine]).run.train_ratio == 5
    assert load_config([mine, "gym", "cpu"]).run.train_ratio == 128
    config = load_config(["gym", "cpu", mine], {"run.train_ratio": "9"})
    assert (config.run.train_ratio, config.run.log_every, config.run.batch_size) == (9, 7, 8)


def test_includes_apply_before_the_file_and_are_found_beside_it(tmp_path):
    write(tmp_path, "seed: 1\nrun: {log_every: 3}\n", "base.yaml")
    top = write(tmp_path, "include: [base.yaml, size1m]\nseed: 2\n", "top.yaml")
    config = load_config([top])
    assert (config.seed, config.run.log_every, config.model.deter) == (2, 3, 512)


def test_yaml_numbers_as_people_write_them(tmp_path):
    mine = write(tmp_path, "optimizer: {learning_rate: 4e-5}\nrun: {agent_steps: 1.1e6, train_ratio: 32}\n")
    config = load_config([mine])
    assert config.optimizer.learning_rate == 4e-5 and isinstance(config.run.train_ratio, float)
    assert config.run.agent_steps == 1_100_000 and isinstance(config.run.agent_steps, int)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "3", 3),
        ("run.agent_steps", "1.5e4", 15_000),
        ("run.agent_steps", "15_000", 15_000),
        ("optimizer.learning_rate", "4e-5", 4e-5),
        ("optimizer.learning_rate", "1", 1.0),
        ("env.atari.gray", "true", True),
        ("env.atari.gray", "False", False),
        ("run.eval_every", "null", None),
        ("run.eval_every", "none", None),
        ("run.eval_every", "100", 100),
        ("env.atari.size", "96,84", (96, 84)),
        ("env.atari.size", "[96, 84]", (96, 84)),
        ("env.gym.size", "none", None),
        ("model.depth_multipliers", "1,2", (1, 2)),
        ("model.depth_multipliers", "2", (2,)),
        ("from_checkpoint_parts", "world_model,critic", ("world_model", "critic")),
        ("env.gym.kwargs", "{gravity: 9.5, mode: easy}", {"gravity": 9.5, "mode": "easy"}),
        ("env.gym.kwargs.gravity", "9.5", {"gravity": 9.5}),
        ("task", "3", "3"),
        ("logdir", "/__import__('os').system('exit 1')", "/__import__('os').system('exit 1')"),
    ],
)
def test_overrides_are_read_as_their_option_wants(name, text, value):
    config = load_config([], {name: text})
    got = value_of(config, name if name in schema.options() else name.rpartition(".")[0])
    assert got == value and type(got) is type(value)


def test_typed_overrides_from_python():
    config = load_config([], {"run.eval_every": None, "env.atari.size": (96, 96), "optimizer.learning_rate": 1})
    assert config.run.eval_every is None and config.env.atari.size == (96, 96)
    assert "expected an integer, got 3.5" in error_of([], {"seed": 3.5})
    assert "expected an integer, got True" in error_of([], {"seed": True})


def test_command_line_forms():
    configs, overrides = split_arguments(
        "--configs gym cpu --seed=3 --env.atari.gray --run.train_ratio 8 --configs my.yaml --seed -4".split()
    )
    assert configs == ["gym", "cpu", "my.yaml"]
    assert overrides == {"seed": "-4", "env.atari.gray": "true", "run.train_ratio": "8"}


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.batch_sizes", "3", ["unknown option run.batch_sizes", "run.batch_size"]),
        ("batch_size", "3", ["unknown option batch_size", "run.batch_size"]),
        ("optimiser.learning_rate", "3", ["unknown option", "optimizer.learning_rate"]),
        ("run", "3", ["run is a group of options", "run.agent_steps"]),
        ("run.batch_size", "abc", ["expected an integer", "'abc'"]),
        ("run.batch_size", "1.5", ["expected an integer", "'1.5'"]),
        ("run.batch_size", "inf", ["expected an integer", "'inf'"]),
        ("run.batch_size", "0", ["greater than 0", "got 0"]),
        ("run.batch_size", "null", ["expected an integer", "'null'"]),
        ("run.platform", "gpuu", ["one of auto, cpu, gpu, tpu", "nearest: gpu"]),
        ("env.atari.gray", "yes", ["expected true or false", "'yes'"]),
        ("env.atari.size", "64", ["a list of 2", "'64'"]),
        ("env.atari.size", "64,x", ["each an integer", "'64,x'"]),
        ("env.gym.kwargs", "[1]", ["expected a mapping"]),
        ("env.gym.kwargs", "{a: !!python/name:os.system }", ["expected a mapping"]),
        ("from_checkpoint_parts", "actr", ["world_model, actor, critic", "'actr'"]),
    ],
)
def test_wrong_overrides_say_what_was_expected(name, text, words):
    message = error_of([], {name: text})
    assert message.startswith(f"--{name}: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("seed: 1\nrun:\n  batch_sizes: 3\n", 3, ["unknown option run.batch_sizes", "run.batch_size"]),
        ("rum:\n  batch_size: 3\n", 1, ["unknown option rum", "run"]),
        ("seed: 1\nrun:\n  batch_size: '3'\n", 3, ["run.batch_size", "expected an integer, got '3'"]),
        ("seed: true\n", 1, ["seed", "expected an integer, got True"]),
        ("task: 3\n", 1, ["task", "expected a text, got 3"]),
        ("\nrun:\n  batch_size: -3\n", 3, ["run.batch_size", "greater than 0, got -3"]),
        ("run: 3\n", 1, ["expected run to be a group of options"]),
        ("- run\n", 1, ["expected the file to be a group of options"]),
        ("run:\n  platform: gpuu\n", 2, ["one of auto, cpu, gpu, tpu", "nearest: gpu"]),
        ("env:\n  atari:\n    size: [64]\n", 3, ["env.atari.size", "a list of 2", "[64]"]),
        ("run: {batch_size: 3\nseed: 2\n", 2, ["expected valid YAML"]),
        ("seed: 1\nseed: 2\n", 2, ["seed is given twice"]),
        ("seed: !!python/object/apply:os.getpid []\n", 1, ["expected a plain value"]),
        ("seed: 2020-01-01\n", 1, ["expected an integer"]),
        ("seed: 1\ninclude: [nothing]\n", 2, ["unknown preset 'nothing'"]),
        ("include: 3\n", 1, ["include to be a list of presets, got 3"]),
        ("include: [my.yaml]\n", None, ["includes itself"]),
    ],
)
def test_wrong_files_are_told_with_name_and_line(tmp_path, text, line, words):
    path = write(tmp_path, text)
    message = error_of([path])
    assert message.startswith(f"{path}:{line}: " if line else path)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.deter": "513"}, ["multiple of model.blocks (8)", "513"]),
        ({"model.bins": "254"}, ["odd number of model.bins", "254"]),
        ({"optimizer.accumulate": "3"}, ["run.batch_size (16)", "3"]),
        ({"actor_critic.imagine_last": "65"}, ["actor_critic.imagine_last", "65"]),
        ({"model.min_std": "2"}, ["model.min_std < model.max_std"]),
    ],
)
def test_options_that_do_not_fit_together(overrides, words):
    message = error_of([], overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize("arguments", ["oops", "--seed", "--configs", "--seed 3 4", "--"])
def test_malformed_command_lines(arguments):
    with pytest.raises(ConfigError, match=r"expected"):
        split_arguments(arguments.split())


def test_configs_are_frozen_and_closed():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(ValueError, match="sede"):
        Config(sede=3)


# --- The resolved file, and resuming -----------------------------------------------------------


@pytest.mark.parametrize("name", sorted(preset_names()))
def test_resolved_file_round_trips(tmp_path, name):
    config = load_config([name])
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config == stored_config(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@settings(max_examples=30)
@given(
    text=st.text(),
    number=st.floats(min_value=5e-324, max_value=1e6),
    kwargs=st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    ),
)
def test_any_value_round_trips(tmp_path_factory, text, number, kwargs):
    folder = tmp_path_factory.mktemp("round")
    config = load_config([], {"run.train_ratio": number, "env.gym.kwargs": kwargs})
    config = dataclasses.replace(config, task=text)
    save_config(config, folder / "config.yaml")
    back = load_config([folder / "config.yaml"])
    assert back == config and math.copysign(1, back.run.train_ratio) == 1


def test_no_run_no_stored_config(tmp_path):
    assert stored_config(tmp_path) is None


def test_resume_allows_lengths_and_intervals_and_lists_the_changes():
    old = load_config(["gym", "cpu"])
    new = load_config(["gym", "cpu"], {"run.agent_steps": "200_000", "run.eval_every": "1000", "logdir": "/elsewhere"})
    changes = check_resume(old, new)
    assert [str(c) for c in changes] == [
        'logdir: "" -> /elsewhere',
        "run.agent_steps: 100000 -> 200000",
        "run.eval_every: null -> 1000",
    ]
    assert check_resume(old, old) == diff(old, old) == []


def test_resume_refuses_everything_else_by_name():
    old, new = load_config(["gym"]), load_config(["gym", "cpu"], {"run.agent_steps": 7, "seed": 1})
    with pytest.raises(ConfigError) as caught:
        check_resume(old, new)
    for words in ("seed: 0 -> 1", "run.batch_size: 16 -> 8", "optimizer.learning_rate: 4e-05 -> 0.0003"):
        assert words in str(caught.value)
    assert "agent_steps" not in str(caught.value)


def test_train_without_presets(tmp_path):
    assert train_config(["--seed", "3"]) == load_config(["quickstart"], {"seed": 3})
    assert train_config(["--task", "gym_CartPole-v1"]) == load_config([], {"task": "gym_CartPole-v1"})
    logdir = str(tmp_path)
    run = load_config(["gym", "cpu"], {"logdir": logdir})
    save_config(run, tmp_path / "config.yaml")
    assert train_config(["--logdir", logdir]) == run
    assert train_config(["--logdir", logdir, "--run.agent_steps", "5"]).run.agent_steps == 5


# --- Every option ------------------------------------------------------------------------------


def test_help_names_every_option_with_its_default_unit_and_meaning():
    text = " ".join(schema.help_text().split())
    for option in schema.options().values():
        assert f"--{option.name} ({schema.describe(option.annotation)}) {option.meaning} [default " in text
        assert option.meaning
    assert "--run.agent_steps (an integer) Length of the run [default 1100000; unit: agent steps; > 0" in text


def _attributes_read() -> set[str]:
    """Names that the code reads as attributes of something that is not `self`, or by name with getattr."""
    names: set[str] = set()
    for path in sorted((ROOT / "dreamer").rglob("*.py")):
        if path.name in ("config.py", "env_config.py", "schema.py", "presets.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    names.add(node.attr)
    return names


def test_every_option_is_read_somewhere():
    read = _attributes_read()
    unread = [name for name in schema.options() if name.rpartition(".")[2] not in read]
    assert unread == []
