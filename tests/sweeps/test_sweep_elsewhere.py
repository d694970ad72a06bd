"""Search by Optuna, and runs on other machines: submitit's local executor; Ray and the real trainer, slow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_sweep import FAKE, FOUR, NAMES, Place, place  # noqa: F401
from waiting import until

from dreamer.schema import ConfigError
from dreamer.sweeps.launch import Request, run_sweep
from dreamer.sweeps.local import STOP_FILE, run_program
from dreamer.sweeps.progress import load_state

SEARCH = """
configs: [debug]
options: {run.platform: cpu, run.agent_steps: 30}
retry_seconds: 0.01
retries: 0
search:
  trials: 4
  options:
    optimizer.learning_rate: {log_uniform: [1e-5, 1e-3]}
    model.units: {choice: [8, 16]}
seeds: 2
"""


def study(place):  # noqa: F811
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(place.folder / "search.log"))
    return optuna.load_study(study_name="mine", storage=optuna.storages.JournalStorage(backend))


def test_search_tries_trials_over_all_seeds_and_learns_their_scores(place):  # noqa: F811
    place.write(SEARCH)
    place.behave(**{"trial001-seed0": {"score": 3.0}, "trial002-seed1": {"fail_at": 10}})
    assert place.run() == 5  # one run failed
    found = study(place).trials
    assert [trial.state.name for trial in found] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert [trial.value for trial in found] == [1.0, 2.0, None, 1.0]  # means over two seeds
    config = (place.folder / "trial001-seed0" / "config.yaml").read_text()
    rate = float(re.search(r"learning_rate: (\S+)", config)[1])
    assert rate == pytest.approx(found[1].params["optimizer.learning_rate"])
    starts = [len(place.starts(f"trial{number:03d}-seed{seed}")) for number in range(4) for seed in range(2)]
    assert starts == [1] * 8


def test_search_goes_on_where_it_was_stopped(place):  # noqa: F811
    place.write(SEARCH)
    place.behave(all={"seconds": 0.3})
    sweep = place.begin()
    until(lambda: place.steps("trial000-seed1") >= 10)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(30) == 0, place.output.read_text()
    before = dict(study(place).trials[0].params)
    place.behave()
    assert place.run() == 0
    found = study(place).trials
    assert len(found) == 4 and found[0].params == before
    assert len({trial.params["optimizer.learning_rate"] for trial in found}) == 4
    assert place.starts("trial000-seed1")[1]["from"] >= 10


def test_search_needs_its_extra(place, monkeypatch):  # noqa: F811
    place.write(SEARCH)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'dreamer\[optuna\]'"):
        place.run()


@pytest.mark.parametrize(("backend", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_backends_need_their_extras(place, monkeypatch, backend, module):  # noqa: F811
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'dreamer\[{backend}\]'"):
        place.run(backend=backend)
    with pytest.raises(ConfigError, match="--devices: expected the local backend"):
        place.run(backend=backend, devices=["0"])


def test_settings_of_clusters_are_checked(place):  # noqa: F811
    place.write(FOUR + "slurm: {cluster: local, partitoin: gpu}\n")
    with pytest.raises(ConfigError, match="slurm: .*partitoin"):
        place.run(backend="slurm")
    place.write(FOUR + "ray: {gpus: 1}\n")
    with pytest.raises(ConfigError, match="unknown key 'gpus' of ray; nearest: num_gpus"):
        place.run(backend="ray")


def test_submitit_runs_the_same_file(place):  # noqa: F811
    """On its executor of this machine, which runs what a SLURM job would."""
    place.write(FOUR.replace("[8, 16]", "[8]") + "slurm: {cluster: local, timeout_min: 5}\n")
    assert place.run(backend="slurm") == 0
    assert [place.status(name) for name in (NAMES[0], NAMES[2])] == ["finished"] * 2
    assert "2 finished." in (place.folder / "report.md").read_text()


def test_a_file_asks_a_run_on_another_machine_to_leave(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "behaviour.json").write_text(json.dumps({"*": {"seconds": 0.02}}))
    (folder / "sweep.yaml").write_text("run:\n  agent_steps: 100000\n")
    words = [*FAKE, "--configs", str(folder / "sweep.yaml"), "--logdir", str(folder)]

    def ask() -> None:
        while steps_of(folder) < 20:
            time.sleep(0.01)
        (folder / STOP_FILE).touch()

    thread = threading.Thread(target=ask)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_program(words, folder, {}, poll_seconds=0.02) == 0
        thread.join()
        steps = steps_of(folder)
        assert 20 <= steps < 100_000
        assert run_program(words, folder, {}, poll_seconds=0.02) == 0  # asked before it began: it does not begin
        assert steps_of(folder) == steps
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_is_asked_to_leave_where_the_cluster_ends_what_watches_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "behaviour.json").write_text(json.dumps({"*": {"seconds": 0.02}}))
    (folder / "sweep.yaml").write_text("run:\n  agent_steps: 100000\n")
    words = [*FAKE, "--configs", str(folder / "sweep.yaml"), "--logdir", str(folder)]
    script = "import signal, sys; from pathlib import Path; from dreamer.sweeps.local import run_program\n"
    # Tests that were started in the background inherit that Ctrl-C is ignored.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "run_program(sys.argv[2:], Path(sys.argv[1]), {}, 0.02)"
    with (tmp_path / "output.txt").open("w") as file:
        watching = subprocess.Popen([sys.executable, "-c", script, str(folder), *words], stdout=file, stderr=file)
    until(lambda: steps_of(folder) >= 20, 30, "20 steps", watching)
    pid = holder(folder)
    watching.send_signal(signal.SIGINT)  # as an exception within
    watching.wait(30)
    assert pid is not None and not psutil.pid_exists(pid)


# --- Slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_runs_the_same_file(place):  # noqa: F811
    """On a cluster of this machine; a run that is killed is resumed there too."""
    pytest.importorskip("ray")
    place.behave(**{NAMES[0]: {"fail_at": 50, "fails": 1}})
    assert place.run(backend="ray") == 0
    assert [place.status(name) for name in NAMES] == ["finished"] * 4
    assert [start["from"] for start in place.starts(NAMES[0])] == [0, 50]
    assert "4 finished." in (place.folder / "report.md").read_text()


def steps_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["agent_steps"] if path.exists() else 0


def holder(folder: Path) -> int | None:
    """The live process that has a run's lock."""
    words = (folder / ".lock").read_text().split() if (folder / ".lock").exists() else []
    return int(words[1]) if len(words) > 1 and psutil.pid_exists(int(words[1])) else None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_sweep_survives_ctrl_c_and_a_kill(tmp_path):
    """The real trainer: interrupted once, a run killed once, resumed by the same command, finished, reported."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "dreamer", "sweep", "tiny", "--logdir", str(folder), "--jobs", "2"]
    first, second = folder / "entropy_0.0003-seed0", folder / "entropy_0.003-seed0"

    def begin() -> subprocess.Popen:
        with (tmp_path / "output.txt").open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    sweep = begin()
    until(lambda: steps_of(first) >= 40 or steps_of(second) >= 40, 600, "steps", sweep)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(300) == 0
    assert "resume with: dreamer sweep tiny" in (tmp_path / "output.txt").read_text()
    stopped = [run for run in (first, second) if load_state(run).status == "waiting"]
    assert stopped and steps_of(stopped[0]) < 200
    assert all(list((run / "checkpoints").iterdir()) for run in stopped if steps_of(run) >= 40)

    sweep = begin()
    until(lambda: load_state(stopped[0]).starts == 2 and holder(stopped[0]) is not None, 600, "steps", sweep)
    victim, pid = stopped[0], holder(stopped[0])
    os.kill(pid, signal.SIGKILL)
    assert sweep.wait(900) == 0, (tmp_path / "output.txt").read_text()
    states = [load_state(run) for run in sorted(folder.glob("entropy*"))]
    assert [state.status for state in states] == ["finished"] * 4
    assert load_state(victim).starts == 3
    for run in folder.glob("entropy*"):
        steps = [json.loads(line)["agent_steps"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps) and steps[-1] >= 200
    report = (folder / "report.md").read_text()
    assert "4 finished." in report and "| toy_catch | entropy 0.0003 | 2 |" in report
    assert (folder / "report.png").stat().st_size > 1000

    starts = [state.starts for state in states]
    assert run_sweep(Request("tiny", folder, 2)) == 0  # nothing is run again
    assert [load_state(run).starts for run in sorted(folder.glob("entropy*"))] == starts
