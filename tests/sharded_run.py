"""Run as a program: `dreamer train` with the debug preset, quiet; arguments are further options."""

from __future__ import annotations

import sys

from tiny_runs import QUIET

from dreamer.cli import main

if __name__ == "__main__":
    quiet = [f"--{name}={str(value).lower()}" for name, value in QUIET.items()]
    sys.exit(main(["train", "--configs", "debug", *quiet, *sys.argv[1:]]))
