"""`dreamer doctor`: every fault it knows, simulated, is told with its remedy; nothing ends or hangs the report."""

from __future__ import annotations

import collections
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dreamer import cli
from dreamer.doctor import checkup, machine_checks, program_checks
from dreamer.doctor.findings import Finding, Request
from dreamer.doctor.probe import ProbeError, ask, run_limited
from dreamer.envs.registry import SUITES
from dreamer.terminal import Console

Usage = collections.namedtuple("Usage", "total used free")
GB = 10**9


def printed(finding: Finding, width: int = 80) -> str:
    """The finding as the report shows it, in one line."""
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(checkup.table([finding]))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    return " ".join(capture.get().split())


def check(finding: Finding, level: str, *words: str) -> None:
    """The finding is of this level, and says these words where a person reads them."""
    text = printed(finding)
    assert finding.level == level, text
    assert (finding.remedy != "") >= (level != "ok"), "a fault without a remedy"
    for word in words:
        assert word in text or word in finding.seen, text


@pytest.fixture
def request_(tmp_path):
    return Request(tmp_path / "runs" / "mine")


# --- Devices -----------------------------------------------------------------------------------


def test_devices_of_this_machine_work(request_):
    jax, devices = program_checks.devices(request_)
    check(jax, "ok", "jaxlib")
    check(devices, "ok", "cpu")


