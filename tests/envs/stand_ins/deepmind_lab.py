"""A stand-in of deepmind_lab: the documented Python interface around a level of 40 frames.

A frame of walking forwards gives 1, firing gives 10. After the end, observations may not be asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FRAMES = 40
LOW = np.array([-512, -512, -1, -1, 0, 0, 0])
HIGH = np.array([512, 512, 1, 1, 1, 1, 1])


class Lab:
    def __init__(
        self, level: str, observations: list[str], config: dict[str, str] | None = None, renderer: str = "software"
    ) -> None:
        assert all(isinstance(part, str) for item in (config or {}).items() for part in item)
        self.level, self.names, self.config = level, observations, config or {}
        self.frame = FRAMES
        self.given: list[list[int]] = []
        self.closed = False

    def reset(self, episode: int = -1, seed: int | None = None) -> None:
        self.random = np.random.default_rng(seed)
        self.frame = 0

    def step(self, action: np.ndarray, num_steps: int = 1) -> float:
        assert action.dtype == np.intc and action.shape == (7,)
        assert (LOW <= action).all() and (action <= HIGH).all() and self.is_running()
        self.given.append(action.tolist())
        frames = min(num_steps, FRAMES - self.frame)
        self.frame += frames
        return float(frames * action[3] + 10 * action[4])

    def is_running(self) -> bool:
        return self.frame < FRAMES

    def observations(self) -> dict[str, Any]:
        if not self.is_running():
            raise RuntimeError("the level has ended")
        shape = int(self.config["height"]), int(self.config["width"]), 3
        all_of_them = {
            "RGB_INTERLEAVED": self.random.integers(0, 256, shape, dtype=np.uint8),
            "INSTR": f"pick the red ball {self.frame}",
        }
        return {name: all_of_them[name] for name in self.names}

    def close(self) -> None:
        self.closed = True
