"""`dreamer play`: from the folder of a run to a page that plays in its dream."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from dreamer.config import Config
from dreamer.dreaming import Dreams
from dreamer.envs import TaskError
from dreamer.envs.vector import env_seed
from dreamer.paths import absolute, check_folder
from dreamer.play.actors import POLICY, Actors
from dreamer.play.door import Door
from dreamer.play.real_world import RealWorld, Seen, make_real_world, runs_code
from dreamer.play.recording import Recorder
from dreamer.play.server import make_app, need_aiohttp
from dreamer.play.session import Session
from dreamer.presets import ConfigError, run_config
from dreamer.process import unfailing_output
from dreamer.rssm import State
from dreamer.run.dream_starts import Starts, load_dreams, replayed_starts
from dreamer.run.factories import is_listed
from dreamer.terminal import Console
from dreamer.types import visible


@dataclasses.dataclass(frozen=True)
class Request:
    """What `dreamer play` was asked for; `--help` says what each means."""

    logdir: Path | str
    host: str = "127.0.0.1"
    port: int = 8765
    real: Literal["auto", "yes", "no"] = "auto"
    seed: int | None = None
    out: Path | str | None = None


class Game:
    """A run's dream, ready to be played in by any number of sessions."""

    def __init__(self, config: Config, real: Literal["auto", "yes", "no"], seed: int, out: Path) -> None:
        """ConfigError, CheckpointError or TaskError if there is nothing to play with."""
        self.config, self.dreams, self._seed = config, load_dreams(config), seed
        self._actors = Actors(self.dreams)
        observations, actions = visible(self.dreams.agent.observations), self.dreams.agent.actions
        self._recorder = Recorder(out, observations, actions, self.dreams.observations)
        self._why_alone = why_alone(config.task, real)
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._replayed: Starts | None = None

    def session(self) -> Session:
        """A new one, with an environment, seeds and history of its own."""
        with self._lock:
            number = next(self._numbers)
        world, why = None, self._why_alone
        seed = env_seed(self._seed, False, number)
        if not why:
            try:
                world = self._world(seed)
            except TaskError as error:
                why = f"There is no real environment beside the dream: {error}"
        return Session(self.dreams, self._actors, self._starting(seed), world, self._recorder, seed, why)

    def warm_up(self) -> str:
        """Compile what the first frames need, in a session that is thrown away. Returns what is beside the dream, in
        words."""
        session = self.session()
        try:
            session.tick()
            session.actor = POLICY
            session.tick()
            session.frame()
            words = session.hello()["alone"]
            return words or f"the real {self.config.task} is played beside the dream"
        finally:
            session.close()

    def _world(self, seed: int) -> RealWorld:
        agent = self.dreams.agent
        return make_real_world(self.config, agent.observations, agent.actions, seed)

    def _starting(self, seed: int) -> Callable[[Seen | None], State]:
        """Where dreams begin: in what the real environment shows first, else like an episode of the replay."""
        rng, observed = np.random.default_rng(seed), observed_start(self.dreams)

        def start(seen: Seen | None) -> State:
            if seen is not None:
                return observed(seen)
            index = int(rng.integers(self._starts().drawn))
            return jax.tree.map(lambda x: x[index : index + 1], self._starts().states)

        return start

    def _starts(self) -> Starts:
        with self._lock:
            if self._replayed is None:
                self._replayed = replayed_starts(self.dreams, self.config.logdir)
            return self._replayed


def observed_start(dreams: Dreams) -> Callable[[Seen | None], State]:
    """Where dreams begin that follow a first real observation."""
    idle = {key: np.zeros((1, 1, *space.shape), space.dtype) for key, space in dreams.agent.actions.items()}

    def start(seen: Seen | None) -> State:
        if seen is None:
            raise ValueError("expected a first real observation, got none; begin in a replayed one")
        steps = {key: np.asarray(value)[None, None] for key, value in seen.transition.items()}
        return jax.tree.map(lambda x: x[:, 0], dreams.watch({**steps, **idle}))

    return start


def why_alone(task: str, real: Literal["auto", "yes", "no"]) -> str:
    """Why the dream is played alone, in words; empty: the real environment is to be made."""
    if real == "no":
        return "The dream is played alone, as --real no asks."
    if not is_listed(task):
        return f"There is no real environment beside the dream: {task} came from a function of somebody's program."
    if real == "auto" and runs_code(task):
        return (
            f"There is no real environment beside the dream: {task} names code, and a run's folder is only data. If "
            "you trust that code, start with --real yes."
        )
    return ""


@unfailing_output()
def play(request: Request, console: Console | None = None) -> int:
    """Serve the page until it is interrupted; returns the exit code. ConfigError, CheckpointError, PathError or
    TaskError if it cannot be."""
    console = console or Console()
    config = run_config(request.logdir)
    need_aiohttp()
    out = absolute(request.out or Path("played") / f"{Path(config.logdir).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_folder(out)
    listening = _listen(request.host, request.port)
    with listening:
        game = Game(config, request.real, config.seed if request.seed is None else request.seed, out)
        console.print(f"{config.logdir}: {game.warm_up()}")
        door = Door(request.host, listening.getsockname()[1])
        shown = "127.0.0.1" if request.host in ("0.0.0.0", "::") else request.host
        name = f"[{shown}]" if ":" in shown else shown
        console.print(f"open http://{name}:{listening.getsockname()[1]}/?token={door.token}")
        if request.host not in ("127.0.0.1", "::1", "localhost"):
            console.print("others can reach this address; whoever has the token can play, without encryption")
        console.print(f"recordings go to {out}; Ctrl-C ends")
        asyncio.run(_serve(door, game, listening))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """ConfigError if the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"expected an address that is free, got {host} port {port} ({error}); another --port, or 0 for any"
        ) from error


async def _serve(door: Door, game: Game, listening: socket.socket) -> None:
    from aiohttp import web

    runner = web.AppRunner(make_app(door, game.session), access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await web.SockSite(runner, listening).start()
        await stop.wait()
    finally:
        await runner.cleanup()
