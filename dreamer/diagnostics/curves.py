"""Scores of runs from files: our logdirs, `scores.jsonl` of other DreamerV3 code, JSON lists of curves.

LOGDIR/config.yaml + scores.jsonl     ours, and those of other code with the keys step and episode/score
FOLDER                                every such folder in it, at any depth
scores-seed3.jsonl                    one file of scores; config.yaml beside it says the task
FILE.json, FILE.json.gz               a list of objects {task, method, seed, xs, ys}
NAME=any of these                     NAME in the legend
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.diagnostics.variants import flatten, is_ours
from dreamer.schema import ConfigError

#: Folders of a logdir that hold many files and no runs.
_PASSED = {"replay", "checkpoints", "best", "tensorboard", "videos", "reports", "wandb", "mlflow"}
#: Folders as other code names them: TIME-TASK-METHOD-SEED.
_NAMED = re.compile(r"\d{8}T\d{6}\w*-(?P<task>[^-]+)-(?P<method>[^-]+)-(?P<seed>[^-]+)")
OURS, THEIRS = "dreamer", "other code"


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


# --- Files -------------------------------------------------------------------------------------


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    return [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]


def _files(path: Path) -> Iterator[Path]:
    """Files of scores: the path itself, or all inside the folder."""
    if not path.is_dir():
        yield path
        return
    for folder, inner, files in os.walk(path):
        scores = sorted(name for name in files if re.fullmatch(r"scores.*\.jsonl", name))
        yield from (Path(folder) / name for name in scores)
        deeper = () if scores else (name for name in inner if name not in _PASSED and not name.startswith("."))
        inner[:] = sorted(deeper)


def find(patterns: Iterable[str]) -> list[tuple[str | None, Path]]:
    """(label or None, file of scores) of everything the arguments name, each file once."""
    found: dict[Path, tuple[str | None, Path]] = {}
    for pattern in patterns:
        label, equals, rest = pattern.partition("=")
        paths = _matches(pattern)
        named = label if equals and label and not paths else None
        paths = _matches(rest) if named else paths
        files = [file for path in paths for file in _files(path)]
        if not files:
            seen = f"nothing of scores in {', '.join(map(str, paths))}" if paths else "no such file or folder"
            raise ConfigError(
                f"no runs found at {pattern!r}: {seen}; expected folders of runs (config.yaml and scores.jsonl), "
                "a file scores*.jsonl, or a JSON list of curves"
            )
        for file in files:
            found.setdefault(file.resolve(), (named, file))
    return list(found.values())


# --- Ours and those of other code --------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line that is only half written is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ConfigError(f"{path}:{number}: expected an object of JSON, got {line[:40]!r}") from None
        if not isinstance(objects[-1], dict):
            raise ConfigError(f"{path}:{number}: expected an object, got {objects[-1]!r}")
    return objects


def _numbers(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
    """The columns of those rows that have a number for each key, float64."""
    whole = [[row[key] for key in keys] for row in rows if all(isinstance(row.get(k), int | float) for k in keys)]
    return list(np.array(whole, np.float64).reshape(-1, len(keys)).T)


def _along(known: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`values` between the points `known`, from (0, 0); beyond the last, on along the line from the origin."""
    inner = np.interp(at, np.append(0.0, known), np.append(0.0, values))
    return np.where(at > known[-1], at * values[-1] / known[-1], inner)


def _hours(rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """(step, hours): agent steps since the line before, over their rate. Pauses between parts of a run do not count."""
    steps, agent_steps, rate = _numbers(rows, "step", "agent_steps", "fps/policy")
    taken = np.diff(agent_steps, prepend=0.0)
    return [steps, np.cumsum(np.divide(taken, rate, out=np.zeros_like(taken), where=rate > 0)) / 3600]


#: Of each axis but environment frames: (step, value) from the lines of metrics.jsonl.
_AXES: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[np.ndarray]]] = {
    "agent_steps": lambda rows: _numbers(rows, "step", "agent_steps"),
    "updates": lambda rows: _numbers(rows, "step", "updates"),
    "hours": _hours,
}


