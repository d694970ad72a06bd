"""What TensorBoard finds in a run: groups, charts, text, hyper-parameters of one run; and its budget."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.presets import load_config
from dreamer.records.logger import Logger, Steps, as_text, make_logger, table
from dreamer.records.pictures import Pace
from dreamer.records.tensorboard import CHARTS, GROUPS, TensorBoardSink, tag
from dreamer.schema import options

ROOT = Path(__file__).resolve().parents[2]


def at(agent_steps: int) -> Steps:
    return Steps(agent_steps, 4 * agent_steps, agent_steps // 8)


def reader(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Importing the reader warns about its optional parts.
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("episode/score", "1_score/episode/score"),
        ("episode/mean_score", "1_score/episode/mean_score"),
        ("episode/mean_length", "4_behaviour/episode/mean_length"),
        ("episode/achievement_wood/max", "4_behaviour/episode/achievement_wood/max"),
        ("eval/length", "4_behaviour/eval/length"),
        ("report/bias/value", "2_health/bias/value"),
        ("report/bias/cont", "3_world_model/bias/cont"),
        ("report/param_norm/rssm", "5_optimizer/param_norm/rssm"),
        ("eval/score", "1_score/eval/score"),
        ("episode/video", "1_score/episode/video"),
        ("report/health", "2_health/health"),
        ("report/imagined_error/image", "2_health/imagined_error/image"),
        ("train/loss/image", "3_world_model/loss/image"),
        ("train/loss/policy", "4_behaviour/loss/policy"),
        ("train/loss/repval", "4_behaviour/loss/repval"),
        ("train/loss/valuable", "3_world_model/loss/valuable"),
        ("train/dyn_ent", "3_world_model/dyn_ent"),
        ("train/rand/action", "4_behaviour/rand/action"),
        ("train/opt/module_grad_norm/rssm", "5_optimizer/module_grad_norm/rssm"),
        ("replay/ratio", "6_replay/ratio"),
        ("fps/train", "7_speed/fps/train"),
        ("time/env", "7_speed/time/env"),
        ("system/gpu_load", "8_system/gpu_load"),
        ("env/failures_sum", "8_system/env/failures_sum"),
        ("anything", "9_other/anything"),
    ],
)
def test_every_name_has_its_group(name, expected):
    assert tag(name) == expected


def documented() -> set[str]:
    """Names of docs/metrics.md that TensorBoard gets, with examples for what stands for others."""
    names = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), flags=re.M)
    examples = {"<key>": "image", "<action>": "action", "<module>": "rssm", "<name>": "wood"}
    found = {re.sub(r"<\w+>", lambda m: examples[m[0]], name) for name in names}
    return found - {"step", "agent_steps", "updates"}


def test_no_documented_metric_is_left_over_and_none_share_a_tag():
    tags = {name: tag(name) for name in documented()}
    assert len(tags) > 90 and len(set(tags.values())) == len(tags)
    groups = {group.split("/")[0] for _, group in GROUPS}
    assert {t.split("/")[0] for t in tags.values()} == groups - {"9_other"}
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert {group for group in groups if f"| {group} |" in text} == groups - {"9_other"}


def test_every_chart_finds_documented_metrics():
    tags = {tag(name) for name in documented()}
    for title, patterns in CHARTS.items():
        for pattern in patterns:
            assert [t for t in tags if re.match(pattern, t)], (title, pattern)


@pytest.fixture
def events(tmp_path):
    config = load_config(["debug"], {"logdir": str(tmp_path), "run.train_ratio": 32})
    with make_logger(config) as logger:
        logger.scalars(at(40), {"train/loss/dyn": 2.0, "eval/score": 3.0})
    return reader(tmp_path / "tensorboard")


def test_the_options_are_text(events):
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| `run.train_ratio` | `32.0` | `256.0` |" in text and "| `actor_critic.lambda_` | `0.95` |" in text
    assert all(f"`{name}`" in text for name in options())


def test_hyper_parameters_belong_to_the_one_run(tmp_path, events):
    """No second folder, and TensorBoard's own plugin reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.plugins.hparams import metadata
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["tensorboard"]
    assert all(path.is_file() for path in (tmp_path / "tensorboard").iterdir())
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    assert found["run.train_ratio"].number_value == 32 and found["task"].string_value == "toy_catch"
    assert found["seed"].number_value == 0 and "replay.online" not in found, "what is at its default is left out"
    assert not [name for name in found if name.startswith("log")]
    experiment = metadata.parse_experiment_plugin_data(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    assert "1_score/eval/score" in {info.name.tag for info in experiment.metric_infos}


def test_the_charts_are_laid_out(events):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.plugins.custom_scalar import layout_pb2
    proto = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(proto.string_val[0])
    (category,) = layout.category
    assert category.title == "health" and {chart.title: list(chart.multiline.tag) for chart in category.chart} == CHARTS


def test_scalars_stay_under_their_budget_over_the_whole_run(tmp_path):
    """Ten times what fits is offered."""
    sink = TensorBoardSink(tmp_path, scalars=Pace(0.1, 10_000))
    values = {f"train/loss/key{i}": 1.0 for i in range(20)}
    with Logger(tmp_path / "run", sinks=[sink]) as logger:
        for step in range(0, 10_001, 10):
            logger.scalars(at(step), values)
        offsets = logger.offsets()
    (file,) = tmp_path.glob("events*")
    size = file.stat().st_size
    assert 0.09e6 < size < 0.11e6 and abs(offsets["tensorboard"] - size) < 0.05 * size
    steps = np.array([e.step for e in reader(tmp_path).Scalars("3_world_model/loss/key3")]) // 4
    assert len(steps) < 200 and steps[-1] > 9800 and np.diff(steps[10:]).max() < 200
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1001


def test_options_are_numbers_where_they_can_be_compared():
    config = load_config(["quickstart"])
    found = table(config)
    assert found["optimizer.learning_rate"] == 5e-4 and found["task"] == "toy_catch" and found["run.eval_every"] == 4000
    assert found["model.depth_multipliers"] == "2,3,4,4" and found["env.time_limit"] == "null"
    assert "changed option" in as_text(config)
