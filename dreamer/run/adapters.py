"""Adapters between other programs and a trained agent: their observations, checked, to ours; its actions to theirs.

What does not fit is refused with a ValueError before the agent remembers any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import gymnasium.spaces as gs
import numpy as np
from gymnasium.vector import VectorEnv

from dreamer.envs.interface import TransitionError
from dreamer.envs.spaces import action_leaves, flatten, observation_leaves, surplus, unflatten
from dreamer.types import ACTION_MASK, LOG_PREFIX, Space, Spaces

#: What Gymnasium's methods return, by the number of values: its name, and how to take the observation out of it.
_RETURNED = {
    2: ("the pair (observation, info) of env.reset()", "obs, info = env.reset()"),
    5: ("the five values of env.step()", "obs, reward, terminated, truncated, info = env.step(action)"),
}


class Adapter(Protocol):
    """tuples: whether an observation itself is a tuple."""

    tuples: bool

    def to_agent(self, observation: Any) -> dict[str, np.ndarray]:
        """One observation by name, in the agent's spaces. ValueError if it does not fit."""

    def from_agent(self, action: Mapping[str, np.ndarray]) -> Any:
        """One action in the form of the other program."""


class NamedAdapter:
    """For a program that uses the agent's own form: a mapping by the names of training, or a bare value for a single
    one."""

    tuples = False

    def __init__(self, observations: Spaces) -> None:
        self._spaces = dict(observations)

    def to_agent(self, observation: Any) -> dict[str, np.ndarray]:
        spaces = self._spaces
        bare = not isinstance(observation, Mapping) and len(spaces) == 1
        named = {next(iter(spaces)): observation} if bare else observation
        if not isinstance(named, Mapping):
            raise ValueError(f"expected a mapping with {', '.join(spaces)}, got {type(observation).__name__}")
        values = {str(k): _array(k, v) for k, v in named.items() if not str(k).startswith(LOG_PREFIX)}
        odd = sorted(spaces.keys() ^ values.keys())
        if not odd:
            odd = [k for k, s in spaces.items() if values[k].shape != s.shape or not _converts(values[k], s.dtype)]
        if odd:
            wanted = ", ".join(f"{k} {s.dtype}{list(s.shape)}" for k, s in spaces.items())
            found = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in values.items()) or "nothing"
            raise ValueError(f"expected the observations of training, {wanted}; got {found}{self._remedy(values, odd)}")
        return checked(spaces, values)

    def _remedy(self, values: Mapping[str, np.ndarray], odd: Sequence[str]) -> str:
        if "is_first" in odd:
            return "; say that an episode begins with `first`"
        for key in odd:
            image = key in self._spaces and self._spaces[key].kind == "image"
            if image and key in values and values[key].dtype.kind in "bf":
                return f"; {key} is in bytes from 0 to 255: (255 * image).astype(np.uint8), if yours is from 0 to 1"
        return f"; differing: {', '.join(odd)}" if len(values) > 1 else ""

    def from_agent(self, action: Mapping[str, np.ndarray]) -> Any:
        return next(iter(action.values())) if len(action) == 1 else dict(action)


class EnvAdapter:
    """For a program that plays a Gymnasium environment, alone or in a vector of them."""

    def __init__(self, env: Any, observations: Spaces, actions: Spaces) -> None:
        """ValueError if `env` is not a Gymnasium environment, or if its spaces are not those of training."""
        see, act = spaces_of(env)
        self._observation_space, self._action_space, self._spaces = see, act, dict(observations)
        self._see, self._act = observation_leaves(see), action_leaves(act)
        self.tuples = isinstance(see, gs.Tuple)
        for what, leaves, spaces in (("observations", self._see, observations), ("actions", self._act, actions)):
            found = {leaf.key: leaf.space for leaf in leaves}
            if found != dict(spaces):
                raise ValueError(f"expected an environment with the {what} of training, {dict(spaces)}, got {found}")

    def to_agent(self, observation: Any) -> dict[str, np.ndarray]:
        try:
            named = flatten(self._see, mapped(lambda leaf: _array("the observation", leaf), observation))
        except TransitionError as error:
            raise ValueError(str(error)) from error
        if unknown := surplus(self._observation_space, observation):
            raise ValueError(f"expected an observation with {', '.join(named)}, got {', '.join(unknown)} beside them")
        return checked(self._spaces, named)

    def from_agent(self, action: Mapping[str, np.ndarray]) -> Any:
        return unflatten(self._action_space, self._act, action)


def spaces_of(env: Any) -> tuple[gs.Space, gs.Space]:
    """(observation space, action space) of an environment, or of one in a vector. ValueError for anything else."""
    prefix = "single_" if isinstance(env, VectorEnv) else ""
    see, act = (getattr(env, f"{prefix}{name}_space", None) for name in ("observation", "action"))
    if isinstance(env, type) or not isinstance(see, gs.Space) or not isinstance(act, gs.Space):
        got = env.__name__ if isinstance(env, type) else repr(env) if isinstance(env, str) else type(env).__name__
        raise ValueError(
            f"expected a Gymnasium environment with spaces of gymnasium.spaces, got {got}; make one with "
            "gymnasium.make(...), or leave env out and act on observations by the names of training"
        )
    return see, act


