"""Settings of the whole suite: the CPU, one compilation cache, no skip that is not on the checked-in list."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports jax; worker processes inherit them. `scripts/gpu_report` asks for the accelerator ("").
os.environ["JAX_PLATFORMS"] = os.environ.get("DREAMER_TEST_PLATFORM", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# The same examples every time: a failure on another machine can be seen again on this one.
hypothesis.settings.register_profile("dreamer", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dreamer")


def allowed_skips() -> list[str]:
    """Patterns of test ids that may be skipped, from tests/allowed_skips.txt."""
    lines = (ROOT / "tests" / "allowed_skips.txt").read_text().splitlines()
    return [line for raw in lines if (line := raw.split("#")[0].strip())]


def _fail_if_not_allowed(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip into a failure unless the list allows it. Expected failures are no skips."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    if any(fnmatch.fnmatchcase(report.nodeid, pattern) for pattern in allowed_skips()):
        return
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} was skipped ({reason}), and tests/allowed_skips.txt does not list it"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _fail_if_not_allowed(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _fail_if_not_allowed(report)
    return report


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory) -> Path:
    """The folder of the quickstart's run, which takes minutes; DREAMER_TEST_QUICKSTART: one that is there."""
    if given := os.environ.get("DREAMER_TEST_QUICKSTART"):
        return Path(given)
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    command = [sys.executable, "-m", "dreamer", "train", "--configs", "quickstart", "--run.display", "false"]
    subprocess.run([*command, "--logdir", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def shots(tmp_path) -> Path:
    """Where screenshots go; DREAMER_TEST_SHOTS: to keep them."""
    return Path(os.environ.get("DREAMER_TEST_SHOTS", tmp_path))


@pytest.fixture
def unchecked_envs(monkeypatch):
    """Environments in this process whose garbage nobody catches: what the rest of the run then does."""
    monkeypatch.setattr("dreamer.envs.wrappers.TransitionCheck", lambda spaces: lambda result, first: None)
