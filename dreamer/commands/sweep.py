"""`dreamer sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dreamer.commands.arguments import Parser, count, place


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer sweep",
        description="Train many runs from one file, several at once, and report on them. The same command again goes "
        "on with the sweep: finished runs are not run again, others resume.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="NAME_OR_FILE", help="a sweep under configs/sweeps, or the path of a YAML file")
    parser.add_argument("--logdir", type=place, metavar="DIR", help="folder of the sweep, runs/NAME otherwise")
    parser.add_argument(
        "--jobs", type=count, metavar="N", help="runs at once; one per device otherwise, and all at once on a cluster"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="devices to deal out to runs: 0 1, or 0,1 2,3 for two each; all NVIDIA devices otherwise",
    )
    parser.add_argument("--backend", choices=("local", "ray", "slurm"), default="local", help="where runs are started")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they will need, and stop")
    parser.add_argument("--report", action="store_true", help="write the report as things stand, and stop")
    return parser


def run(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)

    from dreamer.sweeps.launch import Request, run_sweep

    return run_sweep(Request(**vars(given)))
