"""Minecraft: task ``diamond``, from an empty inventory to a diamond, through MineRL 0.4.4.

Twelve items on the way give 1 each when first owned in an episode, and a change of health gives 0.01 times its share
of full health. An episode ends by death (terminal) or at a time limit. The settings are those of the DreamerV3 paper:
25 actions; blocks break 100 times as fast, or else attacks last 30 steps; jumps last 10 steps and move forwards.

Written against MineRL's documented interface and tested with a stand-in for it, not with Minecraft itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dreamer.env_config import EnvConfig, MinecraftConfig
from dreamer.envs.interface import Env, EnvError, Transition, transition
from dreamer.envs.wrappers import TimeLimit
from dreamer.types import Space

TURN = 15  # degrees

#: Every key of a MineRL action that does nothing.
IDLE: dict[str, Any] = {
    **dict.fromkeys(("forward", "back", "left", "right", "jump", "sneak", "attack"), 0),
    **dict.fromkeys(("place", "equip", "craft", "nearbyCraft", "nearbySmelt"), "none"),
    "camera": (0, 0),
}
MOVES: dict[str, dict[str, Any]] = {
    "noop": {},
    **{key: {key: 1} for key in ("attack", "forward", "back", "left", "right")},
    "jump": {"jump": 1, "forward": 1},
    "turn_up": {"camera": (-TURN, 0)},
    "turn_down": {"camera": (TURN, 0)},
    "turn_left": {"camera": (0, -TURN)},
    "turn_right": {"camera": (0, TURN)},
}
PICKAXES = ("wooden_pickaxe", "stone_pickaxe", "iron_pickaxe")
WORK: dict[str, dict[str, Any]] = {
    f"{key}_{item}": {key: item}
    for key, items in {
        "place": ("dirt", "crafting_table", "furnace"),
        "equip": PICKAXES,
        "craft": ("planks", "stick", "crafting_table"),
        "nearbyCraft": (*PICKAXES, "furnace"),
        "nearbySmelt": ("iron_ingot",),
    }.items()
    for item in items
}
ACTIONS = {**MOVES, **WORK}

#: Items that give a reward when they are first owned, in the order in which they can be obtained.
MILESTONES = (
    *("log", "planks", "stick", "crafting_table", "wooden_pickaxe", "cobblestone", "stone_pickaxe"),
    *("iron_ore", "furnace", "iron_ingot", "iron_pickaxe", "diamond"),
)
HEALTH_REWARD = 0.01
FULL = {"health": ("life", 20.0), "hunger": ("food", 20.0), "breath": ("air", 300.0)}


class Minecraft:
    """One world with one player. Each episode has a world of its own.

    image              uint8 (H, W, 3)
    inventory(_max)    float32 (items,): how many are owned now, and the most in this episode
    equipped           which item is in the hand
    health and others  shares of the maximum
    log/item_NAME      how many of a milestone's item are owned
    """

    def __init__(self, config: MinecraftConfig, seed: int) -> None:
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._env = world(config.size, config.break_speed)
        seen = self._env.observation_space
        # Minecraft has two kinds of logs, which count as one.
        self._items = sorted(set(seen["inventory"].spaces) - {"log2"})
        self._in_hand = {str(name): i for i, name in enumerate(seen["equipped_items"]["mainhand"]["type"].values)}
        self._commands = list(ACTIONS.values())
        counts = Space("vector", (len(self._items),))
        self.observation_spaces = {
            "image": Space("image", (*config.size, 3)),
            "inventory": counts,
            "inventory_max": counts,
            "equipped": Space("discrete", (), (len(self._in_hand),)),
            **{key: Space("vector", ()) for key in FULL},
            **{f"log/item_{item}": Space("vector", ()) for item in MILESTONES},
        }
        self.action_spaces = {"action": Space("discrete", (), (len(ACTIONS),))}
        self._begin()

    def reset(self) -> Transition:
        self._begin()
        self._env.seed(int(self._rng.integers(2**31)))
        observation, _ = self._observe(self._env.reset(), first=True)
        return transition(observation, is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        seen, _, dead, info = self._env.step(self._command(int(action["action"])))
        if info and "error" in info:
            raise EnvError(f"expected a step of Minecraft, got the error {info['error']!r} of its Java process")
        return transition(*self._observe(seen), is_last=bool(dead), is_terminal=bool(dead))

    def render(self) -> np.ndarray:
        return self._image

    def close(self) -> None:
        self._env.close()

    def _begin(self) -> None:
        self._attack = self._jump = self._pitch = 0
        self._health = 0.0
        self._owned: set[str] = set()
        self._most = np.zeros(len(self._items), np.float32)
        self._image = np.zeros((*self._config.size, 3), np.uint8)

    def _command(self, index: int) -> dict[str, Any]:
        """MineRL's action. Attacks and jumps last for several steps; the view stays within the pitch limit."""
        command = {**IDLE, **self._commands[index]}
        if self._config.break_speed == 1:
            self._attack = self._config.sticky_attack if command["attack"] else self._attack
            if self._attack:
                self._attack -= 1
                command |= {"attack": 1, "jump": 0}
        self._jump = self._config.sticky_jump if command["jump"] else self._jump
        if self._jump:
            self._jump -= 1
            command |= {"jump": 1, "forward": 1}
        pitch, yaw = command["camera"]
        if abs(self._pitch + pitch) > self._config.pitch_limit:
            pitch = 0
        self._pitch += pitch
        return {**command, "camera": np.array([pitch, yaw], np.float32)}

    def _observe(self, seen: Mapping[str, Any], first: bool = False) -> tuple[dict[str, Any], float]:
        """(observation, reward). Items owned when an episode begins give none."""
        owned = {item: int(count) for item, count in seen["inventory"].items()}
        owned["log"] += owned.pop("log2", 0)
        counts = np.array([owned[item] for item in self._items], np.float32)
        self._most = np.maximum(self._most, counts)
        self._image = np.array(seen["pov"], np.uint8)
        stats = {key: float(seen["life_stats"][name]) / full for key, (name, full) in FULL.items()}
        new = {item for item in MILESTONES if owned[item] > 0} - self._owned
        reward = 0.0 if first else len(new) + HEALTH_REWARD * (stats["health"] - self._health)
        self._owned |= new
        self._health = stats["health"]
        return {
            "image": self._image,
            "inventory": counts,
            "inventory_max": self._most,
            "equipped": np.int32(self._in_hand[str(seen["equipped_items"]["mainhand"]["type"])]),
            **{key: np.float32(value) for key, value in stats.items()},
            **{f"log/item_{item}": np.float32(owned[item]) for item in MILESTONES},
        }, reward


