"""Files as crashes, full disks and editors leave them: the rest is drawn, and what is left out is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer import cli
from dreamer.plot import figure
from dreamer.plot.comparison import compare
from dreamer.plot.curves import OURS, THEIRS, Run, read
from dreamer.presets import load_config, save_config
from dreamer.records.json_lines import columns
from dreamer.schema import ConfigError
from dreamer.sweeps import views
from dreamer.sweeps.progress import FINISHED, Progress, RunState, load_state, save_state

GOOD = b'{"step": 10, "episode/score": 1.0}\n{"step": 20, "episode/score": 3.0}\n'


def written(folder: Path, scores: bytes = GOOD, name: str = "scores.jsonl", config: str = "task: gym_A\n") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_bytes(scores)
    (folder / "config.yaml").write_text(config)
    return folder


def in_between(line: bytes) -> bytes:
    """A line between two good ones."""
    first, second = GOOD.splitlines(keepends=True)
    return first + line + b"\n" + second


LINES = [
    (b'{"step": 1', "expected JSON"),
    (b"\0" * 40, "expected JSON"),
    (b"\x1f\x8b\xff\xfe\x80", "expected JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b"[1, 2]", "expected an object of JSON, got [1, 2]"),
    (b'"step"', "expected an object"),
    (b'{"step": "10", "episode/score": 1}', "expected step as a number from 0 to 9.22e+18, got '10'"),
    (b'{"step": true, "episode/score": 1}', "got True"),
    (b'{"step": -5, "episode/score": 1}', "got -5"),
    (b'{"step": 1e30, "episode/score": 1}', "got 1e+30"),
    (b'{"step": 1' + b"0" * 400 + b', "episode/score": 1}', "expected step"),
    (b'{"step": 1' + b"0" * 5000 + b', "episode/score": 1}', "expected JSON"),
    (b'{"step": 15, "episode/score": [1]}', "expected episode/score as a number"),
    (b'{"step": 15, "episode/score": 1e308}', "got 1e+308"),
    (b'{"step": 15, "episode/score": -Infinity}', "got -inf"),
    (b'{"step": 15, "episode/score": NaN}', "got nan"),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=range(len(LINES)))
def test_a_line_that_cannot_be_used_is_left_out_and_told_by_its_number(tmp_path, line, words):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(in_between(line))
    (steps, scores), told = columns(path, "step", "episode/score")
    assert (steps.tolist(), scores.tolist()) == ([10, 20], [1, 3])
    (told,) = told
    assert told.startswith(f"{path}:2: ") and words in told and len(told) < 300 and "\n" not in told


@pytest.mark.parametrize(
    "last", [b'{"step": 30, "episode/sc', b"\0\0\0", b'{"step": 30, "episode/score": null}\n', b'{"step": 30}\n', b""]
)
def test_what_is_half_written_or_not_finite_says_nothing(tmp_path, last):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(GOOD + last)
    assert [c.tolist() for c in columns(path, "step", "episode/score").values] == [[10, 20], [1, 3]]
    assert columns(path, "step", "episode/score").left_out == []


def broken(folder: Path) -> dict[str, str]:
    """Runs that cannot be read, each for a reason of its own, beside one that can: words on each."""
    written(folder / "good")
    written(folder / "binary", bytes(range(256)) * 9)
    written(folder / "gz", gzip.compress(GOOD)[:-9], "scores.jsonl.gz")
    written(folder / "yaml", config="task: [gym_A\n")
    written(folder / "nameless", config="seed: 3\n")
    written(folder / "folder").joinpath("config.yaml").unlink()
    (folder / "folder" / "config.yaml").mkdir()
    written(folder / "denied")
    return {
        "binary/scores.jsonl": "no line of it can be used; the first is line 1: expected JSON",
        "gz/scores.jsonl.gz": "cannot be read (Compressed file ended",
        "yaml/scores.jsonl": "config.yaml:",
        "nameless/scores.jsonl": "give it with --task",
        "folder/scores.jsonl": "give it with --task",
        "denied/scores.jsonl": "cannot be read (Permission denied)",
    }


def deny(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not: tests may run as root."""
    plain = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.parent.name == "denied":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


