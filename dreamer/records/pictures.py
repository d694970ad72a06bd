"""Pictures for the records: encoded in parallel with the training loop, and kept to a budget of bytes."""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

#: Pictures that may wait to be encoded; adding one more waits for the oldest.
WAITING = 4
#: Share of a budget that may be spent at once; the rest becomes available in step with the run.
_AT_ONCE = 0.1


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded image: its file's ending (gif, png), bytes, height and width in pixels."""

    ending: str
    data: bytes
    height: int
    width: int


def encode_png(image: np.ndarray) -> Picture:
    """uint8 (H, W, 3), in 128 colours: charts lose nothing that can be seen."""
    file = io.BytesIO()
    Image.fromarray(image).quantize(128).save(file, "PNG", optimize=True)
    return Picture("png", file.getvalue(), *image.shape[:2])


class Encoder:
    """A thread that makes pictures, in the order in which they come. `deliver` receives them in the caller's thread, at
    the next call of a method, so that one thread writes all records.

    Errors in making a picture are raised there too.
    """

    def __init__(self, deliver: Callable[[Any, Picture], None]) -> None:
        self._deliver = deliver
        self._thread: ThreadPoolExecutor | None = None
        self._pending: collections.deque[tuple[Any, Future[Picture]]] = collections.deque()

    def add(self, label: Any, make: Callable[[], Picture]) -> None:
        """`make` runs in the thread; `label` comes back beside the picture."""
        self.deliver(WAITING - 1)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "pictures")
        self._pending.append((label, self._thread.submit(make)))

    def deliver(self, waiting: int = WAITING) -> None:
        """Hand over what is ready, and wait until at most `waiting` are left."""
        while self._pending and (len(self._pending) > waiting or self._pending[0][1].done()):
            label, picture = self._pending.popleft()
            self._deliver(label, picture.result())

    def close(self) -> None:
        """Wait for all of them."""
        try:
            self.deliver(0)
        finally:
            if self._thread is not None:
                self._thread.shutdown(cancel_futures=True)
                self._thread = None


class Pace:
    """A budget of bytes that is spent in step with the run: what would come too early is left out.

    So a run of any length stays under the budget, and its records are spread over the whole run.
    """

    def __init__(self, megabytes: float | None, agent_steps: int) -> None:
        """megabytes: 10^6 bytes, None: no limit; agent_steps: of the whole run."""
        self._limit = None if megabytes is None else megabytes * 1e6
        self._agent_steps = agent_steps
        self.spent = 0

    def takes(self, size: int, agent_steps: int) -> bool:
        """Whether `size` bytes may be written at this step; if so, they are spent."""
        if self._limit is not None:
            done = min(1.0, agent_steps / self._agent_steps)
            if self.spent + size > self._limit * (_AT_ONCE + (1 - _AT_ONCE) * done):
                return False
        self.spent += size
        return True
