"""Many seeds at once: independent agents in one process, trained by one update that is mapped over all of them.

Everything but the two mapped programs belongs to the single runs: environments, replay, records, checkpoints. A run of
the group can be evaluated, plotted or continued alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamer import compiler, transfer
from dreamer.agent import Agent, stream_key
from dreamer.config import Config
from dreamer.envs.vector import MakeEnv
from dreamer.paths import brief
from dreamer.presets import CONFIG_FILE, save_config
from dreamer.records.meters import Packed, StartupTimer
from dreamer.run.loop import Loop, Run
from dreamer.run.signals import StopRequest
from dreamer.saves.checkpoint import Checkpointer, CheckpointError
from dreamer.saves.lock import LogdirLock
from dreamer.terminal import Console


def seed_configs(config: Config) -> list[Config]:
    """The configurations of the single runs: seeds s, s+1, ..., each in its own folder, DIR/seed_2 for seed 2."""
    count = config.run.seeds or 1
    run = dataclasses.replace(config.run, seeds=None, mesh_data=1, mesh_model=1)
    return [
        dataclasses.replace(config, seed=seed, logdir=str(Path(config.logdir) / f"seed_{seed}"), run=run)
        for seed in range(config.seed, config.seed + count)
    ]


def common_step(folders: list[Path]) -> int | None:
    """The newest step for which every run has a checkpoint; None: nothing was saved yet.

    Runs save one after another, so a group that was killed may have newer checkpoints for some of them.
    """
    steps = [set(Checkpointer(folder, read_only=True).steps()) for folder in folders]
    if not any(steps):
        return None
    common = set.intersection(*steps)
    if not common:
        found = ", ".join(f"{folder.name}: {sorted(have)}" for folder, have in zip(folders, steps, strict=True))
        raise CheckpointError(
            f"expected a checkpoint of the same step in every run, found {found}; continue each run alone: "
            f"dreamer train --logdir {shlex.quote(brief(folders[0]))}"
        )
    return max(common)


class MappedAgent:
    """An agent's policy and updates for S training states with a leading axis (S, ...)."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.stack = jax.jit(self._stacked)
        self.state_of = jax.jit(lambda states, index: jax.tree.map(lambda leaf: leaf[index], states))
        self.pack = jax.jit(lambda metrics: jnp.stack(metrics, 1))
        self.policy = jax.jit(self._policy, donate_argnums=1)
        self.update = jax.jit(self._update, donate_argnums=0, compiler_options=compiler.options(agent.target))

    def _policy(
        self, params: Any, carries: list[Any], seen: Mapping[str, jax.Array], run_keys: jax.Array, counter: jax.Array
    ) -> tuple[list[Any], Any, Any]:
        """One step of every seed, observations (S, N, ...): the carry of each, actions and extras (S, N, ...)."""
        keys = jax.vmap(lambda key: jax.random.key_data(stream_key(key, "policy", counter)))(run_keys)
        act = lambda params, carry, seen, key: self._agent.act(params, carry, seen, jax.random.wrap_key_data(key))  # noqa: E731
        carry, action, extras = jax.vmap(act)(params, self._stacked(carries), seen, keys)
        return self._apart(carry, len(carries)), action, extras

    def _update(self, states: Any, batches: list[list[Any]]) -> tuple[Any, list[Any], Any, jax.Array]:
        """One dispatch, batches[seed][k]: states, latents of each seed, metrics (S,) or (S, K), finite (S,)."""
        parts = [self._stacked(list(part)) for part in zip(*batches, strict=True)]
        if len(parts) == 1:
            states, latents, metrics = jax.vmap(self._agent.learn)(states, parts[0])
        else:
            states, latents, metrics = jax.vmap(self._agent.learn_in_turn)(states, parts)
        return states, self._apart(latents, len(batches)), metrics, jax.vmap(self._agent.finite)(metrics)

    @staticmethod
    def _stacked(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[dict(tree) for tree in trees])

    @staticmethod
    def _apart(tree: Any, count: int) -> list[Any]:
        return [jax.tree.map(lambda leaf: leaf[index], tree) for index in range(count)]  # noqa: B023


@dataclasses.dataclass(frozen=True)
class _Part:
    """One seed's part of an array (S, ...) that the device may still be computing; all parts share one transfer."""

    whole: jax.Array
    index: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self.whole)[self.index], dtype)


