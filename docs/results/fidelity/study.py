"""What the runs of `dreamer sweep fidelity` came to: a table, and a picture of it.

python docs/results/fidelity/study.py FOLDER [OUT.png], the folder of the sweep; runs that have no evaluation or no
report yet are left out. For each objective, background and size: the last evaluation's score, and the last report's
error of pictures dreamt along the real actions, over that of always guessing the mean.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dreamer.records.drawing import COLORS, FAINT, GRAY, INK, Axes, Page, ticks

#: (objective, background, deterministic units)
Kind = tuple[str, str, int]


def last(lines: list[dict[str, Any]], name: str) -> float | None:
    """The newest value of a metric."""
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def read(folder: Path) -> dict[Kind, list[tuple[float, float]]]:
    """(score, relative error of pictures) of every run that has both, by what kind of run it is."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*/metrics.jsonl")):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        names = ("eval/score", "report/imagined_error/image", "report/guess_error/image")
        score, error, guess = (last(lines, name) for name in names)
        if score is not None and error is not None and guess:
            kind = config["loss"]["objective"][0], config["env"]["toy"]["background"], config["model"]["deter"]
            found[kind].append((score, error / guess))
    return found


def draw(found: dict[Kind, list[tuple[float, float]]]) -> np.ndarray:
    """uint8 (H, W, 3): a dot for each run; columns are objectives, colors backgrounds, small dots small sizes."""
    objectives = list(dict.fromkeys(kind[0] for kind in found))
    page, size, sizes = Page(960, 320), (480, 320), sorted({kind[2] for kind in found})
    panels = (("Score", "last evaluation, of 3", (-3, 4)), ("Error of dreamt pictures", "1: a guess", (0, 1.5)))
    for i, (title, words, limits) in enumerate(panels):
        axes = Axes(page, (480 * i, 0), size, title, words, ("", ""), (0, len(objectives)), limits)
        for y in ticks(*limits):
            page.line([axes.at(0, y), axes.at(len(objectives), y)], FAINT)
            page.text((axes.left - 5, axes.at(0, y)[1]), f"{y:.2g}", 11, INK, "rm")
        for column, name in enumerate(objectives):
            words = name.replace("_", "\n")
            for line, word in enumerate(words.split("\n")):
                page.text((axes.at(column + 0.5, 0)[0], axes.bottom + 4 + 13 * line), word, 11, GRAY, "ma")
        for (name, background, deter), runs in found.items():
            for score, error in runs:
                across = objectives.index(name) + (0.35 if background == "plain" else 0.65)
                at = axes.at(across, (score, error)[i])
                page.dot(at, 3 + 2 * sizes.index(deter), COLORS[background == "moving"])
        for color, name in zip(COLORS, ("plain", "moving"), strict=False):
            axes.key(name, color)
    return page.array()


if __name__ == "__main__":
    runs = read(Path(sys.argv[1]))
    heads = ("objective", "background", "units", "runs", "score", "error of dreamt pictures")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for kind, values in sorted(runs.items()):
        scores, errors = np.transpose(values)
        spans = (f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})" for x in (scores, errors))
        print(f"| {' | '.join(map(str, kind))} | {len(values)} | {' | '.join(spans)} |")
    Image.fromarray(draw(runs)).save(sys.argv[2] if len(sys.argv) > 2 else "fidelity.png")