def checked(spaces: Spaces, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of the right shapes in the spaces' dtypes. ValueError, naming the place, for a value outside them."""
    result = {}
    for key, space in spaces.items():
        value = named[key]
        with np.errstate(over="ignore"):
            ours = value.astype(space.dtype)
        inside, wanted = _inside(space, value, ours)
        if not inside.all():
            place = tuple(int(i) for i in np.argwhere(~inside)[0])
            at = f"{key}[{', '.join(map(str, place))}]" if place else key
            raise ValueError(f"expected {wanted} in observation {key!r}, got {value[place]} as {at}")
        result[key] = ours
    return result


def _inside(space: Space, value: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, str]:
    """Which numbers of a value are in its space, and what the space allows, in words. ours: the value in its dtype."""
    if space.kind == "vector":
        return np.isfinite(ours), "finite numbers (float32)"
    if space.classes is None:
        return (value >= 0) & (value <= 255), "bytes from 0 to 255"
    counts = np.array(space.classes).reshape(space.shape)
    words = f"classes from 0 to {max(space.classes) - 1}" if len(set(space.classes)) == 1 else f"classes below {counts}"
    return (value >= 0) & (value < counts), words


# --- Batches -----------------------------------------------------------------------------------


def mapped(function: Callable[..., Any], *nests: Any) -> Any:
    """Applies `function` to the leaves of equally nested mappings and tuples."""
    first = nests[0]
    if isinstance(first, Mapping):
        return {key: mapped(function, *(nest[key] for nest in nests)) for key in first}
    if isinstance(first, tuple):
        return tuple(mapped(function, *parts) for parts in zip(*nests, strict=True))
    return function(*nests)


def rows(observations: Any, tuples: bool) -> tuple[list[Any], bool]:
    """(N observations, whether they came stacked: as one whose leaves have a leading axis N). ValueError if N is 0.

    tuples: whether a tuple is a nested observation, not a sequence of them.
    """
    if isinstance(observations, list) or (isinstance(observations, tuple) and not tuples):
        found, stacked = list(observations), False
    else:
        sizes: list[tuple[int, ...]] = []
        whole = mapped(lambda leaf: _array("observations", leaf), observations)
        mapped(lambda leaf: sizes.append(leaf.shape[:1]), whole)
        if len(set(sizes)) != 1 or sizes[0] == ():
            raise ValueError(
                "expected observations stacked along a leading axis, or a list of them, one for each environment, got "
                f"leading axes {[list(size) for size in sizes]}"
            )
        found, stacked = [mapped(lambda leaf: leaf[i], whole) for i in range(sizes[0][0])], True  # noqa: B023
    if not found:
        raise ValueError("expected the observation of at least one environment, got none")
    return found, stacked


def stack(actions: Sequence[Any]) -> Any:
    """N actions as one whose leaves have a leading axis N."""
    return mapped(lambda *leaves: np.stack(leaves), *actions)


# --- Reading, with words for what else it may be -----------------------------------------------


def read_observation(adapter: Adapter, observation: Any) -> dict[str, np.ndarray]:
    """One observation by name. ValueError for anything else, saying what it seems to be."""
    try:
        seen = adapter.to_agent(observation)
    except ValueError as error:
        count = _count(adapter, observation)
        batch = f"; it is a batch of {count}: one for each of {count} environments takes act_batch" if count else ""
        raise ValueError(_returned(observation) or f"{error}{batch}") from error
    if ACTION_MASK in seen and not seen[ACTION_MASK].any():
        raise ValueError(f"expected an {ACTION_MASK} that allows at least one action, got one that forbids all")
    return seen


def read_batch(adapter: Adapter, observations: Any) -> tuple[list[dict[str, np.ndarray]], bool]:
    """(N observations by name, stacked or not; see `rows`). ValueError names an environment that does not fit."""
    seen: list[dict[str, np.ndarray]] = []
    found: list[Any] = []
    try:
        found, stacked = rows(observations, adapter.tuples)
        for observation in found:
            seen.append(adapter.to_agent(observation))
    except ValueError as error:
        where = f"environment {len(seen)}: " if found else ""
        one = "; it is a single observation, which act takes" if _is_one(adapter, observations) else ""
        raise ValueError(_returned(observations) or f"{where}{error}{one}") from error
    return seen, stacked


def _returned(value: Any) -> str | None:
    """What to say about something that looks like the whole return value of Gymnasium's reset or step; else None."""
    if not isinstance(value, tuple) or len(value) not in _RETURNED or not isinstance(value[-1], Mapping):
        return None
    what, how = _RETURNED[len(value)]
    return f"expected an observation, got {what}; pass its first: {how}"


def _count(adapter: Adapter, observation: Any) -> int:
    """The number of observations in something that is not a single one; 0: it is not a batch either."""
    try:
        found, _ = rows(observation, adapter.tuples)
        return len(found) if _is_one(adapter, found[0]) else 0
    except ValueError:
        return 0


def _is_one(adapter: Adapter, observation: Any) -> bool:
    try:
        adapter.to_agent(observation)
    except ValueError:
        return False
    return True


def _array(key: Any, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # Whatever arrays of other libraries raise: on another device, with a gradient, ...
        reason = str(error).partition("\n")[0]
        raise ValueError(f"expected numbers as {key!r}, got {type(value).__name__}: {reason}") from error


def _converts(value: np.ndarray, dtype: np.dtype) -> bool:
    """Whether the numbers keep their meaning: integers of any width do; floats or booleans as bytes do not."""
    if dtype == np.uint8 or value.dtype.kind in "iu":
        return value.dtype.kind in "iu"
    return np.can_cast(value.dtype, dtype, "same_kind")
