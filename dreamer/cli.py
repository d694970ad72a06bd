"""The program `dreamer`: a table of commands. Mistakes of the user end in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from dreamer import __version__
from dreamer.config import Config
from dreamer.presets import check_resume, load_config, preset_names, stored_config
from dreamer.schema import ConfigError, help_text, mismatch, options, suggestion

USAGE_ERROR = 2
QUICKSTART = "quickstart"


class Command(NamedTuple):
    """One row of the table: what `dreamer --help` says of it, and the function that runs it."""

    summary: str
    run: Callable[[Sequence[str]], int]


# --- dreamer train -----------------------------------------------------------------------------

TRAIN_USAGE = """\
usage: dreamer train [--configs NAME_OR_FILE ...] [--task SUITE_NAME] [--logdir DIR] [--seed N] [--OPTION VALUE ...]

Presets and YAML files apply in order, then the options: --run.train_ratio 128, --run.train_ratio=128, lists as
64,64, null for none, true or false (a name alone is true). The same command with the same --logdir resumes the run.
`dreamer train` alone learns the built-in game; `dreamer train --logdir DIR` alone goes on with the run in DIR.

presets: {presets}
"""


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(`--configs`, overrides) of a command line: `--name value`, `--name=value`, or `--name` alone for true."""
    configs: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(f"expected an option such as --seed 3, got {token!r} (several values: 64,64)")
        name, equals, value = token.removeprefix("--").partition("=")
        if name == "configs":
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if not values:
                raise ConfigError("--configs: expected names of presets or YAML files, got none")
            configs += values
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and name in options():
            if options()[name].annotation is not bool:
                raise ConfigError(f"--{name}: {mismatch(options()[name], None).replace('got None', 'got nothing')}")
            value = "true"
        overrides[name] = value
    return configs, overrides


def train_config(arguments: Sequence[str]) -> Config:
    """The configuration that `dreamer train ARGUMENTS` means.

    Without --configs and --task it goes on with the run that --logdir holds, or else is the quickstart.
    """
    configs, overrides = split_arguments(arguments)
    if not configs and "task" not in overrides:
        logdir = overrides.get("logdir")
        if logdir and stored_config(logdir) is not None:
            return load_config([os.path.join(os.path.abspath(logdir), "config.yaml")], overrides)
        configs = [QUICKSTART]
    return load_config(configs, overrides)


