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
    """All devices of the asked kind ("auto": the fastest kind present), those of other processes included.

    DeviceError if there is none, or none that JAX itself would compute on.
    """
    found: list[jax.Device] = []
    try:
        found = jax.devices()
        return found if platform == "auto" else jax.devices(_BACKENDS[platform])
    except (RuntimeError, AssertionError, ValueError) as error:  # each is what JAX raises for some missing device
        raise DeviceError(_not_there(platform, found, error)) from error


def _not_there(platform: str, found: list[jax.Device], error: Exception) -> str:
    """What was asked for, what is there, and how to get on."""
    wanted = "a device" if platform == "auto" else f"a device of kind {platform!r} (--run.platform)"
    kinds = sorted({device.platform for device in found}) or "none"
    reason = f" ({str(error).splitlines()[0]})" if not found and str(error) else ""
    settings = {name: jax.config.values.get(name.lower()) for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")}
    told = " and ".join(f"{name}={value}" for name, value in settings.items() if value)
    extra = "install the extra for it, pip install 'dreamer[cuda12]' say"
    remedy = f"JAX was told {told}: unset that, or {extra}" if told else f"{extra}, or use --run.platform auto"
    return f"expected {wanted}, found {kinds}{reason}; {remedy}"


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
