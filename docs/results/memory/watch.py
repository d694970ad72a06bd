"""Watches the memory of a run: resident size of the training process and of its workers, every ten seconds.

python docs/results/memory/watch.py MINUTES OUT.csv -- dreamer train ...      run it and watch
python docs/results/memory/watch.py --fit OUT.csv CAPACITY            growth after the ring has wrapped twice
"""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil


def megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def watch(minutes: float, out: Path, command: list[str]) -> None:
    run = psutil.Popen(command, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    with out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seconds", "agent_steps", "parent_mb", "workers_mb", "workers", "descriptors"])
        while run.poll() is None and time.monotonic() - begin < 60 * minutes:
            time.sleep(10)
            workers = [child for child in run.children(recursive=True) if child.is_running()]
            sizes = [megabytes(worker) for worker in workers]
            values = [megabytes(run), sum(sizes)]
            rows.writerow([round(time.monotonic() - begin), newest_step(command), *(round(v, 2) for v in values),
                           len(workers), run.num_fds()])  # fmt: skip
            file.flush()
    run.send_signal(signal.SIGTERM)
    run.wait()


def newest_step(command: list[str]) -> int:
    path = Path(command[command.index("--logdir") + 1]) / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(whole[-1])["agent_steps"] if whole else 0


def fit(out: Path, capacity: int) -> None:
    with out.open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    kept = [row for row in rows if row["agent_steps"] >= 2 * capacity]
    minutes = np.array([row["seconds"] for row in kept]) / 60
    print(f"{minutes[-1] - minutes[0]:.1f} minutes after the ring of {capacity:,} steps had wrapped twice, "
          f"{kept[-1]['agent_steps']:,.0f} agent steps in all")  # fmt: skip
    for name in ("parent_mb", "workers_mb", "descriptors"):
        values = np.array([row[name] for row in kept])
        slope = np.polyfit(minutes, values, 1)[0]
        print(f"{name}: {values[0]:.1f} at first, {values[-1]:.1f} at last, {slope:+.3f} a minute")


if __name__ == "__main__":
    if sys.argv[1] == "--fit":
        fit(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        watch(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[4:])
