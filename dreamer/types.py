"""The vocabulary of all packages: the axis glossary, spaces and stored fields.

Axis glossary (used in every docstring and shape comment of the project)::

    N  environments stepped together        B  sequences in a batch
    T  time steps of a sequence             H  imagination horizon (H+1 states with the start)
    S  categorical latent variables         K  classes per latent variable
    D  units of the deterministic state     G  blocks of the block-linear layers
    F  width of the model feature, D + S*K  A  width of the flattened action

A *transition batch* is a plain dict of numpy arrays, one entry per observation key plus
``reward, is_first, is_last, is_terminal``, each ``(N, ...)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

Kind = Literal["image", "vector", "discrete"]

#: Fields of every transition beside the observations, with their dtypes (all scalars).
TRANSITION_FIELDS: dict[str, type] = {
    "reward": np.float32,
    "is_first": np.bool_,
    "is_last": np.bool_,
    "is_terminal": np.bool_,
}

#: Observation keys with this prefix are logged and never seen by the agent.
LOG_PREFIX = "log/"

#: The reward as the environment gave it, where the learner sees a scaled one: what scores sum.
UNSCALED_REWARD = f"{LOG_PREFIX}unscaled_reward"

#: The return that a planner expected when it chose an action, stored with the step.
PLANNED = "planned"

#: Names that no observation or action may have, and what has them. Beside these, an observation that the decoder
#: predicts must not be named like a loss term (`DreamerModel` says which there are).
TAKEN: Mapping[str, str] = {
    **dict.fromkeys(TRANSITION_FIELDS, "a field of every transition"),
    **dict.fromkeys(("deter", "stoch"), "a latent, stored with every step"),
    PLANNED: "what a planner expects",
    "cont": "the continue head, in reports",
    UNSCALED_REWARD: "what scores sum",
}

#: The observation that says which actions are allowed now; see `mask_space`.
ACTION_MASK = "action_mask"


@dataclasses.dataclass(frozen=True)
class Space:
    """What one observation or one action may be.

    kind     "image": uint8 (H, W, C); "vector": float32 of any shape;
             "discrete": int32, one entry per choice.
    shape    Shape of one element, without batch axes.
    classes  Discrete only: number of classes of each entry, flattened in C order
             (``(n,)`` for a single choice of shape ``()``).
    """

    kind: Kind
    shape: tuple[int, ...]
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.kind == "discrete") != (self.classes is not None):
            raise ValueError(f"expected `classes` exactly for discrete spaces, got {self}")
        if self.kind == "image" and len(self.shape) != 3:
            raise ValueError(f"expected an image shape (H, W, C), got {self.shape}")
        if self.classes is not None and len(self.classes) != int(np.prod(self.shape, dtype=int)):
            raise ValueError(f"expected one class count per entry of shape {self.shape}, got {self.classes}")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"image": np.uint8, "vector": np.float32, "discrete": np.int32}[self.kind])

    @property
    def flat_width(self) -> int:
        """Width of one element as the networks see it: one-hots for discrete spaces."""
        if self.classes is not None:
            return sum(self.classes)
        return int(np.prod(self.shape, dtype=int))

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """A uniform sample; vectors are drawn from [-1, 1]."""
        if self.classes is not None:
            return rng.integers(0, np.array(self.classes)).astype(np.int32).reshape(self.shape)
        if self.kind == "image":
            return rng.integers(0, 256, self.shape, dtype=np.uint8)
        return rng.uniform(-1, 1, self.shape).astype(np.float32)

    def zeros(self) -> np.ndarray:
        return np.zeros(self.shape, self.dtype)


Spaces = Mapping[str, Space]


def visible(spaces: Spaces) -> dict[str, Space]:
    """The observation spaces that the agent sees: all but those to be logged."""
    return {key: space for key, space in spaces.items() if not key.startswith(LOG_PREFIX)}


def mask_space(actions: Spaces) -> Space:
    """The space of the observation `ACTION_MASK`: an entry per class of the one discrete action, 1 allowed, 0 not.

    ValueError unless there is exactly one action and it is discrete.
    """
    classes = [space.classes or () for space in actions.values()]
    if [len(counts) for counts in classes] != [1]:
        raise ValueError(
            f"expected a single discrete action where there is an {ACTION_MASK!r}, got {dict(actions)}; rename that "
            "observation, or give the environment one discrete action"
        )
    count = classes[0][0]
    return Space("discrete", (count,), (2,) * count)


def masks_actions(observations: Spaces, actions: Spaces) -> bool:
    """Whether the environment says, with the observation `ACTION_MASK`, which actions are allowed now.

    ValueError if an observation of this name is not a mask of the action; see `mask_space`.
    """
    if ACTION_MASK not in observations:
        return False
    if observations[ACTION_MASK] != mask_space(actions):
        raise ValueError(
            f"expected {ACTION_MASK!r} to be {mask_space(actions)}, one entry per action, got "
            f"{observations[ACTION_MASK]}; correct the environment's mask or rename that observation"
        )
    return True


@dataclasses.dataclass(frozen=True)
class Field:
    """Shape (of one step, without batch axes) and numpy dtype of something replay stores.

    latent: whether updates rewrite it, as they do the model's states; all else stays as it was collected.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    latent: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=int)) * self.dtype.itemsize


def replay_fields(observations: Spaces, actions: Spaces, extras: Mapping[str, Field]) -> dict[str, Field]:
    """Everything replay stores of one step: observations, transition fields, actions, policy extras."""
    seen = {k: Field(s.shape, s.dtype) for k, s in visible(observations).items()}
    flags = {k: Field((), np.dtype(d)) for k, d in TRANSITION_FIELDS.items()}
    acts = {k: Field(s.shape, s.dtype) for k, s in actions.items()}
    groups = {"observation": seen, "transition": flags, "action": acts, "extra": extras}
    fields: dict[str, Field] = {}
    for name, group in groups.items():
        clash = sorted(set(fields) & set(group))
        if clash:
            raise ValueError(f"{name} names {clash} are taken; rename these keys of the environment")
        fields.update(group)
    return fields
