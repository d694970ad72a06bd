"""Ways to save and restore a Gymnasium environment that has no such methods. None is trusted: `gym.py` tries them.

An environment and its wrappers are a chain of layers. Attributes that cannot be pickled, such as a window, stay as they
are in the restored environment.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cloudpickle
import gymnasium
from gymnasium.utils import EzPickle

from dreamer.envs.workers.fence import fenced

#: The attribute of a wrapper that holds the layer below.
BELOW = "env"
#: Values that are shared anyway: finding one in two places means nothing.
PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type, types.FunctionType, type(None))


def layers(env: gymnasium.Env) -> list[gymnasium.Env]:
    """The outermost wrapper first, the environment itself last."""
    chain = [env]
    while isinstance(chain[-1], gymnasium.Wrapper):
        chain.append(chain[-1].env)
    return chain


class _Pickler(cloudpickle.Pickler):
    """Leaves out the layers, and saves an EzPickle object by its attributes: its own way is to be constructed again."""

    def __init__(self, file: io.BytesIO, chain: list[gymnasium.Env]) -> None:
        super().__init__(file)
        self._places = {id(layer): index for index, layer in enumerate(chain)}

    def persistent_id(self, obj: Any) -> int | None:
        return self._places.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, EzPickle):
            return object.__new__, (type(obj),), vars(obj), None, None, _set_attributes
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, chain: list[gymnasium.Env]) -> None:
        super().__init__(file)
        self._chain = chain

    def persistent_load(self, place: int) -> gymnasium.Env:
        return self._chain[place]


def _set_attributes(obj: Any, attributes: Mapping[str, Any]) -> None:
    vars(obj).update(attributes)


def _dumps(value: Any, chain: list[gymnasium.Env]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, chain).dump(value)
    return file.getvalue()


def _attributes(layer: gymnasium.Env, chain: list[gymnasium.Env]) -> tuple[dict[str, Any], set[str]]:
    """(attributes that can be pickled, names of those that cannot)."""
    found = {name: value for name, value in vars(layer).items() if name != BELOW}
    stay = set()
    for name, value in found.items():
        try:
            fenced(_dumps, value, chain)
        except Exception:  # whatever an object raises that refuses to be pickled
            stay.add(name)
    return {name: value for name, value in found.items() if name not in stay}, stay


def _save_attributes(env: gymnasium.Env, count: int | None = None) -> bytes:
    chain = layers(env)
    return _dumps([_attributes(layer, chain) for layer in chain[:count]], chain)


def _load_attributes(env: gymnasium.Env, saved: bytes) -> gymnasium.Env:
    chain = layers(env)
    for layer, (attributes, stay) in zip(chain, _Unpickler(io.BytesIO(saved), chain).load(), strict=False):
        before = dict(vars(layer))
        for name in set(before) - set(attributes) - stay - {BELOW}:
            delattr(layer, name)
        _set_attributes(layer, attributes)
        moved = {
            id(old): attributes[name]
            for name, old in before.items()
            if name in attributes and not isinstance(old, PLAIN) and type(old) is type(attributes[name])
        }
        for name in stay & set(before):
            _relink(before[name], moved)
    return env


def _relink(holder: Any, moved: Mapping[int, Any], depth: int = 3) -> None:
    """Makes what stayed, such as a renderer, refer to the new attributes instead of the replaced ones."""
    inside = holder if isinstance(holder, dict) else getattr(holder, "__dict__", None)
    if depth == 0 or not isinstance(inside, dict) or isinstance(holder, types.ModuleType):
        return
    for name, value in list(inside.items()):
        if id(value) in moved:
            inside[name] = moved[id(value)]
        else:
            _relink(value, moved, depth - 1)


def _save_by_methods(env: gymnasium.Env) -> tuple[bytes, Any]:
    return _save_attributes(env, -1), env.unwrapped.get_state()  # type: ignore[attr-defined]


def _load_by_methods(env: gymnasium.Env, saved: tuple[bytes, Any]) -> gymnasium.Env:
    env.unwrapped.set_state(saved[1])  # type: ignore[attr-defined]
    return _load_attributes(env, saved[0])


class Way(NamedTuple):
    """One way to save and restore an environment.

    fits  Whether it is worth a try.
    save  environment -> something picklable.
    load  (environment, what was saved) -> the environment to continue with.
    """

    fits: Callable[[gymnasium.Env], bool]
    save: Callable[[gymnasium.Env], Any]
    load: Callable[[gymnasium.Env, Any], gymnasium.Env]


#: In the order in which they are tried.
WAYS: Mapping[str, Way] = {
    "methods": Way(
        lambda env: all(callable(getattr(env.unwrapped, name, None)) for name in ("get_state", "set_state")),
        _save_by_methods,
        _load_by_methods,
    ),
    "attributes": Way(lambda env: True, _save_attributes, _load_attributes),
    "pickle": Way(lambda env: True, cloudpickle.dumps, lambda env, saved: pickle.loads(saved)),
}
