"""What an accelerator gives: correctness, update times of all sizes, flags, many seeds, a short learning run.

`scripts/gpu_report --out DIR` on a machine with a GPU writes DIR/gpu_report.json and DIR/gpu_report.md within nine
minutes. Programs are compiled several at a time and timed one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamer.paths import PROGRAM

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("1m", "12m", "25m", "50m", "100m", "200m", "400m")
OBS = {"vector": "proprio", "image": "image"}
SEEDS = (1, 2, 4, 8, 16)
#: Programs that are compiled at the same time.
TOGETHER = 8
ROUNDS = 20
#: Seconds after the deadline that programs may still compile.
GRACE = 60.0
#: A flag that changes nothing: with any XLA_FLAGS of the user's, ours are left out.
NO_FLAGS = "--xla_gpu_autotune_level=4"


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to time: its row, the command that speaks the protocol of `dreamer bench update`, further settings.

    updates: gradient steps in what it calls one update (seeds that are updated together).
    """

    group: str
    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    updates: int = 1


def update_command(size: str, obs: str, *options: str) -> tuple[str, ...]:
    given = ("--protocol", "--size", size, "--obs", obs, *options)
    return (*PROGRAM, "bench", "update", *given)


def jobs(sizes: Sequence[str], yardstick: str | None) -> list[Job]:
    """Everything that is timed, what matters most first."""
    found = [Job("size", f"{size} {obs}", update_command(size, obs)) for size in sizes for obs in OBS]
    for obs in OBS:  # the smallest size alone has loops that are one kernel
        few = update_command(sizes[0], obs, "--without", "in_one_kernel")
        found.append(Job("steps as few kernels", f"{sizes[0]} {obs}", few))
        for size in sizes:
            several = update_command(size, obs, "--without", "in_one_kernel", "in_few_kernels")
            found.append(Job("steps as several kernels", f"{size} {obs}", several))
    found += [Job("seeds", f"{sizes[0]} vector x {n}", seeds_command(sizes[0], n), updates=n) for n in SEEDS]
    if yardstick is not None:
        command = tuple(shlex.split(yardstick))
        for size in sizes:
            for obs, theirs in OBS.items():
                found.append(Job("yardstick", f"{size} {obs}", (*command, "--size", size, "--obs", theirs)))
    for size in sizes[:2]:
        dispatch = update_command(size, "vector", "--updates-per-dispatch", "4")
        found.append(Job("dispatch of four", f"{size} vector", dispatch))
        plain = update_command(size, "vector")
        found.append(Job("without our flags", f"{size} vector", plain, (("XLA_FLAGS", NO_FLAGS),)))
    return found


def seeds_command(size: str, count: int) -> tuple[str, ...]:
    return update_command(size, "vector", "--seeds", str(count))


class Server:
    """A program that compiles, says what it is in one line of JSON, and then answers each line with a time."""

    def __init__(self, job: Job) -> None:
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **dict(job.environment)}
        self.job, self.facts, self._late = job, dict[str, Any](), False
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            job.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def ready(self, seconds: float) -> bool:
        """Wait until it is compiled; False if it ended, or was ended after so many seconds."""

        def give_up() -> None:
            self._late = True
            self._process.kill()

        watchdog = threading.Timer(max(1.0, seconds), give_up)
        watchdog.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        watchdog.cancel()
        if line.startswith("{"):
            self.facts = json.loads(line)
        return bool(self.facts)

    def time(self, rounds: int) -> dict[str, Any]:
        """Median and quartiles of milliseconds of one update."""
        assert self._process.stdin is not None and self._process.stdout is not None
        found = []
        for _ in range(rounds):
            print(file=self._process.stdin, flush=True)
            found.append(json.loads(self._process.stdout.readline())["ms"])
        low, middle, high = statistics.quantiles(found, n=4)
        return {"ms": middle, "ms_quartiles": [low, high], **self.facts}

    def close(self) -> str:
        """End it; why there is no figure: the end of what it complained of."""
        self._process.kill()
        self._process.communicate()
        self._errors.seek(0)
        text = self._errors.read()[-500:]
        self._errors.close()
        return "it was not compiled in time" if self._late else f"it ended: {text}"


