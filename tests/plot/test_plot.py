"""`dreamer plot`: what is compared, drawn and tabled, and what it says to mistakes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from dreamer import cli
from dreamer.commands.plot import parser
from dreamer.plot.comparison import Comparison, compare
from dreamer.plot.curves import Run
from dreamer.plot.figure import as_table, number, short
from dreamer.plot.lines import nice
from dreamer.plot.published import published
from dreamer.plot.request import Request, make_comparison
from dreamer.plot.totals import scale_of
from dreamer.presets import load_config, save_config

ROOT = Path(__file__).resolve().parents[2]
CARTPOLE = ROOT / "docs" / "results" / "dmc_cartpole_swingup"


def line(task: str, label: str, seed: int, level: float, end: float = 1000.0) -> Run:
    """A run with an episode each 10 steps, all of one score."""
    xs = np.arange(10.0, end + 1, 10.0)
    return Run(task, label, str(seed), Path("x"), xs, np.full(len(xs), level))


def lists(path: Path, *runs: tuple[str, str, int, list[float], list[float]]) -> str:
    keys = ("task", "method", "seed", "xs", "ys")
    path.write_text(json.dumps([dict(zip(keys, run, strict=True)) for run in runs]))
    return str(path)


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plot", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- What is compared --------------------------------------------------------------------------


def test_mean_band_and_final_score_of_seeds():
    """Three flat runs: their mean everywhere; the band of scipy's bootstrap."""
    levels = [1.0, 2.0, 6.0]
    found = compare([line("gym_a", "x", seed, level) for seed, level in enumerate(levels)], {}, bins=10)
    (curve,) = found.panels[0].curves
    np.testing.assert_array_equal(curve.x, np.arange(1, 11) * 100.0)
    np.testing.assert_array_equal(curve.mean, [3.0] * 10)
    np.testing.assert_array_equal(curve.count, [3] * 10)
    oracle = scipy.stats.bootstrap((levels,), np.mean, n_resamples=9999, method="percentile", rng=1)
    assert (curve.low[0], curve.high[0]) == pytest.approx(oracle.confidence_interval, abs=0.05)
    (final,) = found.finals
    assert (final.seeds, final.span, final.mean) == (3, (900.0, 1000.0), 3.0)
    assert (final.low, final.high) == (curve.low[-1], curve.high[-1])
    assert any("fewer than 5 seeds" in note for note in found.notes)


def test_a_run_that_ended_early_bounds_the_final_score_and_is_told():
    found = compare([line("gym_a", "x", 0, 1.0), line("gym_a", "x", 1, 3.0, end=500)], {}, bins=10)
    (curve,), (final,) = found.panels[0].curves, found.finals
    assert curve.mean.tolist() == [2.0] * 5 + [1.0] * 5 and curve.count.tolist() == [2] * 5 + [1] * 5
    assert np.isnan(curve.low[5:]).all() and np.isfinite(curve.low[:5]).all()
    assert (final.span, final.mean) == ((400.0, 500.0), 2.0)
    assert any("seed 1 ends at 500" in note for note in found.notes)


def test_runs_without_a_common_span_have_no_final_score():
    late = Run("gym_a", "x", "1", Path("x"), np.array([900.0, 1000.0]), np.ones(2))
    found = compare([line("gym_a", "x", 0, 1.0, end=500), late], {}, bins=10)
    assert found.finals[0].span is None and any("no x in common" in note for note in found.notes)


def test_the_final_score_is_of_the_last_tenth_of_the_bins():
    ramp = Run("gym_a", "x", "0", Path("x"), np.arange(1.0, 41.0), np.arange(1.0, 41.0))
    (final,) = compare([ramp], {}, bins=40).finals
    assert final.span == (36.0, 40.0) and final.mean == np.mean([37, 38, 39, 40])
    assert np.isnan(final.low)


def test_a_seed_twice_is_told():
    found = compare([line("gym_a", "x", 0, 1.0), line("gym_a", "x", 0, 3.0)], {})
    assert any("several runs have seed 0" in note for note in found.notes)


