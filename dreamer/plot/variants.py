"""What distinguishes runs of one task: the options in which their configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamer.schema import options, sections, show

#: Options that say which run it is, not what kind of run.
_NAMES = {"task", "seed", "logdir"}
#: Groups of options that configurations of this program have had since its first version, and no other program's have.
_OURS = {"run", "actor_critic", "replay", "model", "env"}


def is_ours(tree: Mapping[str, Any]) -> bool:
    """Whether a config.yaml is from this program, in any version."""
    return _OURS <= tree.keys()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and f"{prefix}{name}" in sections()
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _compared(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options that can make runs differ in kind: those that may change within a run cannot."""
    names = {name: None for name in options()} | {name: None for config in configs for name in config}
    return [n for n in names if n not in _NAMES and not (n in options() and options()[n].resume)]


def _value(config: Mapping[str, Any], name: str) -> str:
    """An option's value as text; the default where an older configuration does not have it."""
    default = options()[name].default if name in options() else None
    return show(config.get(name, default))


def variants(configs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """The options in which runs of the same task differ, in the order of `config.py`.

    configs  by task, of all its runs
    Options that always differ together (the sizes of a network) are one entry, in which the first stands for all.
    """
    runs = [config for group in configs.values() for config in group]
    found: dict[tuple[int, ...], list[str]] = {}
    for name in _compared(runs):
        values = {task: [_value(config, name) for config in group] for task, group in configs.items()}
        if all(len(set(group)) == 1 for group in values.values()):
            continue
        flat = [value for group in values.values() for value in group]
        first = {value: place for place, value in reversed(list(enumerate(flat)))}
        found.setdefault(tuple(first[value] for value in flat), []).append(name)
    return list(found.values())


def variant(config: Mapping[str, Any], differing: Sequence[Sequence[str]]) -> str:
    """`train_ratio 64, deter 512`: the values of one configuration that set it apart."""
    firsts = [names[0] for names in differing]
    ends = [name.rsplit(".", 1)[-1] for name in firsts]
    shown = [name if ends.count(end) > 1 else end for name, end in zip(firsts, ends, strict=True)]
    return ", ".join(f"{short} {_value(config, name)}" for short, name in zip(shown, firsts, strict=True))
