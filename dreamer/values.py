"""The values an option may have: groups of options as checked dataclasses, plain values from Python, errors in words.

Whatever a configuration holds can be written to a file and read back unchanged, so values are converted on arrival: a
numpy number becomes a number, a path a text, a tuple in a mapping a list. What has no such form is refused.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

import numpy as np
import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

#: Most values in one option, counting those of nested lists and mappings, and how deeply these may be nested.
MOST_VALUES, DEEPEST = 10_000, 32
#: Bits of the largest whole number in a mapping. Python refuses to convert much longer numbers from and to text.
MOST_BITS = 4096
#: Characters of a value in an error.
SHOWN = 100


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: what was expected, what came, how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text without line breaks, and with escapes for what cannot be printed."""
    joined = " ".join(part.strip() for part in text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in joined)


class _Brief(reprlib.Repr):
    """`repr` of anything in at most a line, however large or deep or broken it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, SHOWN, SHOWN
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 8

    def repr_int(self, value: int, level: int) -> str:
        digits = int(value.bit_length() * math.log10(2))
        return repr(value) if digits < SHOWN else f"{'-' if value < 0 else ''}a number of about {digits:,} digits"


_brief = _Brief()


def brief(value: Any) -> str:
    """A value as an error shows it."""
    text = one_line(_brief.repr(value))
    return text if len(text) <= 4 * SHOWN else f"{text[: 4 * SHOWN]}..."


def suggestion(name: str, known: Iterable[str], otherwise: str = "", prefix: str = "") -> str:
    """The end of an error: `; nearest: a, b`, the known names most similar to `name`; `otherwise` if there are none.

    Dotted names are also compared by their last part. prefix: put before each suggested name.
    """
    by_last: dict[str, list[str]] = {}
    for candidate in (known := list(known)):
        by_last.setdefault(candidate.rsplit(".", 1)[-1], []).append(candidate)
    close = difflib.get_close_matches(name, known, 3, 0.6)
    for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 3, 0.75):
        close += by_last[match]
    shown = [prefix + match for match in dict.fromkeys(close)][:3]
    return f"; nearest: {', '.join(shown)}" if shown else otherwise


# --- Values from Python --------------------------------------------------------------------------


#: How to get Python's own number or text from a subclass, even if it overrides `str()` and `int()`.
_NATIVE: dict[type, Callable[[Any], Any]] = {str: str.__str__, float: float.__float__, int: int.__int__}


def native(value: Any) -> Any:
    """A number or text of another type (numpy's, an enum's, a path) as Python's own; all else as it is."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    for kind, own in _NATIVE.items():
        if isinstance(value, kind) and not isinstance(value, bool):
            return own(value)
    return value


def plain(value: Any) -> Any:
    """A copy of numbers, texts, truth values and None, in lists and mappings, as a file will return them.

    ValueError, in one line, for anything else, and for more or deeper than a file should hold.
    """
    left = MOST_VALUES

    def copied(value: Any, place: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise ValueError(
                f"expected at most {MOST_VALUES:,} values, in lists and mappings nested at most {DEEPEST} deep, "
                f"got more{_at(place)}; keep large data in a file and give its path"
            )
        if isinstance(value, Mapping):
            return {
                _key(key, place): copied(inner, f"{place}.{key}".lstrip("."), depth + 1) for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [copied(inner, f"{place}[{index}]", depth + 1) for index, inner in enumerate(value)]
        return _leaf(value, place)

    return copied(value, "", 0)


def _key(key: Any, place: str) -> Any:
    key = native(key)
    if isinstance(key, str | int) and not isinstance(key, bool):
        return _leaf(key, place)
    raise ValueError(f"expected texts or whole numbers as the names in a mapping, got {brief(key)}{_at(place)}")


def _leaf(value: Any, place: str) -> Any:
    value = native(value)
    if isinstance(value, float) and value != value:
        return math.nan  # one and the same object, so that equal mappings compare as equal
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and value.bit_length() <= MOST_BITS:
        return value
    if isinstance(value, str) and _is_text(value):
        return value
    raise ValueError(
        f"expected numbers, texts, true, false, null, and lists and mappings of them, got {brief(value)}{_at(place)}; "
        "other objects belong in a function of your own: train(config, make_env=FUNCTION)"
    )


def _is_text(value: str) -> bool:
    """Whether a file can hold it: no lone surrogates, which stand for undecodable bytes in file names."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _at(place: str) -> str:
    return f" at {place[:SHOWN]}" if place else ""


# --- Groups of options ---------------------------------------------------------------------------


@dataclass_transform(frozen_default=True)
def group(cls: type[T]) -> type[T]:
    """A frozen dataclass of options, checked however it is made: ConfigError for impossible values."""
    checked: Any = dataclass(
        frozen=True, config=pydantic.ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    )(cls)
    build = checked.__init__

    @functools.wraps(build)
    def init(self: Any, *args: Any, **given: Any) -> None:
        try:
            build(self, *map(native, args), **{name: native(value) for name, value in given.items()})
        except pydantic.ValidationError as error:
            fault = error.errors()[0]
            place = ".".join([cls.__name__, *(str(part) for part in fault["loc"])])
            raise ConfigError(f"{place}: {describe_fault(fault)}") from None

    checked.__init__ = init
    return checked


#: Bounds that many options share. Larger numbers would mean nothing more, and overflow what counts or stores them.
STEPS: dict[str, Any] = {"gt": 0, "le": 10**12}
COUNT: dict[str, Any] = {"gt": 0, "le": 1_000_000}
UNITS: dict[str, Any] = {"gt": 0, "le": 131_072}
LAYERS: dict[str, Any] = {"ge": 1, "le": 64}
SCALE: dict[str, Any] = {"ge": 0, "le": 1e6}
REPEAT: dict[str, Any] = {"ge": 1, "le": 10_000}
LARGEST_SEED = 2**64 - 1

#: Height and width of images.
Side = Annotated[int, Field(ge=1, le=4096)]
Size = tuple[Side, Side]


def option(default: Any, meaning: str, unit: str | None = None, resume: bool = False, **limits: Any) -> Any:
    """One option. `resume`: may change when a run is resumed. `limits`: pydantic's ge, gt, le, lt, min_length; every
    number has a lower and an upper bound."""
    extra: dict[str, Any] = {"unit": unit, "resume": resume}
    if callable(default):
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, **limits)
    return Field(default=default, description=meaning, json_schema_extra=extra, **limits)


def describe_fault(fault: Mapping[str, Any]) -> str:
    """What is wrong, in words, from one of pydantic's errors."""
    if fault["type"] == "value_error":  # the words are ours
        return str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] in ("too_short", "too_long"):
        bounds = fault["ctx"]
        most = bounds.get("max_length")
        number = f"at least {bounds['min_length']}" if most is None else f"at most {most}"
        return f"expected {number} in the list, got {brief(fault['input'])}"
    text = str(fault["msg"]).replace("Input should be a ", "expected a ").replace("Input should be", "expected a value")
    return f"{text}, got {brief(fault['input'])}"
