"""Which device a run computes on, and what is said where it is not there."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from tiny_runs import tiny_config

import dreamer
from dreamer.bench.bench_update import Program
from dreamer.bench.plan import make_plan
from dreamer.cli import main
from dreamer.commands import bench
from dreamer.config import Config
from dreamer.presets import save_config
from dreamer.run.devices import DeviceError, find_devices
from dreamer.run.loaded_agent import load_agent

UNKNOWN = "Unable to initialize backend 'foo': Backend 'foo' is not in the list of known backends\nand more"


def on_auto(config: Config) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, platform="auto"))


@pytest.fixture(params=[AssertionError(), RuntimeError(UNKNOWN)], ids=["without a word", "with words"])
def told_of_nothing(request, monkeypatch):
    """JAX_PLATFORMS=foo: JAX raises one thing or another from whatever looks for its devices."""

    def missing(*arguments: Any) -> Any:
        raise request.param

    before = {name: jax.config.values[name] for name in ("jax_platforms", "jax_platform_name")}
    jax.config.update("jax_platforms", "foo")
    jax.config.update("jax_platform_name", "")
    for name in ("devices", "local_devices", "process_count", "process_index", "default_backend"):
        monkeypatch.setattr(jax, name, missing)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


STARTS: dict[str, Callable[[Config], object]] = {
    "train": dreamer.train,
    "eval": load_agent,
    "plan": make_plan,
    "bench": bench._checked,
    "bench update": lambda config: Program("1m", "vector"),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_device_that_is_not_there_is_told_before_anything_begins(start, told_of_nothing, tmp_path):
    config = on_auto(tiny_config(logdir=str(tmp_path / "run")))
    with pytest.raises(
        DeviceError, match=r"^expected a device, found none.*JAX was told JAX_PLATFORMS=foo: unset"
    ) as found:
        start(config)
    assert "\n" not in str(found.value) and not list(tmp_path.glob("run/*"))


def test_agents_in_other_programs_say_it_as_well(told_of_nothing, tmp_path):
    save_config(tiny_config(logdir=str(tmp_path)), tmp_path / "config.yaml")
    with pytest.raises(DeviceError, match="JAX_PLATFORMS=foo"):
        dreamer.Agent.load(tmp_path)


def test_the_command_line_says_it_in_a_line(told_of_nothing, tmp_path, capsys):
    assert main(["train", "--configs", "debug", "--logdir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_there_is_named():
    """Of the tests' own devices, which are processors."""
    with pytest.raises(DeviceError, match=r"kind 'tpu' \(--run.platform\), found \['cpu'\].*pip install"):
        find_devices("tpu")
    assert find_devices("cpu") == jax.devices("cpu")


def test_jax_itself_is_told_of_a_device_that_is_not_there(tmp_path):
    code = "from dreamer.run.devices import *\ntry: find_devices('auto')\nexcept DeviceError as e: print(e)"
    surroundings = {**os.environ, "JAX_PLATFORMS": "foo"}
    said = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("expected a device, found none (Unable to initialize backend 'foo'")
    assert said.stdout.count("\n") == 1 and "JAX was told JAX_PLATFORMS=foo" in said.stdout
