"""The container file, the compose files, the examples for clusters: their structure, and their scripts as processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from waiting import until

from dreamer.commands.train import train_config
from dreamer.envs.registry import check_task

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
SLURM = ROOT / "docs" / "examples" / "slurm.sh"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = {"cpu": "", "cuda12": "cuda12", "cuda13": "cuda13", "tpu": "tpu"}
BARE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

# --- The container file ------------------------------------------------------------------------


def stages() -> dict[str, list[tuple[str, str]]]:
    """Of each stage by name: (instruction, arguments), continued lines joined, those of the stage below it first."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip():
            continue
        instruction, arguments = line.split(None, 1)
        if instruction == "FROM":
            below, name = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()
            found[name] = list(found.get(below, [("FROM", below)]))
        elif name:
            found[name].append((instruction, arguments.strip()))
    return found


def only(target: str, name: str) -> list[str]:
    return [arguments for instruction, arguments in stages()[target] if instruction == name]


def installation(target: str) -> str:
    (step,) = [step for step in only(target, "RUN") if step.startswith("pip install")]
    return step


def test_the_linter_finds_nothing():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", "Dockerfile"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_there_is_a_target_for_each_kind_of_machine():
    assert set(stages()) == {"base", "nvidia", *TARGETS}
    assert list(stages())[-1] == "cuda12"
    for target, extra in TARGETS.items():
        extras = f"[{extra}${{EXTRAS:+,${{EXTRAS}}}}]" if extra else "${EXTRAS:+[${EXTRAS}]}"
        assert f'".{extras}"' in installation(target) and "-c constraints.txt" in installation(target)
        assert only(target, "ARG") == ["EXTRAS"] and (not extra or extra in EXTRAS)
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    assert set(default.split(",")) <= set(EXTRAS)


def test_what_the_container_copies_exists_and_is_sent_to_the_builder():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for arguments in only("base", "COPY") for source in arguments.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "dreamer", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and source.split("/")[0] in sent
        assert not source.startswith("docker/") or os.access(ROOT / source, os.X_OK)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_runs_as_an_ordinary_user_with_a_mounted_logdir(target):
    assert only(target, "USER") == ["1000"] and only(target, "WORKDIR")[-1] == "/logdir"
    names = [instruction for instruction, _ in stages()[target]]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert only(target, "VOLUME") == ["/logdir"]
    # A list, no shell in front: signals reach the script itself.
    assert only(target, "ENTRYPOINT") == ['["dreamer-entrypoint"]']
    assert only(target, "HEALTHCHECK")[0].endswith('CMD ["dreamer-healthy"]')
    assert "--logdir" in only(target, "CMD")[0]
    assert any("libegl1" in step for step in only(target, "RUN"))
    assert ("graphics" in " ".join(only(target, "ENV"))) == target.startswith("cuda")


def build_folder(tmp_path: Path) -> Path:
    """What the builder has before it installs: its COPY steps done by hand."""
    build = tmp_path / "build"
    build.mkdir()
    for arguments in only("base", "COPY"):
        *sources, to = arguments.split()
        for source in sources:
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            if to.startswith("./"):
                copy(ROOT / source, build / source)
    return build


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_installation_of_the_cpu_target_works_in_a_clean_environment(tmp_path):
    """Its COPY and pip steps and its entry point, run by hand. Network: installation only."""
    build = build_folder(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    there = BARE | {"PATH": f"{binaries}:{os.environ['PATH']}", "EXTRAS": "dmc,crafter"}
    subprocess.run(["bash", "-euc", installation("cpu")], cwd=build, env=there, check=True)
    shutil.rmtree(build)
    shown = subprocess.run(
        [binaries / "dreamer", "envs", "dmc"], cwd=tmp_path, env=there, check=True, capture_output=True, text=True
    )
    assert "dmc_walker_walk" in shown.stdout
    line = "train --configs crafter debug --task crafter_reward --run.agent_steps 20 --logdir run --run.platform cpu"
    subprocess.run([DOCKER / "dreamer-entrypoint", *line.split()], cwd=tmp_path, env=there, check=True)
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["cuda12", "cuda13"])
def test_the_installation_of_a_cuda_target_can_be_resolved(target, tmp_path):
    """There are versions of everything that fit together; nothing is installed. Network: the resolver's. By uv, which
    asks for descriptions of packages alone; pip would fetch gigabytes of CUDA for them."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", "uv"], check=True)
    there = BARE | {"PATH": f"{binaries}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path / "venv")}
    step = installation(target).replace("pip install", "uv pip install --dry-run")
    command = ["bash", "-euc", step]
    build, there = build_folder(tmp_path), there | {"EXTRAS": "dmc,crafter"}
    done = subprocess.run(command, cwd=build, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = set(re.findall(r"^ \+ ([\w.-]+)==", done.stderr, flags=re.M))
    assert {f"jax-{target}-plugin", "jaxlib", "dm-control", "crafter"} <= chosen


# --- Compose and Kubernetes --------------------------------------------------------------------


def compose(name: str) -> dict:
    """A compose file with its variables at their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / name).read_text())
    return YAML(typ="safe").load(text)["services"]


@pytest.mark.parametrize(("name", "target"), [("compose.yaml", "cpu"), ("docker/compose.gpu.yaml", "cuda12")])
def test_compose_builds_a_target_that_is_there(name, target):
    services = compose(name)
    assert set(services) == {"train", "tensorboard"}
    for service in services.values():
        assert service["build"]["target"] == target and target in TARGETS
        assert service["image"] == f"dreamer:{target}"


