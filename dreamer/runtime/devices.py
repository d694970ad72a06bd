"""Which device a run computes on, and the settings JAX needs before its first computation."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from dreamer.config import RunConfig
from dreamer.paths import PathError, absolute

_BACKENDS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


class DeviceError(RuntimeError):
    """The wanted device is not there; the message says what is and what to install."""


def find_devices(platform: str) -> list[jax.Device]:
    """All devices of the asked kind ("auto": the fastest kind present), those of other processes included."""
    if platform == "auto":
        return jax.devices()
    try:
        return jax.devices(_BACKENDS[platform])
    except RuntimeError as error:
        found = sorted({d.platform for d in jax.devices()})
        raise DeviceError(
            f"expected a device of kind {platform!r} (--run.platform), found {found}; "
            "install the extra for it, pip install 'dreamer[cuda12]' say, or use --run.platform auto"
        ) from error


def choose_device(platform: str) -> jax.Device:
    """The first device of the asked kind that is this process's own, made JAX's default."""
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
    """Keep compiled programs in the user's cache folder, unless JAX was told another place or there is none.

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