def train_command(arguments: Sequence[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        presets = textwrap.fill(" ".join(preset_names()), width=110, subsequent_indent=" " * 9)
        print(TRAIN_USAGE.format(presets=presets))
        print(help_text())
        return 0
    config = train_config(arguments)

    from dreamer.envs.registry import check_task

    check_task(config.task)
    stored = stored_config(config.logdir) if config.logdir else None
    changes = check_resume(stored, config) if stored else []
    if changes:
        print("Resuming with changed options:", *(f"  {change}" for change in changes), sep="\n")
    if config.run.platform == "cpu":
        hide_accelerators()

    from dreamer.runtime.train import train

    return train(config)


def hide_accelerators() -> None:
    """Makes JAX use the CPU only, and leave the memory of accelerators alone. Before its first computation."""
    import jax

    jax.config.update("jax_platforms", "cpu")


# --- dreamer eval ------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like those of the configuration."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows the arguments")


def _count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _eval_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dreamer eval",
        description="Play episodes with the best or newest weights of a run, and print the scores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("logdir", help="folder of the run")
    parser.add_argument("--episodes", type=_count, default=20, help="episodes to play")
    parser.add_argument("--video", metavar="FILE.gif", help="write a video of the first environment there")
    parser.add_argument("--policy", choices=("mode", "sample"), default="mode", help="most likely or sampled actions")
    parser.add_argument("--seed", type=int, help="seed of the environments and of sampling; none: the run's own")
    parser.add_argument("--platform", choices=("auto", "cpu"), default="auto", help="auto: the fastest device")
    return parser


def eval_command(arguments: Sequence[str]) -> int:
    given = _eval_parser().parse_args(arguments)
    stored = stored_config(given.logdir)
    if stored is None:
        raise ConfigError(f"expected the folder of a run, with a config.yaml in it, got {given.logdir!r}")
    if given.platform == "cpu":
        hide_accelerators()

    from dreamer.runtime.evaluate import evaluate_command

    return evaluate_command(
        given.logdir, episodes=given.episodes, video=given.video, policy=given.policy, seed=given.seed
    )


# --- dreamer collect, dreamer export -----------------------------------------------------------


def _collect_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dreamer collect",
        description="Play with a random or a trained policy, and write the episodes to files for `dreamer train "
        "--replay.preload`. Any --configs and --OPTION of `dreamer train` may follow, as --env.num_envs 8 or --seed 1.",
        allow_abbrev=False,
    )
    parser.add_argument("task", help="environment, as `dreamer envs` lists them")
    parser.add_argument("out", help="folder for the episodes; must hold none yet")
    parser.add_argument("--steps", type=_count, default=20_000, help="agent steps over all environments (20000)")
    parser.add_argument("--from", dest="source", metavar="LOGDIR", help="play with the agent of this run")
    parser.add_argument("--policy", choices=("random", "sample", "mode"), help="with --from: sample (default) or mode")
    return parser


def collect_config(given: argparse.Namespace, options: Sequence[str]) -> tuple[Config, str]:
    """(configuration, policy) of a command line of `dreamer collect`; of a run's agent, on top of its own options."""
    configs, overrides = split_arguments(options)
    policy = given.policy or ("random" if given.source is None else "sample")
    if (policy == "random") != (given.source is None):
        raise ConfigError(f"expected --policy random without --from, sample or mode with --from, got --policy {policy}")
    if given.source is not None:
        if stored_config(given.source) is None:
            raise ConfigError(f"--from: expected the folder of a run, with a config.yaml in it, got {given.source!r}")
        configs = [os.path.join(os.path.abspath(given.source), "config.yaml"), *configs]
        overrides["logdir"] = given.source
    return load_config(configs, overrides | {"task": given.task}), policy


def collect_command(arguments: Sequence[str]) -> int:
    given, options = _collect_parser().parse_known_args(arguments)
    config, policy = collect_config(given, options)

    from dreamer.envs.registry import check_task

    check_task(config.task)
    if config.run.platform == "cpu":
        hide_accelerators()

    from dreamer.runtime.collect_episodes import collect_command

    return collect_command(config, given.out, given.steps, policy)


def _export_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dreamer export",
        description="Write the episodes in the replay of a run's newest checkpoint to files.",
        allow_abbrev=False,
    )
    parser.add_argument("logdir", help="folder of the run; it may still be going on")
    parser.add_argument("out", help="folder for the episodes; must hold none yet")
    parser.add_argument("--unfinished", action="store_true", help="also the episodes that had not ended, as cut")
    return parser


def export_command(arguments: Sequence[str]) -> int:
    given = _export_parser().parse_args(arguments)
    hide_accelerators()

    from dreamer.runtime.export import export_command

    return export_command(given.logdir, given.out, given.unfinished)


# --- dreamer envs ------------------------------------------------------------------------------


ENVS_HELP = "List the suites, or all tasks of one. `dreamer envs check TASK` tries one out."
CHECK_USAGE = """\
usage: dreamer envs check TASK [--steps N] [--configs NAME_OR_FILE ...] [--OPTION VALUE ...]

Plays N (1000) agent steps of random actions and reports the spaces, the speed, the growth of memory, whether equal
seeds give equal episodes, whether the state can be saved, and every violation of the contract. Options as in
`dreamer train`: --env.gym.repeat 2. Exit code 0: no violation, 1: violations, 2: a mistake in what was asked.
"""


