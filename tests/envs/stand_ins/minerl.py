"""A stand-in of MineRL 0.4.4: the names, arguments and shapes of its documented interface, around a world of numbers.

Attacking gives a log every third time, more exactly one of the two kinds by turns; crafting costs nothing and works if
`NEEDS` are owned; every fifth step hurts. Actions are checked as strictly as Minecraft's Java side reads them.
"""

from __future__ import annotations

import abc
import sys
import types
from typing import Any

import numpy as np

ITEMS = [
    *("air", "cobblestone", "crafting_table", "diamond", "dirt", "furnace", "iron_ingot", "iron_ore", "iron_pickaxe"),
    *("log", "log2", "planks", "stick", "stone_pickaxe", "wooden_pickaxe"),
]
KEYS = {"forward": 17, "back": 31, "left": 30, "right": 32, "jump": 57, "sneak": 42, "attack": -100}
NEEDS = {
    **{"planks": "log", "stick": "planks", "crafting_table": "planks", "wooden_pickaxe": "stick"},
    **{"stone_pickaxe": "cobblestone", "furnace": "cobblestone", "iron_ingot": "iron_ore"},
    "iron_pickaxe": "iron_ingot",
}


class Handler(abc.ABC):
    @abc.abstractmethod
    def to_string(self) -> str: ...

    def xml_template(self) -> str:
        return ""


class Named(Handler):
    """Any handler of the package: remembers what it was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def to_string(self) -> str:
        return type(self).__name__


NAMES = [
    *("POVObservation", "FlatInventoryObservation", "EquippedItemObservation", "ObservationFromLifeStats"),
    *("KeybasedCommandAction", "CameraAction", "PlaceBlock", "EquipAction", "CraftAction", "CraftNearbyAction"),
    *("SmeltItemNearby", "DefaultWorldGenerator", "ServerQuitWhenAnyAgentFinishes", "TimeInitialCondition"),
    "SpawningInitialCondition",
]
CHOICES = {
    "PlaceBlock": "place",
    "EquipAction": "equip",
    "CraftAction": "craft",
    "CraftNearbyAction": "nearbyCraft",
    "SmeltItemNearby": "nearbySmelt",
}


class EnvSpec:
    """Abstract in MineRL: every method below must be there."""

    METHODS = (
        *("create_observables", "create_actionables", "create_rewardables", "create_agent_start"),
        *("create_agent_handlers", "create_server_world_generators", "create_server_quit_producers"),
        *("create_server_decorators", "create_server_initial_conditions", "create_monitors"),
        *("determine_success_from_rewards", "is_from_folder", "get_docstring"),
    )

    def __init__(self, name: str, max_episode_steps: int | None = None) -> None:
        missing = [method for method in self.METHODS if not hasattr(self, method)]
        if missing:
            raise TypeError(f"abstract methods {missing}")
        self.name = name

    def make(self) -> World:
        return World(self)


class Enum:
    def __init__(self, values: list[str]) -> None:
        self.values = np.array(values)


class Dict:
    def __init__(self, **spaces: Any) -> None:
        self.spaces = spaces

    def __getitem__(self, key: str) -> Any:
        return self.spaces[key]


class World:
    """The Gym environment (reset gives an observation, step four things) that a specification makes."""

    def __init__(self, spec: EnvSpec) -> None:
        observables = {type(one).__name__: one for one in spec.create_observables()}
        self.height, self.width = observables["POVObservation"].args[0]
        in_hand = ["air", *observables["EquippedItemObservation"].args[0], "other"]
        self.observation_space = Dict(
            inventory=Dict(**dict.fromkeys(observables["FlatInventoryObservation"].args[0])),
            equipped_items=Dict(mainhand=Dict(type=Enum(list(dict.fromkeys(in_hand))))),
        )
        self.keys: dict[str, Any] = {"camera": None}
        for one in spec.create_actionables():
            name = type(one).__name__
            if name == "KeybasedCommandAction":
                assert one.args[1] == KEYS[one.args[0]]
                self.keys[one.args[0]] = (0, 1)
            elif name in CHOICES:
                self.keys[CHOICES[name]] = one.args[0]
        self.start = [one.xml_template() for one in spec.create_agent_start()]
        self.given: list[dict[str, Any]] = []
        self.next_seed = 0
        self.fail = self.closed = False

    def seed(self, seed: int) -> None:
        self.next_seed = seed

    def reset(self) -> dict[str, Any]:
        self.random = np.random.default_rng(self.next_seed)
        self.inventory = dict.fromkeys(ITEMS, 0)
        self.life, self.steps, self.attacks, self.hand = 20.0, 0, 0, "air"
        return self._observation()

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], float, bool, dict]:
        assert set(action) == set(self.keys), set(action) ^ set(self.keys)
        for key, allowed in self.keys.items():
            assert key == "camera" or action[key] in allowed, (key, action[key])
        assert np.shape(action["camera"]) == (2,) and np.abs(action["camera"]).max() <= 180
        self.given.append(action)
        self.steps += 1
        self.attacks += action["attack"]
        if action["attack"] and self.attacks % 3 == 0:
            self.inventory[("log", "log2")[self.attacks % 2]] += 1
        for key in ("craft", "nearbyCraft", "nearbySmelt"):
            item = action[key]
            if item != "none" and self.inventory[NEEDS[item]]:
                self.inventory[item] += 1
        if self.inventory[action["equip"] if action["equip"] != "none" else "air"]:
            self.hand = action["equip"]
        if self.steps % 5 == 0:
            self.life -= 2
        info = {"error": "the client is gone"} if self.fail else {}
        return self._observation(), 0.0, self.life <= 0, info

    def close(self) -> None:
        self.closed = True

    def _observation(self) -> dict[str, Any]:
        return {
            "pov": self.random.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8),
            "inventory": {item: np.array(count) for item, count in self.inventory.items()},
            "equipped_items": {"mainhand": {"type": self.hand}},
            "life_stats": {"life": np.array(self.life), "food": np.array(10), "air": np.array(300)},
        }


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


handler = _module("minerl.herobraine.hero.handler", Handler=Handler)
handlers = _module("minerl.herobraine.hero.handlers", **{name: type(name, (Named,), {}) for name in NAMES})
mc = _module("minerl.herobraine.hero.mc", ALL_ITEMS=ITEMS, INVERSE_KEYMAP=KEYS)
_module("minerl.herobraine.hero", handler=handler, handlers=handlers, mc=mc)
_module("minerl.herobraine.env_spec", EnvSpec=EnvSpec)
_module("minerl.herobraine")
