"""Reading command lines: options of the configuration, and what argparse needs for ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dreamer.paths import PathError, absolute
from dreamer.schema import ConfigError, mismatch, options

USAGE_ERROR = 2


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(`--configs`, overrides) of a command line: `--name value`, `--name=value`, or `--name` alone for true."""
    configs: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(f"expected an option such as --seed 3, got {token!r} (several values: 64,64)")
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


def hide_accelerators() -> None:
    """Makes JAX use the CPU only, and leave the memory of accelerators alone. Before its first computation."""
    import jax

    jax.config.update("jax_platforms", "cpu")


class Parser(argparse.ArgumentParser):
    """Errors in one line, like those of the configuration."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows the arguments")


def place(text: str) -> Path:
    """A path from the root, for argparse."""
    try:
        return absolute(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
