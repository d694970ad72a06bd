"""Checks that may hang, crash or change their process run in a separate one: `ask` here, `main` there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

_ANSWER = "answer: "
#: A picture whose pixels are all equal shows nothing.
PICTURE_TASK = "dmc_cartpole_swingup"


class ProbeError(RuntimeError):
    """A probe that failed, crashed or did not answer; the message says how."""


def ask(probe: str, *arguments: str, limit: float, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `PROBES[probe](*arguments)` returns in a new process. ProbeError if it raises or dies, or after `limit`
    seconds. environment: further environment variables of that process."""
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(path for path in (package, os.environ.get("PYTHONPATH")) if path)
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": paths}
    command = [sys.executable, "-P", "-W", "ignore", "-m", "dreamer.doctor.probe", probe, *arguments]
    out, errors, code = run_limited(command, limit, variables)
    answers = [line for line in out.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        said = [line.strip() for line in errors.splitlines() if line.strip()]
        raise ProbeError(f"it ended with exit code {code}" + (f": {said[-1]}" if said else ""))
    answer = json.loads(answers[-1].removeprefix(_ANSWER))
    if "error" in answer:
        raise ProbeError(answer["error"])
    return answer


def run_limited(command: list[str], limit: float, environment: Mapping[str, str]) -> tuple[str, str, int]:
    """(stdout, stderr, exit code) of a command. ProbeError after `limit` seconds; it and its children are ended."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace", env=environment) as process:
        try:
            out, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            end(process.pid)
            raise ProbeError(f"no answer within {limit:g} seconds") from None
        except BaseException:
            end(process.pid)
            raise
    return out, errors, process.returncode


def end(pid: int) -> None:
    """Kills a process and its children."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


# --- In the other process ----------------------------------------------------------------------


class Messages(logging.Handler):
    """Keeps a library's warnings, and the errors from which it recovers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # JAX logs some texts without values for their placeholders.
        text = record.getMessage() if record.args else str(record.msg).replace("%s ", "")
        cause = record.exc_info[1] if record.exc_info else None
        kept = self.errors if record.levelno >= logging.ERROR else self.warnings
        kept.append(text if cause is None else f"{text}: {cause}")


def devices() -> dict[str, Any]:
    """Versions of JAX, its warnings, and for each device the seconds of a tiny program."""
    messages = Messages()
    logging.getLogger("jax").addHandler(messages)
    import jax
    import jaxlib
    import numpy as np

    side = 128
    found = []
    for device in jax.devices():
        start = time.perf_counter()
        ones = jax.device_put(np.ones((side, side), np.float32), device)
        total = float(jax.jit(lambda x: (x @ x).sum())(ones))
        seconds = time.perf_counter() - start
        if total != side**3:
            raise ProbeError(f"{device}: expected {side**3} as the sum of a product of matrices, got {total}")
        found.append({"platform": device.platform, "kind": device.device_kind, "seconds": seconds})
    said = {"warnings": messages.warnings, "errors": messages.errors}
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "devices": found, **said}


def cards() -> dict[str, Any]:
    """What NVIDIA's driver reports about its cards."""
    from dreamer import nvidia

    return {"cards": nvidia.cards()}


def environment(task: str) -> dict[str, Any]:
    """Seconds to make an environment and take two steps in it."""
    from dreamer.env_config import EnvConfig
    from dreamer.envs.registry import make_env

    start = time.perf_counter()
    env = make_env(task, EnvConfig(), seed=0)
    try:
        env.reset()
        for _ in range(2):
            env.step({key: space.zeros() for key, space in env.action_spaces.items()})
    finally:
        env.close()
    return {"seconds": time.perf_counter() - start}


def picture() -> dict[str, Any]:
    """The renderer's name, the seconds of a first picture, and how far its values spread."""
    from dreamer.env_config import DmcConfig, EnvConfig
    from dreamer.envs.registry import make_env

    start = time.perf_counter()
    env = make_env(PICTURE_TASK, EnvConfig(dmc=DmcConfig(pixels=True)), seed=0)
    try:
        image = env.reset()["image"]
    finally:
        env.close()
    spread = float(image.std())
    return {"renderer": os.environ.get("MUJOCO_GL"), "seconds": time.perf_counter() - start, "spread": spread}


PROBES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "cards": cards,
    "devices": devices,
    "environment": environment,
    "picture": picture,
}


def main(arguments: list[str]) -> None:
    """Prints what a probe returns, or its error, as JSON after a marker, since libraries print too."""
    try:
        answer = PROBES[arguments[0]](*arguments[1:])
    except Exception as error:  # whatever a driver or an environment raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error) or f"in {where.filename}, line {where.lineno}"
        answer = {"error": f"{type(error).__name__}: {said}"}
    print(_ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
