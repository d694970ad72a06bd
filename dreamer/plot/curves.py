"""Scores of runs from files: our logdirs, `scores.jsonl` of other DreamerV3 code, JSON lists of curves.

What cannot be read is left out and reported; the rest is used.

LOGDIR/config.yaml + scores.jsonl     ours, and those of other code with the keys step and episode/score
FOLDER                                every such folder in it, at any depth
scores-seed3.jsonl[.gz]               one file of scores; config.yaml beside it says the task
FILE.json, FILE.json.gz               a list of objects {task, method, seed, xs, ys}
NAME=any of these                     NAME in the legend
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import absolute
from dreamer.plot.variants import flatten, is_ours
from dreamer.presets import CONFIG_FILE
from dreamer.records.json_lines import LARGEST, MOST, SCORE, UnreadableError, columns, contents, parsed, told
from dreamer.schema import ConfigError
from dreamer.yaml_files import parse_file, plain_node

#: Folders of a logdir that hold many files but no runs.
_PASSED = {"replay", "checkpoints", "best", "tensorboard", "videos", "reports", "wandb", "mlflow"}
#: Folders as other code names them: TIME-TASK-METHOD-SEED.
_NAMED = re.compile(r"\d{8}T\d{6}\w*-(?P<task>[^-]+)-(?P<method>[^-]+)-(?P<seed>[^-]+)")
OURS, THEIRS = "dreamer", "other code"
#: Longest name of a task, a curve or a seed.
_LONGEST = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """Scores of one run.

    xs      (E,) of each episode, in units of the axis
    ys      (E,) undiscounted scores
    label   name in the legend: runs with one task and one label are seeds of the same thing
    config  the configuration, dotted names to values; None where there is none, or not ours
    """

    task: str
    label: str
    seed: str
    path: Path
    xs: np.ndarray
    ys: np.ndarray
    config: Mapping[str, Any] | None = None


@dataclasses.dataclass
class Reading:
    """Runs, and a sentence for each that could not be read, or not completely."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)


# --- Files -------------------------------------------------------------------------------------


def _matches(pattern: str) -> list[Path]:
    """Paths of this name or, if there are none, matching this pattern; leading folders may be named like `[1]`."""
    path = absolute(pattern)
    if os.path.exists(path):
        return [path]
    there = next(folder for folder in path.parents if os.path.isdir(folder))
    inner = str(path.relative_to(there))
    return [Path(p) for p in sorted(glob.glob(os.path.join(glob.escape(str(there)), inner), recursive=True))]


def _labelled(pattern: str) -> tuple[str | None, list[Path]]:
    """(label or None, existing paths) for a path, or for LABEL=path; either may contain further `=`."""
    cuts = [place for place, letter in enumerate(pattern) if letter == "=" and place]
    for label, rest in [(None, pattern), *((pattern[:cut], pattern[cut + 1 :]) for cut in cuts)]:
        if rest and (paths := _matches(rest)):
            return label, paths
    return None, []


def _files(path: Path, remarks: list[str]) -> list[Path]:
    """Files of scores: the path itself, or all inside the folder. Unreadable folders are added to the remarks."""
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    refused: list[OSError] = []
    for folder, inner, files in os.walk(path, onerror=refused.append):
        scores = sorted(name for name in files if re.fullmatch(r"scores.*\.jsonl(\.gz)?", name))
        found += [Path(folder) / name for name in scores]
        deeper = () if scores else (name for name in inner if name not in _PASSED and not name.startswith("."))
        inner[:] = sorted(deeper)
    remarks += [f"Left out: {error.filename}: cannot be read ({error.strerror})." for error in refused]
    return found


