"""What a saved buffer says of itself, so that one it does not fit can tell why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamer.replay.errors import ReplayError
from dreamer.replay.memory import Fields

VERSION = 2


def describe(fields: Fields, num_envs: int) -> dict[str, Any]:
    """What `check_manifest` compares, JSON-able."""
    return {"version": VERSION, "fields": describe_fields(fields), "num_envs": num_envs}


def check_manifest(manifest: Mapping[str, Any], fields: Fields, num_envs: int) -> None:
    """Raise ReplayError unless the manifest is of a buffer of these fields and environments, and of this version."""
    if manifest["version"] != VERSION:
        raise ReplayError(
            f"expected a replay manifest of version {VERSION}, got {manifest['version']};"
            " use the version of this program that wrote it"
        )
    check_fields(fields, manifest["fields"])
    if manifest["num_envs"] != num_envs:
        raise ReplayError(
            f"expected a replay of {num_envs} environments, got one of {manifest['num_envs']};"
            f" set --env.num_envs {manifest['num_envs']} or use another logdir"
        )


def check_fields(expected: Fields, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ReplayError if the manifest's fields `found` are not those `expected`, naming the ones that differ."""
    ours, theirs = describe_fields(expected), {name: dict(entry) for name, entry in found.items()}
    wrong = [
        f"{name}: expected {ours.get(name, 'no such field')}, got {theirs.get(name, 'no such field')}"
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        raise ReplayError(
            "the stored replay has other fields than this run: "
            + "; ".join(wrong)
            + ". Use the task and the model size it was collected with, or another logdir"
        )


def describe_fields(fields: Fields) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes of `fields`, JSON-able."""
    return {name: {"shape": list(field.shape), "dtype": field.dtype.name} for name, field in sorted(fields.items())}
