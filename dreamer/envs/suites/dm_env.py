"""Any `dm_env.Environment`, from a user's function, a Python path or an entry point.

A LAST step with discount 0 is terminal, with any other discount a time limit; the discounts of other steps are not
used. Nested specs become flat keys joined by ``/``; a single observation is called ``image``, ``vector`` or
``discrete``, a single action ``action``. Whoever makes the environment seeds it. It cannot be
restored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamer.envs.interface import TaskError, Transition, TransitionError, as_rgb, transition
from dreamer.envs.return_values import as_classes, as_reward, as_vector, check_no_picture
from dreamer.envs.spaces import LARGE, Path, as_picture, check_distinct, converted, joined, part_of, rescale
from dreamer.types import Space

if TYPE_CHECKING:
    import dm_env

#: What messages call the declaration of an observation.
SPEC = "observation_spec"
#: Path inside the spec, our space, and the conversion of a value: theirs to ours (observations), or back (actions).
Leaf = tuple[Path, Space, Callable[[Any], Any]]


def adopted(made: Any) -> Any:
    """A `dm_env.Environment` behind our interface; anything else as it is. Does not need dm_env installed."""
    module = sys.modules.get("dm_env")
    return DmEnv(made) if module is not None and isinstance(made, module.Environment) else made


class DmEnv:
    """One environment. TaskError for specs that the agent cannot see, act in, or be rewarded by."""

    def __init__(self, env: dm_env.Environment) -> None:
        self._env = env
        if math.prod(env.reward_spec().shape) != 1:
            raise TaskError(f"expected a single number as reward, got {env.reward_spec()}; sum it in the environment")
        seen = [(joined(path), _observed(path, spec)) for path, spec in _walk(env.observation_spec(), ())]
        acted = [(joined(("action", *path)), _acted(path, spec)) for path, spec in _walk(env.action_spec(), ())]
        for what, leaves in (("observation", seen), ("action", acted)):
            check_distinct(what, [(name, leaf[0]) for name, leaf in leaves])
        self._see = {name or leaf[1].kind: leaf for name, leaf in seen}
        self._act = dict(acted)
        self.observation_spaces = {key: space for key, (_, space, _) in self._see.items()}
        self.action_spaces = {key: space for key, (_, space, _) in self._act.items()}
        self._picture: np.ndarray | None = None

    def reset(self) -> Transition:
        return transition(self._observe(self._env.reset().observation), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        values = {path: convert(action[key]) for key, (path, _, convert) in self._act.items()}
        step = self._env.step(_built(self._env.action_spec(), (), values))
        if step.first():
            raise TransitionError(
                "expected a step of the episode, got the first of another; do not reset within a step"
            )
        terminal = step.last() and step.discount == 0
        reward = as_reward(step.reward)
        return transition(self._observe(step.observation), reward, False, step.last(), bool(terminal))

    def render(self) -> np.ndarray | None:
        """The first image of the observation, or None."""
        return self._picture

    def close(self) -> None:
        self._env.close()

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        flat = {
            key: converted(key, convert, part_of(observation, path, key, SPEC), SPEC)
            for key, (path, _, convert) in self._see.items()
        }
        images = [key for key, space in self.observation_spaces.items() if space.kind == "image"]
        self._picture = as_rgb(flat[images[0]]) if images else None
        return flat


def _walk(spec: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(spec, Mapping):
        for key, part in spec.items():
            yield from _walk(part, (*path, key))
    elif isinstance(spec, list | tuple):
        for position, part in enumerate(spec):
            yield from _walk(part, (*path, position))
    else:
        yield path, spec


def _built(spec: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    """Values nested as in the spec."""
    if isinstance(spec, Mapping):
        return {key: _built(part, (*path, key), values) for key, part in spec.items()}
    if isinstance(spec, list | tuple):
        return type(spec)([_built(part, (*path, position), values) for position, part in enumerate(spec)])
    return values[path]


def _observed(path: Path, spec: Any) -> Leaf:
    from dm_env import specs

    shape, kind, what = tuple(spec.shape), np.dtype(spec.dtype), f"observation {joined(path) or 'vector'!r}"
    if isinstance(spec, specs.DiscreteArray):
        count = int(spec.num_values)
        return path, Space("discrete", (), (count,)), lambda value: as_classes(value, (), 0, count)
    if kind == np.bool_:
        return path, Space("discrete", shape, (2,) * math.prod(shape)), lambda value: as_classes(value, shape, 0, 2)
    if kind == np.uint8 and len(shape) in (2, 3):
        return path, *as_picture(shape, what)
    if not np.issubdtype(kind, np.number) or np.issubdtype(kind, np.complexfloating):
        raise TaskError(
            f"expected numbers or booleans in the observation, got {spec}; leave it out or encode it in the environment"
        )
    bounds = (float(np.min(getattr(spec, "minimum", -np.inf))), float(np.max(getattr(spec, "maximum", np.inf))))
    check_no_picture(shape, kind, bounds, what)
    return path, Space("vector", shape), lambda value: as_vector(value, shape)


def _acted(path: Path, spec: Any) -> Leaf:
    from dm_env import specs

    dtype = np.dtype(spec.dtype)
    if isinstance(spec, specs.DiscreteArray):
        return path, Space("discrete", (), (int(spec.num_values),)), lambda action: dtype.type(action)
    if dtype == np.bool_:
        return path, Space("discrete", spec.shape, (2,) * math.prod(spec.shape)), lambda action: np.array(action, bool)
    low, high = (np.broadcast_to(getattr(spec, name, np.inf), spec.shape) for name in ("minimum", "maximum"))
    if not (np.abs(low) < LARGE).all() or not (np.abs(high) < LARGE).all():
        raise TaskError(
            f"expected an action spec that is discrete or has finite bounds, got {spec}; bound it in the environment"
        )
    low, high = low.astype(np.float64), high.astype(np.float64)
    whole = np.issubdtype(dtype, np.integer)

    def convert(action: np.ndarray) -> np.ndarray:
        value = rescale(action, low, high)
        # The cast may round past a bound.
        return np.clip((np.rint(value) if whole else value).astype(dtype), spec.minimum, spec.maximum)

    return path, Space("vector", spec.shape), convert