def find(patterns: Iterable[str], remarks: list[str]) -> list[tuple[str | None, Path]]:
    """(label or None, file of scores) for everything that the arguments name, each file once. ConfigError for an
    argument that names nothing."""
    found: dict[Path, tuple[str | None, Path]] = {}
    for pattern in patterns:
        label, paths = _labelled(pattern)
        files = [file for path in paths for file in _files(path, remarks)]
        if not files:
            seen = f"no scores in {', '.join(map(str, paths))}" if paths else "no such file or folder"
            raise ConfigError(
                f"no runs found at {pattern!r}: {seen}; expected folders of runs (config.yaml and scores.jsonl), "
                f"a file scores*.jsonl, or a JSON list of curves{'; ' + remarks[0] if remarks else ''}"
            )
        for file in files:
            found.setdefault(file.resolve(), (label, file))
    return list(found.values())


def plain(value: Any) -> str:
    """A name from somebody's file, made fit to be printed, drawn and stored anywhere: one line, not too long."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...") or "-"


# --- Ours and those of other code --------------------------------------------------------------


def _along(known: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`values` interpolated between the points `known`, from (0, 0); beyond the last, in proportion to it."""
    inner = np.interp(at, np.append(0.0, known), np.append(0.0, values))
    return np.where(at > known[-1], at * (values[-1] / known[-1]), inner)


def _hours(step: np.ndarray, agent_steps: np.ndarray, rate: np.ndarray) -> list[np.ndarray]:
    """(step, hours): agent steps since the previous line, over their rate. Pauses of a run do not count."""
    taken = np.maximum(np.diff(agent_steps, prepend=0.0), 0.0)
    seconds = np.divide(taken, rate, out=np.zeros_like(taken), where=rate > _STOPPED)
    return [step, np.cumsum(seconds) / 3600]


#: Agent steps per second below which nothing happens.
_STOPPED = 1e-6
#: For each axis but environment frames: the names in metrics.jsonl, and (step, value) from their columns.
_AXES: dict[str, tuple[Sequence[str], Callable[..., list[np.ndarray]]]] = {
    "agent_steps": (("step", "agent_steps"), lambda *found: list(found)),
    "updates": (("step", "updates"), lambda *found: list(found)),
    "hours": (("step", "agent_steps", "fps/policy"), _hours),
}


def _on_axis(steps: np.ndarray, axis: str, file: Path, left_out: list[str]) -> np.ndarray:
    """Environment frames to another axis, by the metrics.jsonl beside the scores."""
    if axis == "env_frames":
        return steps
    metrics, (names, points) = file.parent / "metrics.jsonl", _AXES[axis]
    found = columns(metrics, *names) if metrics.is_file() else None
    known, values = points(*found.values) if found else (np.zeros(0), np.zeros(0))
    if not (known > 0).any():
        raise UnreadableError(f"--x {axis}: expected {metrics}, as in our logdirs, to have it; use --x env_frames")
    left_out += found.left_out if found else []
    order = np.argsort(known[known > 0], kind="stable")  # steps go back where files were concatenated
    return _along(known[known > 0][order], np.maximum.accumulate(values[known > 0][order]), steps)


def _tree(file: Path) -> Mapping[str, Any]:
    """The contents of config.yaml beside a file; other code uses other names. ConfigError if it is not YAML."""
    path = file.parent / CONFIG_FILE
    root = parse_file(path) if path.is_file() else None
    tree = None if root is None else plain_node(root, str(path))
    return tree if isinstance(tree, Mapping) else {}


def _from_logdir(file: Path, axis: str, task: str | None) -> Reading:
    tree = _tree(file)
    named = _NAMED.fullmatch(file.parent.name)
    said = tree.get("task") or (named and named["task"]) or task
    if not said:
        raise UnreadableError(f"expected a {CONFIG_FILE} beside it to say the task; give it with --task")
    numbered = re.search(r"seed[_-]?(\d+)", file.name)
    seed = numbered[1] if numbered else tree.get("seed", named["seed"] if named else file.parent.name)
    ours = is_ours(tree)
    label = OURS if ours else named["method"] if named else THEIRS
    (steps, scores), left_out = columns(file, "step", SCORE)
    left_out = list(left_out)
    xs = _on_axis(steps, axis, file, left_out) if steps.size else steps
    remarks = [f"Left out: {one}." for one in left_out]
    if back := int((np.diff(steps) < 0).sum()):
        remarks.append(f"Several runs in one file? Steps go back in {file} ({back:,} times); all its scores count.")
    run = Run(plain(said), plain(label), plain(seed), file, xs, scores, flatten(tree) if ours else None)
    return Reading([run], remarks)


