"""One person's game: what they ask for, what happens at each tick, and what their page is shown. Knows no network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dreamer.dreaming import Dreams
from dreamer.envs.interface import as_rgb
from dreamer.play.actors import PERSON, Actors, Memory, read_action
from dreamer.play.keyboard import TWINS, keyboard
from dreamer.play.real_world import RealWorld, Seen
from dreamer.play.recording import Recorder
from dreamer.play.timeline import Moment, Timeline
from dreamer.rssm import State

#: Frames per second that can be asked for, and those of the beginning.
SPEEDS, SPEED = (1, 60), 8
#: Numbers of an observation that the page draws as curves.
NUMBERS = 32
#: The page says that it falls behind where it shows fewer than this share of the frames that were asked for.
_BEHIND = 0.85


class CommandError(ValueError):
    """A command that makes no sense; the message goes to the page."""


class Session:
    """A game in one tab. Everything in it is its own; the weights and compiled programs are shared by all."""

    def __init__(
        self,
        dreams: Dreams,
        actors: Actors,
        start: Callable[[Seen | None], State],
        world: RealWorld | None,
        recorder: Recorder,
        seed: int,
        why_alone: str = "",
    ) -> None:
        """start: see `Timeline`; why_alone: why there is no real environment, in words."""
        self.timeline = Timeline(dreams, start, world)
        self.playing, self.actor, self.speed = False, PERSON, SPEED
        self._dreams, self._actors, self._recorder, self._why = dreams, actors, recorder, why_alone
        self._rng, self._seed = np.random.default_rng(seed), 0
        self._keys = keyboard(dreams.agent.actions, {} if world is None else world.names)
        idle = self._keys["idle"]
        first = idle if idle is not None else self._keys["keys"][0]["action"]
        self._held = read_action(first, dreams.agent.actions)
        self._tapped: dict[str, np.ndarray] | None = None
        #: What an actor carries on, and the actor and step that it is for.
        self._carried: tuple[tuple[str, int], Memory] = ("", 0), {}
        self._shown: list[float] = []
        self.reset()

    @property
    def over(self) -> bool:
        """Whether there is nothing to play on: the dream is over, or the history is full."""
        return self.timeline.now.ended[0] or self.timeline.full

    def reset(self) -> None:
        self._seed = int(self._rng.integers(2**32))
        self.timeline.begin(self._seed)
        self._tapped, self._carried = None, (("", 0), {})

    def hello(self) -> dict[str, Any]:
        """What a page needs to know before the first frame."""
        agent, world = self._dreams.agent, self.timeline.world
        actions = {
            key: {
                "classes": space.classes,
                "size": int(space.zeros().size),
                "names": None if world is None else world.names.get(key),
            }
            for key, space in agent.actions.items()
        }
        return {
            "hello": agent.config.task,
            "actions": actions,
            "keyboard": self._keys,
            "twins": TWINS,
            "actors": list(self._actors.names),
            "actor": self.actor,
            "speed": self.speed,
            "speeds": SPEEDS,
            "real": world is not None,
            "alone": self._why,
            "rewinds": world is not None and world.restorable,
        }

    def command(self, text: str) -> str | None:
        """Do what a page asks for, {"do": NAME, ...} in JSON; returns words for the person, if there are any.

        CommandError for anything else.
        """
        try:
            given = json.loads(text)
        except ValueError:
            raise CommandError("expected a command in JSON") from None
        if not isinstance(given, dict) or not isinstance(given.get("do"), str) or given["do"] not in COMMANDS:
            raise CommandError(f"expected a command among {', '.join(COMMANDS)}")
        try:
            return COMMANDS[given["do"]](self, given)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CommandError(f"{given['do']}: {str(error)[:200] or type(error).__name__}") from error

    def tick(self) -> None:
        """One step by whoever acts, if the game goes on."""
        if self.over:
            self.playing = False
            return
        now, at = self.timeline.now, self.timeline.at
        if self.actor == PERSON:
            action, self._tapped = self._held if self._tapped is None else self._tapped, None
        else:
            carried = self._carried[1] if self._carried[0] == (self.actor, at) else self._actors.begin(self.actor)
            observation = now.glimpse.observation
            action, carried = self._actors.choose(self.actor, now.state, observation, carried, self._seed, at)
            self._carried = (self.actor, at + 1), carried
        self.timeline.step(action, self.actor)
        self.playing = self.playing and not self.over

    def frame(self) -> bytes:
        """What the page shows now: four bytes of a length, JSON of this length, then pictures, uint8 (H, W, 3) each."""
        self._shown = [*self._shown[-30:], time.monotonic()]
        line, now = self.timeline, self.timeline.now
        pictures = self._pictures(now)
        header = {
            "at": line.at,
            "last": len(line.moments) - 1,
            "playing": self.playing,
            "actor": self.actor,
            "speed": self.speed,
            "rate": round(self._rate(), 1),
            "behind": self.playing and len(self._shown) > 10 and self._rate() < _BEHIND * self.speed,
            "ended": now.ended,
            "full": line.full,
            "failure": None if line.world is None else line.world.failure,
            "parted": now.parted,
            "pictures": [[name, *image.shape[:2]] for name, image in pictures.items()],
            **self._told(now),
        }
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        parts = [len(text).to_bytes(4, "little"), text, *(image.tobytes() for image in pictures.values())]
        return b"".join(parts)

    def idle(self) -> None:
        """The rate of frames is not measured over a pause."""
        self._shown = []

    def close(self) -> None:
        if self.timeline.world is not None:
            self.timeline.world.close()

    def _rate(self) -> float:
        """Frames per second lately; what was asked for while it is not known."""
        shown = self._shown
        return float(self.speed) if len(shown) < 3 else (len(shown) - 1) / max(shown[-1] - shown[0], 1e-6)

    def _told(self, now: Moment) -> dict[str, Any]:
        """What the model thinks of a moment, and what was done before it, as numbers."""
        glimpse, seen = now.glimpse, now.seen
        before = self.timeline.moments[max(0, self.timeline.at - 1)]
        led = {} if before is now else {key: np.ravel(value).tolist() for key, value in (before.action or {}).items()}
        vectors = [key for key, space in self._dreams.observations.items() if space.kind != "image"]
        dreamed = {key: value[0] for key, value in glimpse.observation.items()}
        return {
            "reward": _number(glimpse.reward[0]),
            "cont": _number(glimpse.cont[0]),
            "value": _number(glimpse.value[0]),
            "entropy": _number(glimpse.entropy[0]),
            "unsure": now.unsure,
            "scores": [_number(score) for score in now.scores],
            "difference": None if now.difference is None else _number(now.difference),
            "real_reward": None if seen is None else _number(seen.transition["reward"]),
            "action": led,
            "acted": before.actor,
            "numbers": [_numbers(dreamed, vectors), _numbers(seen.transition, vectors) if seen is not None else []],
        }

    def _pictures(self, now: Moment) -> dict[str, np.ndarray]:
        """By name: the dream's first image, the same of the real observation or, where the agent sees numbers, the real
        environment's own picture."""
        images = [key for key, space in self._dreams.observations.items() if space.kind == "image"]
        found: dict[str, np.ndarray | None] = {}
        if images:
            found["dream"] = as_rgb(now.glimpse.observation[images[0]][0])
            found["real"] = None if now.seen is None else as_rgb(np.asarray(now.seen.transition[images[0]]))
        elif now.seen is not None:
            found["real"] = now.seen.picture
        return {name: np.ascontiguousarray(image) for name, image in found.items() if image is not None}

    # Commands

    def _act(self, given: dict[str, Any]) -> None:
        """Hold an action; a press that ends before the next tick still counts there, once."""
        action = read_action(given["action"], self._dreams.agent.actions)
        if given.get("tap") is True:
            self._tapped = action
        self._held = action

    def _who(self, given: dict[str, Any]) -> None:
        if given["name"] not in self._actors.names:
            raise ValueError(f"expected one of {', '.join(self._actors.names)}")
        self.actor = given["name"]

    def _play(self, given: dict[str, Any]) -> None:
        self.playing = bool(given["on"]) and not self.over
        self.idle()

    def _step(self, given: dict[str, Any]) -> None:
        self.playing = False
        self.tick()

    def _reset(self, given: dict[str, Any]) -> None:
        self.reset()

    def _seek(self, given: dict[str, Any]) -> None:
        self.playing = False
        self.timeline.seek(_whole(given["at"], 0, 10**9))

    def _speed(self, given: dict[str, Any]) -> None:
        self.speed = _whole(given["fps"], *SPEEDS)
        self.idle()

    def _save(self, given: dict[str, Any]) -> str:
        if given["what"] not in ("gif", "episode"):
            raise ValueError("expected gif or episode")
        played = self.timeline.moments[: self.timeline.at + 1]
        if given["what"] == "gif":
            return f"saved {self._recorder.gif([self._pictures(one) for one in played], played, self.speed)}"
        return f"saved {self._recorder.episode(played)}"


COMMANDS: dict[str, Callable[[Session, dict[str, Any]], str | None]] = {
    "act": Session._act,
    "who": Session._who,
    "play": Session._play,
    "step": Session._step,
    "reset": Session._reset,
    "seek": Session._seek,
    "speed": Session._speed,
    "save": Session._save,
}


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"expected a whole number from {least} to {most}")
    return value


def _number(value: Any) -> float:
    """For JSON, which has no infinity."""
    return round(float(np.nan_to_num(np.float64(value), posinf=1e30, neginf=-1e30)), 5)


def _numbers(observation: Any, keys: Sequence[str]) -> list[float]:
    """The first numbers of an observation that is not a picture."""
    parts = [np.ravel(observation[key]) for key in keys]
    return [_number(x) for x in np.concatenate(parts)[:NUMBERS]] if parts else []
