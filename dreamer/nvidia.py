"""NVIDIA cards, as their driver reports them. Without a driver there are no cards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pynvml


class DriverError(RuntimeError):
    """There is a driver, but it does not answer; the message says what happened."""


class Card(NamedTuple):
    """One card. What it does not report is None.

    total, used  Bytes of memory: in all, and in use by any process.
    load         Share of the last moments in which the card was busy.
    """

    name: str
    driver: str
    total: int | None
    used: int | None
    load: float | None


def cards(named: Sequence[str] | None = None) -> list[Card]:
    """The cards of the machine, in the driver's order; only those `named`, if any is named by its number.

    DriverError if there is a driver that does not answer.
    """
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        count = pynvml.nvmlDeviceGetCount()
        numbers = [int(name) for name in named or () if name.isdigit() and int(name) < count] or range(count)
        return [_card(pynvml.nvmlDeviceGetHandleByIndex(number), driver) for number in numbers]
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return []
        raise DriverError(str(error)) from None


def visible(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The devices that this process may use, as CUDA_VISIBLE_DEVICES names them; None: all that there are."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else [device.strip() for device in named.split(",") if device.strip()]


def _card(handle: Any, driver: str) -> Card:
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    load = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    return Card(
        pynvml.nvmlDeviceGetName(handle),
        driver,
        None if memory is None else int(memory.total),
        None if memory is None else int(memory.used),
        None if load is None else load.gpu / 100,
    )


def _told(question: Callable[[Any], Any], handle: Any) -> Any:
    try:
        return question(handle)
    except pynvml.NVMLError:  # not every card knows
        return None
