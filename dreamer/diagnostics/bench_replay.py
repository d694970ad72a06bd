"""What replay costs beside plain copying: `python -m dreamer.diagnostics.bench_replay`, or `scripts/bench_replay`.

Prints, for storage in memory and on disk, the time of drawing and gathering a batch as a multiple of gathering the same
bytes from plain numpy arrays, and of adding a step of all environments as a multiple of copying it. Both sides take
turns; the median counts, in processor time of this thread (copying in the kernel included), which other load on the
machine does not lengthen. What is on disk has been read before, so the disk itself is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from dreamer.replay import Replay
from dreamer.types import Field, Space, replay_fields

ENVS, BATCH, LENGTH = 16, 16, 65
IMAGE = (64, 64, 3)


def fields(deter: int) -> dict[str, Field]:
    """A step of a pixel task: image, flags, an action, and the latents of a model with `deter` units."""
    extras = {"deter": Field((deter,), np.dtype(ml_dtypes.bfloat16)), "stoch": Field((32,), np.dtype(np.uint8))}
    return replay_fields({"image": Space("image", IMAGE)}, {"action": Space("discrete", (), (17,))}, extras)


def steps_of(spec: dict[str, Field], count: int) -> list[dict[str, np.ndarray]]:
    """A few different steps of all environments, (N, ...)."""
    rng = np.random.default_rng(0)
    return [{k: rng.integers(0, 2, (ENVS, *f.shape)).astype(f.dtype) for k, f in spec.items()} for _ in range(count)]


def seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def compare(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median processor seconds of each, taking turns, and the median of their ratios."""
    pairs = [(seconds(ours), seconds(plain)) for _ in range(rounds)]
    mine, other = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(other), statistics.median(a / b for a, b in pairs)


def measure(storage: str, folder: Path, capacity: int, deter: int, rounds: int) -> None:
    """Fill a buffer and print its two lines."""
    spec = fields(deter)
    replay = Replay(spec, ENVS, capacity, LENGTH, seed=0, online=False, storage=storage, folder=folder)  # type: ignore[arg-type]
    samples = steps_of(spec, 8)
    rows = capacity // ENVS
    for row in range(rows):
        replay.add(samples[row % 8])
    plain = {k: np.zeros((ENVS * rows, *f.shape), f.dtype) for k, f in spec.items()}
    for array in plain.values():
        array.reshape(-1).view(np.uint8)[:] = 1
    rng = np.random.default_rng(1)

    def gather_plain() -> dict[str, np.ndarray]:
        start = rng.integers(0, ENVS * rows - LENGTH, BATCH)
        slots = start[:, None] + np.arange(LENGTH)
        return {name: array[slots] for name, array in plain.items()}

    turn = [0]

    def add() -> None:
        turn[0] += 1
        replay.add(samples[turn[0] % 8])

    def copy_plain() -> None:
        start = turn[0] % rows * ENVS
        for name, value in samples[turn[0] % 8].items():
            plain[name][start : start + ENVS] = value

    for what, ours, other, count in (
        (f"sampling {BATCH}x{LENGTH}", lambda: replay.gather(replay.select(BATCH)), gather_plain, rounds),
        (f"adding {ENVS} steps", add, copy_plain, 20 * rounds),
    ):
        compare(ours, other, max(1, count // 10))
        mine, theirs, ratio = compare(ours, other, count)
        print(f"{storage:5} {what:15} {1e3 * mine:8.3f} ms   plain {1e3 * theirs:8.3f} ms   {ratio:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", type=int, default=32_000, help="steps in the buffer (17 kB each)")
    parser.add_argument("--deter", type=int, default=2048, help="units of the deterministic state")
    parser.add_argument("--rounds", type=int, default=200, help="batches drawn; steps are 20 times as many")
    parser.add_argument("--folder", type=Path, help="where disk storage lies; default: a temporary folder")
    arguments = parser.parse_args()
    for storage in ("host", "disk"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(storage, Path(folder), arguments.capacity, arguments.deter, arguments.rounds)


if __name__ == "__main__":
    main()
