"""Sweep files: one YAML file says which runs there are. Errors name the file, the line and the nearest valid name."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from dreamer.config import LARGEST_SEED
from dreamer.presets import (
    Setting,
    Settings,
    configs_folder,
    fitted,
    flatten_node,
    unknown,
)
from dreamer.schema import ConfigError, options, show
from dreamer.sweeps.draws import read_draw
from dreamer.sweeps.spec import MOST_RUNS, Drawn, EarlyStop, Entry, RayTask, Sweep
from dreamer.values import brief, plain, suggestion
from dreamer.yaml_files import find_file, key_text, parse_file, plain_node

#: Options that a sweep sets itself, and what to write instead.
_OWN = {"seed": "write `seeds: [0, 1, 2]`", "logdir": "each run has a folder of its own in --logdir"}


def sweep_names() -> dict[str, Path]:
    """The sweeps that go by a name."""
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
        raise ConfigError(f"{path}: expected a sweep, found an empty file; known keys: {', '.join(_KEYS)}")
    found: dict[str, Any] = {}
    for key, where, node in _pairs(root, path, "a sweep"):
        more = "; options of all runs go under `options:`" if key.split(".")[0] in _roots() else ""
        _check_key(key, _KEYS, where, " of a sweep", more)
        field, read = _KEYS[key]
        found[field] = read(node, path, where)
    sweep = Sweep(**{"path": path, "name": path.stem, **found})
    if sweep.search and (sweep.named or sweep.grid or sweep.items or sweep.random):
        raise ConfigError(f"{path}: expected `search` alone beside `options` and `seeds`; its score must be one number")
    return sweep


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
            raise ConfigError(f"{where}: {name} stands here twice; keep one")
        found[name] = (name, where, value)
    return list(found.values())


def _check_key(key: str, known: Iterable[str], where: str, of: str = "", remedy: str = "") -> None:
    """ConfigError for a key that is none of those known. of: what it would be a key of; remedy: other than the nearest
    of them."""
    if key not in (known := tuple(known)):
        close = remedy or suggestion(key, known, f"; known: {', '.join(known)}")
        raise ConfigError(f"{where}: unknown key {key!r}{of}{close}")


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
    """Options by dotted name, from nested groups or dotted keys; those that a sweep sets itself are refused."""
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


def _named(node: Node, path: Path, where: str) -> tuple[Entry, ...]:
    entries = []
    for name, _, inner in _pairs(node, path, "runs"):
        empty = inner.tag == "tag:yaml.org,2002:null"
        entries.append(Entry(name, *(((), {}) if empty else _settings(inner, path))))
    return tuple(entries)


def _items(node: Node, path: Path, where: str) -> tuple[Entry, ...]:
    entries = []
    for inner in _sequence(node, path, where, "list"):
        configs, settings = _settings(inner, path)
        entries.append(Entry(label_of(configs, settings), configs, settings))
    return tuple(entries)


def _grid(node: Node, path: Path, where: str) -> tuple[tuple[Entry, ...], ...]:
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
            entries.append(Entry(label_of(configs, settings, found), configs, settings))
        axes.append(tuple(entries))
    return tuple(axes)


def label_of(configs: Iterable[Setting], settings: Settings, among: Iterable[str] = ()) -> str:
    """What a run is called by what it sets: `size12m-train_ratio_64`; full names where last parts are shared."""
    ends = [name.rsplit(".", 1)[-1] for name in among]
    parts = [Path(config.value).stem for config in configs]
    for name, setting in settings.items():
        end = name.rsplit(".", 1)[-1]
        parts.append(
            show(setting.value) if name == "task" else f"{name if ends.count(end) > 1 else end}_{show(setting.value)}"
        )
    return "-".join(parts)


def _drawn(count_key: str) -> Callable[[Node, Path, str], Drawn]:
    def read(node: Node, path: Path, where: str) -> Drawn:
        parts = {key: (line, inner) for key, line, inner in _pairs(node, path, "this")}
        known = (count_key, "seed", "options")
        for key, (line, _) in parts.items():
            _check_key(key, known, line)
        for key in (count_key, "options"):
            if key not in parts:
                raise ConfigError(f"{where}: expected the key {key}; known: {', '.join(known)}")
        numbers = {
            k: (_SEED if k == "seed" else _COUNT)(parts[k][1], path, parts[k][0])
            for k in (count_key, "seed")
            if k in parts
        }
        draws = {
            name: read_draw(name, plain_node(inner, line), line)
            for name, (inner, line) in _dotted(parts["options"][1], path).items()
        }
        for name, draw in draws.items():
            for value in draw.values:
                fitted(name, value, draw.where)
        return Drawn(numbers[count_key], numbers.get("seed", 0), draws)

    return read


def _seeds(node: Node, path: Path, where: str) -> tuple[int, ...]:
    """A number of seeds, from 0, or the list of them."""
    found = plain_node(node, where)
    if isinstance(found, int) and not isinstance(found, bool) and 0 < found <= MOST_RUNS:
        return tuple(range(found))
    good = isinstance(found, list) and found and all(isinstance(s, int) and not isinstance(s, bool) for s in found)
    if not good or min(found) < 0 or max(found) > LARGEST_SEED or len(set(found)) < len(found):
        raise ConfigError(
            f"{where}: expected seeds to be their number, at most {MOST_RUNS:,}, or a list of different ones from 0 to "
            f"2^64 - 1, got {brief(found)}"
        )
    return tuple(found)


def _number(kind: type, least: float, largest: float) -> Callable[[Node, Path, str], Any]:
    def read(node: Node, path: Path, where: str) -> Any:
        found = plain_node(node, where)
        number = isinstance(found, int if kind is int else int | float) and not isinstance(found, bool)
        if not number or not least <= found <= largest:
            raise ConfigError(
                f"{where}: expected a {'whole ' if kind is int else ''}number from {least:,g} to {largest:,g}, "
                f"got {brief(found)}"
            )
        return kind(found)

    return read


#: Runs, trials, and the seed of their draws.
_COUNT, _SEED = _number(int, 1, MOST_RUNS), _number(int, 0, LARGEST_SEED)


def _early_stop(node: Node, path: Path, where: str) -> EarlyStop | None:
    if node.tag == "tag:yaml.org,2002:null":
        return None
    readers = {"after": _number(float, 0, 1), "below": _number(float, 0, 1), "runs": _COUNT}
    found = {}
    for key, line, inner in _pairs(node, path, "early_stop"):
        _check_key(key, readers, line, " of early_stop")
        found[key] = readers[key](inner, path, line)
    return EarlyStop(**found)


def _text(node: Node, path: Path, where: str) -> str:
    found = plain_node(node, where)
    if not isinstance(found, str) or found in ("", ".", "..") or "/" in found or not found.isprintable():
        raise ConfigError(f"{where}: expected a name that a folder can have, without /, got {brief(found)}")
    return found


def _mapping(node: Node, path: Path, where: str) -> dict[str, Any]:
    found = {}
    for key, line, inner in _pairs(node, path, "this"):
        try:
            found[key] = plain(plain_node(inner, line))
        except ValueError as error:
            raise ConfigError(f"{line}: {error}") from None
        if isinstance(found[key], float) and not math.isfinite(found[key]):
            raise ConfigError(f"{line}: expected a finite number, got {found[key]}")
    return found


def _ray(node: Node, path: Path, where: str) -> RayTask:
    for key, line, _ in _pairs(node, path, "ray"):
        _check_key(key, [field.name for field in dataclasses.fields(RayTask)], line, " of ray")
    try:
        return RayTask(**_mapping(node, path, where))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


#: By key of the file: the field of `Sweep`, and how it is read.
_KEYS: dict[str, tuple[str, Callable[[Node, Path, str], Any]]] = {
    "name": ("name", _text),
    "configs": ("configs", _configs),
    "options": ("settings", _options),
    "runs": ("named", _named),
    "grid": ("grid", _grid),
    "list": ("items", _items),
    "random": ("random", _drawn("runs")),
    "search": ("search", _drawn("trials")),
    "seeds": ("seeds", _seeds),
    "retries": ("retries", _number(int, 0, 1000)),
    "retry_seconds": ("retry_seconds", _number(float, 0, 1e6)),
    "early_stop": ("early_stop", _early_stop),
    "hours": ("hours", _number(float, 0, 1e6)),
    "slurm": ("slurm", _mapping),
    "ray": ("ray", _ray),
}