def _on_axis(steps: np.ndarray, axis: str, file: Path) -> np.ndarray:
    """Environment frames to another axis, by the metrics.jsonl beside the scores."""
    if axis == "env_frames":
        return steps
    metrics = file.parent / "metrics.jsonl"
    known, values = _AXES[axis](_lines(metrics)) if metrics.is_file() else (np.zeros(0), np.zeros(0))
    if not known.size:
        raise ConfigError(f"--x {axis}: expected {metrics} to tell it, as in a logdir of ours; use --x env_frames")
    return _along(known, values, steps)


def _tree(file: Path) -> Mapping[str, Any]:
    """What config.yaml beside a file holds; other code's has other names."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = file.parent / "config.yaml"
    if not path.is_file():
        return {}
    try:
        tree = YAML(typ="safe", pure=True).load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML: {error}") from None
    return tree if isinstance(tree, Mapping) else {}


def _from_logdir(file: Path, axis: str, task: str | None) -> Run:
    tree = _tree(file)
    named = _NAMED.fullmatch(file.parent.name)
    said = tree.get("task") or (named and named["task"]) or task
    if not said:
        raise ConfigError(f"{file}: expected config.yaml beside it to say the task; give it with --task")
    numbered = re.search(r"seed[_-]?(\d+)", file.name)
    seed = numbered[1] if numbered else tree.get("seed", named["seed"] if named else file.parent.name)
    ours = bool(tree) and is_ours(tree)
    label = OURS if ours else named["method"] if named else THEIRS
    steps, scores = _numbers(_lines(file), "step", "episode/score")
    xs = _on_axis(steps, axis, file) if steps.size else steps
    return Run(str(said), label, str(seed), file, xs, scores, flatten(tree) if ours else None)


# --- JSON lists --------------------------------------------------------------------------------


def _from_list(file: Path, axis: str, task: str | None) -> list[Run]:
    if axis != "env_frames":
        raise ConfigError(f"--x {axis}: {file} has environment frames only; use --x env_frames")
    try:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as stream:
            records = json.load(stream)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: expected a list of curves as JSON: {error}") from None
    if not isinstance(records, list):
        raise ConfigError(f"{file}: expected a list of objects with task, method, seed, xs, ys, got {type(records)}")
    runs = []
    for number, record in enumerate(records):
        where = f"{file}, curve {number}"
        keys = set(record) if isinstance(record, dict) else set()
        if missing := {"xs", "ys", *(["task"] if task is None else [])} - keys:
            raise ConfigError(f"{where}: expected the keys task, method, seed, xs, ys; no {', '.join(sorted(missing))}")
        if len(record["xs"]) != len(record["ys"]):
            raise ConfigError(f"{where}: expected as many ys as xs, got {len(record['ys'])} and {len(record['xs'])}")
        xs, ys = np.array(record["xs"], np.float64), np.array(record["ys"], np.float64)
        known = np.isfinite(xs) & np.isfinite(ys)
        label, seed = str(record.get("method", THEIRS)), str(record.get("seed", number))
        runs.append(Run(str(record.get("task", task)), label, seed, file, xs[known], ys[known]))
    return runs


def read(patterns: Sequence[str], axis: str = "env_frames", task: str | None = None) -> list[Run]:
    """All runs the arguments name (see above), labelled by them where they say NAME=.

    axis  env_frames, agent_steps, updates or hours
    task  of runs that do not say theirs
    Raises ConfigError for what is not there or cannot be read. Runs without a finished episode have empty arrays.
    """
    runs: list[Run] = []
    for label, file in find(patterns):
        whole = file.name.endswith((".json", ".json.gz"))
        read_here = _from_list(file, axis, task) if whole else [_from_logdir(file, axis, task)]
        runs += [dataclasses.replace(run, label=label, config=None) for run in read_here] if label else read_here
    return runs
