"""A small process that outlives its parent for a moment, and ends the workers that did not notice.

A worker whose parent was killed sees its pipe close, and exits: unless it is in the middle of a long step, or hangs,
perhaps in code that none of its threads could interrupt. Processes that environments started may not notice either.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection

from dreamer.envs.workers.worker import own_group

#: Seconds that workers have to exit by themselves.
GRACE = 2.0


def run(conn: Connection) -> None:
    """Take lists of process groups, each replacing the one before, until the pipe closes; then end the last ones."""
    own_group()
    groups: list[int] = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            groups = conn.recv()
    if groups:
        time.sleep(GRACE)
        end_groups(groups)


def end_groups(groups: Iterable[int]) -> None:
    """Send SIGKILL to all processes of these groups; groups that are gone do no harm."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