@pytest.mark.parametrize(
    ("task", "name", "score", "scaled"),
    [
        ("atari_pong", "human-normalised score", 14.6, 1.0),
        ("atari100k_pong", "human-normalised score", -20.7, 0.0),
        ("dmc_walker_walk", "share of the best possible score", 250.0, 0.25),
        ("gym_CartPole-v1", "raw score of gym", 250.0, 250.0),
    ],
)
def test_scales(task, name, score, scaled):
    scale = scale_of(task)
    assert scale.name == name and scale.apply(task, np.array(score)) == pytest.approx(scaled)


def test_aggregates_over_tasks_are_human_normalised():
    """Pong at the human 14.6 (1), Boxing half-way from 0.1 to 12.1 (0.5), Breakout at random 1.7 (0)."""
    runs = [
        line(f"atari_{game}", "x", seed, level)
        for game, level in (("pong", 14.6), ("boxing", 6.1), ("breakout", 1.7))
        for seed in range(2)
    ]
    found = compare(runs + [line("gym_a", "x", 0, 77.0)], {}, bins=5)
    assert [panel.title for panel in found.panels[4:]] == [
        "mean, 3 tasks",
        "median, 3 tasks",
        "interquartile mean, 3 tasks",
    ]
    (total,) = found.totals
    assert total.tasks == ["atari_pong", "atari_boxing", "atari_breakout"] and total.seeds == 2
    expected = {"mean": 0.5, "median": 0.5, "interquartile mean": 0.5, "optimality gap": 0.5}
    assert {name: pytest.approx(values[0]) for name, values in total.values.items()} == expected
    np.testing.assert_allclose(found.panels[4].curves[0].mean, [0.5] * 5)


def test_curves_are_aggregated_over_the_tasks_that_all_have():
    tasks = {"x": ("pong", "boxing", "breakout"), "y": ("pong", "boxing")}
    runs = [line(f"atari_{game}", label, 0, 1.0) for label, games in tasks.items() for game in games]
    found = compare(runs, {})
    assert [total.tasks for total in found.totals] == [["atari_pong", "atari_boxing"]] * 2
    assert any("leaves out atari_breakout" in note for note in found.notes)
    apart = compare([line("atari_pong", "x", 0, 1.0), line("atari_boxing", "y", 0, 1.0)], {})
    assert not apart.totals and any("share fewer than two tasks" in note for note in apart.notes)


def test_published_means_are_aggregated_where_all_tasks_have_them():
    tasks = ("atari_pong", "atari_boxing")
    known = [published()[f"atari100k-{task.removeprefix('atari_')}"] for task in tasks]
    runs = [line(task, "x", 0, 0.0, end=400_000) for task in tasks]
    found = compare(runs, {task: [curve] for task, curve in zip(tasks, known, strict=True)}, window=20_000)
    (total,) = found.totals
    pong, boxing = (curve.mean[-2:].mean() for curve in known)
    expected = np.mean([(pong + 20.7) / 35.3, (boxing - 0.1) / 12.0])
    assert total.published["atari100k"]["mean"] == pytest.approx(expected)
    panel = next(panel for panel in found.panels if panel.title == "mean, 2 tasks")
    assert [curve.label for curve in panel.curves] == ["x", "published atari100k"]


@pytest.mark.parametrize(("width", "expected"), [(2800, 5000), (0.011, 0.02), (5, 5), (1000, 1000), (999, 1000)])
def test_round_widths(width, expected):
    assert nice(width) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (20_000, "20k"), (1_500_000, "1.5M"), (0.25, "0.25"), (2e8, "200M")]
)
def test_numbers_on_axes(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(765.5, "766"), (12345.6, "12,346"), (0.7696, "0.770"), (-4.5, "-4.50"), (0.0, "0"), (float("nan"), "-")],
)
def test_numbers_in_tables(value, text):
    assert number(value) == text


# --- The command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """PREFIX of what the command makes of the run in docs/results."""
    out = tmp_path_factory.mktemp("real") / "deep" / "curve"
    arguments = ["plot", str(CARTPOLE), "--reference", "dmc_cartpole_swingup", "--out", str(out)]
    assert cli.main([*arguments, "--format", "png", "svg"]) == 0
    return out


