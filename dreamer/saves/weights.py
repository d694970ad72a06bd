"""Trained weights of a finished run, or of another run: to play with, or to start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dreamer.agent import Agent, TrainState
from dreamer.config import Config
from dreamer.presets import diff, stored_config
from dreamer.saves.checkpoint import Checkpointer, CheckpointError
from dreamer.saves.snapshot import flatten

#: Where the parameters that `from_checkpoint_parts` names are in the tree.
PARTS = {
    "world_model": ("world_model",),
    "actor": ("actor_critic", "policy"),
    "critic": ("actor_critic", "value"),
}

_SHOWN = 8


def load_params(checkpointer: Checkpointer, template: Mapping[str, Any] | None = None) -> Any:
    """The best evaluated weights of a logdir or, where nothing was evaluated, those of its newest checkpoint."""
    if checkpointer.best_score() is not None:
        return checkpointer.restore_best(template)[1]["params"]
    return checkpointer.restore(template, parts=("params",))[1]["params"]


def check_source(config: Config) -> None:
    """CheckpointError if the configuration names a folder without weights. Does not read the weights."""
    if config.from_checkpoint is not None:
        source = Checkpointer(config.from_checkpoint, read_only=True)
        if source.best_score() is None and source.latest() is None:
            raise CheckpointError(
                f"--from_checkpoint: expected a checkpoint in {source.logdir}, found none; name the folder of a run"
            )


def warm_start(config: Config, agent: Agent, state: TrainState) -> TrainState:
    """`state` with the parts of another run's weights that the configuration names; the rest stays fresh.

    CheckpointError, naming parameters and options, if one of these parts has other shapes there.
    """
    if config.from_checkpoint is None:
        return state
    source = load_params(Checkpointer(config.from_checkpoint, read_only=True))
    wanted = list(PARTS) if "all" in config.from_checkpoint_parts else config.from_checkpoint_parts
    params = jax.tree.map(lambda x: x, state["params"])
    differences: list[str] = []
    for *parents, leaf in (PARTS[name] for name in wanted):
        ours, theirs = params, source
        for parent in parents:
            ours, theirs = ours[parent], theirs[parent]
        differences += _differences(".".join((*parents, leaf)), ours[leaf], theirs[leaf])
        ours[leaf] = jax.device_put(theirs[leaf])
    if differences:
        raise CheckpointError(_explain(config, differences))
    return state | {"params": params, "slow": agent.slow_copies(params)}


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    """One line for each parameter whose shape or dtype differs, or that only one side has."""
    expected, found = (
        {".".join((name, *map(str, path))): f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in flatten(x).items()}
        for x in (ours, theirs)
    )
    absent = "no such parameter"
    return [
        f"{key}: expected {expected.get(key, absent)}, found {found.get(key, absent)}"
        for key in sorted(expected | found)
        if expected.get(key) != found.get(key)
    ]


def _explain(config: Config, differences: list[str]) -> str:
    stored = stored_config(config.from_checkpoint or "")
    changes = [] if stored is None else [c for c in diff(stored, config) if c.name.startswith("model.")]
    cause = f"these options differ: {'; '.join(map(str, changes))}. Give the old values"
    if not changes:
        cause = "the options of the networks are the same, so the environments differ. Use one with the same spaces"
    more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return (
        f"the weights in {config.from_checkpoint} do not fit this run, {len(differences)} parameters differ:\n  "
        + "\n  ".join(differences[:_SHOWN])
        + f"{more}\n{cause}, or copy other parts: --from_checkpoint_parts"
    )
