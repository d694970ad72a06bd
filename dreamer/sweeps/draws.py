"""What random and searched options are drawn from: a table of distributions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dreamer.schema import ConfigError
from dreamer.values import brief, suggestion


@dataclasses.dataclass(frozen=True)
class Distribution:
    """One kind of draw.

    bounds   Whether it takes [least, largest]; otherwise a list of values.
    whole    Whether the bounds are integers.
    log      Whether the bounds must be above 0.
    draw     (generator, values of the file) -> a value.
    space    (optuna.distributions, values of the file) -> Optuna's space. Choices by index: Optuna's are plain values.
    """

    bounds: bool
    whole: bool
    log: bool
    draw: Callable[[np.random.Generator, Sequence[Any]], Any]
    space: Callable[[Any, Sequence[Any]], Any]


def _log_uniform(generator: np.random.Generator, bounds: Sequence[Any]) -> float:
    return float(math.exp(generator.uniform(math.log(bounds[0]), math.log(bounds[1]))))


def _log_int(generator: np.random.Generator, bounds: Sequence[Any]) -> int:
    """Each integer gets the share of the logarithmic axis that is within one half of it."""
    drawn = generator.uniform(math.log(bounds[0] - 0.5), math.log(bounds[1] + 0.5))
    return min(max(round(math.exp(drawn)), bounds[0]), bounds[1])


#: By name, as in the file.
DISTRIBUTIONS: dict[str, Distribution] = {
    "choice": Distribution(
        False, False, False,
        lambda generator, values: values[int(generator.integers(len(values)))],
        lambda spaces, values: spaces.CategoricalDistribution(list(range(len(values)))),
    ),
    "uniform": Distribution(
        True, False, False,
        lambda generator, bounds: float(generator.uniform(*bounds)),
        lambda spaces, bounds: spaces.FloatDistribution(*bounds),
    ),
    "log_uniform": Distribution(
        True, False, True, _log_uniform, lambda spaces, bounds: spaces.FloatDistribution(*bounds, log=True)
    ),
    "int": Distribution(
        True, True, False,
        lambda generator, bounds: int(generator.integers(bounds[0], bounds[1] + 1)),
        lambda spaces, bounds: spaces.IntDistribution(*bounds),
    ),
    "log_int": Distribution(
        True, True, True, _log_int, lambda spaces, bounds: spaces.IntDistribution(*bounds, log=True)
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Draw:
    """The distribution of one option, as given in the file. where: file and line."""

    kind: str
    values: tuple[Any, ...]
    where: str

    @property
    def distribution(self) -> Distribution:
        return DISTRIBUTIONS[self.kind]


def _is_number(value: Any, whole: bool) -> bool:
    """Whether a generator can draw numbers up to it."""
    kind, largest = (int, 2**62) if whole else (int | float, 1e300)
    return isinstance(value, kind) and not isinstance(value, bool) and -largest <= value <= largest


def read_draw(name: str, found: Any, where: str) -> Draw:
    """Reads `{log_uniform: [1e-5, 1e-3]}` for an option; ConfigError if it is not a distribution."""
    shape = "{" + "|".join(DISTRIBUTIONS) + ": [...]}"
    if not isinstance(found, dict) or len(found) != 1:
        raise ConfigError(f"{where}: {name}: expected a distribution, {shape}, got {brief(found)}")
    ((kind, values),) = found.items()
    if kind not in DISTRIBUTIONS:
        close = suggestion(str(kind), DISTRIBUTIONS, f"; known: {', '.join(DISTRIBUTIONS)}")
        raise ConfigError(f"{where}: {name}: unknown distribution {brief(kind)}{close}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: {name}: expected {kind} of a list, got {brief(values)}")
    distribution = DISTRIBUTIONS[kind]
    if distribution.bounds:
        low = "a number above 0" if distribution.log else "a number"
        kinds = f"[least, largest], each {low.replace('number', 'whole number') if distribution.whole else low}"
        good = len(values) == 2 and all(_is_number(value, distribution.whole) for value in values)
        if not good or values[0] > values[1] or (distribution.log and values[0] <= 0):
            raise ConfigError(f"{where}: {name}: expected {kind} of {kinds}, got {brief(values)}")
    return Draw(kind, tuple(values), where)
