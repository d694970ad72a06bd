"""What every environment looks like from inside: transitions, `Env` and `VectorEnv`.

An episode of k actions has k + 1 transitions. The action stored with a transition is the one taken
*after seeing* it; the reward is the one received *on arriving* there::

    transition   0          1          2    ...    k          | next episode: 0'
    reward       0          r1         r2          rk         | 0
    is_first     True       False      False       False      | True
    is_last      False      False      False       True       | False
    is_terminal  False      False      False       True if the task ended, False at a time limit
    action       a0         a1         a2          ak (stored, never executed)
                   \\________^  \\_______^
                    leads to    leads to

A `VectorEnv` resets by itself (Gymnasium's NEXT_STEP mode): after a transition with ``is_last`` the next step
ignores that environment's action ``ak`` and returns transition 0' of a new episode.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from dreamer.types import TRANSITION_FIELDS, Spaces

#: One environment's transition: observation keys plus reward, is_first, is_last, is_terminal; no batch axis.
Transition = dict[str, np.ndarray | np.generic]
#: The same for N environments: every entry is (N, ...).
Batch = dict[str, np.ndarray]


class TaskError(ValueError):
    """A task, an option or a space that cannot work; the message says what to change."""


class EnvError(RuntimeError):
    """An environment failed while it was running; the message names the task and the environment."""


class TransitionError(EnvError):
    """An environment returned a transition that does not fit its spaces."""


@runtime_checkable
class Env(Protocol):
    """One environment.

    observation_spaces  Keys of an observation; keys that begin with ``log/`` are logged, never seen by the agent.
    action_spaces       Keys of an action; a single action has the key ``action``. Continuous actions are in [-1, 1].
    """

    @property
    def observation_spaces(self) -> Spaces: ...

    @property
    def action_spaces(self) -> Spaces: ...

    def reset(self) -> Transition:
        """Begin a new episode: ``is_first``, reward 0."""
        ...

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        """Take one agent step. Never resets; after ``is_last`` the caller must."""
        ...

    def render(self) -> np.ndarray | None:
        """The current picture for people, uint8 (H, W, 3), or None if there is none."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Restorable(Protocol):
    """An `Env` that can be restored exactly. Optional.

    An environment that has the methods but cannot, or a wrapper around such a one, has an attribute ``restorable`` that
    is False; ask `restorable(env)`.
    """

    def get_state(self) -> Any:
        """Everything that later transitions depend on, random streams included: picklable host objects."""
        ...

    def set_state(self, state: Any) -> None:
        """Go back to a state that this environment, or another one of the same task and options, returned.

        Afterwards `step` and `reset` continue bit for bit, and `render` shows the same picture.
        """
        ...


def restorable(env: Env) -> bool:
    """Whether the environment, through its wrappers, can really be restored."""
    if not isinstance(env, Restorable):
        return False
    # No default for the attribute: it would also hide an AttributeError in a property.
    says = inspect.getattr_static(env, "restorable", None) is not None
    return bool(env.restorable) if says else True  # type: ignore[attr-defined]


@runtime_checkable
class NamesActions(Protocol):
    """An `Env` that has names for what can be chosen in it. Optional.

    action_names: by the key of a single discrete action, one name for each of its classes.
    """

    @property
    def action_names(self) -> Mapping[str, Sequence[str]]: ...


def action_names(env: Env) -> dict[str, list[str]]:
    """The names that an environment, through its wrappers, has for the classes of its actions; those it has none for
    are left out."""
    found = env.action_names if isinstance(env, NamesActions) else {}
    spaces = {key: space.classes or () for key, space in env.action_spaces.items()}
    fits = {key: [str(name) for name in names] for key, names in found.items() if spaces.get(key) == (len(names),)}
    return fits


@dataclasses.dataclass(frozen=True)
class Fault:
    """A failure of one environment that its `VectorEnv` survived.

    env        Index of the environment.
    kind       died: its process ended; hung: a time limit passed; raised: an exception; garbage: a transition that
               does not fit its spaces.
    message    One sentence for people.
    traceback  Where it failed, empty if there is nothing to show.
    """

    env: int
    kind: Literal["died", "hung", "raised", "garbage"]
    message: str
    traceback: str


@runtime_checkable
class VectorEnv(Protocol):
    """N environments stepped together, resetting by themselves. Returned arrays are fresh: callers may keep them.

    An environment that fails after it has begun is recreated, with a fresh seed. `step_wait` and `reset` then return
    the first transition of its new episode, and `take_faults` reports what happened; the others notice nothing.
    EnvError if it fails before its first transition, or cannot be recreated.
    """

    num_envs: int

    @property
    def restorable(self) -> bool:
        """Whether all environments can be restored exactly."""
        ...

    @property
    def observation_spaces(self) -> Spaces: ...

    @property
    def action_spaces(self) -> Spaces: ...

    def reset(self) -> Batch:
        """First transitions of new episodes in all environments."""
        ...

    def step_async(self, actions: Mapping[str, np.ndarray]) -> None:
        """Start one step; actions (N, ...) by key. Follow with `step_wait`."""
        ...

    def step_wait(self) -> Batch:
        """The transitions of the step that was started."""
        ...

    def render(self) -> np.ndarray | None:
        """Picture of the first environment, uint8 (H, W, 3); None if there is none or drawing failed."""
        ...

    def get_state(self) -> list[bytes]:
        """One pickle per environment: its state, where it is in its episode, how often it was recreated.

        Only between `step_wait` and `step_async`. EnvError if an environment cannot say.
        """
        ...

    def set_state(self, states: list[bytes]) -> None:
        """Go back to what `get_state` returned; it needs no `reset` before. Unpickles: pass your own states only."""
        ...

    def take_faults(self) -> list[Fault]:
        """The failures of environments since the last call, oldest first."""
        ...

    def close(self) -> None: ...


def transition(
    observation: Mapping[str, np.ndarray | np.generic],
    reward: float = 0.0,
    is_first: bool = False,
    is_last: bool = False,
    is_terminal: bool = False,
) -> Transition:
    """One transition from an observation (values already of their space's dtype) and its flags."""
    flags = {"reward": reward, "is_first": is_first, "is_last": is_last, "is_terminal": is_terminal}
    return {**observation, **{key: TRANSITION_FIELDS[key](value) for key, value in flags.items()}}


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, C) as (H, W, 3): fewer than three channels are repeated; of more than three, the last three are shown."""
    channels = image.shape[-1]
    return image[..., -3:] if channels >= 3 else image[..., [0, channels - 1, 0]]


def picture(drawn: Any) -> np.ndarray | None:
    """What `Env.render` returned, as uint8 (H, W, 3): gray gets three channels, transparency is dropped.

    EnvError for anything that is not a picture.
    """
    if drawn is None:
        return None
    image = np.array(drawn)
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape or image.shape[-1] not in (1, 3, 4):
        raise EnvError(f"expected a picture uint8 (H, W, 3) from render, got {image.dtype} {image.shape}; correct it")
    return as_rgb(image[..., :3])


def batch_fields(spaces: Spaces) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype, without the batch axis, of everything in a transition with these observation spaces."""
    fields = {key: (space.shape, space.dtype) for key, space in spaces.items()}
    return {**fields, **{key: ((), np.dtype(dtype)) for key, dtype in TRANSITION_FIELDS.items()}}


def shown(value: Any) -> str:
    """A value in a message: on one line, cut to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