# --- JSON lists --------------------------------------------------------------------------------


def _line_of(values: Any, name: str) -> np.ndarray:
    """float64 (E,), NaN where there is null. UnreadableError if it is not a list of numbers."""
    try:
        line = np.array([np.nan if value is None else value for value in values], np.float64)
    except (TypeError, ValueError, OverflowError):
        line = np.zeros((0, 0))
    if line.ndim != 1 or isinstance(values, str | dict):
        raise UnreadableError(f"expected {name} as a list of numbers, got {str(values)[:40]}")
    return line


def _curve(record: Any, number: int, file: Path, task: str | None) -> tuple[Run, int]:
    """(a curve of a list, how many of its points are impossible). UnreadableError if it is not a curve."""
    keys = set(record) if isinstance(record, dict) else set()
    if missing := {"xs", "ys", *(["task"] if task is None else [])} - keys:
        raise UnreadableError(f"expected the keys task, method, seed, xs, ys; no {', '.join(sorted(missing))}")
    xs, ys = (_line_of(record[name], name) for name in ("xs", "ys"))
    if len(xs) != len(ys):
        raise UnreadableError(f"expected as many ys as xs, got {len(ys)} and {len(xs)}")
    known = ~(np.isnan(xs) | np.isnan(ys))
    possible = known & (xs >= 0) & (xs <= MOST) & (np.abs(ys) <= LARGEST)
    label, seed = record.get("method", THEIRS), record.get("seed", number)
    run = Run(plain(record.get("task", task)), plain(label), plain(seed), file, xs[possible], ys[possible])
    return run, int((known & ~possible).sum())


def _from_list(file: Path, axis: str, task: str | None) -> Reading:
    records = parsed(contents(file))
    if not isinstance(records, list):
        got = type(records).__name__
        raise UnreadableError(f"expected a list of objects with task, method, seed, xs, ys, got a {got}")
    if axis != "env_frames":
        raise UnreadableError(f"--x {axis}: it has environment frames only; use --x env_frames")
    found, faults = Reading(), []
    for number, record in enumerate(records):
        try:
            run, impossible = _curve(record, number, file, task)
        except UnreadableError as error:
            faults.append(f"curve {number}: {error}")
            continue
        found.runs.append(run)
        if impossible:
            faults.append(f"curve {number}: points ({impossible:,}) with negative or far too large numbers")
    if faults and not found.runs:
        raise UnreadableError(f"none of its curves can be used; the first is {faults[0]}")
    found.remarks += [f"Left out: {file}, {told(faults, 'curves of it')}."] if faults else []
    return found


def read(patterns: Sequence[str], axis: str = "env_frames", task: str | None = None) -> Reading:
    """All runs that the arguments name (see above), labelled where they say NAME=.

    axis  env_frames, agent_steps, updates or hours
    task  of runs that do not say theirs
    Raises ConfigError for an argument that names nothing, and if nothing that was found can be read. Runs
    without a finished episode have empty arrays.
    """
    whole = Reading()
    for label, file in find(patterns, whole.remarks):
        load = _from_list if file.name.endswith((".json", ".json.gz")) else _from_logdir
        try:
            found = load(file, axis, task)
        except (UnreadableError, ConfigError, OSError) as error:
            found = Reading([], [f"Left out: {file}: {error}."])
        for run in found.runs:
            whole.runs.append(dataclasses.replace(run, label=plain(label), config=None) if label else run)
        whole.remarks += found.remarks
    if not whole.runs and whole.remarks:
        raise ConfigError(f"nothing can be drawn. {told(whole.remarks, 'faults')}")
    return whole
