"""Weights & Biases and MLflow, beside TensorBoard: each an optional package, with one run per logdir, across resumes.

Both count `env_frames`. Neither can forget: after a resume from an older checkpoint they keep what was recorded since.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dreamer.presets import ConfigError
from dreamer.records.pictures import Picture
from dreamer.records.sink import Steps

Options = Mapping[str, float | str]


class _Remote:
    """What was sent stays, and nothing is kept on this side."""

    def offsets(self) -> dict[str, int]:
        return {}

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None:
        """It cannot forget."""

    def flush(self) -> None:
        """It sends by itself."""


class WandbSink(_Remote):
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in LOGDIR/wandb, for `wandb sync`."""

    def __init__(self, logdir: Path, project: str, options: Options) -> None:
        self._wandb = _load("wandb")
        with _started("Weights & Biases"):
            self._run = self._wandb.init(
                project=project,
                id=_remembered(logdir / "wandb_run"),
                name=logdir.name,
                dir=str(logdir),
                config=dict(options),
                resume="allow",
                settings=self._wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )
        self._run.define_metric("env_frames", hidden=True)
        self._run.define_metric("*", step_metric="env_frames")
        _remember(logdir / "wandb_run", self._run.id)

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None:
        counters = {"env_frames": steps.env_frames, "agent_steps": steps.agent_steps, "updates": steps.updates}
        self._log({**counters, **values})

    def episode(self, steps: Steps, score: float, length: int) -> None:
        self._log({"env_frames": steps.env_frames, "episode/score": score, "episode/length": length})

    def picture(self, steps: Steps, name: str, picture: Picture) -> None:
        data = io.BytesIO(picture.data)
        if picture.ending == "gif":
            shown = self._wandb.Video(data, format="gif")
        else:
            shown = self._wandb.Image(Image.open(data))
        self._log({"env_frames": steps.env_frames, name: shown})

    def close(self) -> None:
        with _reported("Weights & Biases"):
            self._run.finish(quiet=True)

    def _log(self, values: Mapping[str, Any]) -> None:
        with _reported("Weights & Biases"):
            self._run.log(dict(values))


class MlflowSink(_Remote):
    """A run of an MLflow experiment, at MLFLOW_TRACKING_URI; without it, in LOGDIR/mlflow."""

    def __init__(self, logdir: Path, experiment: str, options: Options) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (logdir / "mlflow").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files are no longer what MLflow prefers
        mlflow = _load("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        with _started("MLflow"):
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            self._run = _remembered(logdir / "mlflow_run")
            if self._run is None:
                self._run = self._client.create_run(number, run_name=logdir.name).info.run_id
                params = [self._entities.Param(name, str(value)) for name, value in options.items()]
                for first in range(0, len(params), 100):
                    self._client.log_batch(self._run, params=params[first : first + 100])
            else:
                self._client.update_run(self._run, status="RUNNING")
        _remember(logdir / "mlflow_run", self._run)

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None:
        now = int(time.time() * 1000)
        metric = self._entities.Metric
        finite = [(name, float(value)) for name, value in values.items() if math.isfinite(value)]
        with _reported("MLflow"):
            metrics = [metric(name, value, now, steps.env_frames) for name, value in finite]
            self._client.log_batch(self._run, metrics=metrics)

    def episode(self, steps: Steps, score: float, length: int) -> None:
        self.scalars(steps, {"episode/score": score, "episode/length": length})

    def picture(self, steps: Steps, name: str, picture: Picture) -> None:
        file = f"{name}-{steps.env_frames:012d}.{picture.ending}"
        folder, _, file = file.rpartition("/")
        with _reported("MLflow"), _file(file, picture.data) as path:
            self._client.log_artifact(self._run, str(path), folder or None)

    def close(self) -> None:
        with _reported("MLflow"):
            self._client.set_terminated(self._run)


def _load(package: str) -> Any:
    """The optional package; ConfigError naming the extra where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"log.{package} needs a package that cannot be imported ({error}); pip install 'dreamer[{package}]', or "
            f"pass --log.{package} null"
        ) from error


@contextlib.contextmanager
def _started(name: str) -> Iterator[None]:
    """Turns what goes wrong before the first step, which the user has to fix, into a ConfigError."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{name} cannot be started: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """Turns whatever goes wrong at a tracker into an OSError, which the logger reports while training goes on."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{name}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _file(name: str, data: bytes) -> Iterator[Path]:
    """A temporary file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def _remembered(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


def _remember(path: Path, name: str) -> None:
    path.write_text(f"{name}\n")
