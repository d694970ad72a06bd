"""DeepMind Lab: the 30 training levels of DMLab-30. A task is the level's name, ``rooms_watermaze`` for example.

One agent step is 4 frames with one of 15 actions; the end of a level, by its time or by its goal, is terminal (the
interface does not distinguish the two). Levels whose names begin with ``language`` also give their instruction.

Written against the documented Python interface of deepmind_lab and tested with a stand-in for it, not with the
simulator itself.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from dreamer.env_config import DmlabConfig, EnvConfig
from dreamer.envs.interface import Transition, transition
from dreamer.types import Space

FOLDER = "contributed/dmlab30"
LEVELS = {
    "rooms": (
        *("collect_good_objects_train", "exploit_deferred_effects_train", "select_nonmatching_object"),
        *("watermaze", "keys_doors_puzzle"),
    ),
    "language": (
        *("select_described_object", "select_located_object", "execute_random_task"),
        "answer_quantitative_question",
    ),
    "lasertag": (
        *("one_opponent_small", "three_opponents_small", "one_opponent_large"),
        "three_opponents_large",
    ),
    "natlab": ("fixed_large_map", "varying_map_regrowth", "varying_map_randomized"),
    "skymaze": ("irreversible_path_hard", "irreversible_path_varied"),
    "psychlab": ("arbitrary_visuomotor_mapping", "continuous_recognition", "sequential_comparison", "visual_search"),
    "explore": (
        *("object_locations_small", "object_locations_large", "obstructed_goals_small", "obstructed_goals_large"),
        *("goal_locations_small", "goal_locations_large", "object_rewards_few", "object_rewards_many"),
    ),
}
NAMES = tuple(f"{family}_{level}" for family, levels in LEVELS.items() for level in levels)

#: The parts of the simulator's action: pixels of a mouse per frame, directions, buttons.
PARTS = ("look_right", "look_down", "right", "forward", "fire", "jump", "crouch")
SMALL, LARGE = 10, 60
#: Looking about while standing and while walking.
LOOKS = [{"look_right": turn} for turn in (-SMALL, SMALL, -LARGE, LARGE)]
#: The 15 actions of the literature on DMLab-30 since PopArt.
ACTIONS: list[dict[str, int]] = [
    *({"forward": 1}, {"forward": -1}, {"right": -1}, {"right": 1}),
    *LOOKS,
    *({"look_down": SMALL}, {"look_down": -SMALL}),
    *({**look, "forward": 1} for look in LOOKS),
    {"fire": 1},
]

#: The agent sees the first words of an instruction, each as a fixed random vector chosen by the word's checksum.
WORDS, WORD_WIDTH, VOCABULARY = 32, 32, 2**16


class DMLab:
    """One level. `image` uint8 (H, W, 3), and `instruction` float32 (32, 32) where the level gives one."""

    def __init__(self, name: str, config: DmlabConfig, seed: int) -> None:
        import deepmind_lab

        height, width = config.size
        self._repeat = config.repeat
        self._rng = np.random.default_rng(seed)
        self._keys = ["RGB_INTERLEAVED"]
        self.observation_spaces = {"image": Space("image", (height, width, 3))}
        if name.startswith("language"):
            self._keys.append("INSTR")
            self.observation_spaces["instruction"] = Space("vector", (WORDS, WORD_WIDTH))
            table = np.random.default_rng(0).standard_normal((VOCABULARY, WORD_WIDTH), np.float32)
            table[0] = 0  # no word
            self._table = table
        self._lab = deepmind_lab.Lab(
            f"{FOLDER}/{name}", self._keys, config={"height": str(height), "width": str(width), "logLevel": "WARN"}
        )
        self._commands = [np.array([action.get(part, 0) for part in PARTS], np.intc) for action in ACTIONS]
        self._seen: dict[str, np.ndarray] = {}
        self.action_spaces = {"action": Space("discrete", (), (len(ACTIONS),))}

    def reset(self) -> Transition:
        self._lab.reset(seed=int(self._rng.integers(2**31)))
        self._look()
        return transition(self._seen, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        reward = self._lab.step(self._commands[int(action["action"])], num_steps=self._repeat)
        over = not self._lab.is_running()
        if not over:  # a level that has ended shows nothing: keep the last picture
            self._look()
        return transition(self._seen, float(reward), is_last=over, is_terminal=over)

    def render(self) -> np.ndarray | None:
        return self._seen.get("image")

    def close(self) -> None:
        self._lab.close()

    def _look(self) -> None:
        shown = self._lab.observations()
        self._seen = {"image": np.array(shown["RGB_INTERLEAVED"], np.uint8)}
        if "INSTR" in self._keys:
            self._seen["instruction"] = self._table[word_numbers(str(shown["INSTR"]))]


def word_numbers(text: str) -> np.ndarray:
    """The first `WORDS` words as numbers, 0 after the end: (WORDS,) int64."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())[:WORDS]
    numbers = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words]
    return np.array(numbers + [0] * (WORDS - len(numbers)))


def make(name: str, config: EnvConfig, seed: int) -> DMLab:
    return DMLab(name, config.dmlab, seed)


def tasks() -> Sequence[str]:
    return NAMES
