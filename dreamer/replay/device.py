"""Storage in an accelerator's memory: JAX arrays, read and written inside a jit by two pure functions.

A jit that updates the agent may take `DeviceStorage.arrays` as a donated argument, `write` the latents of the previous
update, `gather` the next batch, and return the arrays, which then go back into the buffer; slots come from
`Replay.slots` and `Replay.write_slots`, so the numbers are those of the other storages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamer.replay.memory import Fields
from dreamer.replay.ring import ReplayError, Ring
from dreamer.replay.storage import SlotStorage, Values

if TYPE_CHECKING:
    import jax

    Arrays = dict[str, jax.Array]


def gather(arrays: Arrays, slots: jax.Array) -> Arrays:
    """The steps at `slots`, int32 of any shape: (*slots.shape, ...) of every field."""
    return {name: array.at[slots].get(mode="clip") for name, array in arrays.items()}


def write(arrays: Arrays, slots: jax.Array, values: Mapping[str, Any]) -> Arrays:
    """The arrays with `values` (*slots.shape, ...) of some fields at `slots`; slots beyond the end are left out.

    Slots before the end must be distinct.
    """
    changed = {name: arrays[name].at[slots].set(value, mode="drop") for name, value in values.items()}
    return arrays | changed


class DeviceStorage(SlotStorage):
    """Fields as JAX arrays (N * rows, ...) on the default device.

    ReplayError if a field has a dtype that JAX would narrow.
    """

    arrays: Arrays

    def __init__(self, fields: Fields, mutable: Sequence[str], ring: Ring):
        import jax
        import jax.numpy as jnp

        super().__init__(fields, mutable, ring)
        if wide := [name for name, f in fields.items() if jax.dtypes.canonicalize_dtype(f.dtype) != f.dtype]:
            raise ReplayError(f"expected fields of at most 32 bits on the device, got wider ones in {wide}")
        count = ring.num_envs * ring.rows
        zeros = lambda: {name: jnp.zeros((count, *f.shape), f.dtype) for name, f in fields.items()}  # noqa: E731
        self.arrays = jax.jit(zeros)()
        self._end = count

    def write_slots(self, slots: np.ndarray, values: Values) -> None:
        index = self._padded(slots)
        padded = {}
        for name, value in values.items():
            # A copy: JAX may still read an array that it was given while the caller writes to it.
            padded[name] = np.zeros((len(index), *self.fields[name].shape), self.fields[name].dtype)
            padded[name][: len(slots)] = value
        self.arrays = _compiled_write()(self.arrays, index, padded)

    def read_slots(self, name: str, slots: np.ndarray) -> np.ndarray:
        index = self._padded(slots.reshape(-1))
        found = np.asarray(_compiled_gather()({name: self.arrays[name]}, index)[name])
        return found[: slots.size].copy().reshape(*slots.shape, *self.fields[name].shape)

    def _padded(self, slots: np.ndarray) -> np.ndarray:
        """Slots (M,) as int32, filled up to a power of two with one beyond the end: few shapes, few compilations."""
        index = np.full(1 << max(len(slots) - 1, 0).bit_length(), self._end, np.int32)
        index[: len(slots)] = slots
        return index


@functools.cache
def _compiled_write() -> Callable[..., Arrays]:
    import jax

    return jax.jit(write, donate_argnums=0)


@functools.cache
def _compiled_gather() -> Callable[..., Arrays]:
    import jax

    return jax.jit(gather)
