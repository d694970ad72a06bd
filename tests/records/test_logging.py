"""Records: valid JSON lines, TensorBoard events its own reader understands, cutting back to a checkpoint."""

import io
import json
import math
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_tensorboard import reader

from dreamer import transfer
from dreamer.records.logger import Logger, LogWarning, Steps
from dreamer.records.meters import Aggregator, Stopwatch
from dreamer.records.tensorboard import TensorBoardSink


def at(frames):
    return Steps(agent_steps=frames // 4, env_frames=frames, updates=frames // 8)


def lines(path):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(logdir):
    """What TensorBoard's own reader finds: ({tag: [(step, value)]}, {tag: [(step, image)]})."""
    found = reader(logdir / "tensorboard")
    tags = found.Tags()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [(e.step, e) for e in found.Images(tag)] for tag in tags["images"]}


def board(logdir):
    return TensorBoardSink(logdir / "tensorboard")


def test_metrics_and_scores(tmp_path):
    with Logger(tmp_path, sinks=[board(tmp_path)]) as logger:
        logger.episode(at(80), np.float32(0.5), np.int64(20))
        values = {"train/loss/dyn": jnp.float32(1.5), "replay/size": np.int64(3), "fps/train": 2.5, "on": np.True_}
        logger.scalars(at(100), {**values, "low": jnp.bfloat16(0.5), "one": np.ones((1, 1))})
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    head = {"step": 100, "agent_steps": 25, "updates": 12}
    expected = {"train/loss/dyn": 1.5, "replay/size": 3, "fps/train": 2.5, "on": 1, "low": 0.5, "one": 1.0}
    assert metrics == {**head, **expected}
    assert lines(tmp_path / "scores.jsonl") == [{"step": 80, "episode/score": 0.5, "episode/length": 20}]
    scalars, _ = events(tmp_path)
    assert scalars["3_world_model/loss/dyn"] == [(100, 1.5)] and scalars["6_replay/size"] == [(100, 3.0)]
    assert scalars["1_score/episode/score"] == [(80, 0.5)] and scalars["4_behaviour/episode/length"] == [(80, 20.0)]


def test_float_values_survive_exactly(tmp_path):
    values = [0.1, 1 / 3, 1e-300, math.pi]
    with Logger(tmp_path) as logger:
        for value in values:
            logger.scalars(at(1), {"x": value})
    assert [line["x"] for line in lines(tmp_path / "metrics.jsonl")] == values


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with Logger(tmp_path, sinks=[board(tmp_path)]) as logger:
        logger.scalars(at(4), {"a": float("nan"), "b": np.inf, "c": -jnp.inf, "d": 1.0})
        logger.episode(at(4), math.nan, 3)
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert [metrics[k] for k in "abcd"] == [None, None, None, 1.0]
    assert lines(tmp_path / "scores.jsonl")[0]["episode/score"] is None
    assert math.isnan(events(tmp_path)[0]["9_other/a"][0][1])


@pytest.mark.parametrize("bad", [np.ones(2), "text", np.ones(0), None])
def test_only_numbers_are_metrics(tmp_path, bad):
    with Logger(tmp_path) as logger, pytest.raises(ValueError, match="expected one number for metric train/x"):
        logger.scalars(at(0), {"train/x": bad})


def test_counters_cannot_be_overwritten(tmp_path):
    with Logger(tmp_path) as logger, pytest.raises(ValueError, match="updates"):
        logger.scalars(at(0), {"updates": 3})


def test_video_is_an_animation_in_tensorboard_and_a_file(tmp_path):
    frames = np.zeros((7, 32, 48, 3), np.uint8)
    frames[np.arange(7), np.arange(7) * 4] = (255, 200, 0)
    with Logger(tmp_path, fps=10, sinks=[board(tmp_path)]) as logger:
        path = logger.video(at(40), "report/dream/image", frames)
        logger.video(at(80), "report/dream/image", frames[:3])
    assert path == tmp_path / "videos" / "report_dream_image.gif"
    _, images = events(tmp_path)
    assert [step for step, _ in images["2_health/dream/image"]] == [40, 80]
    event = images["2_health/dream/image"][0][1]
    with Image.open(io.BytesIO(event.encoded_image_string)) as gif:
        assert gif.format == "GIF" and gif.n_frames == 7 and gif.size == (event.width, event.height) == (192, 128)
        gif.seek(3)
        pixels = np.asarray(gif.convert("RGB"))
    assert pixels[3 * 4 * 4 + 2, 100].tolist() == [255, 200, 0] and pixels[20, 100].tolist() == [0, 0, 0]
    with Image.open(path) as gif:
        assert gif.n_frames == 3


