"""The contents of a sweep file, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dreamer.presets import Setting, Settings
from dreamer.sweeps.draws import Draw
from dreamer.values import LARGEST_SEED, brief, group, plain

#: Most runs of a sweep.
MOST_RUNS = 100_000


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise ValueError(f"expected a name that a folder can have, without /, got {brief(name)}")
    return name


def _seeds(found: Any) -> tuple[int, ...]:
    """A number of seeds, from 0, or the list of them."""
    listed: Sequence[Any] = found if isinstance(found, list | tuple) else ()
    if type(found) is int and 0 < found <= MOST_RUNS:
        listed = range(found)
    good = listed and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in listed)
    if not good or len(set(listed)) < len(listed):
        raise ValueError(
            f"expected their number, at most {MOST_RUNS:,}, or a list of different ones from 0 to "
            f"2^64 - 1, got {brief(found)}"
        )
    return tuple(listed)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return plain(value)


Count = Annotated[int, Field(strict=True, ge=1, le=MOST_RUNS)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1_000_000)]


@group
class RayTask:
    """What a run takes of a Ray cluster. address: of the cluster; None: RAY_ADDRESS, or a cluster on this machine."""

    address: str | None = None
    num_cpus: Amount = 1.0
    num_gpus: Amount = 0.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """What distinguishes some runs: presets and options. label: in their names."""

    label: str
    configs: tuple[Setting, ...] = ()
    settings: Settings = dataclasses.field(default_factory=dict)


@group
class Drawn:
    """Options drawn `count` times from these distributions, by name."""

    draws: Mapping[str, Draw] = Field(alias="options")
    count: Count = Field(alias="runs")
    seed: int = Field(0, strict=True, ge=0, le=LARGEST_SEED)


@group
class Trials(Drawn):
    """Options drawn according to the scores of earlier trials."""

    count: Count = Field(alias="trials")


@group
class EarlyStop:
    """When a run is hopeless: its score is below that of this share of at least `runs` others of its task, at the same
    step, once it has done the share `after` of its length."""

    after: Share = 0.3
    below: Share = 0.5
    runs: Count = 4


@group
class Sweep:
    """A sweep file.

    configs        presets of all runs
    settings       options of all runs
    named          named runs; empty: one without a name
    grid           by option (or `configs`): its values
    items          alternatives
    random         random draws; search: draws that learn from the scores of earlier ones
    seeds          of each run
    retries        how often a failing run is retried in a row without progress
    retry_seconds  wait before the first retry; doubles
    hours          of one run, if the file says them
    slurm, ray     what these backends are asked for
    """

    path: Path
    name: Annotated[str, AfterValidator(_folder_name)]
    configs: tuple[Setting, ...] = ()
    settings: Settings = Field(default_factory=dict, alias="options")
    named: tuple[Variant, ...] = Field((), alias="runs")
    grid: tuple[tuple[Variant, ...], ...] = ()
    items: tuple[Variant, ...] = Field((), alias="list")
    random: Drawn | None = None
    search: Trials | None = None
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds)] = (0,)
    retries: int = Field(2, strict=True, ge=0, le=1000)
    retry_seconds: Amount = 10.0
    early_stop: EarlyStop | None = None
    hours: Amount | None = None
    slurm: Mapping[str, Annotated[Any, AfterValidator(_plain)]] = Field(default_factory=dict)
    ray: RayTask = Field(default_factory=RayTask)

    @model_validator(mode="after")
    def _searched_alone(self) -> Sweep:
        if self.search and (self.named or self.grid or self.items or self.random):
            raise ValueError("expected `search` alone beside `options` and `seeds`; its score must be one number")
        return self
