"""`dreamer bench`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from dreamer.commands.arguments import Parser, count, hide_accelerators, place, positive, split_arguments
from dreamer.config import Config
from dreamer.paths import check_file, make_folder
from dreamer.planner_config import SETTINGS
from dreamer.presets import load_config
from dreamer.values import brief

if TYPE_CHECKING:
    from dreamer.bench.measuring import Report

Asked = TypeVar("Asked")
#: What is measured without --configs and --task.
DEFAULT = "quickstart"
#: What `dreamer bench loop` measures without them: presets and task, by name.
SUITES: dict[str, tuple[tuple[str, ...], str]] = {
    "toy": (("quickstart",), "toy_catch"),
    "atari": (("atari100k", "size1m", "cpu"), "atari100k_pong"),
    "dmc": (("dmc_proprio", "cpu"), "dmc_cartpole_swingup"),
}
TRAIN_RATIOS = (1024.0, 256.0, 4.0)
OPTIONS = "Any --configs, --task and --OPTION of `dreamer train` may follow."


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dreamer bench",
        description="Measure what training costs on this machine, part by part: medians and quartiles of rounds.",
        allow_abbrev=False,
    )
    add_parts(parser.add_subparsers(dest="part", metavar="PART", required=True))
    return parser


def add_parts(parts: argparse._SubParsersAction) -> None:
    """The options of each part."""

    def add(part: str, summary: str, rounds: int | None, options: str = "") -> argparse.ArgumentParser:
        added = parts.add_parser(
            part,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {options}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        if rounds is not None:
            added.add_argument("--rounds", type=count, default=rounds, help="timed turns")
        added.add_argument("--json", type=place, metavar="FILE", help="write the figures there")
        added.add_argument(
            "--compare", type=place, metavar="FILE", help="ratios to the figures that --json wrote there"
        )
        return added

    update = add("update", "one gradient step, with everything that a run does in it", 11)
    update.add_argument("--size", default="1m", help="size of the model, as in the presets size1m, size12m, ...")
    update.add_argument("--obs", choices=("vector", "image"), default="vector", help="what the agent observes")
    update.add_argument(
        "--against", choices=("plain",), help="plain: compare with all rewrites replaced by their plain forms"
    )
    update.add_argument("--protocol", action="store_true", help="time one update for each line on stdin, as JSON")
    update.add_argument("--trace", type=place, metavar="DIR", help="write a profile of one dispatch there")

    launches = add("kernels", "what a GPU would launch for an update, counted without one", None)
    launches.add_argument(
        "--sizes", nargs="+", default=["1m"], help="sizes of the model, as in the presets size1m, ..."
    )
    launches.add_argument("--obs", nargs="+", choices=("vector", "image"), default=["vector", "image"])
    launches.add_argument("--cards", nargs="+", choices=("h100", "h200"), default=["h200"])
    launches.add_argument("--launch-us", type=positive, default=2.0, help="modelled microseconds of a launch")
    launches.add_argument("--tflops", type=positive, default=500.0, help="modelled rate of products, TFLOP/s")
    streaming = "modelled rate at which a loop that is one kernel reads weights, GB/s"
    launches.add_argument("--stream-gbs", type=positive, default=100.0, help=streaming)
    launches.add_argument(
        "--flags", nargs="+", default=[], metavar="NAME=VALUE", help="XLA's, instead of the usual ones"
    )
    for part in (update, launches):
        part.add_argument("--updates-per-dispatch", type=count, metavar="K", help="K updates in one program")
        part.add_argument("--seeds", type=count, metavar="S", help="S agents in one update mapped over them")
        part.add_argument("--without", nargs="+", default=[], metavar="REWRITE", help="rewrites of kernels.py left out")

    policy = add("policy", "choosing actions", 15, OPTIONS)
    policy.add_argument("--envs", type=count, nargs="+", help="numbers of environments; default: 1 and env.num_envs")

    plan = add("plan", "decisions of the policy and of each planner, by budget", 5, OPTIONS)
    plan.add_argument("--envs", type=count, nargs="+", default=[1, 16], help="numbers of environments")
    plan.add_argument("--planners", nargs="+", metavar="NAME", help="policy, mppi, ...; default: all")

    replay = add("replay", "drawing batches, adding steps, writing latents, compared with plain copying", 100, OPTIONS)
    replay.add_argument("--capacity", type=count, default=32_000, help="steps in the buffer")
    replay.add_argument("--folder", type=place, help="folder for disk storage; default: a temporary folder")

    env = add("env", "stepping environments, by where they run; Atari also compared with ale-py's own", 15, OPTIONS)
    env.add_argument("--steps", type=count, default=100, help="of all environments, in each round")

    play = add("play", "a frame of the page of dreamer play, by who acts", 11, OPTIONS)
    play.add_argument("--frames", type=count, default=60, help="of each, in each round")
    play.add_argument("--actors", nargs="+", metavar="NAME", help="who acts; default: a person and the policy")

    loop = add("loop", "the training loop compared with the bound set by its parts", 5, OPTIONS)
    loop.add_argument(
        "--seconds", type=positive, default=15.0, help="seconds of the loop for each row; its parts not counted"
    )
    loop.add_argument(
        "--train-ratios", type=positive, nargs="+", default=TRAIN_RATIOS, help="run.train_ratio, one row each"
    )


def bench_config(options: Sequence[str]) -> Config:
    """The configuration that the rest of a command line means; the quickstart without --configs and --task."""
    configs, overrides = split_arguments(options)
    return load_config(configs if configs or "task" in overrides else [DEFAULT], overrides)


def loop_configs(options: Sequence[str]) -> dict[str, Config]:
    """Configurations by name: the command line's, or without --configs and --task one for each of three suites."""
    configs, overrides = split_arguments(options)
    if configs or "task" in overrides:
        config = load_config(configs, overrides)
        return {config.task: config}
    return {name: load_config(presets, {"task": task, **overrides}) for name, (presets, task) in SUITES.items()}


