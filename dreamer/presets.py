"""From presets, files and command-line overrides to one `Config`, and back to a file.

Files are applied in order, then the overrides; each changes some options and leaves the others alone.
A preset may begin with `include: [name, ...]`: these are applied before it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from ruamel.yaml.nodes import MappingNode, Node

from dreamer.config import Config
from dreamer.paths import absolute
from dreamer.schema import (
    ConfigError,
    first_fault,
    fit,
    mismatch,
    options,
    read,
    sections,
    show,
)
from dreamer.values import brief, native, suggestion
from dreamer.yaml_files import YamlTextError, find_file, key_text, parse_file, plain_node, plain_text, write_file

CONFIG_FILE = "config.yaml"
#: Options that name places: unchanged as long as their path relative to the run's folder is the same.
_PLACES = ("from_checkpoint", "replay.preload")

__all__ = ["CONFIG_FILE", "Change", "ConfigError", "check_resume", "diff", "load_config", "preset_names", "save_config"]


class Setting(NamedTuple):
    """A value and where it came from (`file.yaml:3` or `--run.seed`), for errors."""

    value: Any
    source: str


Settings = dict[str, Setting]


# --- Presets by name ---------------------------------------------------------------------------


def configs_folder() -> Path:
    """The folder of presets: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / "presets").is_dir():
            return folder
    raise ConfigError(f"expected the presets in {package / '_configs'}, found none; install the package again")


def preset_names() -> dict[str, Path]:
    """Everything `--configs` knows by name: presets, sizes, and files beside them such as `cpu`."""
    folder = configs_folder()
    files = [
        *sorted(folder.glob("presets/*.yaml")),
        *sorted(folder.glob("sizes/*.yaml")),
        *sorted(folder.glob("*.yaml")),
    ]
    return {file.stem: file for file in files}


def _find(name: str, source: str, beside: Path | None = None) -> Path:
    """The file that a preset's name or a path means; relative paths start at `beside`, or in the working folder."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return find_file(name, source, beside)
    names = preset_names()
    if name not in names:
        close = suggestion(name, names, f"; known: {', '.join(names)}")
        raise ConfigError(f"{source}: unknown preset {brief(name)}{close} (or give a path that ends in .yaml)")
    return names[name]


# --- Files -------------------------------------------------------------------------------------


def flatten_node(root: Node, path: Path) -> dict[str, tuple[Node, str]]:
    """Dotted name -> (node, `file:line`) of every option of a mapping, in nested groups or with dotted keys."""
    found: dict[str, tuple[Node, str]] = {}
    groups: set[str] = set()

    def walk(node: Node, prefix: str) -> None:
        where = f"{path}:{node.start_mark.line + 1}"
        if prefix and node.tag == "tag:yaml.org,2002:null":  # an empty group
            return
        if not isinstance(node, MappingNode):
            raise ConfigError(f"{where}: expected {prefix or 'the file'} to be a group of options (name: value)")
        for key, value in node.value:
            line = f"{path}:{key.start_mark.line + 1}"
            name = f"{prefix}.{key_text(key, line)}" if prefix else key_text(key, line)
            if name in found or name in groups:
                raise ConfigError(f"{line}: {name} is given twice; keep one")
            if name in sections():
                groups.add(name)
                walk(value, name)
            else:
                found[name] = (value, line)

    walk(root, "")
    return found


def _load_file(path: Path, trail: tuple[Path, ...] = ()) -> Settings:
    """The settings in one file, those of its includes first."""
    if path in trail:
        raise ConfigError(f"{path}: includes itself ({' -> '.join(p.name for p in (*trail, path))})")
    root = parse_file(path)
    found = {} if root is None else flatten_node(root, path)
    settings: Settings = {}
    if "include" in found:
        node, where = found.pop("include")
        names = plain_node(node, where)
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"{where}: expected include to be a list of presets, got {brief(names)}")
        for name in names:
            settings |= _load_file(_find(name, where, path.parent), (*trail, path))
    for name, (node, where) in found.items():
        settings[name] = fitted(name, plain_node(node, where), where)
    return settings


def fitted(name: str, value: Any, source: str) -> Setting:
    """The value in the option's type; ConfigError, with the source, if it does not fit or there is no such option."""
    if name not in options():
        raise ConfigError(f"{source}: {unknown(name)}")
    try:
        return Setting(fit(options()[name].annotation, value), source)
    except TypeError:
        label = "" if source == f"--{name}" else f"{name}: "
        raise ConfigError(f"{source}: {label}{mismatch(options()[name], value)}") from None


def unknown(name: str) -> str:
    """What to say about a name that is not an option."""
    if name in sections():
        inside = [o.removeprefix(f"{name}.") for o in options() if o.startswith(f"{name}.")]
        return f"{name} is a group of options; give one of them, as {name}.{inside[0]}"
    known = [*options(), *sections()]
    return f"unknown option {brief(name)[1:-1]}{suggestion(name, known, '; `dreamer train --help` lists them')}"


# --- Overrides ---------------------------------------------------------------------------------


