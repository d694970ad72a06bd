"""`dreamer bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dreamer.commands.arguments import Parser, count


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="dreamer bench",
        description="Measure what a part of training costs on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("part", choices=("update",), help="update: one gradient step, everything a run asks of it")
    parser.add_argument("--size", default="1m", help="size of the model, as in the presets size1m, size12m, ...")
    parser.add_argument("--obs", choices=("vector", "image"), default="vector", help="what the agent observes")
    parser.add_argument("--updates-per-dispatch", type=count, metavar="K", help="K updates in one program")
    parser.add_argument(
        "--against", choices=("plain",), help="plain: beside all rewrites swapped for their plain forms"
    )
    parser.add_argument("--rounds", type=count, default=11, help="timed turns")
    parser.add_argument("--protocol", action="store_true", help="one timed update for each line on stdin, as JSON")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write a profile of one dispatch there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    given = vars(parser.parse_args(arguments))
    given.pop("part")

    from dreamer.diagnostics.bench_update import Request, bench_update

    return bench_update(Request(**given))
