"""What a person sees of a sweep: the live table, the dry run, the report without matplotlib, errors in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dreamer.cli import main
from dreamer.sweeps.dry_run import Need, kind_of, needs, print_dry_run, totals
from dreamer.sweeps.expand import expand
from dreamer.sweeps.progress import FAILED, FINISHED, RUNNING, RunState, save_state
from dreamer.sweeps.scheduler import RunEntry
from dreamer.sweeps.spec_file import load_sweep
from dreamer.sweeps.views import SweepDisplay, counts, time_left, write_report
from dreamer.terminal import Console

FILE = """
configs: [debug]
options: {run.agent_steps: 1000}
grid:
  model.units: [8, 16]
seeds: 2
"""


class Going:
    """A job that goes on."""

    where = "device 3"

    def poll(self):
        return None

    stop = kill = poll


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return load_sweep(path)


@pytest.fixture
def entries(sweep, tmp_path):
    """Finished, half done and running, failed, waiting."""
    runs = expand(sweep, tmp_path / "out")
    states = [RunState(FINISHED, 1000, 1, 0, 50.0), RunState(RUNNING, 0, 2), RunState(FAILED, 0, 3, 3, 1.0, "bad luck")]
    for run, state in zip(runs, states, strict=False):
        save_state(run.folder, state)
    for run, steps in zip(runs, (1000, 500), strict=False):
        row = {"step": steps, "agent_steps": steps, "fps/policy": 20.0}
        (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (run.folder / "scores.jsonl").write_text(json.dumps({"step": steps, "episode/score": 7.25}) + "\n")
    found = [RunEntry(run) for run in runs]
    found[1].job, found[1].began = Going(), 100.0
    return found


def shown(entries: list[RunEntry], height: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=height, color_system=None)
    with SweepDisplay("mine", 2, console) as display:
        display.event(entries[0], "finished [at] 3")
        display.update(entries, 160.0)
    return console.file.getvalue()


def test_the_table_shows_every_run_and_what_is_left(entries):
    text = shown(entries, 40)
    running = next(line for line in text.splitlines() if line.lstrip().startswith("units_16-seed0"))
    for part in ("running device 3", "500/1.0K", "50 %", "7.25", "1:00", "0:25"):  # 500 steps at 20 a second
        assert part in running, part
    assert "units_8-seed0: finished [at] 3" in text
    assert "1 finished, 1 running, 1 waiting, 1 failed; about 0:37 left" in text  # 25 s + 50 s on two slots


def test_a_small_terminal_shows_what_runs_first(entries):
    text = shown(entries * 3, 10)
    assert "8 runs not shown" in text and "units_16-seed0" in text


def test_counts_and_time_left_without_anything_to_go_by(entries):
    assert counts(entries) == "1 finished, 1 running, 1 waiting, 1 failed"
    assert time_left(entries, 2) == pytest.approx((500 / 20 + 1000 / 20) / 2)
    assert time_left(entries[2:], 2) is None


# --- The dry run ---------------------------------------------------------------------------------


def test_totals_count_what_is_left_to_do(sweep, entries):
    need = Need(2.0, "at least: counted", 1e9, 3e9, "sizes")
    kinds = needs(sweep, entries[3:] + entries[1:2], lambda config: need)
    assert [len(kind.runs) for kind in kinds] == [2]  # two seeds of one setting
    lines = {what: text for what, text, _ in totals(kinds, 2)}
    # One whole run of 2 hours; the other is half done: measured would need seconds, of which its state has none.
    assert lines["hours"].startswith("at least 3.00 of runs; at least 2.00")
    assert (lines["memory"], lines["disk"]) == ("2.0 GB", "6.0 GB")


def test_hours_are_measured_where_runs_have_begun_and_the_file_comes_first(sweep, entries):
    need = Need(9.0, "planned", 0.0, 0.0, "sizes")
    kinds = {kind.runs[0].run.name: kind.need for kind in needs(sweep, entries, lambda config: need)}
    assert kinds["units_8-seed0"].hours == pytest.approx(51 / 1000 * 1000 / 3600)  # 50 s, and 1 s of the failed seed
    assert "measured: 1 runs of this kind, 1,000 agent steps" in kinds["units_8-seed0"].hours_how
    sweep.path.write_text(FILE + "hours: 0.5\n")
    said = needs(load_sweep(sweep.path), entries, lambda config: need)
    assert {kind.need.hours for kind in said} == {0.5} and "said by mine.yaml" in said[0].need.hours_how


def test_kinds_of_runs_ignore_seeds_and_what_costs_nothing(sweep, tmp_path):
    runs = expand(sweep, tmp_path)
    assert kind_of(runs[0].config) == kind_of(runs[2].config) != kind_of(runs[1].config)


def test_dry_run_prints_every_run_and_starts_none(sweep, tmp_path, monkeypatch):
    from dreamer.sweeps import dry_run

    need = Need(None, "not known: no such environment", None, None, "not known: no such environment")
    monkeypatch.setattr(dry_run.needs, "__defaults__", (lambda config: need,))
    console = Console(file=io.StringIO(), width=160)
    assert print_dry_run(sweep, expand(sweep, tmp_path / "out"), 2, console) == 0
    text = console.file.getvalue()
    assert "mine: 4 runs, 2 at once" in text and "units_16-seed1: toy_catch, 1.0K agent steps" in text
    assert "not known: no such environment" in text and not (tmp_path / "out").exists()


# --- The report and errors -----------------------------------------------------------------------


def test_without_matplotlib_the_report_is_the_tables(entries, tmp_path, monkeypatch):
    for entry in entries[:2]:
        (entry.run.folder / "config.yaml").write_text("task: toy_catch\nseed: 0\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text, paths = write_report("mine", tmp_path, entries)
    assert paths == [tmp_path / "report.md"] and not (tmp_path / "report.png").exists()
    assert "No picture: it needs matplotlib" in text and "| toy_catch |" in text
    assert "| units_8-seed1 | failed | 0 of 1,000 | - | 0:01 | 3 | bad luck |" in text


def test_a_report_of_nothing_says_so(sweep, tmp_path):
    text, _ = write_report("mine", tmp_path, [RunEntry(run) for run in expand(sweep, tmp_path / "none")])
    assert "No episode has ended yet." in text


def test_errors_are_one_line_with_file_and_line(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("configs: [debug]\ngrid:\n  run.train_ration: [1]\n")
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dreamer: error: {path}:3: unknown option run.train_ration; nearest: run.train_ratio")
    assert main(["sweep", "tinny"]) == 2
    assert "unknown sweep 'tinny'; nearest: tiny" in capsys.readouterr().err
    assert main(["sweep", "tiny", "--jobs", "0"]) == 2
    assert not Path("runs/bad").exists()