def time_all(wanted: Sequence[Job], deadline: float) -> list[dict[str, Any]]:
    """A row for each job: its figures, or why there are none."""
    rows: list[dict[str, Any]] = []
    waiting = list(wanted)
    while waiting:
        wave, waiting = waiting[:TOGETHER], waiting[TOGETHER:]
        if time.monotonic() > deadline:
            rows += [{"group": job.group, "name": job.name, "missing": "no time was left"} for job in wave]
            continue
        servers = [Server(job) for job in wave]
        alive = [server.ready(deadline + GRACE - time.monotonic()) for server in servers]
        for server, well in zip(servers, alive, strict=True):
            row: dict[str, Any] = {"group": server.job.group, "name": server.job.name}
            if well:
                try:
                    row |= server.time(ROUNDS)
                    row["updates_per_s"] = 1e3 * server.job.updates / row["ms"]
                except (ValueError, OSError):
                    well = False
            said = server.close()
            rows.append(row if well else row | {"missing": said})
            print(json.dumps(rows[-1]), flush=True)
    return rows


@contextlib.contextmanager
def in_background(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **environment}
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finished(process: subprocess.Popen, deadline: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(1.0, deadline - time.monotonic()))
    return process.poll() is not None


def launches(size: str, obs: str, seconds: float, out: Path) -> dict[str, Any]:
    """Launches of an update as the compiled program has them, and as a trace of one has them; microseconds of each."""
    file, name = out / f"launches_{size}_{obs}.json", f"{size} {obs}"
    command = (*PROGRAM, "bench", "update", "--size", size, "--obs", obs, "--trace", str(out / f"trace_{size}_{obs}"))
    try:
        done = subprocess.run(
            (*command, "--json", str(file)), capture_output=True, text=True, timeout=max(1.0, seconds), cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "missing": "no time was left"}
    if done.returncode:
        return {"name": name, "missing": f"it ended: {done.stderr[-500:]}"}
    row = json.loads(file.read_text())["rows"]["update"]
    return {"name": name} | {key: row.get(key) for key in ("ms", "launches", "launched", "us_per_launch")}


def precision() -> dict[str, Any]:
    """Relative difference of the loss terms of one update in bfloat16 from those in float32, and the device's rates."""
    import jax
    import jax.numpy as jnp

    from dreamer.agent import Agent
    from dreamer.bench.bench_update import TASKS, random_batch
    from dreamer.bench.update_estimate import product_rate
    from dreamer.presets import load_config

    config = load_config(["size1m"], {})
    found: dict[str, dict[str, float]] = {}
    with jax.default_matmul_precision("highest"):
        for dtype in (jnp.float32, jnp.bfloat16):
            agent = Agent(*TASKS["image"], config, dtype)
            _, _, metrics = agent.train_step(agent.init(0), random_batch(agent, config))
            found[jnp.dtype(dtype).name] = {k: float(v) for k, v in metrics.items() if k.startswith("loss/")}
    exact = found["float32"]
    gaps = {k: abs(v - exact[k]) / max(abs(exact[k]), 1e-3) for k, v in found["bfloat16"].items()}
    rates = {name: product_rate(jnp.dtype(name), jax.devices()[0]) / 1e12 for name in ("float32", "bfloat16")}
    return {"loss_gaps_bfloat16": gaps, "product_tflops": rates}


def learning(deadline: float, out: Path) -> dict[str, Any]:
    """The quickstart, as far as the time goes: scores at its end."""
    from dreamer.records.json_lines import SCORE, columns

    logdir = out / "quickstart"
    log = out / "quickstart.log"
    command = [*PROGRAM, "train", "--configs", "quickstart", "--logdir", str(logdir)]
    start = time.monotonic()
    with in_background([*command, "--run.display", "false", "--log.tensorboard", "false"], log) as process:
        whole = finished(process, deadline)
    scores = logdir / "scores.jsonl"
    values = columns(scores, SCORE).values[0].tolist() if scores.exists() else []
    return {
        "seconds": time.monotonic() - start,
        "finished": whole,
        "episodes": len(values),
        "score_of_last_100": statistics.fmean(values[-100:]) if values else None,
    }


