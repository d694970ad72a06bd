"""Plot training scores of runs beside a published curve. Needs matplotlib.

    python docs/results/plot.py FOLDER PUBLISHED.csv

Reads scores-seed*.jsonl in the folder, writes curve.png there. Scores are averaged in bins of 10,000 frames.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BIN = 10_000

folder, published = Path(sys.argv[1]), Path(sys.argv[2])
figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
runs = sorted(folder.glob("scores-seed*.jsonl"))
last = 0
for path in runs:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = np.array([row["step"] for row in rows])
    scores = np.array([row["episode/score"] for row in rows])
    bins = steps // BIN
    edges = np.unique(bins)
    means = [scores[bins == b].mean() for b in edges]
    axes.plot((edges + 1) * BIN, means, marker="o", label=f"dreamer, {path.stem[7:]}")
    last = max(last, steps.max())
with published.open() as file:
    reference = [{k: float(v) for k, v in row.items() if k != "task"} for row in csv.DictReader(file)]
reference = [row for row in reference if row["step"] <= last + BIN]
x = np.array([row["step"] for row in reference])
mean, std = (np.array([row[key] for row in reference]) for key in ("mean", "std"))
axes.plot(x, mean, color="black", label=f"published, {int(reference[0]['n_seeds'])} seeds (mean, std)")
axes.fill_between(x, mean - std, mean + std, color="black", alpha=0.15, lw=0)
axes.set(xlabel="environment frames", ylabel="training episode score", title=folder.name)
axes.grid(alpha=0.3)
axes.legend()
figure.tight_layout()
figure.savefig(folder / "curve.png")