def test_files_that_cannot_be_read_are_left_out_each_with_its_reason(tmp_path, monkeypatch):
    words = broken(tmp_path)
    deny(monkeypatch)
    found = read([str(tmp_path)])
    assert [run.path.parent.name for run in found.runs] == ["good"]
    assert len(found.remarks) == len(words)
    for file, reason in words.items():
        (remark,) = (r for r in found.remarks if str(tmp_path / file) in r)
        assert remark.startswith("Left out: ") and reason in remark and "\n" not in remark


def test_the_others_are_drawn_with_warnings_and_exit_code_0(tmp_path, capsys, monkeypatch):
    words = broken(tmp_path / "runs")
    deny(monkeypatch)
    out = tmp_path / "plot"
    assert cli.main(["plot", str(tmp_path / "runs"), "--out", str(out), "--format", "png"]) == 0
    printed = capsys.readouterr()
    warnings = printed.err.splitlines()
    assert len(warnings) == 6 and warnings[-1] == "dreamer: warning: and 1 more; the notes below the table have all"
    assert all(line.startswith("dreamer: warning: Left out: ") for line in warnings[:-1])
    table = out.with_suffix(".md").read_text()
    assert all(f"- Left out: {tmp_path / 'runs' / file}" in table for file in words)
    assert "| gym_A | other code | 1 |" in table and out.with_suffix(".png").stat().st_size > 1000


def test_where_nothing_can_be_read_one_line_says_why(tmp_path, capsys):
    broken(tmp_path)
    (tmp_path / "good" / "scores.jsonl").write_bytes(b"nothing\n")
    (tmp_path / "denied" / "scores.jsonl").write_bytes(b"nothing\n")
    assert cli.main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing can be drawn" in error and "(and 6 more faults)" in error


def test_steps_that_go_back_are_told(tmp_path):
    folder = written(tmp_path / "run", GOOD + GOOD)
    found = read([str(folder)])
    assert found.runs[0].xs.tolist() == [10, 20, 10, 20]
    assert found.remarks == [
        f"Several runs in one file? Steps go back in {folder / 'scores.jsonl'} (1 times); all its scores count."
    ]


@pytest.mark.parametrize(
    ("lines", "axis", "expected"),
    [
        ('{"step": 20, "agent_steps": 10}\n{"step": 10, "agent_steps": 5}\nnothing\n', "agent_steps", [5, 10]),
        ('{"step": 0, "updates": 0}\n{"step": 20, "updates": 4}\n{"step": 20, "updates": "x"}\n', "updates", [2, 4]),
        (
            '{"step": 10, "agent_steps": 9, "fps/policy": 1e-99}\n{"step": 20, "agent_steps": 369, "fps/policy": 1}\n',
            "hours",
            [0, 0.1],
        ),
    ],
)
def test_metrics_that_are_half_broken(tmp_path, lines, axis, expected):
    folder = written(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(lines)
    found = read([str(folder)], axis)
    np.testing.assert_allclose(found.runs[0].xs, expected)
    assert len(found.remarks) == (0 if axis == "hours" else 1) and all("metrics.jsonl:3: " in r for r in found.remarks)


def test_metrics_that_say_nothing_leave_their_run_out(tmp_path):
    folders = [written(tmp_path / name) for name in ("a", "b")]
    for folder, line in zip(folders, ('{"step": 0, "updates": 0}', '{"step": 20, "updates": 2}'), strict=True):
        (folder / "metrics.jsonl").write_text(line + "\n")
    found = read([str(tmp_path)], "updates")
    assert [run.path.parent.name for run in found.runs] == ["b"]
    assert "a/scores.jsonl: --x updates: expected" in found.remarks[0]


CURVE: dict[str, Any] = {"task": "gym_A", "method": "ppo", "seed": 0, "xs": [1, 2, 3], "ys": [1.0, None, 3.0]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"xs": 5}, "expected xs as a list of numbers, got 5"),
        ({"xs": "123"}, "expected xs as a list"),
        ({"ys": {"a": 1}}, "expected ys as a list"),
        ({"xs": [[1], [2], [3]]}, "expected xs as a list"),
        ({"ys": [1, "high", 2]}, "expected ys as a list"),
        ({"ys": [1, 10**400, 2]}, "expected ys as a list"),
        ({"ys": [1, 2]}, "expected as many ys as xs, got 2 and 3"),
    ],
)
def test_a_curve_of_a_list_that_cannot_be_is_left_out(tmp_path, changes, words):
    path = tmp_path / "curves.json"
    path.write_text(json.dumps([CURVE, CURVE | changes, 7]))
    found = read([str(path)])
    assert [run.ys.tolist() for run in found.runs] == [[1, 3]]
    (remark,) = found.remarks
    assert f"{path}, curve 1: {words}" in remark and remark.endswith("(and 1 more curves of it).")


