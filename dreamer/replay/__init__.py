"""Replay: what was collected, kept so that sequences of it can be trained on, and never told wrongly.

Read `buffer.py` first; `ring.py` says what a row is, `selection.py` which sequences are drawn,
`storage.py` where the arrays lie, `persistence.py` how they get to disk and back, as immutable `files.py`.
"""

from dreamer.replay.buffer import Replay
from dreamer.replay.errors import ReplayError
from dreamer.replay.files import prune
from dreamer.replay.selection import Selection
from dreamer.replay.storage import bytes_at_capacity, bytes_per_step, largest_capacity, machine_memory

__all__ = [
    "Replay",
    "ReplayError",
    "Selection",
    "bytes_at_capacity",
    "bytes_per_step",
    "largest_capacity",
    "machine_memory",
    "prune",
]
