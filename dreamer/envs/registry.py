"""The table of suites, and environments made from task names (``suite_name``)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence

from dreamer.env_config import EnvConfig
from dreamer.envs.faults import in_words, place
from dreamer.envs.interface import Env, TaskError, VectorEnv
from dreamer.envs.options import wrap
from dreamer.envs.suites import (
    atari,
    atari_vector,
    bsuite,
    crafter,
    custom,
    dmc,
    dmlab,
    gym,
    memory_maze,
    minecraft,
    minigrid,
    procgen,
    toy,
    vizdoom,
)
from dreamer.envs.workers.fence import fenced
from dreamer.values import suggestion


@dataclasses.dataclass(frozen=True)
class Suite:
    """One row of the table.

    make        (name, config, seed) -> Env; `name` is the task without the suite.
    tasks       Names to list.
    check       TaskError if a name cannot be made; None: exactly the listed names can.
    package     Optional package that it needs, and this project's pip extra that installs it, if there is one.
    beside      Commands that install what the extra cannot.
    repeat      Action repeat set by an option of its own.
    process     Whether it is slow enough to deserve a process of its own.
    vector      (name, config, seeds) -> all environments at once, or None to make them one by one.
    best_score  (name, config) -> score of perfect play, where known.
    normalized  (name, score) -> score where 0 is random and 1 human play, where known.
    summary     Means and maxima of the `log/` keys of some episodes -> further figures about them, by name.
    """

    description: str
    make: Callable[[str, EnvConfig, int], Env]
    tasks: Callable[[], Sequence[str]]
    check: Callable[[str], object] | None = None
    package: tuple[str, str | None] | None = None
    beside: str | None = None
    repeat: Callable[[EnvConfig], int] = lambda config: 1
    process: Callable[[EnvConfig], bool] = lambda config: True
    vector: Callable[[str, EnvConfig, Sequence[int]], VectorEnv | None] = lambda name, config, seeds: None
    best_score: Callable[[str, EnvConfig], float | None] | None = None
    normalized: Callable[[str, float], float | None] | None = None
    summary: Callable[[Sequence[Mapping[str, float]]], Mapping[str, float]] | None = None

    @property
    def installation(self) -> str:
        """Commands that install what it needs; empty if it needs nothing."""
        extra = f"pip install 'dreamer[{self.package[1]}]'" if self.package and self.package[1] else None
        return " && ".join(command for command in (extra, self.beside) if command)


def _atari(description: str) -> Suite:
    return Suite(
        description,
        atari.make,
        atari.tasks,
        atari.check,
        repeat=lambda config: config.atari.repeat,
        vector=atari_vector.make,
        normalized=atari.human_normalized,
    )


#: Suites whose environments are, or may be, Gymnasium's.
_gym = functools.partial(Suite, repeat=lambda config: config.gym.repeat, process=lambda config: config.gym.render)

SUITES: Mapping[str, Suite] = {
    "toy": Suite(
        "Built-in games: catch, a slippery grid",
        toy.make,
        toy.tasks,
        process=lambda config: False,
        best_score=toy.best_score,
    ),
    "atari": _atari("Atari 2600, 200M frames protocol"),
    "atari100k": _atari("Atari 2600, 400k frames protocol"),
    "crafter": Suite(
        "Crafter survival game", crafter.make, crafter.tasks, package=("crafter", "crafter"), summary=crafter.summary
    ),
    "dmc": Suite(
        "DeepMind Control, from state or pixels",
        dmc.make,
        dmc.tasks,
        package=("dm_control", "dmc"),
        repeat=lambda config: config.dmc.repeat,
        process=lambda config: config.dmc.pixels,
    ),
    "bsuite": Suite(
        "BSuite, experiments on single abilities",
        bsuite.make,
        bsuite.tasks,
        package=("bsuite", "bsuite"),
        process=lambda config: False,
    ),
    "minigrid": Suite(
        "MiniGrid worlds as pictures", minigrid.make, minigrid.tasks, minigrid.check, package=("minigrid", "minigrid")
    ),
    "memorymaze": Suite(
        "Memory Maze, coloured balls to be found again",
        memory_maze.make,
        memory_maze.tasks,
        package=("memory_maze", "memorymaze"),
    ),
    "vizdoom": Suite("ViZDoom: take cover", vizdoom.make, vizdoom.tasks, package=("vizdoom", "vizdoom")),
    "procgen": Suite(
        "Procgen, 16 games with endless levels",
        procgen.make,
        procgen.tasks,
        package=("procgen", "procgen"),
        beside="pip install --no-deps procgen-mirror gym3",
        process=lambda config: config.procgen.size != procgen.NATIVE,
    ),
    "minecraft": Suite(
        "Minecraft: the way to a diamond",
        minecraft.make,
        minecraft.tasks,
        package=("minerl", None),
        beside="apt-get install openjdk-8-jdk && pip install git+https://github.com/minerllabs/minerl@v0.4.4",
    ),
    "dmlab": Suite(
        "DeepMind Lab: the 30 levels of DMLab-30",
        dmlab.make,
        dmlab.tasks,
        package=("deepmind_lab", None),
        beside="git clone https://github.com/google-deepmind/lab && cd lab && "
        "bazel build -c opt --python_version=PY3 //python/pip_package:build_pip_package && "
        "./bazel-bin/python/pip_package/build_pip_package /tmp/dmlab && pip install /tmp/dmlab/*.whl",
        repeat=lambda config: config.dmlab.repeat,
    ),
    "gym": _gym("Any Gymnasium id", gym.make, gym.tasks, gym.check),
    "py": _gym("A class or function of yours: py_module:NAME or py_file.py:NAME", custom.make, lambda: (), custom.find),
}


def list_suites() -> Mapping[str, Suite]:
    """The table, by suite name, with the suites that installed packages add."""
    return {**{name: _plugin(name) for name in custom.plugins()}, **SUITES}


def _plugin(suite: str) -> Suite:
    source = f"From the entry point {custom.plugins()[suite].value}"
    make = functools.partial(custom.make_plugin, suite)
    return _gym(source, make, lambda: (), lambda name: custom.load_plugin(suite))


def split_task(task: str) -> tuple[Suite, str]:
    """``atari_ms_pacman`` -> (the atari suite, ``ms_pacman``). TaskError for an unknown suite."""
    prefix, _, name = task.partition("_")
    rows = SUITES if prefix in SUITES else list_suites()  # looking for plugins reads files
    if prefix not in rows:
        full = [f"{suite}_{name}" for suite, row in rows.items() for name in row.tasks()]
        raise TaskError(
            f"expected a task suite_name with suite one of {', '.join(rows)}, got {task!r}"
            f"{suggestion(task, full, suggestion(prefix, rows))}"
        )
    return rows[prefix], name


def check_task(task: str) -> None:
    """TaskError if the task is unknown or its package is not installed. Quick: makes nothing."""
    suite, name = split_task(task)
    if suite.check is None and name not in suite.tasks():
        prefix = task.partition("_")[0]
        raise TaskError(
            f"expected a task of the suite {prefix!r}, got {task!r}"
            f"{suggestion(name, suite.tasks(), prefix=prefix + '_')}; `dreamer envs` lists all"
        )
    if suite.package is not None and importlib.util.find_spec(suite.package[0]) is None:
        raise TaskError(
            f"expected the package {suite.package[0]!r} for {task!r}, which is not installed; "
            f"install it with `{suite.installation}`"
        )
    if suite.check is not None:
        _import_theirs(task, suite.check, name)


def _import_theirs(task: str, check: Callable[[str], object], name: str) -> None:
    """Runs a suite's check, which may import third-party code. TaskError if that fails or tries to end the program."""
    try:
        fenced(check, name)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"expected code for {task!r} that can be imported, got {in_words(error)} ({place(error)}); correct it"
        ) from error


