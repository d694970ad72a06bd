"""Checks that run programs: JAX and its devices, NVIDIA's driver, the renderer, each suite of environments."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dreamer.doctor.findings import Finding, Level, Request
from dreamer.doctor.probe import ProbeError, ask
from dreamer.envs.registry import Suite, list_suites
from dreamer.envs.suites.dmc import NO_RENDERER
from dreamer.nvidia import Card

#: Seconds that a probe may take.
DEVICE_LIMIT, RENDERER_LIMIT, SUITE_LIMIT, TOOL_LIMIT = 180.0, 60.0, 120.0, 20.0
#: Oldest driver for each major version of CUDA.
DRIVERS = {"12": (525, 60), "13": (580, 0)}
#: Share of memory in use by others above which a run may not find enough.
BUSY = 0.3
#: The environment variables that tell JAX which devices to use.
_TOLD = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
#: Keeps JAX from taking most of a GPU's memory, which a run may be using, just for a look.
_MODEST = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_NO_DRIVER = "install NVIDIA's driver; a container needs NVIDIA's container toolkit and docker run --gpus all"
#: Where the advice begins in our message about a DeepMind Control renderer that does not work.
_INSTALL = "Install a headless"


def cards() -> list[Card]:
    """NVIDIA cards; none without a driver. ProbeError if the driver does not answer."""
    return [Card(*card) for card in ask("cards", limit=TOOL_LIMIT)["cards"]]


def cuda(request: Request) -> Finding:
    """JAX's plug-in for NVIDIA cards, its version, and the driver."""
    plugins = {name: version for name, version in _installed("jax-cuda") if name.endswith("-plugin")}
    shown = ", ".join(f"{name} {version}" for name, version in plugins.items())
    try:
        found = cards()
    except ProbeError as error:
        remedy = "reload the driver or restart the machine; in a container, the host's driver must match"
        return Finding("CUDA", "fail", f"NVIDIA's driver does not answer: {error}", remedy)
    if not found:
        if plugins:
            return Finding("CUDA", "warn", f"{shown}, but no NVIDIA driver", _NO_DRIVER)
        return Finding("CUDA", "ok", "no NVIDIA driver, no plug-in")
    driver = found[0].driver
    seen = f"{_counted([card.name for card in found])}, driver {driver}"
    if not plugins:
        best = next((major for major in sorted(DRIVERS, reverse=True) if _version(driver) >= DRIVERS[major]), "12")
        return Finding("CUDA", "warn", f"{seen}; JAX has no plug-in for it", f"pip install 'dreamer[cuda{best}]'")
    return Finding("CUDA", *_agreement(plugins, driver, seen))


def _agreement(plugins: dict[str, str], driver: str, seen: str) -> tuple[Any, str, str]:
    """(level, what was seen, remedy) for plug-ins, given the versions of jaxlib and the driver."""
    jaxlib = importlib.metadata.version("jaxlib")
    seen = f"{seen}; " + ", ".join(f"{name} {version}" for name, version in plugins.items())
    majors = sorted(name.removeprefix("jax-cuda").removesuffix("-plugin") for name in plugins)
    if len(majors) > 1:
        return "warn", f"{seen}: two plug-ins for one card", f"pip uninstall jax-cuda{majors[0]}-plugin"
    (version,), (major,) = plugins.values(), majors
    if version != jaxlib:
        return "fail", f"{seen} beside jaxlib {jaxlib}", f"pip install 'jax[cuda{major}]=={jaxlib}'"
    oldest = DRIVERS.get(major)
    if oldest is not None and _version(driver) < oldest:
        other = "; or pip install 'dreamer[cuda12]'" if major != "12" and _version(driver) >= DRIVERS["12"] else ""
        return "fail", f"{seen} needs driver {oldest[0]} or newer", f"update the driver{other}"
    return "ok", seen, ""


