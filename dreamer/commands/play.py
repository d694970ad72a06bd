"""`dreamer play`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dreamer.commands.arguments import Parser, hide_accelerators, place, seed, whole
from dreamer.presets import run_config


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer play",
        description="Play in the dream of a run, in a browser, beside the real environment.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("logdir", help="folder of the run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this reach the network")
    parser.add_argument("--port", type=whole(0, 65_535), default=8765, help="port to listen on; 0: any that is free")
    parser.add_argument(
        "--real",
        choices=("auto", "yes", "no"),
        default="auto",
        help="play the real environment beside the dream; auto: unless its task names code to be imported",
    )
    parser.add_argument("--seed", type=seed, help="seed of environments and dreams; none: the run's own")
    parser.add_argument(
        "--out", type=place, metavar="DIR", help="folder for recordings; none: played/RUN-TIME in the working folder"
    )
    parser.add_argument("--platform", choices=("auto", "cpu"), default="auto", help="auto: the fastest device")
    return parser


def run(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    run_config(given.logdir)  # report a mistake before loading anything slow
    if given.platform == "cpu":
        hide_accelerators()

    from dreamer.play.game import Request, play

    return play(Request(given.logdir, given.host, given.port, given.real, given.seed, given.out))
