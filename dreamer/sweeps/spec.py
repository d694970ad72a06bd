"""What a sweep file says, read and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from dreamer.presets import Setting, Settings
from dreamer.sweeps.draws import Draw
from dreamer.values import group

#: Most runs of a sweep.
MOST_RUNS = 100_000


@group
class RayTask:
    """What a run takes of a Ray cluster. address: where that is; None: RAY_ADDRESS says, or one of this machine."""

    address: str | None = None
    num_cpus: float = pydantic.Field(1, ge=0, le=65_536)
    num_gpus: float = pydantic.Field(0, ge=0, le=65_536)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What sets some runs apart: presets and options. label: in their names."""

    label: str
    configs: tuple[Setting, ...] = ()
    settings: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Options that are drawn: `count` times, from these distributions by name."""

    count: int
    seed: int
    draws: Mapping[str, Draw]


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """When a run is hopeless: its score is below that of this share of at least `runs` others of its task, at the same
    step, once it has done the share `after` of its length."""

    after: float = 0.3
    below: float = 0.5
    runs: int = 4


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file.

    configs        presets of all runs
    settings       options of all runs
    named          named runs; empty: one without name
    grid           by option (or `configs`): its values
    items          alternatives
    random         random draws; search: draws that learn from the scores of earlier ones
    seeds          of each run
    retries        how often a run that fails is tried again, in a row without progress
    retry_seconds  before the first retry; doubles
    hours          of one run, if the file says them
    slurm, ray     what these backends are asked for
    """

    path: Path
    name: str
    configs: tuple[Setting, ...] = ()
    settings: Settings = dataclasses.field(default_factory=dict)
    named: tuple[Entry, ...] = ()
    grid: tuple[tuple[Entry, ...], ...] = ()
    items: tuple[Entry, ...] = ()
    random: Drawn | None = None
    search: Drawn | None = None
    seeds: tuple[int, ...] = (0,)
    retries: int = 2
    retry_seconds: float = 10.0
    early_stop: EarlyStop | None = None
    hours: float | None = None
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ray: RayTask = dataclasses.field(default_factory=RayTask)
