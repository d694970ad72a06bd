"""What a run was made with, so that a resume can tell whether its numbers will be the same."""

from __future__ import annotations

import importlib.metadata
import os
import platform


def versions() -> dict[str, str]:
    """Versions that decide whether a resumed run repeats the numbers of an undisturbed one."""
    packages = ("dreamer", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "gymnasium")
    found = {"python": platform.python_version(), "cores": str(_cores())}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cores() -> int:
    """Cores this process may use; the number of threads decides the order of some sums."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