def _as_asked(request: type[Asked], given: argparse.Namespace) -> Asked:
    """A part's request, a dataclass, from the arguments of the same names."""
    names = [field.name for field in dataclasses.fields(request)]  # type: ignore[arg-type]
    return request(**{name: getattr(given, name) for name in names})


def _refuse(options: Sequence[str]) -> None:
    """Of parts that take no options of the configuration."""
    if options:
        parser().error(f"unrecognized arguments: {' '.join(options)}")


def _update(given: argparse.Namespace, options: Sequence[str]) -> Report | None:
    from dreamer.bench.bench_update import Request, bench_update

    _refuse(options)
    return bench_update(_as_asked(Request, given))


def _kernels(given: argparse.Namespace, options: Sequence[str]) -> Report:
    _refuse(options)
    hide_accelerators()
    from dreamer.bench.bench_kernels import Request, bench_kernels

    return bench_kernels(_as_asked(Request, given))


def _policy(given: argparse.Namespace, options: Sequence[str]) -> Report:
    config = _checked(bench_config(options))
    from dreamer.bench.bench_update import bench_policy

    return bench_policy(config, given.envs, given.rounds)


def _plan(given: argparse.Namespace, options: Sequence[str]) -> Report:
    names = ("policy", *SETTINGS)
    if odd := [name for name in given.planners or () if name not in names]:
        parser().error(f"expected --planners among {', '.join(names)}, got {brief(odd[0])}")
    config = _checked(bench_config(options))
    from dreamer.bench.bench_planning import bench_planning

    return bench_planning(config, given.envs, given.rounds, given.planners)


def _replay(given: argparse.Namespace, options: Sequence[str]) -> Report:
    config = _checked(bench_config(options))
    from dreamer.bench.bench_replay import bench_replay

    return bench_replay(config, given.rounds, given.capacity, given.folder)


def _env(given: argparse.Namespace, options: Sequence[str]) -> Report:
    config = _checked(bench_config(options))
    from dreamer.bench.bench_env import bench_env

    return bench_env(config, given.rounds, given.steps)


def _play(given: argparse.Namespace, options: Sequence[str]) -> Report:
    config = _checked(bench_config(options))
    from dreamer.bench.bench_play import bench_play

    return bench_play(config, given.actors or ("person", "policy"), given.rounds, given.frames)


def _loop(given: argparse.Namespace, options: Sequence[str]) -> Report:
    configs = {name: _checked(config) for name, config in loop_configs(options).items()}
    from dreamer.bench.bench_loop import bench_loop

    return bench_loop(configs, given.train_ratios, given.seconds, given.rounds)


def _checked(config: Config) -> Config:
    """A configuration whose task exists, on the device it asks for."""
    from dreamer.envs.registry import check_task

    check_task(config.task)
    if config.run.platform == "cpu":
        hide_accelerators()
    from dreamer.run.devices import find_devices

    find_devices(config.run.platform)
    return config


PARTS: dict[str, Callable[[argparse.Namespace, Sequence[str]], Report | None]] = {
    "update": _update,
    "kernels": _kernels,
    "policy": _policy,
    "plan": _plan,
    "replay": _replay,
    "env": _env,
    "play": _play,
    "loop": _loop,
}


def run(arguments: Sequence[str]) -> int:
    given, options = parser().parse_known_args(arguments)

    from dreamer.bench.measuring import read_report, save_report, show

    other = None if given.compare is None else read_report(given.compare, given.part)
    if given.json is not None:
        check_file(given.json)
    for folder in (getattr(given, "folder", None), getattr(given, "trace", None)):
        if folder is not None:
            make_folder(folder)
    report = PARTS[given.part](given, options)
    if report is not None:
        show(report, other)
        if given.json is not None:
            save_report(given.json, report)
    return 0
