"""Memory that compiling leaves behind. Each check in a process of its own, because the heap is one for all of it."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

HEAP = """
import ctypes, random
from dreamer.run import devices

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = devices._Usage
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
"""
FRAGMENTS = """
random.seed(0)
chunks = [libc.malloc(random.randrange(2_000, 200_000)) for _ in range(4000)]
for chunk in chunks:
    ctypes.memset(chunk, 1, 2_000)
for chunk in chunks[::2]:
    libc.free(chunk)
before = libc.mallinfo2().fordblks
"""


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_freed_chunks_are_retired_and_the_rest_stays():
    """Of 200 MB freed in pieces nothing is handed out again, and what is in use keeps what it holds."""
    program = f"""{HEAP}
devices.reuse_freed_memory()
{FRAGMENTS}
retired = devices.retire_fragments()
left = libc.mallinfo2()
again = libc.malloc(50_000)
kept = all(ctypes.string_at(chunk, 2_000) == bytes([1]) * 2_000 for chunk in chunks[1::2])
print(before, retired, left.fordblks - left.keepcost, again > max(chunks), kept)
"""
    before, retired, left, fresh, kept = run(program).split()
    assert int(before) > 150e6 and int(retired) > 0.95 * int(before) and int(left) < 0.05 * int(before)
    assert (fresh, kept) == ("True", "True")


def test_retired_chunks_cost_no_memory():
    program = f"""{HEAP}
devices.reuse_freed_memory()
random.seed(0)
chunks = [libc.malloc(random.randrange(2_000, 200_000)) for _ in range(4000)]
for chunk in chunks:
    ctypes.memset(chunk, 1, 2_000)
blocks = [libc.malloc(1_000_000) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 1_000_000)
for block in blocks[::2]:
    libc.free(block)
before = resident()
devices.retire_fragments()
print(before - resident())
"""
    assert int(run(program)) > 80e6


def test_a_long_compilation_is_cleaned_up_after_and_a_short_one_is_not():
    program = """
import jax, jax.numpy as jnp
from dreamer.run import devices

calls = []
devices.retire_fragments = lambda: calls.append(1)
devices.reuse_freed_memory()
devices.reuse_freed_memory()
jax.monitoring.record_event_duration_secs(devices._COMPILED, 0.1)
short = len(calls)
jax.monitoring.record_event_duration_secs(devices._COMPILED, 9.0)
long, devices._LONG = len(calls), 0.0
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
print(short, long, len(calls) > long)
"""
    assert run(program).split() == ["0", "1", "True"]
