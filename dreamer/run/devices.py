"""Which device a run computes on, and the settings that JAX and the C library need before the first computation."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any

import jax
import jax.numpy as jnp

from dreamer.config import RunConfig
from dreamer.paths import PathError, absolute

_BACKENDS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


class DeviceError(RuntimeError):
    """The requested device is missing; the message says which exist and what to install."""


def find_devices(platform: str) -> list[jax.Device]:
    """All devices of the requested kind ("auto": the fastest kind present), those of other processes included.

    DeviceError if there is none, or none that JAX itself would compute on.
    """
    found: list[jax.Device] = []
    try:
        found = jax.devices()
        return found if platform == "auto" else jax.devices(_BACKENDS[platform])
    except (RuntimeError, AssertionError, ValueError) as error:  # JAX raises each of these for some missing device
        raise DeviceError(_not_there(platform, found, error)) from error


def _not_there(platform: str, found: list[jax.Device], error: Exception) -> str:
    """What was asked for, what there is, and what to do."""
    wanted = "a device" if platform == "auto" else f"a device of kind {platform!r} (--run.platform)"
    kinds = sorted({device.platform for device in found}) or "none"
    reason = f" ({str(error).splitlines()[0]})" if not found and str(error) else ""
    settings = {name: jax.config.values.get(name.lower()) for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")}
    told = " and ".join(f"{name}={value}" for name, value in settings.items() if value)
    extra = "install the extra for it, for example pip install 'dreamer[cuda12]'"
    remedy = f"JAX was told {told}: unset that, or {extra}" if told else f"{extra}, or use --run.platform auto"
    return f"expected {wanted}, found {kinds}{reason}; {remedy}"


def choose_device(platform: str) -> jax.Device:
    """The first device of the requested kind that belongs to this process, made JAX's default."""
    device = next(device for device in find_devices(platform) if device.process_index == jax.process_index())
    jax.config.update("jax_default_device", device)
    return device


def compute_dtype(config: RunConfig, device: jax.Device) -> Any:
    """Dtype of activations: as configured; auto is bfloat16 on accelerators and float32 on the CPU."""
    name = config.compute_dtype
    if name == "auto":
        name = "float32" if device.platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was given another place or there is none.

    A second start of the same configuration then takes seconds instead of the compile time.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        root = absolute(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dreamer" / "jax"
        root.mkdir(parents=True, exist_ok=True)
    except (PathError, OSError):
        return
    jax.config.update("jax_compilation_cache_dir", str(root))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


# --- What the C library does with the memory of updates on a CPU -----------------------------------


#: JAX's name for the event that reports the seconds of a compilation.
_COMPILED = "/jax/core/compile/backend_compile_duration"
#: A compilation that took this many seconds is worth a clean-up, which takes about 0.3 s.
_LONG = 5.0
#: Sizes in bytes, from and to, of chunks that a compilation frees and that slow every later search for memory.
_LARGEST, _SMALLEST = 2**28, 2**10


class _Usage(ctypes.Structure):
    """`struct mallinfo2`: sizes in bytes; `keepcost` is what is free at the top of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@functools.cache
def reuse_freed_memory() -> None:
    """Let the C library keep large freed blocks for the next update instead of handing them back to the kernel.

    On a CPU the temporary memory of an update comes from malloc. Above 32 MB, glibc maps it again for every update, and
    the kernel clears each page: a quarter of the time of a small update. All threads get one arena, because other
    arenas hand back what they hold; and what compiling leaves in it is retired, so that updates find their memory at
    once. Call it before JAX's first computation, which starts the threads. Without glibc it does nothing.
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
            # Nothing this large is left below: this chunk is from the top.
            libc.free(chunk)
            size = int(size * 0.93)
    return retired
