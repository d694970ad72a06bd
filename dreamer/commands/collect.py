"""`dreamer collect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dreamer.commands.arguments import Parser, count, hide_accelerators, place, presets_left_out, split_arguments
from dreamer.config import Config
from dreamer.presets import config_file, load_config, run_config
from dreamer.schema import ConfigError


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer collect",
        description="Play with a random or a trained policy, and write the episodes to files for `dreamer train "
        "--replay.preload`. Any --configs and --OPTION of `dreamer train` may follow: --env.num_envs 8, --seed 1.",
        allow_abbrev=False,
    )
    parser.add_argument("task", help="environment, as `dreamer envs` lists them")
    parser.add_argument("out", type=place, help="folder for the episodes; must hold none yet")
    parser.add_argument("--steps", type=count, default=20_000, help="agent steps over all environments (20000)")
    parser.add_argument("--from", dest="source", type=place, metavar="LOGDIR", help="play with the agent of this run")
    parser.add_argument("--policy", choices=("random", "sample", "mode"), help="with --from: sample (default) or mode")
    return parser


def collect_config(given: argparse.Namespace, options: Sequence[str]) -> tuple[Config, str]:
    """(configuration, policy) of a `dreamer collect` command line; with --from, on top of the run's own options."""
    configs, overrides = split_arguments(options)
    policy = given.policy or ("random" if given.source is None else "sample")
    if (policy == "random") != (given.source is None):
        raise ConfigError(f"expected --policy random without --from, sample or mode with --from, got --policy {policy}")
    if given.source is not None:
        run_config(given.source)
        configs = [str(config_file(given.source)), *configs]
        overrides["logdir"] = str(given.source)
    return load_config(configs, overrides | {"task": given.task}), policy


def run(arguments: Sequence[str]) -> int:
    given, options = parser().parse_known_args(arguments)
    config, policy = collect_config(given, options)

    from dreamer.envs.registry import check_task

    check_task(config.task)
    configs, _ = split_arguments(options)
    if given.source is None and (line := presets_left_out(configs, config, environment=True)):
        print(line)
    if config.run.platform == "cpu":
        hide_accelerators()

    from dreamer.run.collect_episodes import collect_episodes

    return collect_episodes(config, given.out, given.steps, policy)