def check_command(arguments: Sequence[str]) -> int:
    """`dreamer envs check`."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(CHECK_USAGE)
        return 0 if arguments else USAGE_ERROR
    task, *rest = arguments
    if task.startswith("-"):
        raise ConfigError(f"expected a task first, as in `dreamer envs check toy_catch`, got {task!r}")
    configs, overrides = split_arguments(rest)
    steps = overrides.pop("steps", "1000")
    if not steps.isdigit() or int(steps) == 0:
        raise ConfigError(f"--steps: expected a whole number above 0, got {steps!r}")
    config = load_config(configs, {**overrides, "task": task})

    from dreamer.envs.audit import audit
    from dreamer.envs.audit_table import show
    from dreamer.envs.registry import make_env

    report = audit(lambda seed: make_env(config.task, config.env, seed), int(steps))
    show(config.task, report)
    return 1 if report.violations else 0


def envs_command(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["check"]:
        return check_command(arguments[1:])
    parser = _Parser(prog="dreamer envs", description=ENVS_HELP, allow_abbrev=False)
    parser.add_argument("suite", nargs="?", help="list every task of this suite, one a line")
    given = parser.parse_args(arguments)

    from dreamer.envs.registry import list_tasks, suites

    if given.suite is not None:
        if given.suite not in suites():
            close = suggestion(given.suite, suites(), f"; known: {', '.join(suites())}")
            raise ConfigError(f"unknown suite {given.suite!r}{close}")
        print(*list_tasks()[given.suite], sep="\n")
        return 0
    for name, suite in suites().items():
        tasks = list_tasks()[name]
        shown = ", ".join(tasks[:4]) + (f", ... ({len(tasks)} in all)" if len(tasks) > 4 else "")
        print(f"{name:10} {suite.description}", *([f"{'':10} {shown}"] if shown else []), sep="\n")
        if suite.package is not None and importlib.util.find_spec(suite.package[0]) is None:
            print(f"{'':10} not installed: {suite.installation}")
    print(
        "\n`dreamer envs SUITE` lists every task of a suite; `dreamer train --configs PRESET --task TASK` trains one."
    )
    return 0


# --- dreamer bench -----------------------------------------------------------------------------


def bench_command(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="dreamer bench",
        description="Measure what a part of training costs on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("part", choices=("update",), help="update: one gradient step, everything a run asks of it")
    parser.add_argument("--size", default="1m", help="size of the model, as in the presets size1m, size12m, ...")
    parser.add_argument("--obs", choices=("vector", "image"), default="vector", help="what the agent observes")
    parser.add_argument("--updates-per-dispatch", type=_count, metavar="K", help="K updates in one program")
    parser.add_argument(
        "--against", choices=("plain",), help="plain: beside all rewrites swapped for their plain forms"
    )
    parser.add_argument("--rounds", type=_count, default=11, help="timed turns")
    parser.add_argument("--protocol", action="store_true", help="one timed update for each line on stdin, as JSON")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write a profile of one dispatch there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    given = vars(parser.parse_args(arguments))
    given.pop("part")

    from dreamer.diagnostics.bench_update import Request, bench_update

    return bench_update(Request(**given))


# --- The program -------------------------------------------------------------------------------

COMMANDS: dict[str, Command] = {
    "train": Command("train an agent, or go on with a run", train_command),
    "eval": Command("play episodes with a trained agent and print its scores", eval_command),
    "collect": Command("write episodes of a random or a trained policy", collect_command),
    "export": Command("write the episodes of a run's replay", export_command),
    "envs": Command("list the environments, or check one", envs_command),
    "bench": Command("measure what an update costs on this machine", bench_command),
}


def usage() -> str:
    rows = "\n".join(f"  {name:8} {command.summary}" for name, command in COMMANDS.items())
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
    return COMMANDS[name].run(rest)


# What a user can put right, told without a traceback: the errors' modules and names.
USER_ERRORS = (
    ("dreamer.schema", "ConfigError"),
    ("dreamer.envs.interface", "TaskError"),
    ("dreamer.runtime.devices", "DeviceError"),
    ("dreamer.runtime.lock", "LogdirInUseError"),
    ("dreamer.runtime.snapshot", "CheckpointError"),
)


def user_errors() -> tuple[type[Exception], ...]:
    """The classes of `USER_ERRORS` that can have been raised: those of modules that were loaded."""
    return tuple(getattr(sys.modules[module], name) for module, name in USER_ERRORS if module in sys.modules)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 a mistake in what was asked, 3 numbers that are not finite, 130 Ctrl-C."""
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `dreamer envs | head`: nobody reads on; keep Python from complaining at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except user_errors() as error:
        print(f"dreamer: error: {error}", file=sys.stderr)
        return USAGE_ERROR
