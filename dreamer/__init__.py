"""DreamerV3 on JAX: learn a world model, learn to act inside it.

From Python: `dreamer.train(dreamer.load_config(["gym", "cpu"]))` and `dreamer.Agent.load(logdir)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamer.config import Config
    from dreamer.presets import load_config
    from dreamer.run.loaded_agent import Agent
    from dreamer.run.training import train

__version__ = "0.1.0"
__all__ = ["Agent", "Config", "load_config", "train"]

_HOMES = {
    "Agent": "dreamer.run.loaded_agent",
    "Config": "dreamer.config",
    "load_config": "dreamer.presets",
    "train": "dreamer.run.training",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: `import dreamer` and `dreamer --help` need no jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dreamer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
