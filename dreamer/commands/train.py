"""`dreamer train`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from dreamer.commands.arguments import hide_accelerators, presets_left_out, split_arguments
from dreamer.config import Config
from dreamer.paths import check_folder
from dreamer.presets import check_resume, config_file, load_config, preset_names, stored_config
from dreamer.schema import help_text

QUICKSTART = "quickstart"
#: Asks for the plan of a run instead of the run.
PLAN = "--plan"

TRAIN_USAGE = """\
usage: dreamer train [--configs NAME_OR_FILE ...] [--task SUITE_NAME] [--logdir DIR] [--seed N] [--OPTION VALUE ...]
                     [--plan]

Presets and YAML files apply in order, then the options: --run.train_ratio 128, --run.train_ratio=128, lists as
64,64, null for none, true or false (a name alone is true). The same command with the same --logdir resumes the run.
--plan trains nothing: it prints what the run needs (memory, disk, updates, hours) and how each figure was obtained.
`dreamer train` alone learns the built-in game; `dreamer train --logdir DIR` alone goes on with the run in DIR.

presets: {presets}
"""


def without_preset(arguments: Sequence[str], config: Config) -> str | None:
    """What to say if a new run was asked for by its task, but without a preset of the task's suite."""
    configs, overrides = split_arguments([word for word in arguments if word != PLAN])
    return presets_left_out(configs, config) if configs or "task" in overrides else None


def train_config(arguments: Sequence[str]) -> Config:
    """The configuration that `dreamer train ARGUMENTS` means.

    Without --configs and --task it continues the run that --logdir holds, or else is the quickstart.
    """
    configs, overrides = split_arguments([word for word in arguments if word != PLAN])
    if not configs and "task" not in overrides:
        logdir = overrides.get("logdir")
        if logdir and stored_config(logdir) is not None:
            return load_config([config_file(logdir)], overrides)
        configs = [QUICKSTART]
    return load_config(configs, overrides)


def run(arguments: Sequence[str]) -> int:
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
    if stored is None and (line := without_preset(arguments, config)):
        print(line)
    if config.run.platform == "cpu":
        hide_accelerators()
    if PLAN in arguments:
        from dreamer.bench.plan import print_plan

        if config.logdir:
            check_folder(Path(config.logdir))
        return print_plan(config)

    from dreamer.records.meters import process_start
    from dreamer.run.training import train

    return train(config, begun=process_start())
