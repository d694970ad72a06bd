"""What was played, as files: a GIF of dream and reality side by side, and episodes that `--replay.preload` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.paths import whole_file
from dreamer.play.timeline import Moment
from dreamer.records.video import IMAGINED_COLOR, enlargement, save_gif
from dreamer.replay.episodes import check_episode, write_arrays
from dreamer.types import Spaces, replay_fields

#: Least height of the pictures of a GIF, space between them, width of the border where the model was unsure; pixels.
_HEIGHT, _GAP, _BORDER = 192, 12, 4
_PAPER = np.array([250, 250, 251], np.uint8)


class Recorder:
    """Writes into one folder, made with its first file; nobody but this class names the files."""

    def __init__(self, folder: Path, observations: Spaces, actions: Spaces, dreamed: Spaces) -> None:
        """dreamed: the observations that the dream predicts."""
        self._folder, self._spaces, self._dreamed = folder, (observations, actions), dreamed

    def gif(self, pictures: Sequence[Mapping[str, np.ndarray]], moments: Sequence[Moment], fps: float) -> Path:
        """ValueError if there is no picture. pictures: by name, of each moment, uint8 (H, W, 3)."""
        names = list(dict.fromkeys(name for one in pictures for name in one))
        if not names:
            raise ValueError("expected pictures, but this task has none; save the episode instead")
        sizes = {name: max(one[name].shape[:2] for one in pictures if name in one) for name in names}
        strips = []
        for one, moment in zip(pictures, moments, strict=True):
            tiles = [_tile(one.get(name), sizes[name], moment.unsure and name == "dream") for name in names]
            strips.append(_side_by_side(tiles))
        return save_gif(self._free("play", ".gif"), np.stack(strips), fps)

    def episode(self, moments: Sequence[Moment]) -> Path:
        """The real episode up to the last moment, or where there is none all of the dream's. ValueError if it has no
        step, or if the dream does not predict everything that an episode holds."""
        real = [moment for moment in moments if moment.seen is not None]
        kept, dreamed = (list(moments), True) if len(real) < 2 else (real, False)
        observations, actions = self._spaces
        fields = replay_fields(observations, actions, {})
        if len(kept) < 2:
            raise ValueError("expected at least one step; play first")
        if dreamed and (missing := sorted(key for key in fields if key in observations and key not in self._dreamed)):
            raise ValueError(f"expected a dream that predicts {', '.join(missing)}; only a real episode can be saved")
        steps = [_as_step(moment, dreamed) for moment in kept]
        for step, moment in zip(steps, kept, strict=True):
            step |= moment.action or {key: space.zeros() for key, space in actions.items()}
        arrays = {key: np.stack([np.asarray(step[key]) for step in steps]).astype(f.dtype) for key, f in fields.items()}
        arrays["is_first"], arrays["is_last"] = (np.arange(len(kept)) == i for i in (0, len(kept) - 1))
        arrays["reward"][0] = 0
        checked = check_episode(arrays, observations, actions, "what was played")
        path = self._free(f"{'dream' if dreamed else 'real'}_{len(kept) - 1}_{float(arrays['reward'].sum()):g}", ".npz")
        with whole_file(path, sync=False) as file:
            write_arrays(file, checked)
        return path

    def _free(self, name: str, suffix: str) -> Path:
        """A path that no file has."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in self._folder.iterdir())
        while (path := self._folder / f"{number:04d}_{name}{suffix}").exists():
            number += 1
        return path


def _as_step(moment: Moment, dreamed: bool) -> dict[str, Any]:
    """What an episode holds of a moment, as it was dreamed or as it was seen, without the action."""
    if moment.seen is not None and not dreamed:
        return dict(moment.seen.transition)
    told = {key: value[0] for key, value in moment.glimpse.observation.items()}
    flags = {"reward": moment.glimpse.reward[0], "is_terminal": moment.glimpse.ended[0]}
    return told | flags | {"is_first": np.bool_(False), "is_last": np.bool_(False)}


def _tile(image: np.ndarray | None, size: tuple[int, int], unsure: bool) -> np.ndarray:
    """A picture enlarged, in a border that is coloured where the model was unsure; paper where there is none."""
    scale = enlargement(size[0], _HEIGHT)
    tile = np.empty((size[0] * scale + 2 * _BORDER, size[1] * scale + 2 * _BORDER, 3), np.uint8)
    tile[:] = IMAGINED_COLOR if unsure else _PAPER
    if image is not None and image.shape[:2] == size:
        tile[_BORDER:-_BORDER, _BORDER:-_BORDER] = image.repeat(scale, 0).repeat(scale, 1)
    return tile


def _side_by_side(tiles: Sequence[np.ndarray]) -> np.ndarray:
    height = max(tile.shape[0] for tile in tiles)
    width = sum(tile.shape[1] for tile in tiles) + _GAP * (len(tiles) - 1)
    strip = np.empty((height, width, 3), np.uint8)
    strip[:] = _PAPER
    left = 0
    for tile in tiles:
        strip[: tile.shape[0], left : left + tile.shape[1]] = tile
        left += tile.shape[1] + _GAP
    return strip
