"""Which key does what: by the names of actions where the environment has some, by their numbers elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from dreamer.types import Space, Spaces

#: Words in names of actions, and the directions they mean; (right, down).
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "forward": (0, -1), "back": (0, 1)}
_ARROWS = {(-1, 0): "ArrowLeft", (1, 0): "ArrowRight", (0, -1): "ArrowUp", (0, 1): "ArrowDown"}
#: Keys that do the same as the arrows, for the left hand.
TWINS = {"KeyA": "ArrowLeft", "KeyD": "ArrowRight", "KeyW": "ArrowUp", "KeyS": "ArrowDown"}
_IDLE = {"noop", "none", "stay", "nothing", "wait", "idle"}
_SPACE = {"fire", "jump", "use", "toggle", "do", "shoot", "attack", "interact"}
#: For names that have no direction, in order.
_REST = [*(f"Digit{n}" for n in range(1, 10)), "Digit0", *(f"Key{letter}" for letter in "EFGHJKLMNOTUVXYZ")]


class Key(TypedDict):
    """keys: codes (of the browser's KeyboardEvent) held together; label: what it does; action: by name."""

    keys: list[str]
    label: str
    action: dict[str, Any]


class Keyboard(TypedDict):
    """keys: what they do, several held together first; idle: the action while nothing is held; None: the last one."""

    keys: list[Key]
    idle: dict[str, Any] | None


def keyboard(spaces: Spaces, names: Mapping[str, Sequence[str]]) -> Keyboard:
    """The keys of an action space. With several actions, or several choices in one, only what fits on the keyboard:
    the page has a control for each number beside it."""
    key, space = next(iter(spaces.items()))
    rest = {name: _zeros(other) for name, other in spaces.items() if name != key}
    if space.classes is None:
        keys, idle = _axes(space)
    elif space.shape == ():
        keys, idle = _choices(space.classes[0], names.get(key))
    else:
        keys, idle = [], _zeros(space)
    found = [Key(keys=codes, label=label, action={key: value, **rest}) for codes, label, value in keys]
    found.sort(key=lambda one: -len(one["keys"]))
    return {"keys": found, "idle": None if idle is None else {key: idle, **rest}}


_Choice = tuple[list[str], str, Any]


def _choices(count: int, names: Sequence[str] | None) -> tuple[list[_Choice], int | None]:
    """Keys of a single choice."""
    if names is None:
        numbers: list[_Choice] = [([code], str(i), i) for i, code in zip(range(count), _REST, strict=False)]
        sides = {2: (0, 1), 3: (0, 2)}.get(count)
        pairs = () if sides is None else zip(("ArrowLeft", "ArrowRight"), sides, strict=True)
        arrows: list[_Choice] = [([code], str(i), i) for code, i in pairs]
        return [*arrows, *numbers], {3: 1}.get(count, None if count == 2 else 0)
    found: list[_Choice] = []
    idle, free = None, iter(_REST)
    for index, name in enumerate(names):
        codes = keys_of(name)
        taken = [used for used, _, _ in found]
        if set(words(name)) & _IDLE and idle is None:
            idle = index
        elif codes and codes not in taken:
            found.append((codes, _label(name), index))
        elif (code := next(free, None)) is not None:
            found.append(([code], _label(name), index))
    return found, idle


def words(name: str) -> list[str]:
    """UPRIGHTFIRE, move_up-right: the words in it, in lower case."""
    text = name.lower()
    for word in (*_DIRECTIONS, *_SPACE - {"do", "use"}):
        text = text.replace(word, f" {word} ")
    return re.findall(r"[a-z0-9]+", text)


def keys_of(name: str) -> list[str]:
    """The arrows and space bar that an action's name means, sorted; none if it says more than directions."""
    parts = [word for word in words(name) if word not in ("move", "go", "turn", "noop")]
    if not parts or not all(word in _DIRECTIONS or word in _SPACE for word in parts):
        return []
    return sorted({_ARROWS[_DIRECTIONS[word]] if word in _DIRECTIONS else "Space" for word in parts})


def _axes(space: Space) -> tuple[list[_Choice], Any]:
    """Keys of a continuous action: left and right for its first number, up and down for its second."""
    width = space.flat_width
    found = []
    for place, (less, more) in enumerate((("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp"))[:width]):
        for code, value in ((less, -1.0), (more, 1.0)):
            numbers = [value if i == place else 0.0 for i in range(width)]
            found.append(([code], f"{'+' if value > 0 else '-'} number {place + 1}", numbers))
    return found, [0.0] * width


def _label(name: str) -> str:
    return " ".join(words(name)) or name


def _zeros(space: Space) -> Any:
    """Nothing done, as the page says it: a class, or flat numbers."""
    return 0 if space.shape == () and space.classes is not None else [0] * len(space.zeros().ravel())
