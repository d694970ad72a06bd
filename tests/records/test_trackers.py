"""Weights & Biases and MLflow: the real packages without a network (slow), and what happens without them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_runs import lines

from dreamer.presets import ConfigError, load_config
from dreamer.records import trackers
from dreamer.records.logger import Logger, LogWarning, Steps, make_logger, table
from dreamer.records.pictures import encode_png
from dreamer.records.trackers import MlflowSink, WandbSink
from dreamer.schema import options


def at(agent_steps: int) -> Steps:
    return Steps(agent_steps, 4 * agent_steps, agent_steps // 8)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_names_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    config = load_config(["debug"], {"logdir": str(tmp_path), f"log.{name}": "catch"})
    with pytest.raises(ConfigError, match=rf"pip install 'dreamer\[{name}\]'"):
        make_logger(config)


def test_all_options_but_those_of_records_are_told():
    names = set(table(load_config(["debug"])))
    assert names == {n for n in options() if not n.startswith("log")} - {"run.display"}


class Run:
    """In place of a run of Weights & Biases."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.broken, self.id = False, "id7"

    def define_metric(self, *arguments: Any, **options: Any) -> None: ...

    def finish(self, **options: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise RuntimeError("no route to host")
        self.logged.append(values)


@pytest.fixture
def fake(monkeypatch):
    """In place of the package wandb."""
    started: list[dict[str, Any]] = []
    run = Run()
    package = SimpleNamespace(
        run=run,
        started=started,
        Settings=lambda **options: options,
        Video=lambda data, format: ("video", format, len(data.read())),
        Image=lambda image: ("image", image.size),
        init=lambda **options: (started.append(options), run)[1],
    )
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: package)
    return package


def test_a_run_goes_on_as_the_same_run(fake, tmp_path):
    for _ in range(2):
        WandbSink(tmp_path, "catch", {"seed": 3}).close()
    assert [one["id"] for one in fake.started] == [None, "id7"]
    assert fake.started[0]["project"] == "catch" and fake.started[0]["config"] == {"seed": 3}


def test_numbers_and_pictures_have_the_frames_as_their_axis(fake, tmp_path):
    with Logger(tmp_path, sinks=[WandbSink(tmp_path, "catch", {})]) as logger:
        logger.scalars(at(16), {"train/loss/dyn": np.float32(2)})
        logger.episode(at(16), 1.5, 7)
        logger.video(at(16), "episode/video", np.zeros((2, 8, 8, 3), np.uint8))
        logger.page(at(24), "report/health", lambda: np.zeros((30, 40, 3), np.uint8))
    numbers, episode, video, page = fake.run.logged
    assert numbers == {"env_frames": 64, "agent_steps": 16, "updates": 2, "train/loss/dyn": 2.0}
    assert episode == {"env_frames": 64, "episode/score": 1.5, "episode/length": 7}
    assert video["env_frames"] == 64 and video["episode/video"][:2] == ("video", "gif")
    assert page == {"env_frames": 96, "report/health": ("image", (40, 30))}


def test_a_tracker_that_cannot_be_reached_at_the_start_is_an_error(fake, tmp_path):
    def refuse(**options: Any) -> None:
        raise RuntimeError("not logged in")

    fake.init = refuse
    with pytest.raises(ConfigError, match="Weights & Biases cannot be started: RuntimeError: not logged in"):
        WandbSink(tmp_path, "catch", {})