def test_compose_trains_with_tensorboard_beside_it():
    train, board = (compose("compose.yaml")[name] for name in ("train", "tensorboard"))
    program, *arguments = train["command"].split()
    assert program == "train" and train_config(arguments).logdir.startswith("/logdir/")
    assert train["volumes"] == ["./runs:/logdir"] and board["volumes"] == ["./runs:/logdir:ro"]
    # The grace is what a checkpoint has; Docker's own is 10 seconds.
    assert train["stop_grace_period"] == "3m" and train["restart"].startswith("on-failure")
    assert board["command"].split()[0] == "tensorboard" and board["ports"] == ["127.0.0.1:6006:6006"]
    assert compose("docker/compose.gpu.yaml")["train"]["deploy"]["resources"]["reservations"]["devices"]


def test_the_kubernetes_job_resumes_where_it_can_and_ends_where_it_cannot():
    files = YAML(typ="safe").load_all((ROOT / "docs" / "examples" / "kubernetes-job.yaml").read_text())
    claim, job = files
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, *arguments = container["args"]
    config = train_config(arguments)
    assert program == "train" and config.logdir.startswith(container["volumeMounts"][0]["mountPath"] + "/")
    check_task(config.task)
    assert container["readinessProbe"]["exec"]["command"] == ["dreamer-healthy", config.logdir]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    rules = {
        code: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {143: "Ignore", 2: "FailJob", 3: "FailJob"}


# --- The scripts as processes ------------------------------------------------------------------

PROGRAM = """#!/usr/bin/env bash
# Stands for `dreamer`: notes its arguments; at SIGTERM takes its time to save, then ends with 0.
trap 'sleep 0.3; echo saved > saved; exit ${STOPPED_CODE:-0}' TERM
echo "$@" > started
if [ -n "${CODE:-}" ]; then exit "$CODE"; fi
while :; do sleep 0.05; done
"""


@pytest.fixture
def place(tmp_path):
    """A folder with programs in front of the path: `dreamer` and `scontrol` that only note what they are asked."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in {
        "dreamer": PROGRAM,
        "scontrol": '#!/bin/sh\necho "$@" > requeued\n',
        "tensorboard": "#!/bin/sh\necho viewer $$ $@\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "activate").write_text("")
    return tmp_path


def start(place: Path, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """The script in the background; what it prints goes to the file `out`."""
    there = BARE | {"PATH": f"{place / '.venv' / 'bin'}:{os.environ['PATH']}"} | environment
    with (place / "out").open("w") as out:
        return subprocess.Popen([script, *arguments], cwd=place, env=there, stdout=out)


@pytest.mark.parametrize("times", [1, 3])
def test_the_entry_point_hands_sigterm_on_and_waits_for_the_checkpoint(place, times):
    process = start(place, DOCKER / "dreamer-entrypoint", "train", "--logdir", "a b")
    until((place / "started").exists, 20, "start")
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert (place / "saved").exists()
    assert (place / "started").read_text() == "train --logdir a b\n"


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_the_entry_point_ends_as_the_program_ended(place, code):
    assert start(place, DOCKER / "dreamer-entrypoint", "train", CODE=str(code)).wait(20) == code


def test_a_failure_while_stopping_is_told(place):
    process = start(place, DOCKER / "dreamer-entrypoint", "train", STOPPED_CODE="3")
    until((place / "started").exists, 20, "start")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3


def test_other_programs_of_the_container_take_the_entry_point_s_place(place):
    process = start(place, DOCKER / "dreamer-entrypoint", "tensorboard", "--logdir", "x")
    assert process.wait(20) == 0
    assert (place / "out").read_text() == f"viewer {process.pid} --logdir x\n"


def test_healthy_is_who_has_written_metrics_lately(tmp_path):
    def healthy(**environment: str) -> int:
        command = [DOCKER / "dreamer-healthy", tmp_path]
        return subprocess.run(command, env=BARE | environment, capture_output=True).returncode

    assert healthy() == 1
    metrics = tmp_path / "sweep" / "run" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("{}\n")
    assert healthy() == 0
    long_ago = time.time() - 45 * 60
    os.utime(metrics, (long_ago, long_ago))
    assert healthy() == 1
    assert healthy(DREAMER_HEALTHY_MINUTES="60") == 0


def test_the_slurm_job_queues_itself_again_when_it_was_stopped(place):
    process = start(place, SLURM, "runs/a", "--configs", "crafter", SLURM_JOB_ID="17")
    until((place / "started").exists, 20, "start")
    config = train_config((place / "started").read_text().split()[1:])
    assert Path(config.logdir) == Path("runs/a").absolute() and config.run.platform == "gpu" and not config.run.display
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (place / "saved").exists() and (place / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("code", [0, 3])
def test_the_slurm_job_is_over_when_the_run_is(place, code):
    assert start(place, SLURM, "runs/a", SLURM_JOB_ID="17", CODE=str(code)).wait(20) == code
    assert not (place / "requeued").exists()


@pytest.mark.slow
def test_a_stopped_container_s_run_has_a_checkpoint_and_its_successor_goes_on(tmp_path):
    """The entry point and the real program, as a preempted container has them."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    line = "train --configs debug --run.agent_steps 1000000 --run.platform cpu --run.display false --logdir run"
    command = [DOCKER / "dreamer-entrypoint", *line.split()]
    steps = []
    for _ in range(2):
        (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=tmp_path, env=BARE | {"PATH": path})
        until((tmp_path / "run" / "metrics.jsonl").exists, 240, "metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
        steps.append(max(int(re.sub(r"\D", "", p.name)) for p in (tmp_path / "run" / "checkpoints").iterdir()))
    assert 0 < steps[0] < steps[1]
    assert subprocess.run([DOCKER / "dreamer-healthy", tmp_path], capture_output=True).returncode == 0