def _override(settings: Settings, name: str, value: Any) -> None:
    """Sets one option; a text is parsed as the option's type."""
    if not isinstance(name, str):
        raise ConfigError(f"expected the name of an option, such as run.train_ratio, got {brief(name)}")
    source = f"--{name}"
    parent, _, key = name.rpartition(".")
    if parent in options() and isinstance(options()[parent].default, dict):
        before = settings[parent].value if parent in settings else options()[parent].default
        try:
            value = plain_text(value) if isinstance(value, str) else value
        except YamlTextError as error:
            raise ConfigError(f"{source}: expected a plain value, got {brief(value)}: {error}") from None
        settings[parent] = Setting({**before, key: value}, source)
        return
    if name not in options():
        raise ConfigError(f"{source}: {unknown(name)}")
    option = options()[name]
    value = native(value)
    if not isinstance(value, str):
        settings[name] = fitted(name, value, source)
        return
    try:
        settings[name] = Setting(read(option.annotation, value), source)
    except TypeError:
        raise ConfigError(f"{source}: {mismatch(option, value)}") from None


# --- The whole ---------------------------------------------------------------------------------


def load_config(configs: Iterable[str | Path] = (), overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration after these presets or files, in order, and then the overrides by dotted name.

    A text override is parsed as on the command line ("64,64", "null"); other values must have the option's type. Raises
    ConfigError, one line, for anything unknown, of the wrong type or out of bounds.
    """
    settings: Settings = {}
    for name in configs:
        settings |= _load_file(_find(str(name), f"--configs {name}"))
    for name, value in (overrides or {}).items():
        _override(settings, name, value)
    return build(settings)


def settings_of(configs: Iterable[Setting], beside: Path) -> Settings:
    """What these presets or files set, in order; errors name their sources.

    beside: where relative paths of files start.
    """
    whole: Settings = {}
    for name, source in configs:
        whole |= _load_file(_find(name, source, beside))
    return whole


def build(settings: Settings) -> Config:
    """The configuration that these settings make of the defaults."""
    tree: dict[str, Any] = {}
    for name, setting in settings.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = setting.value
    try:
        return pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as error:
        name, fault = first_fault(error)
        source = settings[name].source if name in settings else ""
        label = name if source != f"--{name}" else ""
        raise ConfigError(": ".join(part for part in (source, label, fault) if part)) from None


def save_config(config: Config, path: Path | str) -> None:
    """Writes the whole configuration; `load_config([path])` gives exactly the same one. Atomic."""
    head = "The whole configuration of this run; `dreamer train --configs` takes this file."
    write_file(Path(path), dataclasses.asdict(config), head)


# --- Resuming ----------------------------------------------------------------------------------


class Change(NamedTuple):
    """An option that differs between two configurations; `allowed`: it may differ when a run is resumed."""

    name: str
    old: Any
    new: Any
    allowed: bool

    def __str__(self) -> str:
        return f"{self.name}: {show(self.old)} -> {show(self.new)}"


def value_of(config: Config, name: str) -> Any:
    """The value of an option by its dotted name."""
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node


def diff(old: Config, new: Config) -> list[Change]:
    """The options whose values differ, in the order of `config.py`."""
    pairs = [(option, value_of(old, name), value_of(new, name)) for name, option in options().items()]
    moved = [name for name in _PLACES if _as_seen(name, old) == _as_seen(name, new)]
    return [Change(option.name, a, b, option.resume) for option, a, b in pairs if a != b and option.name not in moved]


def _as_seen(name: str, config: Config) -> str | None:
    """The path in an option, relative to the run's folder, so that both may move together; None: there is none."""
    place = value_of(config, name)
    return None if place is None else os.path.relpath(place, config.logdir or "/")


def check_resume(old: Config, new: Config) -> list[Change]:
    """The changes between a run's stored configuration and the one it is to continue with.

    Raises ConfigError, naming them, if any of them may not change within a run.
    """
    changes = diff(old, new)
    refused = [str(change) for change in changes if not change.allowed]
    if refused:
        raise ConfigError(
            f"the run in {new.logdir} was started with other options, which cannot change on resume: "
            f"{'; '.join(refused)}. Give the old values, or another --logdir"
        )
    return changes


def config_file(logdir: Path | str) -> Path:
    """Where a run's folder holds its configuration."""
    return absolute(logdir) / CONFIG_FILE


def stored_config(logdir: Path | str) -> Config | None:
    """The configuration that a run's folder holds, or None when no run was started there."""
    path = config_file(logdir)
    return load_config([path]) if os.path.isfile(path) else None


def run_config(logdir: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of an existing run, to play with its agent: on the fastest device, with this folder as its
    logdir. ConfigError, saying where runs are, for any other folder.

    overrides: options of `planner` by dotted name; naming another planner forgets the settings of the run's own.
    """
    path = config_file(logdir)
    if os.path.isfile(path):
        changes = dict(overrides or {})
        if "planner.name" in changes:
            changes = {name: option.default for name, option in options().items() if _of_planner(name)} | changes
        return load_config([path], {"logdir": str(path.parent), "run.platform": "auto"} | changes)
    folder = path.parent
    above = next((parent for parent in folder.parents if os.path.isfile(parent / CONFIG_FILE)), None)
    if inside := runs_inside(folder):
        where = f"; runs lie in it: {', '.join(inside)}"
    else:
        missing = "" if os.path.exists(folder) else "; there is no such folder"
        where = f"; it lies in the run {above}" if above else missing
    raise ConfigError(f"expected the folder of a run, with a {CONFIG_FILE} in it, got {brief(str(logdir))}{where}")


def _of_planner(name: str) -> bool:
    return name.startswith("planner.")


def runs_inside(folder: Path) -> list[str]:
    """Names of the first five folders in a folder that are runs."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")) if os.path.isdir(folder) else []
    return found[:5] + (["..."] if len(found) > 5 else [])