def world(size: tuple[int, int], break_speed: float) -> Any:
    """A MineRL environment: the default world by day and night, with monsters. Starts a Java process."""
    for name, kind in {"float": float, "int": int, "bool": bool}.items():
        if name not in np.__dict__:
            setattr(np, name, kind)  # MineRL 0.4.4 uses names that NumPy no longer has
    from minerl.herobraine.env_spec import EnvSpec
    from minerl.herobraine.hero import handler, handlers, mc

    class BreakSpeed(handler.Handler):
        def to_string(self) -> str:
            return "break_speed"

        def xml_template(self) -> str:
            return f"<BreakSpeedMultiplier>{break_speed}</BreakSpeedMultiplier>"

    class World(EnvSpec):
        def create_observables(self) -> list:
            return [
                handlers.POVObservation(size),
                handlers.FlatInventoryObservation(mc.ALL_ITEMS),
                handlers.EquippedItemObservation(mc.ALL_ITEMS, _default="air", _other="other"),
                handlers.ObservationFromLifeStats(),
            ]

        def create_actionables(self) -> list:
            keys = [key for key in IDLE if IDLE[key] == 0]
            choose = (
                *(handlers.PlaceBlock, handlers.EquipAction, handlers.CraftAction),
                *(handlers.CraftNearbyAction, handlers.SmeltItemNearby),
            )
            return [
                *(handlers.KeybasedCommandAction(key, mc.INVERSE_KEYMAP[key]) for key in keys),
                handlers.CameraAction(),
                *(make(["none", *mc.ALL_ITEMS], _other="none", _default="none") for make in choose),
            ]

        def create_agent_start(self) -> list:
            return [BreakSpeed()]

        def create_server_world_generators(self) -> list:
            return [handlers.DefaultWorldGenerator(force_reset=True)]

        def create_server_quit_producers(self) -> list:
            return [handlers.ServerQuitWhenAnyAgentFinishes()]

        def create_server_initial_conditions(self) -> list:
            return [
                handlers.TimeInitialCondition(allow_passage_of_time=True, start_time=0),
                handlers.SpawningInitialCondition(allow_spawning=True),
            ]

        def nothing(self) -> list:
            return []

        create_rewardables = create_agent_handlers = create_server_decorators = nothing
        create_mission_handlers = create_monitors = nothing

        def determine_success_from_rewards(self, rewards: list) -> bool:
            return True

        def is_from_folder(self, folder: str) -> bool:
            return False

        def get_docstring(self) -> str:
            return __doc__ or ""

    return World(name="DreamerMinecraft-v0").make()


def make(name: str, config: EnvConfig, seed: int) -> Env:
    return TimeLimit(Minecraft(config.minecraft, seed), config.minecraft.steps)


def tasks() -> Sequence[str]:
    return ("diamond",)
