"""`dreamer doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dreamer.commands.arguments import Parser, place


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer doctor",
        description="Check whether this machine can train, and say what to do where it cannot. Exit code 0: it can, "
        "perhaps with warnings; 1: something fails.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--logdir", type=place, default=Path("runs"), help="folder that runs would write to")
    parser.add_argument(
        "--platform", choices=("auto", "cpu", "gpu", "tpu"), default="auto", help="kind of device that must be there"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def run(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)

    from dreamer.doctor.checkup import run_doctor
    from dreamer.doctor.findings import Request

    return run_doctor(Request(given.logdir, given.platform), given.json)
