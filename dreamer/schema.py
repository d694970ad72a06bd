"""The options of `config.py` as a table: names, types, meanings; reading and checking one value; the help text."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union

import pydantic

from dreamer.config import Config
from dreamer.values import ConfigError, brief, describe_fault, native, suggestion
from dreamer.yaml_files import YamlTextError, plain_text

__all__ = ["ConfigError", "Option"]

NULL_WORDS = ("null", "none", "~")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of the configuration.

    name        Dotted, as in `run.train_ratio`.
    annotation  Python type of the value.
    limits      Bounds of the value, as in `> 0`, or "".
    resume      Whether it may change when a run is resumed.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str
    unit: str | None
    limits: str
    resume: bool


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_LENGTHS = {"min_length": "at least {} of them", "max_length": "at most {}"}


def _bounds(metadata: Iterable[Any]) -> list[str]:
    """Bounds of a value, or of each value in a list."""
    found = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _SIGNS.items() if hasattr(m, name)]
    return found + [words.format(getattr(m, k)) for m in metadata for k, words in _LENGTHS.items() if hasattr(m, k)]


def _limits(annotation: Any, metadata: Iterable[Any]) -> str:
    """The bounds of an option in words: `> 0, <= 100`."""
    inner = [item for part in _parts(annotation) for item in _bounds(_metadata(part))]
    each = [f"each {', '.join(dict.fromkeys(inner))}"] if inner else []
    return ", ".join(_bounds(list(metadata)) + each)


def _parts(annotation: Any) -> Iterable[Any]:
    """An annotation and all its components."""
    yield annotation
    for part in () if typing.get_origin(annotation) is Literal else typing.get_args(annotation):
        yield from _parts(part)


def _metadata(annotation: Any) -> list[Any]:
    """What `Annotated` adds to a type."""
    given = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    return [m for field in given for m in getattr(field, "metadata", ())]


def _bare(annotation: Any) -> Any:
    """A type without what `Annotated` adds to it and its components."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _bare(inner[0])
    if origin is tuple:
        return tuple[tuple(_bare(part) for part in inner)]  # type: ignore[misc]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_bare, inner))
    return annotation


@functools.cache
def sections() -> dict[str, type]:
    """The groups of options: dotted name -> dataclass; the outermost is ""."""
    found: dict[str, type] = {}

    def walk(prefix: str, cls: Any) -> None:
        found[prefix.rstrip(".")] = cls
        for name, field in cls.__pydantic_fields__.items():
            if dataclasses.is_dataclass(field.annotation):
                walk(f"{prefix}{name}.", field.annotation)

    walk("", Config)
    return found


@functools.cache
def options() -> dict[str, Option]:
    """Every option by its dotted name, in the order of `config.py`."""
    found: dict[str, Option] = {}
    for section, cls in sections().items():
        for name, field in typing.cast(Any, cls).__pydantic_fields__.items():
            if dataclasses.is_dataclass(field.annotation):
                continue
            dotted = f"{section}.{name}" if section else name
            extra = typing.cast(dict[str, Any], field.json_schema_extra)
            found[dotted] = Option(
                name=dotted,
                annotation=_bare(field.annotation),
                default=field.get_default(call_default_factory=True),
                meaning=field.description or "",
                unit=extra["unit"],
                limits=_limits(field.annotation, field.metadata),
                resume=extra["resume"],
            )
    return found


# --- One value ---------------------------------------------------------------------------------


def describe(annotation: Any) -> str:
    """The type in words, for errors and for the help."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        parts = [describe(a) for a in inner if a is not type(None)]
        return " or ".join(parts + (["null"] if type(None) in inner else []))
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a list, each {describe(inner[0])}"
        return f"a list of {len(inner)}, each {describe(inner[0])}"
    if origin is dict:
        return "a mapping"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}.get(annotation, "a value")


def fit(annotation: Any, value: Any) -> Any:
    """`value` in the type of an option, or TypeError: texts do not become numbers here, nor numbers truth values.

    A number without a fraction (1.1e6) fits an integer; a list fits a tuple, and so does a single value where there may
    be any number; numpy numbers and paths fit as what they stand for.
    """
    value = native(value)
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        for candidate in inner:
            try:
                return fit(candidate, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            if inner[-1] is not Ellipsis:
                raise TypeError
            value = [value]
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise TypeError
        return tuple(fit(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise TypeError
        return dict(value)
    if annotation is Any:
        return value
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def read(annotation: Any, text: str) -> Any:
    """The value that `text` (from a command line) means for an option of this type, or TypeError."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if text.lower() in NULL_WORDS and type(None) in inner:
            return None
        for candidate in inner:
            try:
                return read(candidate, text)
            except TypeError:
                continue
        raise TypeError
    if origin is tuple:
        body = text.strip().removeprefix("[").removesuffix("]")
        parts = [part.strip() for part in body.split(",") if part.strip()]
        kinds = inner[:1] * len(parts) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(parts):
            raise TypeError
        return tuple(read(k, p) for k, p in zip(kinds, parts, strict=True))
    if annotation is str or origin is Literal:
        return fit(annotation, text)
    if origin is dict or annotation is Any:
        try:
            return fit(annotation, plain_text(text))
        except YamlTextError:
            raise TypeError from None
    if annotation is bool:
        words = {"true": True, "false": False}
        if text.lower() not in words:
            raise TypeError
        return words[text.lower()]
    try:
        return fit(annotation, int(text) if text.strip("+-").isdigit() else float(text))
    except ValueError:
        raise TypeError from None


def mismatch(option: Option, value: Any) -> str:
    """`expected an integer, got 'abc'`, with the nearest of a choice's values."""
    close = ""
    if typing.get_origin(option.annotation) is Literal and isinstance(value, str):
        close = suggestion(value, typing.get_args(option.annotation))
    return f"expected {describe(option.annotation)}, got {brief(value)}{close}"


def first_fault(error: pydantic.ValidationError) -> tuple[str, str]:
    """(dotted name or "", what is wrong) of the first fault that pydantic found."""
    fault = error.errors()[0]
    parts: list[str] = []
    for part in fault["loc"]:
        if ".".join([*parts, str(part)]) in options() or ".".join([*parts, str(part)]) in sections():
            parts.append(str(part))
    name = ".".join(parts)
    return name, describe_fault(fault) + (_off(options()[name]) if name in options() else "")


def _off(option: Option) -> str:
    """What null would mean for an option that may be null."""
    if type(None) not in typing.get_args(option.annotation):
        return ""
    meaning = re.search(r"null: ([^;.]+)", option.meaning)
    return f"; or null: {meaning.group(1)}" if meaning else "; or null"


# --- Help --------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(show(v) for v in value)
    return str(value) if value != "" else '""'


def help_text(width: int = 100) -> str:
    """Every option with its type, default, unit and meaning, in groups, from the dataclasses."""
    lines: list[str] = []
    for section, cls in sections().items():
        title = (cls.__doc__ or "").strip().splitlines()[0]
        lines += ["", f"{section or 'general'}: {title}"]
        for option in options().values():
            if option.name.rpartition(".")[0] != section:
                continue
            notes = [f"default {show(option.default)}"]
            notes += [f"unit: {option.unit}"] if option.unit else []
            notes += [option.limits] if option.limits else []
            notes += ["may change on resume"] if option.resume else []
            name = f"--{option.name}  ({describe(option.annotation)})"
            lines += textwrap.wrap(name, width, initial_indent="  ", subsequent_indent=" " * 4, break_on_hyphens=False)
            text = f"{option.meaning} [{'; '.join(notes)}]"
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])
