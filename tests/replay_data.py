"""Small replay buffers whose every value follows from environment and time, on any storage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dreamer.replay import Replay, Selection, disk, versions
from dreamer.types import Field

FIELDS = {
    "camera/image": Field((4, 4, 3), np.dtype(np.uint8)),
    "reward": Field((), np.dtype(np.float32)),
    "is_first": Field((), np.dtype(bool)),
    "is_last": Field((), np.dtype(bool)),
    "deter": Field((3,), np.dtype(ml_dtypes.bfloat16), latent=True),
    "stoch": Field((2,), np.dtype(np.uint8), latent=True),
}
LATENTS = ("deter", "stoch")
LATENT_BYTES = 6 + 2
STEP_BYTES = 48 + 4 + 1 + 1 + LATENT_BYTES


def build(
    storage: str = "host",
    folder: Path | None = None,
    num_envs: int = 2,
    rows: int = 40,
    length: int = 5,
    seed: int = 0,
    fields: Mapping[str, Field] = FIELDS,
    **options: Any,
) -> Replay:
    return Replay(fields, num_envs, num_envs * rows, length, seed, storage=storage, folder=folder, **options)


def collect(replay: Replay, times: range) -> None:
    N = replay.num_envs
    for time in times:
        rng = np.random.default_rng(time)
        step = {"camera/image": rng.integers(0, 256, (N, 4, 4, 3), dtype=np.uint8), "is_first": rng.random(N) < 0.2}
        step |= {"reward": time + np.arange(N, dtype=np.float32) / 8, "is_last": rng.random(N) < 0.2}
        step |= {"deter": rng.standard_normal((N, 3)).astype(ml_dtypes.bfloat16)}
        replay.add(step | {"stoch": rng.integers(0, 256, (N, 2), dtype=np.uint8)})


def latents_of(batch: Mapping[str, Any], update: int) -> dict[str, np.ndarray]:
    """What an update makes of the batch it saw, (B, T, ...)."""
    deter, stoch = (np.asarray(batch[name])[:, 1:] for name in LATENTS)
    changed = (deter.astype(np.float32) * 0.5 + update).astype(ml_dtypes.bfloat16)
    return {"deter": changed, "stoch": stoch + np.uint8(update % 250 + 1)}


def rewrite(replay: Replay, update: int) -> None:
    """Replace the latents of a few sequences."""
    selection = replay.select(6)
    replay.write(selection, latents_of(replay.gather(selection), update))


def train(replay: Replay, times: range, per_dispatch: int = 1) -> list:
    """Collect, and learn as the training loop does: latents of a dispatch land before the next but one is drawn."""
    seen, pending = [], []
    for time in times:
        collect(replay, range(time, time + 1))
        if not replay.starts:
            continue
        drawn = [replay.select(6) for _ in range(per_dispatch)]
        batches = [replay.gather(selection) for selection in drawn]
        for selection, batch in zip(drawn, batches, strict=True):
            seen.append((selection.env.tolist(), selection.row.tolist(), {k: v.tobytes() for k, v in batch.items()}))
        for selection, latents in pending:
            replay.write(selection, latents)
        pending = [(s, latents_of(b, time)) for s, b in zip(drawn, batches, strict=True)]
    return seen


def everything(replay: Replay) -> dict[str, bytes]:
    """All stored steps, byte for byte."""
    ring = replay._ring
    found = {}
    for env in range(replay.num_envs):
        rows = np.arange(ring.tail[env], ring.head[env])
        found |= {f"{name} {env}": replay.storage.take(name, env, rows).tobytes() for name in FIELDS}
    return found


def stored_steps(replay: Replay) -> dict[str, np.ndarray]:
    """All stored steps of rings that hold equally many, (N, rows, ...)."""
    ring, N = replay._ring, replay.num_envs
    (rows,) = set((ring.head - ring.tail).tolist())
    return replay.gather(Selection(np.arange(N), ring.tail.copy(), np.zeros(N, bool), rows))


def save(replay: Replay, folder: Path) -> dict[str, Any]:
    """A manifest as it comes back from a JSON file."""
    return json.loads(json.dumps(replay.save(folder)))


def make_files_small(patch: pytest.MonkeyPatch) -> None:
    """Disk storage with files of a few steps each."""
    for module, name in [(disk, "SEGMENT_BYTES"), (versions, "EXTENT_BYTES")]:
        patch.setattr(module, name, 300)
    patch.setattr(disk, "SEGMENTS", 8)
