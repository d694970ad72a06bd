"""What a check of `dreamer doctor` says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    level   ok; warn: something works less well, or only in part; fail: what was asked for, or installed, cannot work.
    seen    What was found, in words.
    remedy  What to do about it; may be empty.
    """

    name: str
    level: Level
    seen: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the checks are about: the folder a run would write to, and the kind of device that must be there (one of
    `run.platform`)."""

    logdir: Path = Path("runs")
    platform: str = "auto"
