"""What every place that runs can be sent to has in common."""

from __future__ import annotations

from typing import Protocol

from dreamer.sweeps.expand import Planned


class Job(Protocol):
    """A run that was sent off. where: for people, "device 0" say."""

    where: str

    def poll(self) -> int | None:
        """The exit code of `dreamer train`, None while it goes on."""

    def stop(self) -> None:
        """Ask it to save a checkpoint and leave; returns at once."""

    def kill(self) -> None:
        """End it now."""


class Backend(Protocol):
    """Sends runs off. slots: how many at once."""

    slots: int

    def start(self, run: Planned, slot: int) -> Job: ...

    def close(self) -> None: ...