def test_two_real_seeds_beside_the_published_curve(real):
    """The same figures as in the folder's page, the caveat in the table, a picture that is not empty."""
    table = real.with_suffix(".md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| dmc_cartpole_swingup"))
    assert "| dreamer | 2 | 100k-110k | 766 [710, 821] | dmc_proprio: 506 | dmc_proprio: 851 (std 14.6" in row
    assert "not a like-for-like comparison" in table and "dmc_vision" not in table  # these runs see no pixels
    picture = matplotlib.image.imread(real.with_suffix(".png"))
    assert picture.shape[1] >= 1000 and 0.02 < (picture[..., :3].mean(-1) < 0.9).mean() < 0.5
    assert "<svg" in real.with_suffix(".svg").read_text()


def test_the_picture_in_the_documents_is_what_the_command_draws(real):
    assert real.with_suffix(".md").read_text() == (CARTPOLE / "curve.md").read_text()
    assert (CARTPOLE / "curve.png").stat().st_size > 10_000 and (CARTPOLE / "curve.svg").is_file()


def test_the_same_files_give_the_same_bytes_and_print_the_table(real, tmp_path, capsys):
    arguments = [str(CARTPOLE), "--reference", "dmc_proprio-cartpole_swingup", "--out", str(tmp_path / "again")]
    code, out, _ = command(capsys, *arguments, "--format", "svg", "pdf")
    assert code == 0 and (tmp_path / "again.md").read_text() in out and not (tmp_path / "again.png").exists()
    for ending in ("svg", "md"):
        assert (tmp_path / f"again.{ending}").read_bytes() == real.with_suffix(f".{ending}").read_bytes()
    assert (tmp_path / "again.pdf").read_bytes().startswith(b"%PDF")


def drawn(monkeypatch, found: Comparison, tmp_path: Path, axis: str = "env_frames"):
    """The figure that would be written."""
    from dreamer.plot import figure

    figures = []
    monkeypatch.setattr(figure, "_save", lambda made, paths: figures.append(made))
    figure.draw(found, axis, [tmp_path / "x.png"])
    return figures[0]


def test_panels_axes_legend_and_caption(tmp_path, monkeypatch):
    """Two tasks, two curves, references: every panel is labelled, references are dashed, the caption has the caveat."""
    runs = [
        ("dmc_walker_walk", label, seed, [1e4, 2e4, 3e4], [1.0, 2.0, 3.0]) for label in ("a", "b") for seed in (0, 1)
    ]
    runs += [(f"dmc_{task}", label, seed, xs, ys) for _, label, seed, xs, ys in runs for task in ("hopper_hop",)]
    source = lists(tmp_path / "curves.json", *runs)
    found = make_comparison(Request([source], reference=["auto"]))
    figure = drawn(monkeypatch, found, tmp_path)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = ["dmc_walker_walk", "dmc_hopper_hop", "mean, 2 tasks", "median, 2 tasks", "interquartile mean, 2 tasks"]
    assert [axes.get_title() for axes in panels] == titles
    assert {axes.get_xlabel() for axes in panels} == {"environment frames"}
    assert panels[0].get_ylabel() == "episode score (undiscounted return)"
    assert panels[2].get_ylabel() == "share of the best possible score"
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a", "b", "published dmc_proprio", "published dmc_vision"]
    lines = {entry.get_label(): entry for entry in panels[0].get_lines()}
    assert lines["published dmc_proprio"].is_dashed() and not lines["a"].is_dashed()
    assert lines["a"].get_color() != lines["b"].get_color() and lines["a"].get_marker() != lines["b"].get_marker()
    caption = figure.get_supxlabel()
    assert "mean over 2 seeds" in caption and "95 %" in caption and "landmark" in caption.replace("\n", " ")


