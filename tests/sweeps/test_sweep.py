"""Running sweeps with a trainer that only writes files: scheduling, retries, stops, kills, resumes, early ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from dreamer.cli import main
from dreamer.schema import ConfigError
from dreamer.sweeps.launch import RUNS_FAILED, Request, run_sweep
from dreamer.sweeps.local import slots
from dreamer.sweeps.progress import Progress, hopeless, load_state, rung
from dreamer.sweeps.spec import EarlyStop

TRAINER = Path(__file__).parent / "fake_trainer.py"
FAKE = [sys.executable, "-S", str(TRAINER)]
FOUR = """
configs: [debug]
options: {run.platform: cpu, run.agent_steps: 100}
retry_seconds: 0.05
grid:
  model.units: [8, 16]
seeds: 2
"""
NAMES = ["units_8-seed0", "units_16-seed0", "units_8-seed1", "units_16-seed1"]


class Place:
    """A sweep file, its folder, and what the fake trainer is to do."""

    def __init__(self, root: Path) -> None:
        self.file, self.folder, self.output = root / "mine.yaml", root / "out", root / "output.txt"
        self.folder.mkdir()
        self.write(FOUR)
        self.behave()

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def behave(self, **by_run: dict[str, Any]) -> None:
        """`all` stands for every run."""
        said = {"*" if name == "all" else name: does for name, does in by_run.items()}
        (self.folder / "behaviour.json").write_text(json.dumps(said))

    def run(self, **request: Any) -> int:
        asked = Request(str(self.file), self.folder, **{"jobs": 2, **request})
        return run_sweep(asked, FAKE, poll_seconds=0.02)

    def starts(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def status(self, name: str) -> str:
        return load_state(self.folder / name).status

    def steps(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        return json.loads(path.read_text().splitlines()[-1])["agent_steps"] if path.exists() else 0

    def begin(self, *arguments: str) -> subprocess.Popen:
        """The sweep as a process of its own."""
        script = (
            "import sys; from pathlib import Path; from dreamer.sweeps.launch import Request, run_sweep\n"
            "from dreamer.sweeps import views; views.comparison = lambda folder, runs: ('', [], [])\n"
            "sys.exit(run_sweep(Request(sys.argv[1], Path(sys.argv[2]), 2), sys.argv[3:], 0.02))"
        )
        words = [sys.executable, "-c", script, str(self.file), str(self.folder), *FAKE]
        with self.output.open("w") as file:
            return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    """Only the test of the report has the curves compared and drawn: it takes longer than a sweep."""
    if "report" not in request.function.__name__:
        monkeypatch.setattr("dreamer.sweeps.views.comparison", lambda folder, folders: ("", [], []))
    return Place(tmp_path)


# --- From start to report ----------------------------------------------------------------------


def test_a_sweep_runs_everything_once_and_reports(place, capsys):
    assert place.run() == 0
    assert [place.status(name) for name in NAMES] == ["finished"] * 4
    assert [len(place.starts(name)) for name in NAMES] == [1] * 4
    out = capsys.readouterr().out
    report = (place.folder / "report.md").read_text()
    assert "4 finished." in report and report.strip() in out
    assert "| units_8-seed0 | finished | 100 of 100 | 1.00 |" in report
    assert "| toy_catch | units 16 | 2 |" in report  # the table of `dreamer plot`
    assert (place.folder / "report.png").stat().st_size > 1000

    assert place.run() == 0  # again: nothing to do
    assert [len(place.starts(name)) for name in NAMES] == [1] * 4


def test_never_more_at_once_than_asked_for(place, monkeypatch):
    import dreamer.sweeps.local as local

    now, most, lock = 0, 0, threading.Lock()

    class Counted(local.LocalJob):
        def __init__(self, *arguments):
            nonlocal now, most
            super().__init__(*arguments)
            self._counted = True
            with lock:
                now += 1
                most = max(most, now)

        def poll(self):
            nonlocal now
            code = super().poll()
            if code is not None and self._counted:
                self._counted = False
                now -= 1
            return code

    monkeypatch.setattr(local, "LocalJob", Counted)
    assert place.run(jobs=3) == 0
    assert most == 3


def test_a_longer_sweep_goes_on_with_finished_runs_and_adds_new_ones(place):
    assert place.run() == 0
    place.write(FOUR.replace("agent_steps: 100", "agent_steps: 150").replace("seeds: 2", "seeds: 3"))
    assert place.run() == 0
    assert [start["from"] for start in place.starts(NAMES[0])] == [0, 100]
    assert [start["from"] for start in place.starts("units_8-seed2")] == [0]
    assert place.steps(NAMES[0]) == 150


def test_an_option_that_may_not_change_is_refused_before_anything_starts(place):
    assert place.run() == 0
    place.write(
        FOUR.replace("configs: [debug]", "configs: [debug]\nname: mine").replace("platform: cpu", "train_ratio: 9")
    )
    with pytest.raises(ConfigError, match=r"run.train_ratio: 16.0 -> 9.0"):
        place.run()
    assert len(place.starts(NAMES[0])) == 1


def test_devices_are_dealt_one_by_one_and_memory_divided():
    assert slots(None, []) == [{}]
    assert slots(3, []) == [{}, {}, {}]
    assert slots(None, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    five = slots(5, ["0", "1"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in five] == ["0", "1", "0", "1", "0"]
    assert [slot["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in five] == ["0.30", "0.45", "0.30", "0.45", "0.30"]
    assert slots(2, ["0,1", "2,3"])[1] == {"CUDA_VISIBLE_DEVICES": "2,3"}


def test_runs_get_their_device(place):
    place.write(FOUR.replace("run.platform: cpu, ", ""))
    assert place.run(jobs=4, devices=["4", "7"]) == 0
    found = sorted(
        (s["CUDA_VISIBLE_DEVICES"], s["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for n in NAMES for s in place.starts(n)
    )
    assert found == [("4", "0.45"), ("4", "0.45"), ("7", "0.45"), ("7", "0.45")]


# --- Failures ----------------------------------------------------------------------------------


def test_a_run_that_fails_is_tried_again_from_where_it_was(place):
    place.behave(**{"units_8-seed0": {"fail_at": 50, "fails": 2}})
    assert place.run() == 0
    assert [start["from"] for start in place.starts("units_8-seed0")] == [0, 50, 50]
    first, second, third = (start["at"] for start in place.starts("units_8-seed0"))
    assert second - first >= 0.05 and third - second >= 0.1  # the wait doubles


def test_a_run_that_keeps_failing_is_given_up_and_the_others_finish(place):
    place.behave(**{"units_8-seed0": {"fail_at": 50, "words": "no such luck"}})
    assert place.run() == RUNS_FAILED
    assert len(place.starts("units_8-seed0")) == 3  # once, and `retries: 2`
    assert place.status("units_8-seed0") == "failed"
    assert [place.status(name) for name in NAMES[1:]] == ["finished"] * 3
    assert "exit code 1: no such luck" in (place.folder / "report.md").read_text()
    place.behave()
    assert place.run() == 0  # the same command gives it another chance
    assert [len(place.starts(name)) for name in NAMES] == [4, 1, 1, 1]


def test_a_run_that_gets_further_each_time_is_not_given_up(place):
    """Failures count in a row without progress: a machine that goes down every night is no fault of the run."""
    place.write(FOUR.replace("model.units: [8, 16]", "model.units: [8]").replace("seeds: 2", "seeds: 1\nretries: 1"))
    place.behave(all={"seconds": 0.2})
    sweep = place.begin()
    for count in range(1, 4):
        until(lambda count=count: len(place.starts(NAMES[0])) == count and place.steps(NAMES[0]) >= 20 * count)
        pid = int((place.folder / NAMES[0] / ".lock").read_text().split()[1])
        os.kill(pid, signal.SIGKILL)
    assert sweep.wait(30) == 0, place.output.read_text()
    begun = [start["from"] for start in place.starts(NAMES[0])]
    assert place.status(NAMES[0]) == "finished" and len(begun) == 4
    assert all(start >= 20 * count for count, start in enumerate(begun))  # each went on where the last one was


@pytest.mark.parametrize("code", [2, 3])
def test_what_another_try_cannot_change_is_not_tried_again(place, code):
    place.behave(**{"units_8-seed0": {"fail_at": 50, "code": code}})
    assert place.run() == RUNS_FAILED
    assert len(place.starts("units_8-seed0")) == 1


def test_a_trainer_that_leaves_before_the_end_is_started_again(place):
    """Exit code 0 at 50 of 100 steps: somebody else sent SIGTERM."""
    place.behave(**{"units_8-seed0": {"fail_at": 50, "fails": 1, "code": 0}})
    assert place.run() == 0
    assert [start["from"] for start in place.starts("units_8-seed0")] == [0, 50]


# --- Stops, kills, resumes ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_all_runs_cleanly_and_the_same_command_goes_on(place, number):
    place.behave(all={"seconds": 0.03}, **{"units_8-seed0": {"seconds": 0.0}})
    sweep = place.begin()
    until(lambda: place.status(NAMES[0]) == "finished" and place.steps(NAMES[1]) >= 20)
    sweep.send_signal(number)
    assert sweep.wait(30) == 0
    out = place.output.read_text()
    assert "resume with: dreamer sweep" in out and "is asked to stop" in out
    assert place.status(NAMES[1]) == "waiting" and 20 <= place.steps(NAMES[1]) < 100
    before = {name: place.steps(name) for name in NAMES}
    assert place.run() == 0
    assert [place.status(name) for name in NAMES] == ["finished"] * 4
    assert len(place.starts(NAMES[0])) == 1  # finished: not run again
    assert [start["from"] for start in place.starts(NAMES[1])] == [0, before[NAMES[1]]]


def test_runs_that_outlive_a_killed_sweep_are_taken_over(place):
    place.behave(all={"seconds": 0.1})
    sweep = place.begin()
    until(lambda: place.steps(NAMES[0]) >= 20 and place.steps(NAMES[1]) >= 20)
    sweep.kill()
    sweep.wait()
    assert place.run() == 0
    assert [len(place.starts(name)) for name in NAMES] == [1] * 4  # none was disturbed or started twice
    assert [place.status(name) for name in NAMES] == ["finished"] * 4


def test_one_command_at_a_time(place, capsys):
    place.behave(all={"seconds": 0.05})
    sweep = place.begin()
    until(lambda: place.steps(NAMES[0]) >= 10)
    assert main(["sweep", str(place.file), "--logdir", str(place.folder)]) == 2
    assert f"in use by a live run (pid {sweep.pid}" in capsys.readouterr().err
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(30) == 0


# --- Early stopping ----------------------------------------------------------------------------


class Known(Progress):
    """A run with this score at every point."""

    def __init__(self, score: float | None, frames: int) -> None:
        self._score, self._frames = score, frames

    env_frames = property(lambda self: self._frames)

    def score(self, frames=None, share=None):
        return self._score


def test_hopeless_is_what_is_below_the_median_of_enough_others():
    rule, others = EarlyStop(after=0.3, below=0.5, runs=3), [Known(s, 100) for s in (1.0, 5.0, 9.0)]
    assert "below 5, the 0.5 quantile of 3 runs" in hopeless(rule, Known(4.9, 100), others, 100)
    assert hopeless(rule, Known(5.0, 100), others, 100) == ""
    assert hopeless(rule, Known(None, 100), others, 100) == ""
    assert hopeless(rule, Known(4.9, 100), others[:2], 100) == ""  # too few
    assert hopeless(rule, Known(4.9, 101), others, 101) == ""  # not there yet
    assert hopeless(EarlyStop(below=0.0, runs=3), Known(0.9, 100), others, 100)  # worse than all
    assert not hopeless(EarlyStop(below=0.0, runs=3), Known(1.1, 100), others, 100)


def test_looks_at_a_run_are_five_percent_apart():
    rule = EarlyStop(after=0.3)
    assert [rung(done, rule) for done in (0.0, 0.29, 0.3, 0.34, 0.35, 1.0)] == [None, None, 6, 6, 7, 20]


def test_hopeless_runs_are_stopped_and_not_run_again(place, capsys):
    place.write(FOUR.replace("seeds: 2", "seeds: 3\nearly_stop: {after: 0.3, runs: 3}"))
    bad = "units_16-seed2"
    place.behave(all={"seconds": 0.0, "score": 5.0}, **{bad: {"seconds": 0.1, "score": 1.0}})
    assert place.run() == 0
    assert place.status(bad) == "stopped early" and 30 <= place.steps(bad) < 100
    assert "below 5" in load_state(place.folder / bad).reason
    assert place.run() == 0
    assert len(place.starts(bad)) == 1
    place.write(place.file.read_text().replace("early_stop: {after: 0.3, runs: 3}", ""))
    assert place.run() == 0  # without the rule it goes on
    assert place.status(bad) == "finished"


# --- Reading progress --------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_progress_reads_on_and_forgets_what_a_resume_cut_off(tmp_path):
    progress = Progress(tmp_path)
    progress.look()
    assert (progress.agent_steps, progress.score(), progress.rate) == (0, None, None)
    write(tmp_path / "metrics.jsonl", {"step": 40, "agent_steps": 10, "fps/policy": 5.0})
    write(tmp_path / "scores.jsonl", *({"step": s, "episode/score": float(s)} for s in (10, 20, 30, 40)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "agent_st')  # half a line
    progress.look()
    assert (progress.agent_steps, progress.env_frames, progress.rate, progress.episodes) == (10, 40, 5.0, 4)
    assert progress.score() == 25.0 and progress.score(frames=20) == 15.0 and progress.score(share=0.25) == 35.0
    text = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "scores.jsonl").write_text("\n".join(text[:2]) + "\n")
    progress.look()
    assert progress.score() == 15.0
    write(tmp_path / "scores.jsonl", {"step": 25, "episode/score": 0.0})
    progress.look()
    assert progress.score() == 10.0


def test_progress_of_several_seeds_is_that_of_the_last(tmp_path):
    for seed, steps in enumerate((30, 20)):
        (tmp_path / f"seed_{seed}").mkdir()
        write(tmp_path / f"seed_{seed}" / "metrics.jsonl", {"step": steps, "agent_steps": steps, "fps/policy": 9.0})
        write(tmp_path / f"seed_{seed}" / "scores.jsonl", {"step": 10, "episode/score": float(seed)})
    progress = Progress(tmp_path, 2)
    progress.look()
    assert (progress.agent_steps, progress.score(), progress.episodes) == (20, 0.5, 2)
