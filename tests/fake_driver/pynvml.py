"""In place of NVIDIA's bindings of the same name: a driver whose cards are JSON in $FAKE_CARDS.

[{"name": ..., "driver": ..., "total": MiB, "used": MiB, "load": per cent}, ...]   null: the card does not tell
"hangs", or any other text: the driver does not start, for this reason
"""

import json
import os
import time
from types import SimpleNamespace

NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_NOT_SUPPORTED = 3


class NVMLError(Exception):
    def __init__(self, value, text="Not Supported"):
        super().__init__(text)
        self.value = value


def _cards():
    if "FAKE_CARDS" not in os.environ:
        raise NVMLError(NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found")
    cards = json.loads(os.environ["FAKE_CARDS"])
    if cards == "hangs":
        time.sleep(60)
    if isinstance(cards, str):
        raise NVMLError(18, cards)
    return cards


def _told(handle, key):
    if handle[key] is None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return handle[key]


def nvmlInit():  # noqa: N802
    _cards()


def nvmlDeviceGetCount():  # noqa: N802
    return len(_cards())


def nvmlSystemGetDriverVersion():  # noqa: N802
    return _cards()[0]["driver"] if _cards() else "none"


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    return _cards()[index]


def nvmlDeviceGetName(handle):  # noqa: N802
    return handle["name"]


def nvmlDeviceGetMemoryInfo(handle):  # noqa: N802
    return SimpleNamespace(total=handle["total"] * 2**20, used=_told(handle, "used") * 2**20)


def nvmlDeviceGetUtilizationRates(handle):  # noqa: N802
    return SimpleNamespace(gpu=_told(handle, "load"), memory=0)