def test_a_tracker_that_fails_is_reported_once_and_stops_nothing(fake, tmp_path):
    with Logger(tmp_path, sinks=[WandbSink(tmp_path, "catch", {})]) as logger:
        fake.run.broken = True
        with pytest.warns(LogWarning, match="Weights & Biases: RuntimeError: no route to host; training goes on"):
            logger.scalars(at(1), {"x": 1})
        logger.scalars(at(2), {"x": 2})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def train_offline(name: str, logdir: Path, steps: int) -> None:
    """`dreamer train` with this tracker, which has no network."""
    command = [
        sys.executable, "-m", "dreamer", "train", "--configs", "debug", "--logdir", str(logdir), f"--log.{name}",
        "catch", "--run.agent_steps", str(steps), "--run.display", "false", "--run.final_eval", "false",
    ]  # fmt: skip
    environment = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": ""}
    done = subprocess.run(command, env=trackers.os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def stored(data: bytes) -> list[bytes]:
    """The records of a file of Weights & Biases: LevelDB's log format behind 7 bytes of header."""
    found, parts, at = [], b"", 7
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if room < 7 or not kind:  # The rest of a block is filled up with zeros.
            at += room
            continue
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(parts)
            parts = b""
    return found


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    """A run and its resume are two parts of one run; what they hold is what metrics.jsonl holds."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    logdir = tmp_path / "run"
    for steps in (120, 200):
        train_offline("wandb", logdir, steps)
    name = (logdir / "wandb_run").read_text().strip()
    files = sorted(logdir.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    found: dict[str, list[Any]] = {}
    for file in files:
        for data in stored(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    found.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    expected = [r["train/loss/dyn"] for r in lines(logdir / "metrics.jsonl") if "train/loss/dyn" in r]
    assert found["train/loss/dyn"] == pytest.approx(expected)
    for picture in ("report/health", "report/dream/image", "episode/video"):  # told as dicts: their kind, file, size
        assert [name for name in found if name.startswith(picture)], sorted(found)
    assert list(logdir.glob("wandb/*/files/media/**/*.gif")) and list(logdir.glob("wandb/*/files/media/**/*.png"))


@pytest.mark.slow
def test_mlflow_offline(tmp_path, monkeypatch):
    """A run and its resume are one run of the experiment, in files beside it."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    logdir = tmp_path / "run"
    for steps in (120, 200):
        train_offline("mlflow", logdir, steps)
    client = MlflowClient(tracking_uri=(logdir / "mlflow").resolve().as_uri())
    experiment = client.get_experiment_by_name("catch")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["run.train_ratio"] == "16.0" and run.data.params["task"] == "toy_catch"
    history = client.get_metric_history(run.info.run_id, "train/loss/dyn")
    expected = [(r["step"], r["train/loss/dyn"]) for r in lines(logdir / "metrics.jsonl") if "train/loss/dyn" in r]
    assert sorted((m.step, m.value) for m in history) == expected
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert "report/health-000000000200.png" in pictures


def test_a_picture_is_a_file_of_its_step_for_mlflow(tmp_path, monkeypatch):
    kept: list[Any] = []
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: SimpleNamespace(experiment_id="7"),
        create_run=lambda number, run_name: SimpleNamespace(info=SimpleNamespace(run_id=f"{number}-{run_name}")),
        log_batch=lambda run, metrics=(), params=(): kept.append((run, list(metrics), list(params))),
        log_artifact=lambda run, path, folder: kept.append((run, Path(path).name, folder, Path(path).stat().st_size)),
        update_run=lambda run, status: kept.append((run, status)),
        set_terminated=lambda run: kept.append((run, "over")),
    )
    package = SimpleNamespace(
        MlflowClient=lambda tracking_uri: client,
        Metric=lambda *values: values[:2] + values[3:],
        Param=lambda *values: values,
    )
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: package)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    picture = encode_png(np.zeros((3, 4, 3), np.uint8))
    for _ in range(2):
        sink = MlflowSink(tmp_path, "catch", {f"o{i}": i for i in range(150)})
        sink.scalars(at(2), {"a": 1, "bad": float("nan")})
        sink.picture(at(2), "report/health", picture)
        sink.close()
    run = f"7-{tmp_path.name}"
    first = [(run, [], [(f"o{i}", str(i)) for i in part]) for part in (range(100), range(100, 150))]
    told = [(run, [("a", 1.0, 8)], []), (run, "health-000000000008.png", "report", len(picture.data)), (run, "over")]
    assert kept == [*first, *told, (run, "RUNNING"), *told]
