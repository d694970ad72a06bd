"""How fast the page of `dreamer play` could go: `dreamer bench play`.

A frame is everything that the server does for it: whoever acts chooses, the dream and the real environment take a step,
the model is read, and the message is put together. It does not have to be a trained model's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from dreamer.bench.alone import spaces_of
from dreamer.bench.measuring import Report, Rows, figure, spent, take_turns
from dreamer.config import Config
from dreamer.dreaming import Dreams
from dreamer.play.actors import Actors
from dreamer.play.game import observed_start
from dreamer.play.real_world import make_real_world
from dreamer.play.recording import Recorder
from dreamer.play.session import Session
from dreamer.run.factories import make_agent
from dreamer.schema import ConfigError
from dreamer.types import visible


def bench_play(config: Config, actors: Sequence[str], rounds: int, frames: int) -> Report:
    """Each actor plays `frames` frames in each of `rounds` rounds, after one that does not count. ConfigError for an
    actor that there is not."""
    agent = make_agent(config, *spaces_of(config))
    dreams = Dreams(agent, jax.device_get(agent.init(config.seed)["params"]))
    known = Actors(dreams)
    if unknown := sorted(set(actors) - set(known.names)):
        raise ConfigError(f"--actors: expected some of {', '.join(known.names)}, got {', '.join(unknown)}")
    folder = Path(tempfile.gettempdir()) / "never-written"
    recorder = Recorder(folder, visible(agent.observations), agent.actions, dreams.observations)

    def frame(actor: str) -> Callable[[], None]:
        world = make_real_world(config, agent.observations, agent.actions, config.seed)
        session = Session(dreams, known, observed_start(dreams), world, recorder, config.seed)
        session.actor = actor

        def one() -> None:
            if session.over or session.timeline.now.ended[1]:
                session.reset()
            session.tick()
            session.frame()

        return one

    players = {actor: frame(actor) for actor in actors}
    turns = {name: (lambda one=one: spent(one, frames)) for name, one in players.items()}
    take_turns(turns, 1)
    rows: Rows = {}
    for name, found in take_turns(turns, rounds).items():
        times = np.array(found)
        rows[name] = {
            **figure("ms", times[:, 0]),
            **figure("cpu_ms", times[:, 1]),
            **figure("frames_per_s", 1e3 / times[:, 0]),
        }
    size = sum(leaf.size for leaf in jax.tree.leaves(agent.shapes))
    request = {"task": config.task, "parameters": size, "rounds": rounds, "frames": frames}
    note = f"{config.task}, {size:,} parameters; a frame: choose, dream, step the real environment, read, put together."
    return Report("play", request, ("ms", "cpu_ms", "frames_per_s"), rows, note)
