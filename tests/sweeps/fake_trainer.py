"""Stands for `dreamer train` in tests of sweeps: writes the files of a run, ten agent steps at a time.

What it does is in behaviour.json beside the runs, by name of the run or "*": seconds per tick, score, and ends:
fail_at (agent steps), fails (how often, null: always), code, words.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

DEFAULTS = {"seconds": 0.01, "score": 1.0, "fail_at": None, "fails": None, "code": 1, "words": "out of luck"}


def main() -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    configs, folder = Path(sys.argv[2]), Path(sys.argv[4])
    assert sys.argv[1::2] == ["--configs", "--logdir"], sys.argv
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"dreamer: error: {folder} is in use by a live run", flush=True)
        return 2
    os.truncate(lock, 0)
    os.write(lock, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
    shutil.copy(configs, folder / "config.yaml")
    said = json.loads((folder.parent / "behaviour.json").read_text())
    does = DEFAULTS | said.get("*", {}) | said.get(folder.name, {})
    total = int(re.search(r"agent_steps: (\d+)", configs.read_text())[1])
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    step = json.loads(lines[-1])["agent_steps"] if lines else 0
    with (folder / "starts.jsonl").open("a") as file:
        keys = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION")
        file.write(json.dumps({"from": step, "at": time.time(), **{k: os.environ.get(k) for k in keys}}) + "\n")
    starts = len((folder / "starts.jsonl").read_text().splitlines())
    while step < total and not stopped:
        if (
            does["fail_at"] is not None
            and step >= does["fail_at"]
            and (does["fails"] is None or starts <= does["fails"])
        ):
            print(does["words"], flush=True)
            return does["code"]
        time.sleep(does["seconds"])
        step += 10
        with (folder / "scores.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "episode/score": does["score"], "episode/length": 10}) + "\n")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "agent_steps": step, "updates": 0, "fps/policy": 100.0}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
