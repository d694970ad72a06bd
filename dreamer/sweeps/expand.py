"""From a sweep file to its runs: every combination, each with a name and a complete, checked configuration."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import Config
from dreamer.envs.registry import check_task
from dreamer.presets import Setting, Settings, build, fitted, settings_of
from dreamer.schema import ConfigError
from dreamer.sweeps.spec import MOST_RUNS, Drawn, Sweep, Variant

#: Most bytes of a file name in most file systems.
_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run to be started. name: unique within the sweep, also that of its folder."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.logdir)


def draw(drawn: Drawn, index: int) -> dict[str, Any]:
    """The values of one random draw; the same whatever the number of draws."""
    generator = np.random.default_rng([drawn.seed, index])
    return {name: d.distribution.draw(generator, d.values) for name, d in drawn.draws.items()}


def drawn_variant(drawn: Drawn, label: str, values: Mapping[str, Any]) -> Variant:
    """These values as a variant."""
    return Variant(label, (), {name: fitted(name, value, drawn.draws[name].where) for name, value in values.items()})


def combinations(sweep: Sweep) -> Iterator[tuple[Variant, ...]]:
    """Every combination of named runs, grid, list and random draws; ConfigError if there are too many runs."""
    axes = [axis for axis in (sweep.named, *sweep.grid, sweep.items) if axis]
    counts = [*map(len, axes), *([sweep.random.count] if sweep.random else []), len(sweep.seeds)]
    if math.prod(counts) > MOST_RUNS:
        raise ConfigError(
            f"{sweep.path}: expected at most {MOST_RUNS:,} runs, got {' x '.join(map(str, counts))} = "
            f"{math.prod(counts):,} (the last of these are the seeds); leave values out, or draw with `random:`"
        )
    if sweep.random:
        width = max(2, len(str(sweep.random.count - 1)))
        entries = (
            drawn_variant(sweep.random, f"draw{i:0{width}}", draw(sweep.random, i)) for i in range(sweep.random.count)
        )
        axes.append(tuple(entries))
    return itertools.product(*axes)


#: The settings of presets, by their names: reading YAML takes longer than everything else.
Presets = dict[tuple[Setting, ...], Settings]


def plan_run(
    sweep: Sweep, entries: tuple[Variant, ...], seed: int, folder: Path, presets: Presets | None = None
) -> PlannedRun:
    """One run, its configuration checked; ConfigError with the line of the file, or the run's name.

    presets: a cache of those read before.
    """
    labels = [re.sub(r"[^\w.+-]+", "_", entry.label) for entry in entries if entry.label]
    name = "-".join([*labels, f"seed{seed}"])
    if len(name.encode()) > _LONGEST_NAME:
        raise ConfigError(
            f"{sweep.path}: expected names of runs of at most {_LONGEST_NAME} bytes, as folders allow, got {name}; "
            "name them under `runs:`"
        )
    configs = (*sweep.configs, *(config for entry in entries for config in entry.configs))
    read = {} if presets is None else presets
    if configs not in read:
        read[configs] = settings_of(configs, sweep.path.parent)
    settings = read[configs] | sweep.settings
    for entry in entries:
        settings |= entry.settings
    own = {"seed": seed, "logdir": str(folder / name)}
    settings |= {option: fitted(option, value, f"{sweep.path}") for option, value in own.items()}
    try:
        config = build(settings)
        if not config.log.jsonl:
            raise ConfigError("expected log.jsonl true: a sweep reads how far a run is from its metrics.jsonl")
    except ConfigError as error:
        raise ConfigError(
            str(error) if str(error).startswith(str(sweep.path)) else f"{sweep.path}: run {name}: {error}"
        ) from None
    return PlannedRun(name, config)


def expand(sweep: Sweep, folder: Path) -> list[PlannedRun]:
    """All runs of a sweep without search, the first seed of each before the second of any; each is checked."""
    every = list(combinations(sweep))
    presets: Presets = {}
    runs = [plan_run(sweep, entries, seed, folder, presets) for seed in sweep.seeds for entries in every]
    names: dict[str, str] = {}
    for run in runs:
        plain = run.name.casefold()  # on case-insensitive disks they would be one folder
        if plain in names:
            both = " and ".join(dict.fromkeys([names[plain], run.name]))
            raise ConfigError(f"{sweep.path}: two runs are called {both}; leave one out, or name them under `runs:`")
        names[plain] = run.name
    check_tasks(runs)
    return runs


def check_tasks(runs: list[PlannedRun]) -> None:
    """TaskError if a run names a task that does not exist."""
    for task in dict.fromkeys(run.config.task for run in runs):
        check_task(task)
