"""`dreamer plot`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dreamer.commands.arguments import Parser, place, positive, whole

#: Most bins of an axis.
MOST_BINS = 100_000


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer plot",
        description="Draw learning curves of runs: mean and 95 % bootstrap band over seeds, for each task and over "
        "tasks, beside published ones; with a table of final scores.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_OR_GLOB",
        help="folder of a run, or of many; a scores*.jsonl; a JSON list of {task, method, seed, xs, ys}, .gz too; "
        "a pattern of these; NAME=any of these sets the name in the legend",
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="published scores of these tasks: dmc_walker_walk for all there are, dmc_vision-walker_walk for one; "
        "auto: of every plotted task that has any",
    )
    axes = ("env_frames", "hours", "updates", "agent_steps")
    parser.add_argument("--x", choices=axes, default="env_frames", dest="axis", help="horizontal axis")
    parser.add_argument("--bins", type=whole(1, MOST_BINS), metavar="N", help="average scores in this many bins")
    parser.add_argument(
        "--window", type=positive, metavar="W", help="... or in bins of this width, in units of the x axis"
    )
    parser.add_argument(
        "--out", type=place, default=Path("plot"), metavar="PREFIX", help="write PREFIX.png, PREFIX.svg, PREFIX.md"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=("png", "svg", "pdf"),
        default=("png", "svg"),
        dest="formats",
        metavar="FORMAT",
        help="formats of the picture: png, svg, pdf",
    )
    parser.add_argument("--task", help="the task of runs whose files do not say it")
    return parser


def run(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)

    from dreamer.plot.request import Request, plot_runs

    return plot_runs(Request(**vars(given)))
