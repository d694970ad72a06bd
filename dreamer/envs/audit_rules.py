"""What `dreamer envs check` finds wrong, in words: rules for transitions, and for what Gymnasium returns."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import numpy as np

from dreamer.envs.faults import in_words, original
from dreamer.envs.interface import EnvError, Transition, batch_fields
from dreamer.envs.spaces import observation_leaves
from dreamer.types import Spaces


class Findings:
    """Violations by rule: the first one in words, its step, and how often it happened."""

    def __init__(self) -> None:
        self.step = 0
        self.found: dict[str, tuple[str, int, int]] = {}

    def add(self, rule: str, words: str) -> None:
        first, step, count = self.found.get(rule, (words, self.step, 0))
        self.found[rule] = (first, step, count + 1)

    def lines(self) -> list[str]:
        """One sentence for each, in the order in which they were found."""
        return [
            f"{words} (step {step}{f', {count} times' if count > 1 else ''})"
            for words, step, count in self.found.values()
        ]


def told(error: BaseException) -> str:
    """An exception in one line, with the place that raised it, unless the text is our own, about what was returned."""
    error = original(error)
    words = in_words(error)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, EnvError) or not frames:
        return words
    return f"{words} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}, in {frames[-1].name})"


class Rules:
    """Looks at the transitions of one environment, one after another."""

    def __init__(self, observations: Spaces, findings: Findings) -> None:
        self._spaces = observations
        self._fields = batch_fields(observations)
        self._findings = findings
        self._before: tuple[Transition, Transition] | None = None  # as it was returned, and a copy
        self._brightest: dict[str, int] = {}

    def look(self, result: Transition, first: bool) -> None:
        """`first`: whether it is the answer to `reset`."""
        add = self._findings.add
        for key in sorted(set(self._fields) - set(result)):
            add(f"missing {key}", f"the transition lacks {key!r}, which the spaces promise")
        for key in sorted(set(result) - set(self._fields)):
            add(f"extra {key}", f"the transition has {key!r}, which is in no space")
        for key in self._fields.keys() & result.keys():
            self._look_at(key, result[key])
        for words in _flags(result, first):
            add(words, words)
        self._look_back(result)

    def finish(self) -> None:
        """After the last transition."""
        for key, value in self._brightest.items():
            if value == 1:
                words = f"no pixel of {key!r} is brighter than 1: images go from 0 to 255, not from 0 to 1"
                self._findings.add(f"dark {key}", words)

    def _look_at(self, key: str, value: Any) -> None:
        add, (shape, dtype) = self._findings.add, self._fields[key]
        array = np.asarray(value)
        if array.shape != shape:
            add(f"shape {key}", f"{key!r} has the shape {array.shape}, its space says {shape}")
            return
        if array.dtype != dtype:
            add(f"dtype {key}", f"{key!r} has the dtype {array.dtype}, its space says {dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = array[~np.isfinite(array)].flat[0]
            add(f"finite {key}", f"{key!r} holds {bad}: numbers must be finite")
        space = self._spaces.get(key)
        if space is None:
            return
        if space.classes is not None:
            flat, counts = array.reshape(-1), np.array(space.classes)
            wrong = np.flatnonzero((flat < 0) | (flat >= counts))
            if wrong.size:
                place = wrong[0]
                add(f"class {key}", f"{key!r} holds the class {flat[place]}, its space has 0 to {counts[place] - 1}")
        if space.kind == "image" and array.size:
            self._brightest[key] = max(self._brightest.get(key, 0), int(array.max()))

    def _look_back(self, result: Transition) -> None:
        """Checks whether the previous transition was written to meanwhile."""
        if self._before is not None:
            returned, copy = self._before
            for key in returned.keys() & result.keys():
                one, two = returned[key], result[key]
                if np.asarray(one).tobytes() == np.asarray(copy[key]).tobytes():
                    continue
                if isinstance(one, np.ndarray) and isinstance(two, np.ndarray) and np.may_share_memory(one, two):
                    words = f"{key!r} is the same array at every step: what was returned before changes; return copies"
                else:
                    words = f"{key!r} changed after it was returned: return arrays that nobody writes to"
                self._findings.add(f"reuse {key}", words)
        self._before = result, {key: np.array(value) for key, value in result.items()}


def _flags(result: Transition, first: bool) -> Iterator[str]:
    is_first, is_last, is_terminal = (bool(result.get(key)) for key in ("is_first", "is_last", "is_terminal"))
    if first and not is_first:
        yield "reset returns a transition without is_first"
    if not first and is_first:
        yield "step returns a transition with is_first: an episode begins with reset and nowhere else"
    if first and is_last:
        yield "an episode is over before its first action: is_last on the answer to reset"
    if first and is_terminal:
        yield "is_terminal on the answer to reset"
    if first and np.any(np.asarray(result.get("reward", 0.0)) != 0):
        yield f"the first transition has the reward {np.asarray(result['reward'])}: there is no action before it"


class Watch(gymnasium.Wrapper):
    """Notes where a Gymnasium environment violates its own spaces, before anything is converted."""

    def __init__(self, env: gymnasium.Env, findings: Findings) -> None:
        super().__init__(env)
        self._findings = findings
        self._leaves = observation_leaves(env.observation_space)

    def reset(self, **kwargs: Any) -> Any:
        result = self.env.reset(**kwargs)
        if not isinstance(result, tuple) or len(result) != 2:
            self._findings.add("reset tuple", f"reset returns {_kind(result)}, not (observation, info)")
            return result, {}
        self._look(result[0])
        self._look_at_info(result[1], "reset")
        return result

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        add = self._findings.add
        if not isinstance(result, tuple) or len(result) != 5:
            words = f"step returns {_kind(result)}, not (observation, reward, terminated, truncated, info)"
            add("step tuple", words)
            return result
        observation, reward, terminated, truncated, info = result
        self._look(observation)
        if np.asarray(reward).shape != () or not np.issubdtype(np.asarray(reward).dtype, np.number):
            add("reward kind", f"the reward is {_kind(reward)}, not a number")
        for name, value in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(value, bool | np.bool_):
                add(f"{name} kind", f"{name} is {_kind(value)}, not true or false")
        self._look_at_info(info, "step")
        return result

    def _look_at_info(self, info: Any, method: str) -> None:
        if not isinstance(info, Mapping):
            self._findings.add(f"{method} info", f"{method} returns {_kind(info)} as info, not a dict")

    def _look(self, observation: Any) -> None:
        for leaf in self._leaves:
            part, space = observation, self.env.observation_space
            for place in leaf.path:
                if not isinstance(part, Mapping | tuple | list) or (isinstance(part, Mapping) and place not in part):
                    words = f"the observation has no {leaf.key!r}, which the observation space promises"
                    self._findings.add(f"no {leaf.key}", words)
                    return
                part, space = part[place], space[place]  # type: ignore[index]
            for rule, words in _against(space, part):
                self._findings.add(f"{rule} of {leaf.key}", f"observation {leaf.key!r} {words}")


def _against(space: gs.Space, value: Any) -> Iterator[tuple[str, str]]:
    """(rule, words) for each way in which a value does not fit its elementary space."""
    array = np.asarray(value)
    if array.shape != (space.shape or ()):
        yield "raw shape", f"has the shape {array.shape}, the observation space says {space.shape}"
        return
    if isinstance(space, gs.Box):
        if array.dtype != space.dtype and not np.can_cast(array.dtype, space.dtype):
            yield "raw dtype", f"has the dtype {array.dtype}, the observation space says {space.dtype}"
        outside = (array < space.low) | (array > space.high)
        if outside.any():
            place = tuple(np.argwhere(outside)[0].tolist())
            low, high = space.low[place], space.high[place]
            where = f" at {list(place)}" if place else ""
            yield (
                "bounds",
                f"holds {array[place]:g}{where}, outside of the {low:g} to {high:g} of the observation space",
            )
    elif not space.contains(value):
        yield "member", f"is {_short(value)}, which is not in {space}"


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else f"{_short(value)}"


def _short(value: Any) -> str:
    text = f"the {type(value).__name__} {value!r}"
    return text if len(text) <= 60 else f"{text[:57]}..."
