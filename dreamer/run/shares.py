"""What part of a run belongs to this process: all, unless several share it (see `distributed.py`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dreamer.agent import stream_key
from dreamer.presets import ConfigError


def share(count: int) -> int:
    """This process's part of something that is divided equally."""
    return count // jax.process_count()


def own_seed(seed: int, restarts: int = 0) -> int:
    """The run's seed, changed for each process but the first, and for each restart."""
    which = [restarts, jax.process_index()] if jax.process_index() else [restarts] if restarts else []
    return int(np.random.SeedSequence([seed, *which]).generate_state(1)[0]) if which else seed


def own_key(run_key: np.ndarray) -> np.ndarray:
    """The run's key, raw, changed for each process but the first: all act, and no two draw the same."""
    process = jax.process_index()
    return run_key if process == 0 else np.asarray(jax.random.key_data(stream_key(run_key, "process", process)))


def check_processes(saved: int) -> None:
    """ConfigError unless there are as many processes as the checkpoint was saved by."""
    count = jax.process_count()
    if saved != count:
        raise ConfigError(
            f"expected {saved} processes, as when this run began, got {count}: each has a share of its replay; "
            "start as many, or begin a new run from its weights: --from_checkpoint DIR"
        )


def from_first(state: Any, template: Any) -> Any:
    """A tree of host arrays as process 0 has it; the others pass whatever they have."""
    if jax.process_count() == 1:
        return state
    own = state if jax.process_index() == 0 else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    return multihost_utils.broadcast_one_to_all(own)
