"""`dreamer envs` and `dreamer envs check`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Sequence

from dreamer.commands.arguments import USAGE_ERROR, Parser, count, presets_left_out, split_arguments
from dreamer.presets import load_config
from dreamer.schema import ConfigError
from dreamer.values import brief, suggestion

ENVS_HELP = "List the suites, or all tasks of one. `dreamer envs check TASK` tries one out."
CHECK_USAGE = """\
usage: dreamer envs check TASK [--steps N] [--configs NAME_OR_FILE ...] [--OPTION VALUE ...]

Plays N (1000) agent steps of random actions and reports the spaces, the speed, the growth of memory, whether equal
seeds give equal episodes, whether the state can be saved, and every violation of the contract. Options as in
`dreamer train`: --env.gym.repeat 2. Exit code 0: no violation, 1: violations, 2: a mistake in what was asked.
"""


def check(arguments: Sequence[str]) -> int:
    """`dreamer envs check`."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(CHECK_USAGE)
        return 0 if arguments else USAGE_ERROR
    task, *rest = arguments
    if task.startswith("-"):
        raise ConfigError(f"expected a task first, as in `dreamer envs check toy_catch`, got {brief(task)}")
    configs, overrides = split_arguments(rest)
    try:
        steps = count(overrides.pop("steps", "1000"))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--steps: {error}") from None
    config = load_config(configs, {**overrides, "task": task})

    # Networks are only shaped, not computed: leave accelerators to whoever trains.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dreamer.envs.audit import audit
    from dreamer.envs.audit_table import show
    from dreamer.envs.registry import make_env
    from dreamer.run.factories import make_agent

    anywhere = dataclasses.replace(config, run=dataclasses.replace(config.run, platform="auto"))
    fits = functools.partial(make_agent, anywhere)
    report = audit(lambda seed: make_env(config.task, config.env, seed), steps, fits)
    if line := presets_left_out(configs, config, environment=True):
        print(line)
    show(config.task, report)
    return 1 if report.violations else 0


def run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["check"]:
        return check(arguments[1:])
    parser = Parser(prog="dreamer envs", description=ENVS_HELP, allow_abbrev=False)
    parser.add_argument("suite", nargs="?", help="list every task of this suite, one a line")
    given = parser.parse_args(arguments)

    from dreamer.envs.registry import list_suites, list_tasks

    if given.suite is not None:
        if given.suite not in list_suites():
            close = suggestion(given.suite, list_suites(), f"; known: {', '.join(list_suites())}")
            raise ConfigError(f"unknown suite {brief(given.suite)}{close}")
        print(*list_tasks()[given.suite], sep="\n")
        return 0
    for name, suite in list_suites().items():
        tasks = list_tasks()[name]
        shown = ", ".join(tasks[:4]) + (f", ... ({len(tasks)} in all)" if len(tasks) > 4 else "")
        print(f"{name:10} {suite.description}", *([f"{'':10} {shown}"] if shown else []), sep="\n")
        if suite.package is not None and importlib.util.find_spec(suite.package[0]) is None:
            print(f"{'':10} not installed: {suite.installation}")
    print(
        "\n`dreamer envs SUITE` lists every task of a suite; `dreamer train --configs PRESET --task TASK` trains one."
    )
    return 0
