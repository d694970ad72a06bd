"""The program `dreamer`: its commands, its help, its mistakes. Training itself is replaced by a recorder."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types

import pytest

import dreamer
from dreamer import cli, schema
from dreamer.commands.arguments import presets_left_out
from dreamer.envs.interface import TaskError
from dreamer.presets import load_config, preset_names, save_config


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def trained(monkeypatch):
    """The configurations that reached `dreamer.run.training.train`."""
    seen = []

    def train(config, make_env=None, begun=None):
        seen.append(config)
        return 0

    monkeypatch.setitem(sys.modules, "dreamer.run.training", types.SimpleNamespace(train=train))
    return seen


@pytest.fixture
def evaluated(monkeypatch):
    seen = []

    def evaluate_run(logdir, **options):
        seen.append((logdir, options))
        return 0

    fake = types.SimpleNamespace(evaluate_run=evaluate_run)
    monkeypatch.setitem(sys.modules, "dreamer.run.evaluate", fake)
    return seen


# --- Help --------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("train", "eval", "envs"):
        assert name in out
    assert run(capsys)[:2] == (2, out)


def test_version(capsys):
    assert run(capsys, "--version")[1] == f"dreamer {dreamer.__version__}\n"


def test_train_help_shows_presets_and_every_option(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert all(f" {name}" in out for name in preset_names())
    assert all(f"--{name} " in out for name in schema.options())
    assert max(map(len, out.splitlines())) <= 140


def test_eval_and_envs_help(capsys):
    for command in ("eval", "envs"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        assert f"dreamer {command}" in capsys.readouterr().out


# --- train -------------------------------------------------------------------------------------


def test_train_without_arguments_is_the_quickstart(capsys, trained):
    assert run(capsys, "train")[0] == 0
    assert trained == [load_config(["quickstart"])]


def test_train_passes_presets_and_overrides_in_order(capsys, trained):
    line = "train --configs gym cpu --task gym_Acrobot-v1 --seed 3 --run.train_ratio=64 --logdir /nowhere/x"
    assert run(capsys, *line.split())[0] == 0
    config = trained[0]
    assert (config.task, config.seed, config.run.train_ratio) == ("gym_Acrobot-v1", 3, 64)
    assert (config.run.batch_size, config.model.deter, config.logdir) == (8, 512, "/nowhere/x")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--task atari_pong",
            ["atari_pong goes without the settings of ", "--configs atari (env.atari.size 96,96, env.atari.gray true"],
        ),
        ("--task atari_pong --env.atari.size 96,96", ["--configs atari (env.atari.gray true, env.atari.sticky 0.25"]),
        ("--configs size1m cpu --task atari_pong", ["--configs atari ("]),
        ("--configs atari --task atari100k_pong", ["--configs atari100k (", "or --configs atari100k_official"]),
        ("--task dmc_walker_walk", ["--configs dmc_proprio or --configs dmc_vision (env.dmc.pixels true)\n"]),
        ("--task memorymaze_9x9 --configs gym", ["--configs memory_maze"]),
        ("--task toy_catch", ["--configs quickstart"]),
        ("", []),
        ("--configs atari", []),
        ("--configs dreamer_v1 cpu --task dmc_cup_catch", []),
        ("--configs atari cpu --task atari_breakout", []),
        ("--configs mine.yaml --task atari_pong", []),
        ("--task py_tests/fake_envs.py:Anything", []),
    ],
)
def test_a_line_where_no_preset_of_the_task_s_suite_is_given(capsys, trained, monkeypatch, tmp_path, line, words):
    """A task alone changes no default: it says so once, and names what the suite's presets would set."""
    monkeypatch.setattr("dreamer.envs.registry.check_task", lambda task: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("run: {log_every: 7}")
    code, out, _ = run(capsys, "train", *line.split())
    assert code == 0 and out.count("\n") == bool(words) and len(trained) == 1
    assert all(word in out for word in words), out


def test_commands_that_only_play_name_a_preset_whose_environment_is_another(capsys, monkeypatch):
    load = lambda *names, **options: load_config(names, options)  # noqa: E731
    pong = presets_left_out([], load(task="atari_pong"), environment=True)
    assert pong is not None and "--configs atari (env.atari.size 96,96" in pong
    for task in ("crafter_reward", "atari100k_pong", "dmc_walker_walk", "py_mine:Env"):
        assert presets_left_out([], load(task=task), environment=True) is None, task
    # Played without a word more than that: both commands say it.
    said = []
    monkeypatch.setattr("dreamer.envs.registry.check_task", lambda task: None)
    fake = types.SimpleNamespace(collect_episodes=lambda *inputs: said.append("played") or 0)
    monkeypatch.setitem(sys.modules, "dreamer.run.collect_episodes", fake)
    assert run(capsys, "collect", "atari_pong", "out")[:2] == (0, pong + "\n") and said == ["played"]
    assert run(capsys, "collect", "atari_pong", "out", "--configs", "atari")[:2] == (0, "")


def test_a_run_that_goes_on_is_not_told_of_presets(capsys, trained, tmp_path):
    overrides = {"task": "gym_CartPole-v1", "logdir": str(tmp_path)}
    save_config(load_config([], overrides), tmp_path / "config.yaml")
    assert run(capsys, "train", "--task", "gym_CartPole-v1", "--logdir", str(tmp_path))[:2] == (0, "")
    assert trained == [load_config([], overrides)]


def test_exit_code_of_training_is_the_program_s(capsys, monkeypatch):
    fake = types.SimpleNamespace(train=lambda config, begun: 3)
    monkeypatch.setitem(sys.modules, "dreamer.run.training", fake)
    assert run(capsys, "train")[0] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --configs atarri", ["unknown preset 'atarri'", "nearest: atari"]),
        ("train --task dmc_walker_wlak", ["dmc_walker_walk"]),
        ("train --run.train_ratoi 3", ["run.train_ratio"]),
        ("train --run.train_ratio fast", ["expected a number, got 'fast'"]),
        ("train --configs no/such.yaml", ["expected a YAML file, found none at", "no/such.yaml"]),
        ("trian", ["train"]),
        ("envs dcm", ["unknown suite 'dcm'", "dmc"]),
        ("eval", ["logdir"]),
        ("eval no/such", ["no/such", "config.yaml"]),
        ("eval . --episodes none", ["--episodes", "whole number from 1 to 1,000,000,000"]),
        ("eval . --policy best", ["mode", "sample"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, trained, line, words):
    code, out, err = run(capsys, *line.split())
    assert code == 2 and out == "" and trained == []
    assert err.startswith("dreamer: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_mistakes_come_before_anything_slow():
    """No jax is imported to find them, nor for any help."""
    script = (
        "import sys; from dreamer.cli import main\n"
        "for line in ('--help', 'train --help', 'envs', 'train --task dmc_walker_wlak', 'train --seed x'):\n"
        "    main(line.split())\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_of_the_run_that_a_user_can_mend_end_in_one_line(capsys, monkeypatch):
    def train(config, begun):
        raise TaskError("expected a finite action space")

    monkeypatch.setitem(sys.modules, "dreamer.run.training", types.SimpleNamespace(train=train))
    assert run(capsys, "train") == (2, "", "dreamer: error: expected a finite action space\n")


def test_the_table_of_user_errors_names_real_classes():
    for module, name in cli.USER_ERRORS:
        assert issubclass(getattr(importlib.import_module(module), name), Exception)


def test_faults_of_the_program_are_not_hidden(monkeypatch):
    def train(config, begun):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "dreamer.run.training", types.SimpleNamespace(train=train))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


# --- Resuming ----------------------------------------------------------------------------------


@pytest.fixture
def logdir(tmp_path):
    """The folder of a run that was started with `--configs gym cpu --logdir FOLDER`."""
    save_config(load_config(["gym", "cpu"], {"logdir": str(tmp_path)}), tmp_path / "config.yaml")
    return str(tmp_path)


def test_the_same_command_resumes_without_a_word(capsys, trained, logdir):
    code, out, _ = run(capsys, "train", "--configs", "gym", "cpu", "--logdir", logdir)
    assert (code, out, len(trained)) == (0, "", 1)


# --- eval and envs -----------------------------------------------------------------------------


def test_eval_hands_over_its_arguments(capsys, evaluated, logdir):
    assert run(capsys, "eval", logdir)[0] == 0
    line = f"eval {logdir} --episodes 3 --video a.gif --policy sample --seed 5 --planner.name mppi"
    assert run(capsys, *line.split())[0] == 0
    planner = {"planner.name": "mppi"}
    assert evaluated == [
        (logdir, {"episodes": 20, "video": None, "policy": "mode", "seed": None, "planner": {}}),
        (logdir, {"episodes": 3, "video": "a.gif", "policy": "sample", "seed": 5, "planner": planner}),
    ]


def test_envs_lists_every_suite_and_the_tasks_of_one(capsys):
    code, out, _ = run(capsys, "envs")
    assert code == 0
    for word in ("toy_catch", "atari100k_", "dmc_", "crafter_reward", "gym_CartPole-v1"):
        assert word in out
    tasks = run(capsys, "envs", "dmc")[1].split()
    assert "dmc_walker_walk" in tasks and len(tasks) > 20


def test_envs_says_how_to_install_what_is_missing(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "crafter" else real(name))
    assert "not installed: pip install 'dreamer[crafter]'" in run(capsys, "envs")[1]


def test_module_and_entry_point_are_the_same_program():
    done = subprocess.run([sys.executable, "-m", "dreamer", "train", "--seed", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "expected an integer, got 'x'" in done.stderr
