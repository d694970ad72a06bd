"""Reads numbers from files of JSON lines, as runs write them and as crashes, full disks and editors leave them.

A line that cannot be used is skipped and reported, with its number and what is wrong with it; the others count. A
half-written last line is no fault: its run is still going on, or was killed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: The largest score: the largest float32, the type of rewards. Sums and means of such scores are finite in float64.
LARGEST = float(np.finfo(np.float32).max)
#: The largest counter, such as a number of steps.
MOST = 2.0**63
#: A number that may be negative; all others are counters.
SCORE = "episode/score"


class UnreadableError(ValueError):
    """A line or a file that cannot be used; the message says what is wrong with it, not where it is."""


class Columns(NamedTuple):
    """values: an array float64 for each name; left_out: a sentence, or none, on lines that could not be used."""

    values: list[np.ndarray]
    left_out: list[str]


def contents(path: Path) -> bytes:
    """A file's bytes, unpacked where it ends in .gz. UnreadableError if they cannot be read."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def parsed(text: bytes) -> Any:
    """The value of a JSON text. UnreadableError if it is not JSON, or nested absurdly deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else _cut(repr(text[:60]))
        raise UnreadableError(f"expected JSON, got {reason}") from error


def parse(line: bytes) -> dict[str, Any]:
    """The object in a line. UnreadableError if it holds none."""
    found = parsed(line)
    if not isinstance(found, dict):
        raise UnreadableError(f"expected an object of JSON, got {_cut(repr(found))}")
    return found


def number(row: dict[str, Any], name: str) -> float | None:
    """The number of this name, or None. UnreadableError for anything that is not a number, or not a possible one."""
    value = row.get(name)
    if value is None:  # null stands for a number that was not finite
        return None
    low, high = (-LARGEST, LARGEST) if name == SCORE else (0.0, MOST)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UnreadableError(f"expected {name} as a number from {low:.3g} to {high:.3g}, got {_cut(repr(value))}")
    return float(value)


def columns(path: Path, *names: str) -> Columns:
    """The numbers of these names, from the lines that have all of them. UnreadableError if all lines are unusable."""
    rows: list[list[float | None]] = []
    faults: list[str] = []
    lines = contents(path).splitlines(keepends=True)
    for place, line in enumerate(lines, 1):
        try:
            row = parse(line)
            rows.append([number(row, name) for name in names])
        except UnreadableError as error:
            if place < len(lines) or line.endswith(b"\n"):
                faults.append(f"{place}: {error}")
    if faults and not rows:
        raise UnreadableError(f"no line of it can be used; the first is line {faults[0]}")
    whole = [row for row in rows if None not in row]
    values = list(np.array(whole, np.float64).reshape(-1, len(names)).T)
    return Columns(values, [f"{path}:{told(faults, 'lines of it')}"] if faults else [])


def told(faults: Sequence[str], what: str) -> str:
    """The first fault, and the number of others."""
    return faults[0] + (f" (and {len(faults) - 1:,} more {what})" if len(faults) > 1 else "")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
