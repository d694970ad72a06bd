"""The program `dreamer`: a table of commands. Mistakes of the user end in one line on stderr and exit code 2."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Sequence

from dreamer import __version__
from dreamer.commands.arguments import USAGE_ERROR
from dreamer.process import unfailing_output
from dreamer.schema import ConfigError
from dreamer.values import one_line, suggestion

#: What `dreamer --help` says about each command; `dreamer.commands.NAME` runs it.
COMMANDS: dict[str, str] = {
    "train": "train an agent, or go on with a run",
    "eval": "play episodes with a trained agent and print its scores",
    "collect": "write episodes of a random or a trained policy",
    "export": "write the episodes of a run's replay",
    "play": "play in the dream of a run, in a browser",
    "envs": "list the environments, or check one",
    "sweep": "train many runs from one file",
    "plot": "draw learning curves, beside published ones",
    "doctor": "check whether this machine can train",
    "bench": "measure what training costs on this machine, part by part",
}


def usage() -> str:
    rows = "\n".join(f"  {name:8} {summary}" for name, summary in COMMANDS.items())
    return f"usage: dreamer COMMAND [arguments]\n\n{rows}\n\n`dreamer COMMAND --help` tells more."


def run_command(arguments: Sequence[str]) -> int:
    """Runs `dreamer ARGUMENTS` and returns its exit code; raises what its command raises."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    name, *rest = arguments
    if name == "--version":
        print(f"dreamer {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{suggestion(name, COMMANDS)}; known: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"dreamer.commands.{name}")
    return int(module.run(rest))


# Errors that a user can correct, printed without a traceback: their modules and names.
USER_ERRORS = (
    ("dreamer.paths", "PathError"),
    ("dreamer.schema", "ConfigError"),
    ("dreamer.envs.interface", "TaskError"),
    ("dreamer.envs.interface", "EnvError"),
    ("dreamer.run.devices", "DeviceError"),
    ("dreamer.saves.lock", "LogdirInUseError"),
    ("dreamer.saves.snapshot", "CheckpointError"),
)


def user_errors() -> tuple[type[Exception], ...]:
    """The classes of `USER_ERRORS` that may have been raised: those of loaded modules."""
    return tuple(getattr(sys.modules[module], name) for module, name in USER_ERRORS if module in sys.modules)


@unfailing_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 a mistake in what was asked, 3 numbers that are not finite, 130 Ctrl-C."""
    threads = set(threading.enumerate())
    try:
        code = run_command(sys.argv[1:] if arguments is None else arguments)
        if arguments is None:  # this process belongs to the program
            from dreamer.run.signals import end_without

            end_without([one for one in threading.enumerate() if one not in threads], code)
        return code
    except KeyboardInterrupt:
        return 130
    except user_errors() as error:
        text = re.sub(r"(\S{300})\S{400,}(\S{300})", r"\1...\2", one_line(str(error)))  # nobody reads to the end
        print(f"dreamer: error: {text}", file=sys.stderr)
        return USAGE_ERROR
