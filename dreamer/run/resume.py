"""What a checkpoint holds beside weights and replay, so that a run continues as if it had never been stopped.

Two files of each snapshot: the loop (batches on their way, the policy's carry, running statistics), which is plain
data, and the environments' states, which are pickles. Only a resuming run reads the latter, and only files of its own
user: a pickle can do whatever a program can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import serialization

from dreamer.envs import EnvError, VectorEnv
from dreamer.records.meters import Aggregator
from dreamer.records.system import versions
from dreamer.run.collector import Collector
from dreamer.run.evaluate import Evaluator
from dreamer.run.learner import Learner
from dreamer.saves import snapshot
from dreamer.saves.snapshot import DamagedCheckpointError

LOOP = "loop.msgpack"
ENVIRONMENTS = "environments.msgpack"


class Progress(NamedTuple):
    """What the two files hold. environments: None where the environments cannot be saved."""

    loop: dict[str, Any]
    environments: dict[str, Any] | None


def pack_progress(
    learner: Learner,
    collector: Collector | None,
    metrics: Aggregator,
    envs: VectorEnv,
    evaluator: Evaluator,
    on_unsaved: Callable[[EnvError], object],
) -> dict[str, bytes]:
    """The files, by name.

    collector   None for a run that does not collect.
    on_unsaved  Called with the reason if the environments' states are missing although they could be saved at first.
    """
    loop = {
        "learner": learner.progress(),
        "collector": None if collector is None else collector.state(),
        "metrics": metrics.state(),
    }
    files = {LOOP: serialization.msgpack_serialize(loop)}
    if can_be_restored(envs):
        try:
            states = {"training": envs.get_state() if collector else None, "evaluation": evaluator.state()}
            files[ENVIRONMENTS] = serialization.msgpack_serialize(states)
        except EnvError as error:
            on_unsaved(error)
    return files


def can_be_restored(envs: VectorEnv) -> bool:
    """Whether the environments can be restored now; environments that were given up cannot."""
    try:
        return envs.restorable
    except EnvError:
        return False


def read_progress(folder: Path) -> Progress:
    """What the snapshot in `folder` holds; DamagedCheckpointError if the files are not what they should be."""
    try:
        loop, environments = (
            None if data is None else serialization.msgpack_restore(data)
            for data in (snapshot.read_file(folder, LOOP), snapshot.read_file(folder, ENVIRONMENTS))
        )
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder}: its files cannot be read ({error})") from error
    if loop is None:
        raise DamagedCheckpointError(f"{folder}: expected a file {LOOP}, found none")
    return Progress(loop, environments)


def changed_surroundings(stored: Mapping[str, str]) -> list[str]:
    """What has changed since the checkpoint was saved, and may change the last digits of all numbers."""
    return [
        f"{name}: {stored.get(name, 'unknown')} -> {now}" for name, now in versions().items() if stored.get(name) != now
    ]
