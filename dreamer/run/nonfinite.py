"""NaN and infinity: a run stops at them, says where they are, and leaves behind what produced them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import whole_file
from dreamer.replay.episodes import write_arrays


class NonFiniteError(RuntimeError):
    """Something was not finite. `arrays`: what produced it, for a closer look; `dump` writes them."""

    def __init__(self, message: str, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(message)
        self._name, self.arrays = name, dict(arrays)

    def dump(self, folder: Path) -> Path:
        """Write the arrays as a .npz file that plain numpy reads (bfloat16 as float32); returns the file."""
        plain: dict[str, Any] = {
            k: v.astype(np.float32) if v.dtype.name == "bfloat16" else v for k, v in self.arrays.items()
        }
        path = folder / f"nonfinite-{self._name}.npz"
        with whole_file(path) as file:
            write_arrays(file, plain)
        return path


class NonFiniteUpdateError(NonFiniteError):
    """An update of the weights produced NaN or infinity; the message names the terms and the update."""

    def __init__(self, update: int, terms: Mapping[str, float], batch: Mapping[str, np.ndarray]) -> None:
        bad = ", ".join(f"{name} = {value}" for name, value in terms.items()) or "the weights"
        wrong = not_finite(batch)
        blame = f"; its batch has NaN or infinity in {', '.join(wrong)}" if wrong else ""
        super().__init__(f"update {update} was not finite: {bad}{blame}", f"update-{update}", batch)
        self.update, self.terms = update, dict(terms)


class NonFiniteActionError(NonFiniteError):
    """The policy produced NaN or infinity; the message names the parts of its step that have it."""

    def __init__(self, agent_steps: int, step: Mapping[str, np.ndarray]) -> None:
        """step: observations, actions and policy extras, (N, ...) each."""
        super().__init__(
            f"a step of the policy was not finite: NaN or infinity in {', '.join(not_finite(step))}",
            f"action-{agent_steps}",
            step,
        )


def not_finite(arrays: Mapping[str, np.ndarray]) -> Sequence[str]:
    """Names of the arrays with NaN or infinity in them."""
    # To numpy, bfloat16 is of kind "V", although it is a float.
    floats = {key: value for key, value in arrays.items() if value.dtype.kind in "fV"}
    return [key for key, value in floats.items() if not np.isfinite(value).all()]