class SeedRuns(Loop):
    """The loop over several runs that differ in their seed only."""

    def __init__(
        self, config: Config, make_env: MakeEnv | None, console: Console, startup: StartupTimer | None = None
    ) -> None:
        configs = seed_configs(config)
        folders = [Path(one.logdir) for one in configs]
        save_config(config, Path(config.logdir) / CONFIG_FILE)
        self._config, self._console, self.runs = config, console, list[Run]()
        with contextlib.ExitStack() as undo:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                undo.enter_context(LogdirLock(folder))
            undo.callback(self._close_runs)
            step = common_step(folders)
            for one in configs:
                agent, display = (self.runs[0].agent, self.runs[0].display) if self.runs else (None, None)
                shared: dict[str, Any] = {"agent": agent, "display": display, "startup": startup, "step": step}
                self.runs.append(Run(one, make_env, console, **shared))
                startup = self.runs[0].startup
            self._undo = undo.pop_all()
        self.display = self.runs[0].display
        self._mapped = MappedAgent(self.runs[0].agent)
        self._states = self._mapped.stack([run.learner.state for run in self.runs])
        self._run_keys = np.stack([run.run_key for run in self.runs])
        for index, run in enumerate(self.runs):
            run.learner.lend(functools.partial(self._state_of, index))

    def _state_of(self, index: int) -> Any:
        return self._mapped.state_of(self._states, index)

    @property
    def updates(self) -> int:
        return self.runs[0].updates

    @property
    def failed(self) -> str | None:
        found = [f"{run.logdir.name}: {run.failed}" for run in self.runs if run.failed]
        return "; ".join(found) or None

    def begin(self, stop: StopRequest) -> None:
        names = ", ".join(run.logdir.name for run in self.runs)
        self._console.print(self.runs[0].summary)
        self._console.print(f"{len(self.runs)} agents in one process, every one as above: {names}")
        for run in self.runs:
            run.heed(stop)

    def agree(self) -> bool:
        return all(run.going for run in self.runs)

    def wait(self) -> None:
        for run in self.runs:
            run.wait()

    def saves(self) -> bool:
        return any([run.saves() for run in self.runs])  # ask each: their timers run together

    def record(self, save: bool) -> None:
        for run in self.runs:
            run.record(save)

    def settle(self) -> None:
        for run in self.runs:
            run.settle()

    def finish(self) -> None:
        for run in self.runs:
            self._console.print(run.logdir.name, style="bold")
            run.finish()

    def act(self) -> None:
        """One program chooses the actions of all seeds."""
        for run in self.runs:
            run.agent_steps += run.envs.num_envs
        collectors = [run.collector for run in self.runs if run.collector is not None]
        if not collectors:
            return
        first = self.runs[0]
        with first.watch.section("act"):
            seen = {key: np.stack([one.seen[key] for one in collectors]) for key in collectors[0].seen}
            carries, action, extras = self._mapped.policy(
                self._states["params"], [one.carry for one in collectors], seen, self._run_keys, collectors[0].counter
            )
            under_way = [run.learner.under_way() for run in self.runs]
            (action, extras), arrived = transfer.read(((action, extras), under_way))
        for index, (run, collector) in enumerate(zip(self.runs, collectors, strict=True)):
            collector.carry = carries[index]
            part = lambda tree: {key: value[index] for key, value in tree.items()}  # noqa: B023, E731
            with run.watch.section("act"):
                run.learner.arrived(arrived[index])
                step = collector.send(part(action), part(extras))
            run.store(step)
        first.startup.mark("first action", once=True)

    def update(self) -> None:
        """One program updates all seeds. All begin together."""
        runs = self.runs
        if not runs[0].schedule.started and all(run.filled for run in runs):
            for run in runs:
                run.schedule.start(run.agent_steps)
            runs[0].startup.mark("filling replay")
        plans = [run.schedule.dispatches(run.agent_steps, run.envs.num_envs) for run in runs]
        for (count, following), *_ in zip(*plans, strict=True):
            batches = [run.learner.take(count) for run in runs]
            with runs[0].watch.section("update"):
                self._states, latents, metrics, finite = self._mapped.update(self._states, batches)
            packed = self._mapped.pack(list(metrics.values()))
            for index, run in enumerate(runs):
                own = {name: _Part(value, index) for name, value in metrics.items()}
                run.learner.dispatched(latents[index], own, _Part(finite, index), following)
                run.updated(count, Packed(tuple(metrics), _Part(packed, index)))

    def _close_runs(self) -> None:
        for run in self.runs:
            run.close()

    def close(self) -> None:
        """Release everything."""
        self._undo.close()
