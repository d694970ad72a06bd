"""The wheel, the pinned versions, the two commands and the rule for skipped tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dreamer
from dreamer.envs.registry import list_suites

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
BARE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHON", "DREAMER_EXTRAS")}


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=BARE | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- The wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_every_preset(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"dreamer/_configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "dreamer").rglob("*.py")}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "dreamer" / "plot" / "published_scores").iterdir()}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "dreamer" / "play" / "page").iterdir()}
    assert expected <= names
    assert not [
        name for name in names if not name.startswith(("dreamer/", f"dreamer-{dreamer.__version__}.dist-info/"))
    ]


def test_presets_are_found_from_the_wheel(wheel, tmp_path):
    """The unpacked wheel alone, far from the checkout, resolves `--configs crafter size1m cpu`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys; from dreamer.commands.train import train_config; from dreamer.presets import configs_folder\n"
        "config = train_config('--configs crafter size1m cpu'.split())\n"
        "print(config.task, config.model.deter, config.run.train_ratio, configs_folder())"
    )
    out = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.split() == ["crafter_reward", "512", "128.0", str(tmp_path / "site" / "dreamer" / "_configs")]


def test_presets_of_a_checkout_are_the_files_beside_the_package():
    from dreamer.presets import configs_folder

    assert configs_folder() == ROOT / "configs"


def test_one_version():
    assert PROJECT["version"] == dreamer.__version__


# --- Requirements and pins ---------------------------------------------------------------------


def test_constraints_are_names_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_pins_satisfy_the_requirements():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    groups = {"core": PROJECT["dependencies"], **EXTRAS}
    for group, requirements in groups.items():
        for requirement in map(Requirement, requirements):
            assert canonicalize_name(requirement.name) in pins, f"{group}: {requirement} has no pin"
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, f"{group}: {requirement}"


def test_missing_packages_name_extras_that_exist():
    for suite in list_suites().values():
        if suite.package is not None and suite.package[1] is not None:
            assert suite.package[1] in EXTRAS


def test_pre_commit_runs_the_pinned_tools():
    versions = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert versions and set(versions) == {PINS["ruff"]}


# --- The two commands --------------------------------------------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for an interpreter: makes "environments", notes what would be installed, says what would run.
case "$1 $2" in
  "-c "*) exec {real} "$@" ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >> {log}; exit ${{FAKE_EXIT:-0}} ;;
  *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts in a project whose interpreter is fake, and the log of its installations."""
    root, log = tmp_path / "a project", tmp_path / "pip.log"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON.format(real=sys.executable, log=log))
    fake.chmod(0o755)
    log.touch()

    def script(name: str, *arguments: str, **environment: str) -> str:
        return run(str(root / "scripts" / name), *arguments, cwd=tmp_path, PYTHON=str(fake), **environment).strip()

    return root, log, script


def installations(log: Path) -> list[str]:
    """The extras of each installation, in order."""
    return re.findall(r"-e \S*a project(\[\S*\])?", log.read_text())


def test_train_makes_its_environment_once_and_passes_its_arguments_on(checkout):
    root, log, script = checkout
    assert script("train", "--seed", "3", "--logdir", "a b") == "ran -P -m dreamer train --seed 3 --logdir a b"
    assert script("train") == "ran -P -m dreamer train"
    assert installations(log) == [""]
    assert f"-c {root}/constraints.txt" in log.read_text()


def test_the_environment_follows_its_files_and_keeps_its_extras(checkout):
    root, log, script = checkout
    script("train")
    script("train", DREAMER_EXTRAS="crafter")
    script("train", DREAMER_EXTRAS="dmc")
    script("train")
    with (root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    script("train")
    assert installations(log) == ["", "[crafter]", "[crafter,dmc]", "[crafter,dmc]"]


def test_a_failed_installation_is_told_and_tried_again(checkout):
    root, log, script = checkout
    fake = root.parent / "python"
    failed = subprocess.run(
        [str(root / "scripts" / "train")],
        env=BARE | {"PYTHON": str(fake), "FAKE_EXIT": "1"},
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1 and "error: pip could not install the project" in failed.stderr
    assert script("train") == "ran -P -m dreamer train"
    assert installations(log) == ["", ""]


def test_no_python_is_a_clear_error(checkout, tmp_path):
    root, _, _ = checkout
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "mkdir", "flock"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    done = subprocess.run([str(root / "scripts" / "train")], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected Python 3.11 or newer" in done.stderr and "PYTHON=" in done.stderr


@pytest.mark.parametrize(("arguments", "marks", "more"), [((), "not slow", ""), (("--slow",), "slow", "sb3,")])
def test_test_chooses_the_default_or_the_slow_tests(checkout, arguments, marks, more):
    _, log, script = checkout
    out = script("test", *arguments, "-x", "tests/test_config.py")
    assert out == f"ran -m pytest -m {marks} -x tests/test_config.py"
    assert installations(log) == [
        f"[box2d,bsuite,crafter,dev,dmc,evolution,memorymaze,minari,minigrid,optuna,play,plot,procgen,{more}slurm,vizdoom]"
    ]


def test_continuous_integration_runs_the_test_command():
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
    for name in (".ci/run", "scripts/train", "scripts/test"):
        assert os.access(ROOT / name, os.X_OK), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_clone_trains(tmp_path):
    """The real thing, once: a copy without an environment, from another folder."""
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns(".venv", ".git", ".cache", "runs", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=ignore)
    line = f"--configs debug --logdir {tmp_path}/run --run.platform cpu"
    run(str(clone / "scripts" / "train"), *line.split(), cwd=tmp_path)
    assert (tmp_path / "run" / "config.yaml").exists() and (clone / ".venv").is_dir()
    assert "usage: dreamer train" in run(str(clone / "scripts" / "train"), "--help", cwd=tmp_path)


# --- Skipped tests -----------------------------------------------------------------------------

SKIPPING = """
import pytest

def test_runs(): pass

@pytest.mark.skip(reason="no such machine")
def test_listed(): pass

@pytest.mark.skip(reason="laziness")
def test_not_listed(): pass

@pytest.mark.xfail(reason="known")
def test_expected(): raise AssertionError
"""


def test_a_skip_that_is_not_listed_fails_the_run(tmp_path):
    """And one that is listed, or an expected failure, does not; a whole skipped file counts too."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tests / "allowed_skips.txt").write_text("tests/test_a.py::test_listed  # reason\n")
    (tests / "test_a.py").write_text(SKIPPING)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=BARE, capture_output=True, text=True)
    assert done.returncode == 1
    assert "test_not_listed was skipped" in done.stdout and "allowed_skips.txt does not list it" in done.stdout
    assert "1 passed, 1 skipped, 1 xfailed, 1 error" in done.stdout.strip().splitlines()[-1]

    (tests / "test_a.py").write_text("def test_runs(): pass")
    (tests / "test_b.py").write_text("import pytest\npytest.importorskip('no_such_package')")
    done = subprocess.run(command, cwd=tmp_path, env=BARE, capture_output=True, text=True)
    assert done.returncode != 0 and "tests/test_b.py was skipped" in done.stdout