def table_line(row: dict[str, Any], peak: float | None) -> str:
    """One row of the table. peak: TFLOP/s."""
    if "missing" in row:
        return f"| {row['group']} | {row['name']} | missing: {row['missing'].splitlines()[-1][:80]} |"
    low, high = row["ms_quartiles"]
    cells = [row["group"], row["name"], f"{row['ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['updates_per_s']:.1f}"]
    cells.append(f"{row['compile_s']:.0f}")
    if "gflop" in row:
        rate = row["gflop"] / row["ms"]
        cells += [f"{rate:.1f}", f"{100 * rate / peak:.0f} %" if peak else ""]
    return f"| {' | '.join(cells)} |"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    peak = report["precision"].get("product_tflops", {}).get("bfloat16")
    tests = report["tests"]
    lines = ["# What this GPU gives", "", f"{machine}. {report['seconds']:.0f} seconds in all.", ""]
    lines += [f"Reference tests in float32 (relative L2 error below 1e-4 per tensor): {tests['result']}.", ""]
    if gaps := report["precision"].get("loss_gaps_bfloat16"):
        worst = max(gaps, key=lambda name: gaps[name])
        lines += [f"Loss terms in bfloat16 against float32: largest relative gap {gaps[worst]:.1e} ({worst}).", ""]
    lines += [
        "| what | program | ms | quartiles | updates/s | compile s | TFLOP/s | share of peak |",
        "| --- " * 8 + "|",
    ]
    lines += [table_line(row, peak) for row in report["rows"]]
    lines += ["", f"Peak: a large bfloat16 matrix product on this device, {peak:.0f} TFLOP/s measured." if peak else ""]
    for row in report["launches"]:
        if row.get("launched"):
            counts = f"{row['launches']:,} launches in the program, {row['launched']:,} in a trace"
            lines += ["", f"{row['name']}: {counts}, {row['us_per_launch']:.2f} us each."]
        else:
            lines += ["", f"{row['name']}: no launches counted, {row.get('missing', 'because this is no GPU')}."]
    run = report["learning"]
    if run.get("episodes"):
        ended = "to its end" if run["finished"] else "until the time was up"
        lines += [
            "",
            f"Quickstart {ended}, {run['seconds']:.0f} s: {run['episodes']} episodes, "
            f"mean score of the last 100: {run['score_of_last_100']:.2f} of 3.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--yardstick", metavar="COMMAND", help="another update to time, which speaks the same protocol")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    end = start + 60 * given.minutes

    from dreamer.bench.measuring import machine

    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_reference.py"]
    settings = {
        "DREAMER_TEST_PLATFORM": os.environ.get("JAX_PLATFORMS", ""),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    report: dict[str, Any] = {"machine": machine(), "learning": {}, "precision": {}, "rows": [], "launches": []}
    log = given.out / "reference_tests.log"

    def save(testing: subprocess.Popen) -> None:
        """Write what there is: whatever comes next may be cut short."""
        said = log.read_text().strip().splitlines()
        done = testing.poll() is not None
        report["tests"] = {"finished": done, "result": said[-1].strip("= ") if said else "nothing"}
        report["seconds"] = time.monotonic() - start
        (given.out / "gpu_report.json").write_text(json.dumps(report, indent=2) + "\n")
        (given.out / "gpu_report.md").write_text(markdown(report))

    share = lambda part: start + part * (end - start) - time.monotonic()  # noqa: E731
    with in_background(tests, log, **settings) as testing:
        report["launches"] = [launches(given.sizes[0], obs, share(0.25), given.out) for obs in OBS]
        save(testing)
        report["rows"] = time_all(jobs(given.sizes, given.yardstick), start + 0.65 * (end - start))
        save(testing)
        report["precision"] = precision()
        save(testing)
        report["learning"] = learning(end - 20, given.out)
        finished(testing, end)
        save(testing)
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