def devices(request: Request) -> list[Finding]:
    """A tiny program on every device that JAX finds."""
    wanted = f"pip install 'dreamer[{'tpu' if request.platform == 'tpu' else 'cuda12'}]'"
    try:
        report = ask("devices", limit=DEVICE_LIMIT, environment=_MODEST)
    except ProbeError as error:
        told = [f"{name} (it is {os.environ[name]!r})" for name in _TOLD if os.environ.get(name)]
        remedy = f"unset {' and '.join(told)}, or {wanted}" if told else f"reinstall JAX: {wanted}"
        return [Finding("devices", "fail", f"JAX cannot use its devices: {error}", f"{remedy}; --run.platform cpu")]
    found = report["devices"]
    shown = _counted([device["kind"] for device in found])
    slowest = max(device["seconds"] for device in found)
    seen = f"{shown}; a tiny program ran on each within {slowest:.2f} s"
    kinds = {"cpu": "cpu", "tpu": "tpu"}
    missing = request.platform not in ("auto", *(kinds.get(device["platform"], "gpu") for device in found))
    level: Level = "fail" if missing or report["errors"] else "warn" if report["warnings"] else "ok"
    remedy = "" if level == "ok" else f"{wanted}, see also the line CUDA; or do without: --run.platform cpu"
    if missing:
        seen = f"expected a device of kind {request.platform}, JAX finds only: {shown}"
    if said := [*report["errors"], *report["warnings"]]:
        seen = f"{seen}. JAX says: {' '.join(said)}"
    versions = Finding("JAX", "ok", f"jax {report['jax']}, jaxlib {report['jaxlib']}")
    return [versions, Finding("devices", level, seen, remedy)]


def device_memory(request: Request) -> Finding:
    """Memory of the cards, and what other programs hold of it."""
    try:
        found = cards()
    except ProbeError as error:
        return Finding("device memory", "warn", f"unknown: {error}", "see the line CUDA")
    if not found:
        return Finding("device memory", "ok", "that of the machine, where there is no accelerator")
    sizes = [(card.used or 0, card.total or 0) for card in found]
    seen = ", ".join(f"{used / 2**30:.1f} of {total / 2**30:.1f} GiB in use" for used, total in sizes)
    if any(used > BUSY * total for used, total in sizes):
        remedy = "end the programs that nvidia-smi lists, or share: XLA_PYTHON_CLIENT_MEM_FRACTION=.4"
        return Finding("device memory", "warn", seen, remedy)
    return Finding("device memory", "ok", seen)


def renderer(request: Request) -> Finding:
    """A picture of DeepMind Control, drawn as in a run."""
    if importlib.util.find_spec("dm_control") is None:
        return Finding("renderer", "ok", "nothing installed that needs one")
    try:
        report = ask("picture", limit=RENDERER_LIMIT)
    except ProbeError as error:
        seen, *advice = str(error).split(_INSTALL)
        return Finding("renderer", "fail", seen.strip(), _INSTALL + (advice or NO_RENDERER.split(_INSTALL)[1:])[0])
    seen = f"MuJoCo draws with {report['renderer']}, first picture after {report['seconds']:.1f} s"
    if report["spread"] == 0:
        return Finding("renderer", "fail", f"{seen}, but all its pixels are equal", "try another: MUJOCO_GL=osmesa")
    return Finding("renderer", "ok", seen)


def environments(request: Request) -> list[Finding]:
    """Two steps in the first task of each suite that is installed."""
    tried: dict[str, Suite] = {}
    absent = []
    for name, suite in list_suites().items():
        if suite.package is not None and importlib.util.find_spec(suite.package[0]) is None:
            absent.append(name)
        elif suite.tasks() and suite.make not in [other.make for other in tried.values()]:
            tried[name] = suite
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(_suite, tried, tried.values()))
    if absent:
        found.append(Finding("other suites", "ok", f"not installed: {', '.join(absent)}", "`dreamer envs` says how to"))
    return found


def _suite(name: str, suite: Suite) -> Finding:
    task = f"{name}_{suite.tasks()[0]}"
    try:
        report = ask("environment", task, limit=SUITE_LIMIT)
    except ProbeError as error:
        remedy = suite.installation or "pip install --force-reinstall dreamer"
        return Finding(name, "fail", f"{task}: {error}", remedy)
    return Finding(name, "ok", f"{task} made and stepped in {report['seconds']:.1f} s")


def _installed(prefix: str) -> Iterator[tuple[str, str]]:
    """(name, version) of the installed packages whose names begin with `prefix`."""
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(prefix):
            yield name, distribution.version


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _counted(names: list[str]) -> str:
    """`2 x A, B`."""
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
