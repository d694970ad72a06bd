"""What the C library does with the memory of updates on a CPU."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import jax

#: JAX names the seconds of every compilation so.
_COMPILED = "/jax/core/compile/backend_compile_duration"
#: A compilation that took this many seconds is worth a clean-up, which takes about 0.3.
_LONG = 5.0
#: Chunks that a compilation has freed, from the first size to the last in bytes, slow every later search for memory.
_LARGEST, _SMALLEST = 2**28, 2**10


class _Usage(ctypes.Structure):
    """`struct mallinfo2`: sizes in bytes; `keepcost` is what lies free at the top of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@functools.cache
def reuse_freed_memory() -> None:
    """Let the C library keep large freed blocks for the next update instead of handing them back to the kernel.

    On a CPU the temporary memory of an update comes from malloc. Past 32 MB, glibc maps it anew for every update, and
    the kernel clears each page: a quarter of the time of a small update. One arena for all threads, because other
    arenas hand back what they hold; and what compiling leaves in it is retired, so that updates find their memory at
    once. Before JAX's first computation, which starts the threads. Without glibc, nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    libc = ctypes.CDLL(None)
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    if hasattr(libc, "mallinfo2"):
        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _after_compiling(event: str, duration_secs: float, **_: Any) -> None:
    if event == _COMPILED and duration_secs > _LONG:
        retire_fragments()


def retire_fragments() -> int:
    """Give the pages of freed chunks back to the kernel and never use these chunks again; returns their bytes.

    A compilation of an update frees about 50,000 chunks of 1 KB to 10 MB, in which every allocation of an update then
    searches for a fit, while other threads wait for it. Taken out of the heap they cost addresses but no memory.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Usage
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc_trim(0)
    top = libc.sbrk(0) - libc.mallinfo2().keepcost
    size, retired = _LARGEST, 0
    while size >= _SMALLEST:
        chunk = libc.malloc(size)
        if chunk is not None and chunk < top:
            retired += size
        else:
            # Nothing this large is left below: this one is from the top.
            libc.free(chunk)
            size = int(size * 0.93)
    return retired
