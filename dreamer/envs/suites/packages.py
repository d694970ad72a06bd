"""Third-party modules: submodules of packages whose `__init__` needs more than the submodule does, and users' own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from types import ModuleType


def part(package: str, module: str) -> ModuleType:
    """``package.module`` without running ``package/__init__.py``, unless somebody has run it already.

    For packages whose `__init__` imports the unmaintained `gym` only to register themselves. ModuleNotFoundError if
    there is no such package.
    """
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{module}")


def own_module(name: str) -> ModuleType:
    """A module that a task names: an installed one or, failing that, one in the working folder. ImportError if
    there is none."""
    with contextlib.suppress(FileNotFoundError):  # a deleted working folder holds no module
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
    return importlib.import_module(name)