def test_points_of_a_list_that_cannot_be_are_left_out(tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(json.dumps([CURVE | {"xs": [1, -2, 3, 4, 5], "ys": [1, 2, 1e308, float("inf"), 4]}]))
    found = read([str(path)])
    assert found.runs[0].xs.tolist() == [1, 5] and "curve 0: points (3) with negative" in found.remarks[0]


#: Without the time of its making, which would be in the name of a test.
CUT = gzip.compress(b"[]" * 99, mtime=0)[:20]


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08 not gzip", CUT, b"[" * 100_000, b"\0"])
def test_lists_that_are_no_json_are_one_line(tmp_path, content):
    path = tmp_path / "curves.json.gz"
    path.write_bytes(content if content[:1] == b"\x1f" else gzip.compress(content))
    with pytest.raises(ConfigError, match=r"Left out: .*curves\.json\.gz: (cannot be read|expected JSON)") as caught:
        read([str(path)])
    assert "\n" not in str(caught.value)


def test_scores_that_are_packed_are_read(tmp_path):
    folder = written(tmp_path / "run", gzip.compress(GOOD), "scores-seed4.jsonl.gz")
    (run,) = read([str(folder)]).runs
    assert (run.seed, run.ys.tolist()) == ("4", [1, 3])


@pytest.mark.parametrize(
    ("prefix", "label"),
    [("", THEIRS), ("a=", "a"), ("a=b=", "a=b"), ("lr=1e-4, x==", "lr=1e-4, x="), ("$a_1$=", "$a_1$")],
)
@pytest.mark.parametrize("name", ["run", "run.train_ratio=64"])
def test_names_may_have_equals_signs(tmp_path, prefix, label, name):
    folder = written(tmp_path / name)
    assert [run.label for run in read([f"{prefix}{folder}"]).runs] == [label]


def test_a_configuration_of_another_version_is_ours(tmp_path):
    folder = written(tmp_path / "run")
    save_config(load_config(["gym", "cpu"], {"task": "gym_A"}), folder / "config.yaml")
    with (folder / "config.yaml").open("a") as file:
        file.write("oracle: {depth: 3}\nnovel_option: 7\n")
    (run,) = read([str(folder)]).runs
    assert run.label == OURS and run.config and run.config["novel_option"] == 7


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb\tc", "a b c"),
        ("bad \ud800", "bad ?"),
        ("x\x1b[31m\x07", "x?[31m?"),
        ("y" * 300, "y" * 97 + "..."),
        ("", "-"),
        (["l"], "['l']"),
    ],
)
def test_names_out_of_files_are_one_line(tmp_path, name, shown):
    path = tmp_path / "curves.json"
    path.write_text(json.dumps([CURVE | {"method": name}]))
    assert [run.label for run in read([str(path)]).runs] == [shown]


