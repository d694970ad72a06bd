"""How fast Atari steps: ale-py's own vector environment alone, and ours beside it, in one process.

All are made first and then take turns, a few hundred steps each, many times: whatever else the machine does meanwhile
slows all alike. Steps per second are the median of the rounds. A ratio is the median of each round's ratio to the round
of ale-py's own beside it. What our environments cost over a CPU second is told as well: on a busy machine many
processes get a larger share of it than one, which wall-clock time then praises them for.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil

from dreamer.config import AtariConfig, EnvConfig
from dreamer.envs import VectorEnv, make_vector_env

#: The presets' pictures and rules, as options of `env.atari`.
SETTINGS: dict[str, dict[str, Any]] = {
    "atari": {"size": (96, 96), "gray": True, "sticky": 0.25, "actions": "all"},
    "atari100k": {},
}
ALONE = "ale-py alone"


class Contender(NamedTuple):
    """step takes one step of all environments; close ends them."""

    step: Callable[[np.ndarray], object]
    close: Callable[[], object]


class Speed(NamedTuple):
    """Environment steps per second and per CPU second, and how they compare with ale-py's own."""

    steps: float
    cpu_steps: float
    ratio: float
    cpu_ratio: float


def measure(game: str, setting: str, num_envs: int, rounds: int, steps: int, seed: int = 0) -> dict[str, Speed]:
    """By contender. `steps` of each are taken in each of `rounds` rounds, after one that does not count."""
    config = EnvConfig(workers="process", atari=AtariConfig(**SETTINGS[setting]))
    native = EnvConfig(atari=AtariConfig(**SETTINGS[setting], native=True))
    contenders, rng = {}, np.random.default_rng(seed)
    try:
        contenders[ALONE], count = _alone(game, config, num_envs)
        for name, options in (("env.atari.native", native), ("one process each", config)):
            contenders[name] = _ours(make_vector_env(f"atari_{game}", options, num_envs, seed, training=True))
        taken = np.array(
            [
                [_round(one.step, rng.integers(count, size=(steps, num_envs))) for one in contenders.values()]
                for _ in range(rounds + 1)
            ]
        )[1:]  # (rounds, contenders, wall and CPU seconds)
    finally:
        for one in contenders.values():
            one.close()
    rates = num_envs * steps / taken
    middle, ratios = np.median(rates, 0), np.median(rates / rates[:, :1], 0)
    return {name: Speed(*middle[i], *ratios[i]) for i, name in enumerate(contenders)}


def _alone(game: str, config: EnvConfig, num_envs: int) -> tuple[Contender, int]:
    """ale-py's own, as it comes, with these options; and its number of actions."""
    from ale_py.vector_env import AtariVectorEnv

    atari = config.atari
    env = AtariVectorEnv(
        game,
        num_envs,
        repeat_action_probability=atari.sticky,
        full_action_space=atari.actions == "all",
        img_height=atari.size[0],
        img_width=atari.size[1],
        grayscale=atari.gray,
        stack_num=1,
        frameskip=atari.repeat,
        noop_max=atari.noops + 1,
        reward_clipping=False,
        use_fire_reset=False,
    )
    env.reset(seed=0)
    return Contender(env.step, env.close), len(env.ale.get_action_set())


def _ours(envs: VectorEnv) -> Contender:
    envs.reset()

    def step(action: np.ndarray) -> None:
        envs.step_async({"action": action.astype(np.int32)})
        envs.step_wait()

    return Contender(step, envs.close)


def _round(step: Callable[[np.ndarray], object], actions: np.ndarray) -> tuple[float, float]:
    """Wall and CPU seconds, the workers' included, of these steps."""
    cpu, start = _cpu_seconds(), time.perf_counter()
    for action in actions:
        step(action)
    return time.perf_counter() - start, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(child.user + child.system for child in children)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Atari steps per second, and how they compare with ale-py's own.")
    parser.add_argument("--game", default="pong")
    parser.add_argument("--setting", choices=[*SETTINGS, "both"], default="both", help="pictures and rules of a preset")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100, help="of all environments, in each round")
    chosen = parser.parse_args(arguments)
    for setting in SETTINGS if chosen.setting == "both" else [chosen.setting]:
        print(f"{chosen.game}, {chosen.num_envs} environments, preset {setting}, {os.cpu_count()} CPU cores")
        found = measure(chosen.game, setting, chosen.num_envs, chosen.rounds, chosen.steps)
        for name, speed in found.items():
            print(
                f"  {name:18} {speed.steps:7.0f} steps/s ({speed.ratio:4.0%}) "
                f"{speed.cpu_steps:7.0f} steps per CPU second ({speed.cpu_ratio:4.0%})"
            )


if __name__ == "__main__":
    main()
