"""Third-party environments, without an edit to this project.

By a Python path: ``py_my_package.my_module:MyEnv`` or ``py_folder/my_file.py:MyEnv`` names a class or a function. By an
entry point: a package with::

    [project.entry-points."dreamer.envs"]
    mygames = "my_package.envs:make"

adds the suite ``mygames``, and ``mygames_maze`` calls ``make`` for the name ``maze``.

A Gymnasium class is called with ``env.gym.kwargs``; anything else also with those of ``name``, ``config`` (our
`EnvConfig`) and ``seed`` that it has parameters for. It returns a ``gymnasium.Env``, to which ``env.gym.*`` apply, a
``dm_env.Environment``, or an environment with our own interface (`dreamer.envs.interface.Env`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import gymnasium

from dreamer.env_config import EnvConfig
from dreamer.envs.interface import Env, TaskError
from dreamer.envs.suites.dm_env import adopted
from dreamer.envs.suites.gym import GymEnv, old_gym, render_modes
from dreamer.envs.suites.packages import own_module
from dreamer.paths import PathError, absolute

GROUP = "dreamer.envs"
#: Arguments offered to a class or function of another package.
OFFERED = ("name", "config", "seed")
#: Files of environments by the names that tasks give them.
_places: dict[str, Path] = {}


@functools.cache
def plugins() -> Mapping[str, EntryPoint]:
    """The suites that installed packages add, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_plugin(suite: str) -> Callable[..., Any]:
    """What the entry point names. TaskError if it cannot be imported."""
    entry = plugins()[suite]
    try:
        return _callable(entry.load(), entry.value)
    except (ImportError, AttributeError) as error:
        raise TaskError(
            f"expected the suite {suite!r} at {entry.value}, where its package says it is, got {error}; "
            "install the package again, or remove it"
        ) from error


def find(name: str) -> Callable[..., Any]:
    """The class or function behind ``module:attribute`` or ``file.py:attribute``. TaskError if there is none."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise TaskError(
            f"expected py_module:NAME or py_file.py:NAME, the place of a class or function, got py_{name}; "
            "for example py_my_package.envs:MyEnv"
        )
    try:
        module = _file_module(place) if place.endswith(".py") else own_module(place)
    except (ImportError, PathError) as error:
        raise TaskError(f"expected an importable module {place!r} for py_{name} ({error}); install it") from error
    if not hasattr(module, attribute):
        where = "" if place.endswith(".py") else f" ({getattr(module, '__file__', None) or 'a folder'})"
        raise TaskError(
            f"expected a class or function {attribute!r} in {place}{where}, which has none; correct the name"
            + (f", or name the file: py_{place}.py:{attribute}" if where else "")
        )
    return _callable(getattr(module, attribute), name)


def make(name: str, config: EnvConfig, seed: int) -> Env:
    """``py_NAME``."""
    return build(_Recipe("py", name, config.gym.kwargs), config, seed)


def make_plugin(suite: str, name: str, config: EnvConfig, seed: int) -> Env:
    """``SUITE_NAME`` of an entry point."""
    return build(_Recipe(suite, name, config.gym.kwargs), config, seed)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to make one environment; equal ones make equal environments, up to the seed."""

    suite: str
    name: str
    kwargs: dict[str, Any] = dataclasses.field(compare=False)

    def __call__(self, config: EnvConfig, seed: int) -> Any:
        target = find(self.name) if self.suite == "py" else load_plugin(self.suite)
        kwargs = copy.deepcopy(self.kwargs)  # they may change it
        if isinstance(target, type) and issubclass(target, gymnasium.Env):
            accepted = inspect.signature(target).parameters
            if "render_mode" in accepted and "rgb_array" in render_modes(target):
                kwargs.setdefault("render_mode", "rgb_array")
        else:
            accepted = inspect.signature(target).parameters
            offered = {"name": self.name, "config": config, "seed": seed}
            kwargs |= {key: offered[key] for key in OFFERED if key in accepted}
        try:
            return target(**kwargs)
        except TypeError as error:
            raise TaskError(f"could not make {self.suite}_{self.name} with {sorted(kwargs)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Again:
    """Makes one more environment, to check that its state can be restored."""

    recipe: _Recipe
    options: str
    config: EnvConfig = dataclasses.field(compare=False)

    def __call__(self) -> gymnasium.Env:
        return self.recipe(self.config, 0)


def build(recipe: _Recipe, config: EnvConfig, seed: int) -> Env:
    """The environment behind our interface. TaskError if the recipe makes something else."""
    made = adopted(recipe(config, seed))
    if isinstance(made, gymnasium.Env):
        return GymEnv(made, config.gym, seed, _Again(recipe, repr(config), config))
    task = f"{recipe.suite}_{recipe.name}"
    if not isinstance(made, Env):
        raise TaskError(
            f"expected a gymnasium.Env or a dm_env.Environment for {task}, or an object with observation_spaces, "
            f"action_spaces, reset, step, render and close, got {type(made).__name__}{old_gym(made)}"
        )
    if config.gym.repeat > 1:
        raise TaskError(f"expected env.gym.repeat only for a gymnasium.Env, got {config.gym.repeat} for {task}")
    return made


def _callable(target: Any, place: str) -> Callable[..., Any]:
    if not callable(target):
        raise TaskError(f"expected a class or function at {place}, got {type(target).__name__}; name one of those")
    return target


def _found(name: str) -> Path:
    """The file of a name or, where a relative name leads nowhere now, the file that it led to before: an environment
    may have changed the working folder since. PathError if there is neither a file nor a working folder."""
    try:
        path = Path(os.path.realpath(absolute(name)))
    except PathError:
        if name in _places:
            return _places[name]
        raise
    if os.path.isfile(path):
        _places[name] = path
    return _places.get(name, path)


def _file_module(place: str) -> Any:
    """The module of a file, imported once; it can import its neighbours."""
    path = _found(place)
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    if not os.path.isfile(path):
        raise ImportError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