# --- Pictures ----------------------------------------------------------------------------------


def curves_of(*labels: str, scores: tuple[float, ...] = (1.0, 2.0)) -> list[Run]:
    xs = np.arange(1.0, len(scores) + 1)
    return [Run("gym_$a_{$", label, "0", Path("x"), xs, np.array(scores)) for label in labels]


def test_names_are_no_formulas_and_none_is_hidden(tmp_path, monkeypatch):
    """Nor does a matplotlibrc in the working folder turn them into LaTeX."""
    import matplotlib

    names = ["$x_1$", "$\\frac{", "_hidden", "50 % & #", "ünï 漢字"]
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    made: list[Any] = []
    save = figure._save
    monkeypatch.setattr(figure, "_save", lambda whole, paths: (made.append(whole), save(whole, paths)))
    figure.draw(compare(curves_of(*names), {}), "env_frames", [tmp_path / "x.svg"])
    (axes,) = made[0].axes
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == [f"{name}, 1 seed" for name in names]
    assert not any(text.get_parse_math() for text in (*texts, axes.title)) and axes.get_title() == "gym_$a_{$"
    assert matplotlib.rcParams["text.usetex"] is True


def test_more_names_and_panels_than_have_room(tmp_path, monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr(figure, "_save", lambda whole, paths: made.append(whole))
    labels = [f"curve {i}" for i in range(100)]
    figure.draw(compare(curves_of(*labels), {}), "env_frames", [tmp_path / "x.png"])
    (legend,) = made[0].legends
    assert len(legend.get_texts()) == 40 and legend.get_title().get_text() == "and 60 more, in the table"
    made[0].canvas.draw()  # it fits: warnings are errors
    tasks = [Run(f"gym_{i}", "x", "0", Path("x"), np.ones(1), np.ones(1)) for i in range(70)]
    figure.draw(compare(tasks, {}), "env_frames", [tmp_path / "x.png"])
    assert len(made[1].axes) == 60 and "13 more panels are not drawn" in made[1].get_supxlabel()


def test_the_largest_scores_have_finite_means(tmp_path):
    large = float(np.finfo(np.float32).max)
    found = compare(curves_of("x", "x", "x", scores=(large, -large, large)), {})
    assert np.isfinite([(final.mean, final.low, final.high) for final in found.finals]).all()
    figure.draw(found, "env_frames", [tmp_path / "x.png"])


# --- Sweeps ------------------------------------------------------------------------------------


def test_a_sweep_passes_over_lines_that_cannot_be_used(tmp_path):
    metrics = [b'{"step": 8, "agent_steps": 4, "fps/policy": 2}', b'{"step": "x", "agent_steps": 9}', b"[" * 100_000]
    metrics += [b'{"agent_steps": NaN}', b'{"agent_steps": null, "step": 9}', b"\0"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(metrics) + b"\n")
    (tmp_path / "scores.jsonl").write_bytes(b"\n".join(line for line, _ in LINES) + b"\n" + GOOD)
    progress = Progress(tmp_path)
    progress.look()
    assert (progress.agent_steps, progress.env_frames, progress.rate) == (4, 8, 2)
    assert (progress.episodes, progress.score()) == (2, 2.0)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\0\0", b'{"status": "odd"}', b'{"status": 3}', b'{"steps": "x"}', b'{"seconds": NaN}']
)
def test_a_state_that_cannot_be_is_a_new_one(tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content)
    assert load_state(tmp_path) == RunState()


def test_a_state_comes_back(tmp_path):
    state = RunState(FINISHED, 10, 2, 1, 3.5, "because")
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state


def test_the_report_of_a_sweep_says_that_there_are_no_curves(tmp_path):
    folder = written(tmp_path / "run", b"nothing\n")
    text, notes, files = views.comparison(tmp_path, [str(folder)])
    assert (text, files) == ("", []) and "No curves: nothing can be drawn. Left out: " in notes[0]
