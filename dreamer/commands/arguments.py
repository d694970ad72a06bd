"""Reading command lines: options of the configuration, and argparse types for the commands' own arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dreamer.config import Config
from dreamer.paths import PathError, absolute
from dreamer.presets import Setting, preset_names, settings_of, value_of
from dreamer.schema import ConfigError, mismatch, options, show
from dreamer.values import LARGEST_SEED, brief

USAGE_ERROR = 2
#: Presets that say nothing about their task's suite; the latter are for a single task.
NO_SETTING, ONE_TASK = ("debug",), ("carracing", "quickstart")
#: Presets of whole methods, with their papers' settings of a suite: they do where they are given, but are not named.
METHODS = ("dreamer_v1", "dreamer_v2", "muzero", "planet", "r2dreamer")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(`--configs`, overrides) of a command line: `--name value`, `--name=value`, or `--name` alone for true."""
    configs: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(f"expected an option such as --seed 3, got {brief(token)} (several values: 64,64)")
        name, equals, value = token.removeprefix("--").partition("=")
        if name == "configs":
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if not values:
                raise ConfigError("--configs: expected names of presets or YAML files, got none")
            configs += values
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and name in options():
            if options()[name].annotation is not bool:
                raise ConfigError(f"--{name}: {mismatch(options()[name], None).replace('got None', 'got nothing')}")
            value = "true"
        overrides[name] = value
    return configs, overrides


def planner_options(arguments: Sequence[str]) -> dict[str, str]:
    """The options of the group `planner` of a command line, by dotted name; ConfigError for any others."""
    configs, overrides = split_arguments(arguments)
    if other := [f"--{name}" for name in overrides if not name.startswith("planner.")] or ["--configs"] * bool(configs):
        raise ConfigError(
            f"unrecognized arguments: {other[0]}; expected this command's own (see --help) or --planner.OPTION"
        )
    return overrides


def presets_left_out(configs: Sequence[str], config: Config, environment: bool = False) -> str | None:
    """One line if the task's suite has presets with settings and none of them is among `configs`; None otherwise.

    A user's file in `configs` is taken to say all that is needed. environment: only settings of the environment matter,
    not those of learning.
    """
    known = preset_names()
    if not set(configs) <= set(known):
        return None
    suite, found = config.task.partition("_")[0], dict[str, list[str]]()
    for name, path in known.items():
        if path.parent.name != "presets" or name in NO_SETTING or name in METHODS and name not in configs:
            continue
        settings = settings_of([Setting(name, str(path))], path.parent)
        task = settings["task"].value
        if task == config.task or name not in ONE_TASK and task.partition("_")[0] == suite:
            of_suite = [option for option in settings if option.startswith("env.") and option.count(".") > 1]
            other = [option for option in of_suite if value_of(config, option) != settings[option].value]
            found[name] = [f"{option} {show(settings[option].value)}" for option in other]
    if not found or set(found) & set(configs) or environment and not all(found.values()):
        return None
    named = [f"--configs {name}" + (f" ({', '.join(other)})" if other else "") for name, other in found.items()]
    return f"no preset of its suite is given: {config.task} goes without the settings of {' or '.join(named)}"


def hide_accelerators() -> None:
    """Makes JAX use only the CPU and leave the memory of accelerators alone. Call it before JAX's first computation."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_platform_name", "cpu")


class Parser(argparse.ArgumentParser):
    """Errors in one line, like those of the configuration."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows the arguments")


def place(text: str) -> Path:
    """An absolute path, for argparse."""
    try:
        return absolute(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds, for argparse."""

    def read(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= len(str(most))
        if not digits or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least:,} to {most:,}, got {brief(text)}")
        return int(text)

    return read


#: A number of episodes, steps, rounds or workers.
count = whole(1, 10**9)
#: A seed, with the bounds of the configuration's.
seed = whole(0, LARGEST_SEED)


def positive(text: str) -> float:
    """A positive number of sensible size, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-9 <= value <= 1e12:
        raise argparse.ArgumentTypeError(f"expected a number from 1e-9 to 1e12, got {brief(text)}")
    return value
