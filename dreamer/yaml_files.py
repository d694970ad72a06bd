"""YAML as people write it: files and pieces of text, read with line numbers or as plain values, and written.

The parser is ruamel's, in Python. Whatever it makes of a text, the result is a value or an error in one line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from dreamer.paths import PathError, absolute, whole_file
from dreamer.values import ConfigError

#: Most bytes of a file. A configuration has a few thousand; the parser reads about 100,000 a second.
LARGEST_FILE = 2_000_000


class YamlTextError(ValueError):
    """A text that is not YAML, or not a plain value."""


# --- Reading -------------------------------------------------------------------------------------


def find_file(name: str, source: str, beside: Path | None = None) -> Path:
    """The file that a path names; a relative path begins at `beside`, or in the working folder. ConfigError, after
    `source`, if there is none."""
    try:
        path = Path(os.path.realpath(absolute(name, beside)))
        if os.path.isfile(path):
            return path
    except (PathError, OSError) as error:
        raise ConfigError(f"{source}: {error}") from None
    found = "a folder" if os.path.isdir(path) else "something else" if os.path.exists(path) else "none"
    raise ConfigError(f"{source}: expected a YAML file, found {found} at {path}")


def parse_file(path: Path) -> Node | None:
    """The tree of a YAML file, which knows its lines; None for an empty one."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ConfigError(f"{path}: expected a file of at most {LARGEST_FILE:,} bytes, got a larger one")
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return _parser().compose(text)
    except Exception as error:  # see `_problem`
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{where}: expected valid YAML: {_problem(error)}") from None


def plain_node(node: Node, where: str) -> Any:
    """The plain Python value of a YAML node."""
    try:
        return _parser().constructor.construct_document(node)
    except Exception as error:  # see `_problem`
        raise ConfigError(f"{where}: expected a plain value: {_problem(error)}") from None


def plain_text(text: str) -> Any:
    """What a piece of YAML means, in plain Python values; YamlTextError if it is not YAML."""
    try:
        return _parser().load(io.StringIO(text))
    except Exception as error:  # see `_problem`
        raise YamlTextError(_problem(error)) from None


def key_text(key: Node, where: str) -> str:
    """The key of a mapping as a name. ConfigError for a list or a mapping in its place."""
    if not isinstance(key, ScalarNode):
        raise ConfigError(f"{where}: expected a name and its value (name: value), got a list or a mapping as the name")
    return str(key.value)


def _parser() -> YAML:
    return YAML(typ="safe", pure=True)


def _problem(error: Exception) -> str:
    """What the parser met, in words.

    Beside its own errors it passes on those of Python that a text can provoke: impossible dates, numbers of thousands
    of digits, thousands of brackets, lists as names.
    """
    if isinstance(error, RecursionError):
        return "lists and mappings are nested too deeply"
    if isinstance(error, YAMLError):
        return str(getattr(error, "problem", None) or (str(error).splitlines() or ["unreadable"])[0])
    return f"{error}" or type(error).__name__


# --- Writing -------------------------------------------------------------------------------------


class _Representer(SafeRepresenter):
    """Lists on one line."""


_Representer.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, tuple | list) else value


def write_file(path: Path, content: Mapping[str, Any], head: str) -> None:
    """Writes plain values, tuples as lists, below a one-line comment; whole or not at all."""
    yaml = _parser()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1_000_000
    yaml.allow_unicode = False  # as escapes: the emitter confuses some line separators
    text = io.StringIO(f"# {head}\n")
    text.seek(0, io.SEEK_END)
    yaml.dump(_listed(content), text)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
