"""`dreamer export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dreamer.commands.arguments import Parser, hide_accelerators, place


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer export",
        description="Write the episodes in the replay of a run's newest checkpoint to files.",
        allow_abbrev=False,
    )
    parser.add_argument("logdir", type=place, help="folder of the run; it may still be going on")
    parser.add_argument("out", type=place, help="folder for the episodes; must hold none yet")
    parser.add_argument("--unfinished", action="store_true", help="also the episodes that had not ended, as cut")
    return parser


def run(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    hide_accelerators()

    from dreamer.run.export_episodes import export_episodes

    return export_episodes(given.logdir, given.out, given.unfinished)