def test_one_panel_names_its_seeds_and_other_axes_their_unit(tmp_path, monkeypatch):
    found = compare([line("gym_a", "x", seed, 1.0) for seed in range(3)], {})
    (axes,) = drawn(monkeypatch, found, tmp_path, "hours").axes
    assert axes.get_xlabel() == "hours of training"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x, 3 seeds"]


def test_names_are_one_cell_of_a_table():
    rows = as_table(["a", "b"], [["one|two", "three\nfour"]]).splitlines()
    assert len(rows) == 3 and all(row.count("|") == 3 for row in rows)


def test_more_curves_than_colours_stay_apart(tmp_path, monkeypatch):
    found = compare([line("gym_a", f"curve {i}", 0, float(i)) for i in range(14)], {})
    (axes,) = drawn(monkeypatch, found, tmp_path).axes
    assert len({(drawn.get_color(), drawn.get_marker()) for drawn in axes.get_lines()}) == 14


def test_runs_with_other_options_are_other_curves(tmp_path, capsys):
    for ratio in (32, 64):
        for seed in (0, 1):
            folder = tmp_path / f"{ratio}-{seed}"
            folder.mkdir()
            options = {"task": "gym_CartPole-v1", "seed": seed, "run.train_ratio": ratio}
            save_config(load_config(["gym", "cpu"], options), folder / "config.yaml")
            (folder / "scores.jsonl").write_text('{"step": 100, "episode/score": 5.0}\n')
    (tmp_path / "new").mkdir()
    save_config(load_config(["gym", "cpu"], {"task": "gym_CartPole-v1"}), tmp_path / "new" / "config.yaml")
    (tmp_path / "new" / "scores.jsonl").write_text("")
    code, out, _ = command(capsys, str(tmp_path), "--out", str(tmp_path / "plot"), "--format", "png")
    assert code == 0
    assert re.findall(r"train_ratio \d+\.0 \| 2 ", out) == ["train_ratio 32.0 | 2 ", "train_ratio 64.0 | 2 "]
    assert "Left out, as no episode has ended there" in out


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/run"], "no runs found at 'no/such/run'"),
        ([str(CARTPOLE), "--reference", "dmc_cartpole_swngup"], "nearest: dmc_cartpole_swingup"),
        ([str(CARTPOLE), "--reference", "dmc_walker_walk"], "expected a task of the runs"),
        ([str(CARTPOLE), "--x", "hours"], "metrics.jsonl"),
        ([str(CARTPOLE), "--bins", "3", "--window", "5"], "--bins or --window"),
        ([str(CARTPOLE), "--bins", "0"], "whole number from 1"),
        ([str(CARTPOLE), "--window", "-1"], "number from 1e-9"),
        ([str(CARTPOLE), "--window", "0.001"], "at most 10000 bins"),
        ([], "RUN_OR_GLOB"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "") and words in err and len(err.strip().splitlines()) == 1


def test_runs_without_scores_are_a_mistake(tmp_path, capsys):
    save_config(load_config(["quickstart"], {}), tmp_path / "config.yaml")
    (tmp_path / "scores.jsonl").write_text("")
    code, _, err = command(capsys, str(tmp_path))
    assert code == 2 and "no finished episodes in" in err and "scores.jsonl" in err


def test_published_curves_have_no_hours(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(load_config(["dmc_proprio"], {"task": "dmc_walker_walk"}), folder / "config.yaml")
    (folder / "scores.jsonl").write_text('{"step": 100, "episode/score": 5.0}\n')
    (folder / "metrics.jsonl").write_text('{"step": 100, "agent_steps": 50, "fps/policy": 5.0}\n')
    code, _, err = command(capsys, str(folder), "--x", "hours", "--reference", "dmc_walker_walk")
    assert code == 2 and "published scores have no hours" in err


def test_without_matplotlib_the_error_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = command(capsys, str(CARTPOLE), "--out", str(tmp_path / "plot"))
    assert code == 2 and "pip install 'dreamer[plot]'" in err


def test_help_names_every_option():
    text = parser().format_help()
    for option in ("--reference", "--x", "--bins", "--window", "--out", "--format", "--task", "NAME="):
        assert option in text
