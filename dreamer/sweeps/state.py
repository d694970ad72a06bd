"""What is known of each run of a sweep, kept in its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dreamer.paths import whole_file
from dreamer.records.json_lines import UnreadableError, number, parse

#: In a run's folder.
STATE_FILE, LOG_FILE, CONFIG_FILE = "sweep.json", "sweep.log", "sweep.yaml"

WAITING, RUNNING, FINISHED, FAILED, HOPELESS = "waiting", "running", "finished", "failed", "stopped early"
STATUSES = (WAITING, RUNNING, FINISHED, FAILED, HOPELESS)


@dataclasses.dataclass
class RunState:
    """One run.

    status    waiting, running, finished, failed or stopped early.
    steps     Agent steps at its last end, whatever ended it; a finished run goes on if it is to be longer.
    starts    How often it was started.
    failures  In a row, without getting further; cleared by the next sweep command.
    seconds   How long it has run, over all its starts.
    reason    Of the last failure or early stop.
    """

    status: str = WAITING
    steps: int = 0
    starts: int = 0
    failures: int = 0
    seconds: float = 0.0
    reason: str = ""


def load_state(folder: Path) -> RunState:
    """The state in a run's folder; a new one where there is none that can be read."""
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
    """A reader, or a crash, sees the old or the new one."""
    with whole_file(folder / STATE_FILE) as file:
        file.write(json.dumps(dataclasses.asdict(state), indent=1).encode())
