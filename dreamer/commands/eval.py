"""`dreamer eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dreamer.commands.arguments import Parser, count, hide_accelerators, planner_options, seed
from dreamer.presets import run_config


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer eval",
        description="Play episodes with the best or newest weights of a run, and print the scores. Any "
        "--planner.OPTION of `dreamer train` may follow: --planner.name mppi plans before each action, "
        "--planner.name null asks the policy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("logdir", help="folder of the run")
    parser.add_argument("--episodes", type=count, default=20, help="episodes to play")
    parser.add_argument("--video", metavar="FILE.gif", help="write a video of the first environment there")
    parser.add_argument("--policy", choices=("mode", "sample"), default="mode", help="most likely or sampled actions")
    parser.add_argument("--seed", type=seed, help="seed of the environments and of sampling; none: the run's own")
    parser.add_argument("--platform", choices=("auto", "cpu"), default="auto", help="auto: the fastest device")
    return parser


def run(arguments: Sequence[str]) -> int:
    given, options = parser().parse_known_args(arguments)
    planner = planner_options(options)
    run_config(given.logdir, planner)  # report a mistake before loading anything slow
    if given.platform == "cpu":
        hide_accelerators()

    from dreamer.run.evaluate import evaluate_run

    return evaluate_run(
        given.logdir,
        episodes=given.episodes,
        video=given.video,
        policy=given.policy,
        seed=given.seed,
        planner=planner,
    )
