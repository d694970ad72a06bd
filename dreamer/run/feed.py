"""How batches get to the device and latents back into replay: from the host's memory, or on the device itself."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dreamer.records.meters import Stopwatch
from dreamer.replay import DeviceStorage, Replay, Selection, device

#: Comes beside the latents, and always goes to the host.
_PRIORITY = "priority"


@dataclasses.dataclass
class Drawn:
    """A batch for one update: host arrays (with device storage device arrays), and the same on the device."""

    selection: Selection
    batch: Mapping[str, Any]
    device: Any


class Feed(abc.ABC):
    """Between replay and the updates. place: puts a batch of host arrays on the device."""

    def __init__(self, replay: Replay, place: Callable[[dict[str, np.ndarray]], Any], watch: Stopwatch) -> None:
        self._replay, self._place, self._watch = replay, place, watch

    def send(self, selection: Selection, batch: dict[str, np.ndarray]) -> Drawn:
        """A batch that is on the host."""
        with self._watch.section("transfer"):
            return Drawn(selection, batch, self._place(batch))

    @abc.abstractmethod
    def draw(self, selections: list[Selection]) -> list[Drawn]:
        """The batches of these selections."""

    @abc.abstractmethod
    def needed(self, latents: Mapping[str, Any]) -> dict[str, Any]:
        """What the host must have of an update's latents before they can land."""

    @abc.abstractmethod
    def land(self, selections: list[Selection], latents: dict[str, Any]) -> None:
        """Have latents (K, B, T, ...), of a single update (B, T, ...), in replay before the next batch is gathered;
        later updates overwrite earlier ones."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Write everything that has landed."""


class HostFeed(Feed):
    """Replay is on the host: batches are gathered there and sent, latents are read and written there."""

    def draw(self, selections: list[Selection]) -> list[Drawn]:
        with self._watch.section("replay"):
            gathered = [self._replay.gather(selection) for selection in selections]
        return [self.send(*pair) for pair in zip(selections, gathered, strict=True)]

    def needed(self, latents: Mapping[str, Any]) -> dict[str, Any]:
        return dict(latents)

    def land(self, selections: list[Selection], latents: dict[str, Any]) -> None:
        for i, selection in enumerate(selections):
            self._replay.write(selection, _of_update(latents, i, len(selections)))

    def settle(self) -> None:
        """Nothing waits."""


class DeviceFeed(Feed):
    """Replay is on the device: one compiled exchange writes landed latents and gathers batches; only indices cross."""

    def __init__(
        self,
        replay: Replay,
        storage: DeviceStorage,
        place: Callable[[dict[str, np.ndarray]], Any],
        watch: Stopwatch,
    ) -> None:
        super().__init__(replay, place, watch)
        self._storage = storage
        self._exchange = jax.jit(_exchange, donate_argnums=0)
        self._landing: tuple[list[np.ndarray], Mapping[str, Any]] | None = None

    def draw(self, selections: list[Selection]) -> list[Drawn]:
        if not selections:
            return []
        with self._watch.section("replay"):
            return self._exchanged(selections)

    def needed(self, latents: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values for name, values in latents.items() if name == _PRIORITY}

    def land(self, selections: list[Selection], latents: dict[str, Any]) -> None:
        """The next exchange writes latents; priorities go to the host's tree at once."""
        self.settle()  # if more batches were waiting than the last dispatch took
        if (priority := latents.pop(_PRIORITY, None)) is not None:
            priority = priority.reshape(len(selections), *priority.shape[-2:])
            for selection, values in zip(selections, priority, strict=True):
                self._replay.prioritize(selection, values)
        self._landing = [self._replay.write_slots(selection) for selection in selections], latents

    def settle(self) -> None:
        if self._landing is not None:
            self._exchanged([])

    def _exchanged(self, selections: list[Selection]) -> list[Drawn]:
        """The steps of the selections, after writing the latents that have landed."""
        landing, self._landing = self._landing, None
        slots = [self._replay.slots(selection) for selection in selections]
        self._storage.arrays, batches = self._exchange(self._storage.arrays, landing, slots)
        return [Drawn(selection, batch, batch) for selection, batch in zip(selections, batches, strict=True)]


def make_feed(replay: Replay, place: Callable[[dict[str, np.ndarray]], Any], watch: Stopwatch) -> Feed:
    """place: puts a batch of host arrays on the device; watch: books the time under replay and transfer."""
    if isinstance(replay.storage, DeviceStorage):
        return DeviceFeed(replay, replay.storage, place, watch)
    return HostFeed(replay, place, watch)


def _of_update(latents: Mapping[str, Any], index: int, count: int) -> Mapping[str, Any]:
    """The latents of update `index`, out of (K, B, T, ...) or, for a single update, (B, T, ...)."""
    return latents if count == 1 else {name: values[index] for name, values in latents.items()}


def _exchange(
    arrays: device.Arrays, landing: tuple[list[jax.Array], device.Arrays] | None, slots: list[jax.Array]
) -> tuple[device.Arrays, list[device.Arrays]]:
    """Device storage with latents written at (B, T) slots, update by update; the steps at other slots (B, 1 + T)."""
    if landing is not None:
        write_slots, latents = landing
        for i, where in enumerate(write_slots):
            arrays = device.write(arrays, where, _of_update(latents, i, len(write_slots)))
    return arrays, [device.gather(arrays, where) for where in slots]
