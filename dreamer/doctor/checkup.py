"""`dreamer doctor`: whether this machine can train, line by line, with what to do where it cannot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from rich import box
from rich.text import Text

from dreamer.doctor import machine_checks as machine
from dreamer.doctor import program_checks as program
from dreamer.doctor.findings import Finding, Request
from dreamer.terminal import Console, Table

Check = Callable[[Request], Finding | list[Finding]]

#: Every check, with the name to report if it breaks down itself.
CHECKS: Mapping[str, Check] = {
    "python": machine.python,
    "packages": machine.packages,
    "CUDA": program.cuda,
    "devices": program.devices,
    "device memory": program.device_memory,
    "cores": machine.cores,
    "memory": machine.memory,
    "disk": machine.disk,
    "logdir": machine.logdir,
    "open files": machine.descriptors,
    "shared memory": machine.shared_memory,
    "clock": machine.clock,
    "renderer": program.renderer,
    "environments": program.environments,
}
STYLES = {"ok": "green", "warn": "bold yellow", "fail": "bold red"}
_BROKEN = "this is a fault of `dreamer doctor` itself or of the system: the line says what it met"


def examine(request: Request) -> list[Finding]:
    """What all checks find, in their order; run in parallel, since most of them wait for another process."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda name: _run(name, CHECKS[name], request), CHECKS)
        return [finding for findings in found for finding in findings]


def _run(name: str, check: Check, request: Request) -> list[Finding]:
    """What a check finds; if it breaks down, that is the finding."""
    try:
        found = check(request)
    except Exception as error:  # a machine can be broken in more ways than foreseen here
        return [Finding(name, "fail", f"the check broke down: {type(error).__name__}: {error}", _BROKEN)]
    return [found] if isinstance(found, Finding) else found


def table(findings: Iterable[Finding]) -> Table:
    """One row per finding, with the remedy below what was seen."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    shown.add_column("", no_wrap=True)
    shown.add_column("check", style="bold", no_wrap=True)
    shown.add_column("seen", overflow="fold")
    for finding in findings:
        text = Text(finding.seen)
        if finding.remedy:
            style = "dim" if finding.level == "ok" else STYLES[finding.level]
            text.append(f"\n→ {finding.remedy}", style)
        shown.add_row(Text(finding.level, STYLES[finding.level]), finding.name, text)
    return shown


def run_doctor(request: Request, as_json: bool) -> int:
    """Examines this machine and prints what was found. Exit code 0: ok, perhaps with warnings; 1: something fails."""
    console = Console()
    with console.status("examining this machine ..."):
        findings = examine(request)
    counts = {level: sum(f.level == level for f in findings) for level in STYLES}
    if as_json:
        print(json.dumps({"counts": counts, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        console.print(table(findings))
        console.print(", ".join(f"{count} {level}" for level, count in counts.items()))
    return 1 if counts["fail"] else 0
