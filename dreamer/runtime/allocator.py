"""What the C library does with the memory of updates on a CPU."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import jax

#: JAX names the seconds of every compilation so.
_COMPILED = "/jax/core/compile/backend_compile_duration"
#: A compilation that took this many seconds is worth a clean-up, which takes about 0.1.
_LONG = 5.0
#: The size of the heaps in every arena but the first, and so the largest block in them, in bytes.
_HEAP = 2**26
#: Compiling threads that share an arena wait for each other; every arena an update ran in keeps its temporary memory.
_ARENAS = 4


@functools.cache
def reuse_freed_memory() -> None:
    """Let the C library keep freed memory for the next update instead of handing it back to the kernel.

    On a CPU the temporary memory of an update comes from malloc. By default glibc maps blocks past 32 MB anew for every
    update, and the kernel clears each page: a quarter of the time of a small update. Blocks past 64 MB are kept in one
    arena only, so XLA is told to stay below (`compiler.OPTIONS`). Before JAX's first computation, which starts the
    threads. Without glibc, nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    libc = ctypes.CDLL(None)
    libc.mallopt(arena_max, _ARENAS)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    # Less would hand back a heap of which nothing is in use.
    libc.mallopt(top_pad, _HEAP)
    jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _after_compiling(event: str, duration_secs: float, **_: Any) -> None:
    """What compiling an update has freed, 0.5 GB and more, goes back to the kernel: it is not needed again."""
    if event == _COMPILED and duration_secs > _LONG:
        ctypes.CDLL(None).malloc_trim(0)
