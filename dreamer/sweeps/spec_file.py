"""Reads sweep files: one YAML file says which runs to make. Errors give file, line and the nearest valid name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from dreamer.presets import (
    Setting,
    Settings,
    configs_folder,
    fitted,
    flatten_node,
    unknown,
)
from dreamer.schema import ConfigError, options, show
from dreamer.sweeps.draws import Draw, read_draw
from dreamer.sweeps.spec import Drawn, EarlyStop, RayTask, Sweep, Trials, Variant
from dreamer.values import brief, describe_fault, suggestion
from dreamer.yaml_files import find_file, key_text, parse_file, plain_node

Reader = Callable[[Node, Path, str], Any]

#: Options that a sweep sets itself, and what to write instead.
_OWN = {"seed": "write `seeds: [0, 1, 2]`", "logdir": "each run has a folder of its own in --logdir"}


def sweep_names() -> dict[str, Path]:
    """The sweeps that can be given by name."""
    return {file.stem: file for file in sorted(configs_folder().glob("sweeps/*.yaml"))}


def find_sweep(name: str) -> Path:
    """The file of a sweep's name or of a path."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return find_file(name, "sweep")
    names = sweep_names()
    if name not in names:
        close = suggestion(name, names, f"; known: {', '.join(names)}")
        raise ConfigError(f"unknown sweep {name!r}{close} (or give a path that ends in .yaml)")
    return names[name]


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep file; ConfigError for what is wrong in it."""
    root = parse_file(path)
    if root is None:
        raise ConfigError(f"{path}: expected a sweep, found an empty file; known keys: {', '.join(_keys(Sweep))}")
    found = _part(Sweep, "a sweep", _READERS)(root, path, f"{path}")
    try:
        return TypeAdapter(Sweep).validate_python({"name": path.stem, **found, "path": path})
    except ValidationError as error:
        fault = error.errors()[0]
        where, name = _line_of(fault["loc"], root, path), ".".join(map(str, fault["loc"]))
        wrong = f"expected the key {fault['loc'][-1]}" if fault["type"] == "missing" else describe_fault(fault)
        raise ConfigError(": ".join(part for part in (where, name, wrong) if part)) from None


def _keys(kind: Any) -> list[str]:
    """The keys of one part of a file, except `path`."""
    return [field.alias or name for name, field in kind.__pydantic_fields__.items() if name != "path"]


def _line_of(place: Iterable[str | int], root: Node, path: Path) -> str:
    """`file:line` of the key that these nested keys lead to, or of the last of them that exists."""
    where, node = f"{path}", root
    for part in place:
        pairs = node.value if isinstance(node, MappingNode) else ()
        key, node = next(((key, value) for key, value in pairs if key.value == part), (None, node))
        if key is not None:
            where = _line(key, path)
    return where


def _roots() -> set[str]:
    return {name.split(".")[0] for name in options()}


# --- Parts of the tree ---------------------------------------------------------------------------


def _pairs(node: Node, path: Path, what: str) -> list[tuple[str, str, Node]]:
    """(key, `file:line`, node) of a mapping."""
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{_line(node, path)}: expected {what} to be a mapping (name: value)")
    found: dict[str, tuple[str, str, Node]] = {}
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        name = key_text(key, where)
        if name in found:
            raise ConfigError(f"{where}: {name} is given twice; keep one")
        found[name] = (name, where, value)
    return list(found.values())


def _line(node: Node, path: Path) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _sequence(node: Node, path: Path, where: str, what: str) -> list[Node]:
    if not isinstance(node, SequenceNode) or not node.value:
        raise ConfigError(f"{where}: expected {what} to be a list, got {brief(plain_node(node, where))}")
    return list(node.value)


def _configs(node: Node, path: Path, where: str) -> tuple[Setting, ...]:
    """A preset or a list of them."""
    names = plain_node(node, where)
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"{where}: expected configs to be a list of presets, got {brief(names)}")
    return tuple(Setting(name, where) for name in listed)


def _dotted(node: Node, path: Path) -> dict[str, tuple[Node, str]]:
    """Options by dotted name, from nested groups or dotted keys; options that a sweep sets itself are refused."""
    found = flatten_node(node, path)
    for name, (_, where) in found.items():
        if name in _OWN:
            raise ConfigError(f"{where}: {name} is set by the sweep; {_OWN[name]}")
        parent = name.rpartition(".")[0]
        if name not in options() and name != "configs":
            if parent in options() and isinstance(options()[parent].default, dict):
                raise ConfigError(f"{where}: give {parent} as a mapping, {{{name.rpartition('.')[2]}: value}}")
            raise ConfigError(f"{where}: {unknown(name)}")
    return found


def _settings(node: Node, path: Path) -> tuple[tuple[Setting, ...], Settings]:
    """(configs, options) of a mapping."""
    found = _dotted(node, path)
    configs = _configs(found["configs"][0], path, found["configs"][1]) if "configs" in found else ()
    found.pop("configs", None)
    return configs, {name: fitted(name, plain_node(n, where), where) for name, (n, where) in found.items()}


# --- Keys of the file ----------------------------------------------------------------------------


def _options(node: Node, path: Path, where: str) -> Settings:
    configs, settings = _settings(node, path)
    if configs:
        raise ConfigError(f"{configs[0].source}: configs of all runs go beside `options`, not into it")
    return settings


def _named(node: Node, path: Path, where: str) -> tuple[Variant, ...]:
    entries = []
    for name, _, inner in _pairs(node, path, "runs"):
        empty = inner.tag == "tag:yaml.org,2002:null"
        entries.append(Variant(name, *(((), {}) if empty else _settings(inner, path))))
    return tuple(entries)


def _items(node: Node, path: Path, where: str) -> tuple[Variant, ...]:
    entries = []
    for inner in _sequence(node, path, where, "list"):
        configs, settings = _settings(inner, path)
        entries.append(Variant(label_of(configs, settings), configs, settings))
    return tuple(entries)


def _grid(node: Node, path: Path, where: str) -> tuple[tuple[Variant, ...], ...]:
    axes = []
    found = _dotted(node, path)
    for name, (inner, line) in found.items():
        entries = []
        for value in _sequence(inner, path, line, f"the values of {name}"):
            at = _line(value, path)
            if name == "configs":
                configs, settings = _configs(value, path, at), {}
            else:
                configs, settings = (), {name: fitted(name, plain_node(value, at), at)}
            entries.append(Variant(label_of(configs, settings, found), configs, settings))
        axes.append(tuple(entries))
    return tuple(axes)


def label_of(configs: Iterable[Setting], settings: Settings, among: Iterable[str] = ()) -> str:
    """The name of a run after what it sets: `size12m-train_ratio_64`; full option names where last parts clash."""
    ends = [name.rsplit(".", 1)[-1] for name in among]
    parts = [Path(config.value).stem for config in configs]
    for name, setting in settings.items():
        end = name.rsplit(".", 1)[-1]
        parts.append(
            show(setting.value) if name == "task" else f"{name if ends.count(end) > 1 else end}_{show(setting.value)}"
        )
    return "-".join(parts)


def _draws(node: Node, path: Path, where: str) -> dict[str, Draw]:
    draws = {
        name: read_draw(name, plain_node(inner, line), line) for name, (inner, line) in _dotted(node, path).items()
    }
    for name, draw in draws.items():
        for value in draw.values:
            fitted(name, value, draw.where)
    return draws


def _part(kind: Any, what: str, readers: Mapping[str, Reader]) -> Reader:
    """Reads a mapping with the keys of a class, each by its reader or as a plain value."""

    def read(node: Node, path: Path, where: str) -> dict[str, Any]:
        found = {}
        for key, line, inner in _pairs(node, path, what):
            if key not in (known := _keys(kind)):
                close = suggestion(key, known, f"; known: {', '.join(known)}")
                if kind is Sweep and key.split(".")[0] in _roots():
                    close = "; options of all runs go under `options:`"
                raise ConfigError(f"{line}: unknown key {key!r} of {what}{close}")
            found[key] = readers[key](inner, path, line) if key in readers else plain_node(inner, line)
        return found

    return read


def _early_stop(node: Node, path: Path, where: str) -> dict[str, Any] | None:
    return None if node.tag == "tag:yaml.org,2002:null" else _part(EarlyStop, "early_stop", {})(node, path, where)


def _slurm(node: Node, path: Path, where: str) -> dict[str, Any]:
    return {key: plain_node(inner, line) for key, line, inner in _pairs(node, path, "slurm")}


#: Readers for the values of these keys; all others are plain.
_READERS: dict[str, Reader] = {
    "configs": _configs,
    "options": _options,
    "runs": _named,
    "grid": _grid,
    "list": _items,
    "random": _part(Drawn, "random", {"options": _draws}),
    "search": _part(Trials, "search", {"options": _draws}),
    "early_stop": _early_stop,
    "slurm": _slurm,
    "ray": _part(RayTask, "ray", {}),
}