def test_sinks_can_be_switched_off(tmp_path):
    with Logger(tmp_path, jsonl=False) as logger:
        logger.scalars(at(0), {"x": 1})
        logger.episode(at(0), 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_resume_cuts_back_to_the_checkpoint(tmp_path):
    with Logger(tmp_path, sinks=[board(tmp_path)]) as logger:
        for frames in (10, 20, 30, 40):
            logger.scalars(at(frames), {"x": frames})
            logger.episode(at(frames), frames, 1)
            if frames == 20:
                offsets = logger.offsets()
    with Logger(tmp_path, sinks=[board(tmp_path)]) as logger:
        logger.truncate(json.loads(json.dumps(offsets)), at(20))
        logger.scalars(at(28), {"x": -1})
        logger.episode(at(28), -1, 1)
    assert [(m["step"], m["x"]) for m in lines(tmp_path / "metrics.jsonl")] == [(10, 10), (20, 20), (28, -1)]
    assert [s["episode/score"] for s in lines(tmp_path / "scores.jsonl")] == [10, 20, -1]
    scalars, _ = events(tmp_path)
    assert scalars["9_other/x"] == scalars["1_score/episode/score"] == [(10, 10.0), (20, 20.0), (28, -1.0)]


def test_resume_of_a_file_that_lost_lines(tmp_path):
    with Logger(tmp_path) as logger:
        logger.scalars(at(4), {"x": 1})
        with pytest.warns(LogWarning, match="metrics.jsonl .* lost"):
            logger.truncate({"metrics.jsonl": 10_000})
        logger.scalars(at(8), {"x": 2})
    assert [m["x"] for m in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tr')
    (tmp_path / "scores.jsonl").write_text('{"st')
    with Logger(tmp_path) as logger:
        logger.scalars(at(4), {"x": 1})
    assert [m["step"] for m in lines(tmp_path / "metrics.jsonl")] == [1, 4]
    assert (tmp_path / "scores.jsonl").read_text() == ""


def test_full_disk_is_reported_once_and_loses_no_line(tmp_path):
    """A limit on file sizes stands in for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Logger(tmp_path, sinks=[board(tmp_path)]) as logger:
        logger.scalars(at(0), {"x": 0, "text" * 100: 1})
        logger.flush()
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        try:
            with pytest.warns(LogWarning, match="training goes on") as caught:
                for frames in (4, 8, 12):
                    logger.scalars(at(frames), {"x": frames, "text" * 100: 1})
                    logger.flush()
            assert sorted("metrics.jsonl" in str(w.message) for w in caught) == [False, True]
            assert len(lines(tmp_path / "metrics.jsonl")) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        logger.scalars(at(16), {"x": 16})
    assert [m["x"] for m in lines(tmp_path / "metrics.jsonl")] == [0, 4, 8, 12, 16]
    assert events(tmp_path)[0]["9_other/x"] == [(x, float(x)) for x in (0, 4, 8, 12, 16)]


def test_further_sinks_get_everything(tmp_path):
    class Recorder:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args: self.calls.append((name, *args))

    recorder = Recorder()
    with Logger(tmp_path, sinks=[recorder]) as logger:
        logger.scalars(at(4), {"x": jnp.ones(())})
        logger.episode(at(4), 2, 3)
    assert recorder.calls == [("scalars", at(4), {"x": 1.0}), ("episode", at(4), 2.0, 3), ("close",)]


def test_aggregator_reduces_by_name():
    aggregator = Aggregator()
    for value in (1.0, 2.0, 6.0):
        names = ("loss", "grad_max", "grad_min", "steps_sum", "ret_last")
        aggregator.add(dict.fromkeys(names, jnp.float32(value)), prefix="train/")
    assert aggregator.result() == {
        "train/loss": 3.0,
        "train/grad_max": 6.0,
        "train/grad_min": 1.0,
        "train/steps_sum": 9.0,
        "train/ret_last": 6.0,
    }
    assert aggregator.result() == {}


def test_aggregator_counts_every_value_of_an_array_and_keeps_nan():
    aggregator = Aggregator()
    aggregator.add({"x": jnp.array([1.0, 2.0, 3.0]), "bad": 1.0, "n": np.int32(2**24 + 1)})
    aggregator.add({"x": 10, "bad": jnp.nan})
    result = aggregator.result()
    assert result["x"] == 4.0 and math.isnan(result["bad"]) and result["n"] == 2**24 + 1


def test_aggregator_has_few_arrays_waiting_on_the_device(monkeypatch):
    aggregator, sizes = Aggregator(), []
    read = transfer.read
    monkeypatch.setattr(transfer, "read", lambda tree: (sizes.append(len(jax.tree.leaves(tree))), read(tree))[1])
    metrics = {f"m{i}": jnp.float32(i) for i in range(50)} | {"count_last": jnp.int32(2**24 + 1)}
    for _ in range(3):
        aggregator.add(metrics, "train/")
    aggregator.add({"m0": jnp.array([4.0, 8.0], jnp.float32)}, "train/")
    aggregator.restore(aggregator.state() | {"train/m1": np.array([7.0])})
    aggregator.add(metrics, "train/")
    result = aggregator.result()
    assert sizes == [3 * 2 + 1, 51 + 2]
    assert result["train/m0"] == 12 / 6 and result["train/m1"] == (7 + 1) / 2
    assert result["train/m49"] == 49 and result["train/count_last"] == 2**24 + 1


def test_stopwatch_shares_and_rates():
    now = [100.0]
    watch = Stopwatch(clock=lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    spend(1)
    with watch.section("env"):
        spend(2)
        with watch.section("update"):
            spend(4)
        spend(1)
    with watch.section("env"):
        spend(2)
    watch.count(policy=40, train=500)
    watch.count(policy=10)
    result = watch.result()
    assert result == pytest.approx(
        {"fps/policy": 5, "fps/train": 50, "time/env": 0.5, "time/update": 0.4, "time/other": 0.1}
    )
    with watch.section("log"):
        spend(5)
    assert watch.result() == pytest.approx({"fps/policy": 0, "fps/train": 0, "time/log": 1, "time/other": 0})


def test_stopwatch_result_within_a_section():
    """A log step asks for the result while its own section is open."""
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])
    with watch.section("log"):
        now[0] += 1
        assert watch.result()["time/log"] == 1
        now[0] += 3
    now[0] += 1
    assert watch.result() == pytest.approx({"fps/policy": 0, "fps/train": 0, "time/log": 0.75, "time/other": 0.25})
