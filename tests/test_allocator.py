"""Memory of updates and what compiling leaves behind. Each check in a process of its own: the heap is one for all."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

#: Pages from the kernel for each call of a program with more than 100 MB of temporary memory in arrays of 16 MB.
CALLS = """
import resource, sys
import jax, jax.numpy as jnp
from dreamer import compiler
from dreamer.runtime import allocator

if sys.argv[1] == "ours":
    allocator.reuse_freed_memory()
options = compiler.options() if sys.argv[1] == "ours" else None

def function(x, y):
    kept = [x * i @ y for i in range(1, 11)]
    total = 0.0
    for product in reversed(kept):
        total = jnp.maximum(product, 1 - total)
    return total.sum()

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x, y = jnp.ones((4096, 16)), jnp.ones((16, 1024))
program = jax.jit(function, compiler_options=options).lower(x, y).compile()
seen = []
for _ in range(40):
    before = faults()
    program(x, y).block_until_ready()
    seen.append(faults() - before)
print(program.memory_analysis().temp_size_in_bytes, *seen)
"""
CLEANED_UP = """
import ctypes
import jax, jax.numpy as jnp
from dreamer.runtime import allocator

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
told = lambda seconds: jax.monitoring.record_event_duration_secs(allocator._COMPILED, seconds)
allocator.reuse_freed_memory()
allocator.reuse_freed_memory()
blocks = [libc.malloc(1_000_000) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 1_000_000)
for block in blocks[::2]:
    libc.free(block)
full = resident()
told(0.1)
short = resident()
told(9.0)
print(full - short, short - resident(), all(ctypes.string_at(b, 1_000_000) == b"\\1" * 1_000_000 for b in blocks[1::2]))
compilations = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compilations.append(event))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
print(allocator._COMPILED in compilations)
"""


def run(program: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_updates_find_the_memory_of_the_last_one() -> None:
    """Arenas keep what served a call, whichever thread takes the next; by default each call has its pages cleared."""
    temporary, *ours = map(int, run(CALLS, "ours"))
    _, *default = map(int, run(CALLS, "default"))
    assert temporary > 100e6 and sorted(default)[20] > 100e6 / 4096
    assert sum(ours[20:]) < 0.3 * sum(default[20:])


def test_a_long_compilation_is_cleaned_up_after_and_a_short_one_is_not() -> None:
    """100 MB of freed memory are given back, what is in use keeps what it holds, and JAX names compilations so."""
    kept, given, untouched, known = run(CLEANED_UP)
    assert int(kept) < 10e6 and int(given) > 80e6
    assert (untouched, known) == ("True", "True")