def test_an_accelerator_that_was_asked_for_and_is_not_there():
    _, devices = program_checks.devices(Request(platform="gpu"))
    check(devices, "fail", "expected a device of kind gpu, JAX finds only: cpu", "pip install 'dreamer[cuda12]'")


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("jax_plugins/broken", "raise ImportError('libcudart.so.12: not found')", ["libcudart.so.12: not found"]),
        ("jax_plugins/broken", "raise RuntimeError('no card')", ["JAX cannot use its devices", "no card"]),
        ("jaxlib", "__version__ = '0.1'", ["JAX cannot use its devices"]),
    ],
)
def test_a_plug_in_that_raises(tmp_path, monkeypatch, request_, module, text, words):
    (tmp_path / module).mkdir(parents=True)
    (tmp_path / module / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS")
    check(program_checks.devices(request_)[-1], "fail", *words, "dreamer[cuda12]", "--run.platform cpu")


def test_a_platform_of_the_surroundings_that_is_not_there(monkeypatch, request_):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    check(program_checks.devices(request_)[-1], "fail", "unset JAX_PLATFORMS (it is 'cuda')")


H200 = {"name": "NVIDIA H200", "driver": "570.124.06", "total": 143_771, "used": 512, "load": 0}
CUDA = [  # cards (None: no driver), plug-ins, platform, level, words
    (None, {}, "ok", ["no NVIDIA driver"]),
    (None, {"jax-cuda12-plugin": "0.10.2"}, "warn", ["no NVIDIA driver", "--gpus all"]),
    ([H200], {"jax-cuda12-plugin": "0.10.2"}, "ok", ["NVIDIA H200, driver 570.124.06", "jax-cuda12-plugin 0.10.2"]),
    ([H200], {}, "warn", ["JAX has no plug-in", "pip install 'dreamer[cuda12]'"]),
    ([H200 | {"driver": "580.65.06"}], {}, "warn", ["pip install 'dreamer[cuda13]'"]),
    ([H200], {"jax-cuda12-plugin": "0.9.0"}, "fail", ["0.9.0 beside jaxlib 0.10.2", "'jax[cuda12]==0.10.2'"]),
    ([H200], {"jax-cuda13-plugin": "0.10.2"}, "fail", ["driver 580 or newer", "pip install 'dreamer[cuda12]'"]),
    (
        [H200 | {"driver": "470.1"}],
        {"jax-cuda12-plugin": "0.10.2"},
        "fail",
        ["driver 525 or newer", "update the driver"],
    ),
    (
        [H200, H200],
        {"jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"},
        "warn",
        ["2 x NVIDIA H200", "pip uninstall jax-cuda12-plugin"],
    ),
]


def fake_driver(monkeypatch, said: object) -> None:
    """A driver that says this, see tests/fake_driver; None: no driver."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "fake_driver"))
    monkeypatch.delenv("FAKE_CARDS", raising=False)
    if said is not None:
        monkeypatch.setenv("FAKE_CARDS", json.dumps(said))


@pytest.mark.parametrize(("cards", "plugins", "level", "words"), CUDA)
def test_driver_and_plug_in(monkeypatch, request_, cards, plugins, level, words):
    fake_driver(monkeypatch, cards)
    monkeypatch.setattr(program_checks, "_installed", lambda prefix: plugins.items())
    monkeypatch.setattr(program_checks.importlib.metadata, "version", lambda name: "0.10.2")
    check(program_checks.cuda(request_), level, *words)


def test_a_driver_that_does_not_answer(monkeypatch, request_):
    said = "Driver/library version mismatch"
    fake_driver(monkeypatch, said)
    check(program_checks.cuda(request_), "fail", said, "restart the machine")
    assert program_checks.device_memory(request_).level == "warn"
    monkeypatch.setattr(program_checks, "TOOL_LIMIT", 0.2)
    fake_driver(monkeypatch, "hangs")
    check(program_checks.cuda(request_), "fail", "no answer within 0.2 seconds")


@pytest.mark.parametrize(("used", "level", "words"), [(512, "ok", ["0.5 of"]), (90_000, "warn", ["nvidia-smi"])])
def test_memory_of_cards(monkeypatch, request_, used, level, words):
    fake_driver(monkeypatch, [H200 | {"used": used}])
    check(program_checks.device_memory(request_), level, "of 140.4 GiB in use", *words)


# --- Renderer and environments -----------------------------------------------------------------


def test_a_broken_renderer(monkeypatch, request_):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    words = ["MUJOCO_GL=nonsense", "→ Install a headless OpenGL", "apt-get install libegl1", "--env.dmc.pixels false"]
    check(program_checks.renderer(request_), "fail", *words)


def test_a_renderer_that_draws_nothing_hangs_or_is_not_needed(monkeypatch, request_):
    blank = {"renderer": "egl", "seconds": 1.0, "spread": 0.0}
    monkeypatch.setattr(program_checks, "ask", lambda *arguments, **options: blank)
    check(program_checks.renderer(request_), "fail", "all its pixels are equal", "MUJOCO_GL=osmesa")

    def hang(*arguments, **options):
        raise ProbeError("no answer within 60 seconds")

    monkeypatch.setattr(program_checks, "ask", hang)
    check(program_checks.renderer(request_), "fail", "no answer within 60 seconds", "apt-get install libegl1")
    monkeypatch.setattr(program_checks.importlib.util, "find_spec", lambda name: None)
    check(program_checks.renderer(request_), "ok", "nothing installed")


def test_suites_that_work_break_or_are_not_installed(monkeypatch, request_):
    broken = SUITES["toy"].__class__("", make=len, tasks=lambda: ("nonsense",), package=("crafter", "crafter"))
    absent = SUITES["toy"].__class__("", make=all, tasks=lambda: ("x",), package=("no_such_package", None))
    table = {"toy": SUITES["toy"], "crafter": broken, "elsewhere": absent, "again": SUITES["toy"]}
    monkeypatch.setattr(program_checks, "list_suites", lambda: table)
    works, breaks, rest = program_checks.environments(request_)
    check(works, "ok", "toy_catch made and stepped in")
    check(breaks, "fail", "crafter_nonsense: TaskError: expected a task", "pip install 'dreamer[crafter]'")
    check(rest, "ok", "not installed: elsewhere", "dreamer envs")


# --- The machine -------------------------------------------------------------------------------


def test_a_sound_machine(request_):
    for name in ("python", "packages", "logdir"):
        check(checkup.CHECKS[name](request_), "ok")
    assert not request_.logdir.exists() and not list(request_.logdir.parents[1].iterdir()), "the check left something"


def test_a_python_or_packages_that_do_not_fit(monkeypatch, request_):
    monkeypatch.setattr(machine_checks.platform, "python_version", lambda: "3.10.4")
    check(machine_checks.python(request_), "fail", "3.10.4", "expected >=3.11", "install dreamer into a Python >=3.11")
    wanted = ["numpy>=99", "no-such-package", "rich>=1", "absent; extra == 'dev'"]
    monkeypatch.setattr(machine_checks.importlib.metadata, "requires", lambda name: wanted)
    finding = machine_checks.packages(request_)
    check(finding, "fail", "expected numpy>=99, found", "no-such-package, found none")
    assert finding.remedy.endswith("pip install 'numpy>=99' 'no-such-package'")


@pytest.mark.parametrize(
    ("words", "level", "seen"), [("max 100000", "ok", ""), ("150000 100000", "warn", "time of 1.5 of them")]
)
def test_a_container_that_grants_less_than_its_cores(tmp_path, monkeypatch, request_, words, level, seen):
    (tmp_path / "cpu.max").write_text(words)
    monkeypatch.setattr(machine_checks, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(machine_checks.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    check(machine_checks.cores(request_), level, seen, *(["docker run --cpus 4", "taskset -c 0-0"] * (level != "ok")))


@pytest.mark.parametrize(("free", "level"), [(GB // 2, "fail"), (2 * GB, "warn"), (8 * GB, "ok")])
def test_little_memory(monkeypatch, request_, free, level):
    monkeypatch.setattr(machine_checks, "machine_memory", lambda: 16 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: collections.namedtuple("M", "available")(free))
    check(machine_checks.memory(request_), level, "of 16.0 GB", *(["--replay.storage disk"] * (level != "ok")))


@pytest.mark.parametrize(("free", "level"), [(0, "fail"), (5 * GB, "warn"), (50 * GB, "ok")])
def test_a_full_disk(monkeypatch, request_, free, level):
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: Usage(100 * GB, 0, free))
    check(machine_checks.disk(request_), level, f"{free / GB:.1f} GB free", *(["--logdir DIR"] * (level != "ok")))


def test_a_disk_without_room_for_more_files(monkeypatch, request_):
    system = collections.namedtuple("S", "f_files f_favail")(10**6, 12)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: Usage(100 * GB, 0, 50 * GB))
    monkeypatch.setattr(machine_checks.os, "statvfs", lambda path: system)
    check(machine_checks.disk(request_), "fail", "only 12 more files", "delete files")


def test_a_logdir_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    check(machine_checks.logdir(Request(tmp_path / "file" / "run")), "fail", "is a file", "--logdir DIR")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_an_unwritable_logdir(monkeypatch, request_, code):
    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(machine_checks.tempfile, "TemporaryDirectory", refuse)
    check(machine_checks.logdir(request_), "fail", os.strerror(code), "--logdir DIR", "chown")


def test_a_logdir_in_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.getuid() == 0:  # who may write everywhere
            os.seteuid(65534)
        found = machine_checks.logdir(Request(tmp_path / "run"))
    finally:
        os.seteuid(os.getuid())
        tmp_path.chmod(0o700)
    check(found, "fail", "Permission denied", "--logdir DIR")


def test_a_file_system_without_locks(monkeypatch, request_):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(machine_checks.fcntl, "flock", refuse)
    check(machine_checks.logdir(request_), "warn", "no file locks", "only one run uses a logdir")


@pytest.mark.parametrize(
    ("limits", "level", "words"),
    [
        ((64, 4096), "fail", ["at most 64", "ulimit -n 1024"]),
        ((256, 256), "warn", ["at most 256", "--ulimit nofile=65536"]),
        ((256, -1), "warn", ["ulimit -n 1024"]),
        ((1024, 4096), "ok", []),
        ((-1, -1), "ok", ["no limit"]),
    ],
)
def test_few_open_files(monkeypatch, request_, limits, level, words):
    monkeypatch.setattr(machine_checks.resource, "getrlimit", lambda what: limits)
    check(machine_checks.descriptors(request_), level, *words)


def test_little_shared_memory_or_none(monkeypatch, request_, tmp_path):
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: Usage(64 * 10**6, 0, 60 * 10**6))
    check(machine_checks.shared_memory(request_), "warn", "60 MB free in /dev/shm", "docker run --shm-size 1024m")
    monkeypatch.setattr(machine_checks, "_SHM", tmp_path / "nowhere")
    check(machine_checks.shared_memory(request_), "warn", "files on disk instead", "docker run --shm-size")


def test_a_clock_far_off(monkeypatch, request_):
    check(machine_checks.clock(request_), "ok")
    monkeypatch.setattr(machine_checks, "_written_at", lambda place, otherwise: otherwise - 7200)
    check(machine_checks.clock(request_), "warn", "-7200 seconds off", "set-ntp true")
    monkeypatch.setattr(time, "time", lambda: 10**9)
    check(machine_checks.clock(request_), "warn", "2001-09-09", "before the date of dreamer's own files", "set-ntp")


# --- The report --------------------------------------------------------------------------------


def broken(request):
    raise ZeroDivisionError("by nothing")


def test_a_check_that_breaks_down_is_a_finding_and_the_others_go_on(monkeypatch, request_):
    monkeypatch.setattr(checkup, "CHECKS", {"one": broken, "two": lambda request: Finding("two", "ok", "fine")})
    first, second = checkup.examine(request_)
    check(first, "fail", "ZeroDivisionError: by nothing")
    check(second, "ok", "fine")


@pytest.mark.parametrize(("levels", "code"), [(["ok", "warn"], 0), (["ok", "fail", "warn"], 1)])
def test_exit_code_table_and_json(monkeypatch, capsys, tmp_path, levels, code):
    findings = [Finding(f"check {i}", level, "seen", "remedy") for i, level in enumerate(levels)]
    asked = []
    monkeypatch.setattr(checkup, "examine", lambda request: asked.append(request) or findings)
    assert cli.main(["doctor", "--logdir", str(tmp_path), "--platform", "gpu"]) == code
    out = capsys.readouterr().out
    assert all(f"check {i}" in out for i in range(len(levels))) and out.count("→ remedy") == len(levels)
    assert f"1 ok, 1 warn, {code} fail" in out
    assert cli.main(["doctor", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert [finding["level"] for finding in report["findings"]] == levels and report["counts"]["fail"] == code
    assert asked == [Request(tmp_path, "gpu"), Request(Path("runs"), "auto")]


def test_nothing_heavy_is_loaded_by_the_report_itself():
    """A broken JAX must not end it."""
    script = "import sys, dreamer.doctor.checkup; sys.exit(bool({'jax', 'flax', 'mujoco'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_probes_that_hang_raise_or_die(tmp_path):
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ProbeError, match="no answer within 0.8 seconds"):
        run_limited([sys.executable, "-c", child], 0.8, os.environ)
    assert set(psutil.Process().children(recursive=True)) <= before
    with pytest.raises(ProbeError, match="KeyError: 'nonsense'"):
        ask("nonsense", limit=60)
    (tmp_path / "dies.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(ProbeError, match="exit code -9"):
        ask("environment", f"py_{tmp_path}/dies.py:Env", limit=60)


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_with_a_machine_that_runs_the_tests(tmp_path):
    command = [sys.executable, "-m", "dreamer", "doctor", "--json", "--logdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {finding["name"] for finding in json.loads(done.stdout)["findings"]}
    assert {"JAX", "devices", "renderer", "clock", "toy", "atari", "crafter", "dmc"} <= names
