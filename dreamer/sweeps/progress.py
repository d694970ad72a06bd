"""How far a run is, from the lines it writes; whether it is hopeless compared with others; what is stored of it. Only
new lines are read; unusable ones are skipped here and reported in the report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import whole_file
from dreamer.records.json_lines import SCORE, UnreadableError, number, parse
from dreamer.sweeps.spec import EarlyStop

#: Episodes over which the shown score is averaged.
RECENT = 20
#: Agent steps per second, in metrics.jsonl.
RATE = "fps/policy"


class _Lines:
    """The objects in a file of JSON lines that were not read yet; from the start if the file was truncated."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self.cut = path, 0, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.cut = False
        try:
            size = self._path.stat().st_size
            self.cut = size < self._offset
            if self.cut:
                self._offset = 0
            if size == self._offset:
                return
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            with contextlib.suppress(UnreadableError):
                yield parse(line)


class _Part:
    """One folder with records."""

    def __init__(self, folder: Path) -> None:
        self._metrics, self._scores = _Lines(folder / "metrics.jsonl"), _Lines(folder / "scores.jsonl")
        self.last: dict[str, float] = {}
        self.frames: list[int] = []
        self.scores: list[float] = []

    def look(self) -> None:
        for line in list(self._metrics):
            with contextlib.suppress(UnreadableError):
                found = {name: number(line, name) for name in ("agent_steps", "step", RATE)}
                if found["agent_steps"] is not None:
                    self.last = {name: value or 0.0 for name, value in found.items()}
        new = list(self._scores)
        if self._scores.cut:
            self.frames.clear()
            self.scores.clear()
        for line in new:
            with contextlib.suppress(UnreadableError):
                step, score = number(line, "step"), number(line, SCORE)
                if step is not None and score is not None:
                    self._add(int(step), score)

    def _add(self, step: int, score: float) -> None:
        if self.frames and step < self.frames[-1]:  # truncated and grown again between two looks
            keep = int(np.searchsorted(self.frames, step))
            del self.frames[keep:], self.scores[keep:]
        self.frames.append(step)
        self.scores.append(score)


class Progress:
    """A run's counters and scores; if it trains several seeds at once, those of the seed that is furthest behind."""

    def __init__(self, folder: Path, seeds: int | None = None) -> None:
        self._parts = [_Part(folder)] if seeds is None else [_Part(folder / f"seed_{i}") for i in range(seeds)]

    def look(self) -> None:
        """Reads what is new."""
        for part in self._parts:
            part.look()

    @property
    def agent_steps(self) -> int:
        return min(int(part.last.get("agent_steps", 0)) for part in self._parts)

    @property
    def env_frames(self) -> int:
        return min(int(part.last.get("step", 0)) for part in self._parts)

    @property
    def episodes(self) -> int:
        return sum(len(part.scores) for part in self._parts)

    @property
    def rate(self) -> float | None:
        """Agent steps per second at the last log line."""
        return min((part.last.get(RATE, 0.0) for part in self._parts), default=0.0) or None

    def score(self, frames: int | None = None, share: float | None = None) -> float | None:
        """Mean score of the last episodes that ended within `frames` (None: all). share: average over this last share
        of the frames; None: over the last 20 episodes."""
        means = []
        for part in self._parts:
            count = len(part.scores) if frames is None else int(np.searchsorted(part.frames, frames, side="right"))
            first = max(0, count - RECENT)
            if share is not None and count:
                first = min(int(np.searchsorted(part.frames[:count], (1 - share) * part.frames[count - 1])), count - 1)
            if count:
                means.append(float(np.mean(part.scores[first:count])))
        return float(np.mean(means)) if means else None


# --- Early stopping ------------------------------------------------------------------------------

#: A run is judged each time it has done another such share of its length.
RUNGS = 20


def rung(done: float, rule: EarlyStop) -> int | None:
    """The number of the judgement due when this share of the length is done; None before the first."""
    return int(done * RUNGS) if done >= rule.after and done > 0 else None


def hopeless(rule: EarlyStop, run: Progress, others: Iterable[Progress], frames: int) -> str:
    """Why a run should be stopped; empty if it should not.

    frames: where runs are compared; others that are not there yet do not count. With rule.below 0.5 this is the median
    rule: a run is stopped if its score is below the median of the others at this point.
    """
    score = run.score(frames)
    beside = [found for other in others if other.env_frames >= frames and (found := other.score(frames)) is not None]
    if score is None or len(beside) < rule.runs:
        return ""
    bound = float(np.quantile(beside, rule.below))
    if score >= bound:
        return ""
    return (
        f"score {score:.4g} at {frames:,} frames, below {bound:.4g}, the {rule.below:g} quantile of {len(beside)} runs"
    )


# --- Kept in a run's folder --------------------------------------------------------------------


#: In a run's folder.
STATE_FILE, LOG_FILE, CONFIG_FILE = "sweep.json", "sweep.log", "sweep.yaml"

WAITING, RUNNING, FINISHED, FAILED, HOPELESS = "waiting", "running", "finished", "failed", "stopped early"
STATUSES = (WAITING, RUNNING, FINISHED, FAILED, HOPELESS)


@dataclasses.dataclass
class RunState:
    """One run.

    status    waiting, running, finished, failed or stopped early.
    steps     Agent steps when it last ended, for whatever reason; a finished run continues if it is to be longer.
    starts    How often it was started.
    failures  In a row, without getting further; cleared by the next sweep command.
    seconds   How long it has run, over all its starts.
    reason    The reason of the last failure or early stop.
    """

    status: str = WAITING
    steps: int = 0
    starts: int = 0
    failures: int = 0
    seconds: float = 0.0
    reason: str = ""


def load_state(folder: Path) -> RunState:
    """The state in a run's folder; a new one if none can be read."""
    state = RunState()
    try:
        found = parse((folder / STATE_FILE).read_bytes())
        for name, default in dataclasses.asdict(state).items():
            value = found.get(name) if isinstance(default, str) else number(found, name)
            if value is not None:
                setattr(state, name, type(default)(value))
    except (OSError, UnreadableError):
        return RunState()
    return state if state.status in STATUSES else RunState()


def save_state(folder: Path, state: RunState) -> None:
    """Writes the state; a reader, or a crash, sees either the old or the new one."""
    with whole_file(folder / STATE_FILE) as file:
        file.write(json.dumps(dataclasses.asdict(state), indent=1).encode())
