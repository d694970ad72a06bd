"""Replay: collected steps, kept so that training can draw sequences of them exactly as they happened.

Read `buffer.py` first; `ring.py` says what a row is, `selection.py` which sequences are drawn, `storage.py`,
`device.py` and `disk.py` where the arrays are kept, `persistence.py` how arrays in memory get to disk and back.
"""

from dreamer.replay.buffer import Replay
from dreamer.replay.device import DeviceStorage
from dreamer.replay.files import prune
from dreamer.replay.memory import Budget, budget, bytes_per_step, choose_storage, machine_memory
from dreamer.replay.ring import ReplayError
from dreamer.replay.selection import Selection

__all__ = [
    "Budget",
    "DeviceStorage",
    "Replay",
    "ReplayError",
    "Selection",
    "budget",
    "bytes_per_step",
    "choose_storage",
    "machine_memory",
    "prune",
]