def list_tasks() -> dict[str, list[str]]:
    """Full task names by suite."""
    return {name: [f"{name}_{task}" for task in suite.tasks()] for name, suite in list_suites().items()}


def make_env(task: str, config: EnvConfig, seed: int) -> Env:
    """One environment. TaskError if the task or an option cannot work."""
    check_task(task)
    suite, name = split_task(task)
    return wrap(suite.make(name, config, seed), config, seed, suite.repeat(config))


def frames_per_step(task: str, config: EnvConfig) -> int:
    """Environment frames per agent step: `env.repeat` or the suite's own, one of which is 1 (`envs.options`).

    A name that is not in the table stands for a user's Gymnasium environment.
    """
    suite = SUITES.get(task.partition("_")[0])
    return config.repeat * (config.gym.repeat if suite is None else suite.repeat(config))


def best_score(task: str, config: EnvConfig) -> float | None:
    """The score of perfect play, where it is known."""
    suite, name = split_task(task)
    return None if suite.best_score is None else suite.best_score(name, config)


def human_normalized(task: str, score: float) -> float | None:
    """0 for random and 1 for human play on Atari; None where no such scores are published."""
    suite, name = split_task(task)
    return None if suite.normalized is None else suite.normalized(name, score)


def summary(task: str, episodes: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Further figures about the logs of some episodes, such as Crafter's score; none for most suites."""
    suite, _ = split_task(task)
    return {} if suite.summary is None or not episodes else suite.summary(episodes)
