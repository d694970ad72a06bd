"""How fast environments step, by where they run: `dreamer bench env`.

Atari is also compared with ale-py's own vector environment. All are made first and then take turns, some steps each,
many times. Processor time is reported as well, workers included: on a busy machine many processes get a larger share
than one, which makes them look better by the wall clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from dreamer.bench.alone import EnvsAlone
from dreamer.bench.measuring import Report, Rows, figure, spent, take_turns
from dreamer.config import Config
from dreamer.env_config import EnvConfig
from dreamer.envs import make_vector_env

ALONE = "ale-py alone"
#: Actions drawn before the first step.
_DRAWN = 64


def bench_env(config: Config, rounds: int, steps: int) -> Report:
    """Each takes `steps` steps in each of `rounds` rounds, after one that does not count."""
    num_envs = config.env.num_envs
    with contextlib.ExitStack() as stack:
        contenders = {name: stack.enter_context(made) for name, made in _contenders(config).items()}
        rounds_of = {name: functools.partial(spent, one, steps) for name, one in contenders.items()}
        take_turns(rounds_of, 1)
        taken = {name: np.array(times) for name, times in take_turns(rounds_of, rounds).items()}
    rows: Rows = {}
    reference = next(iter(taken.values()))
    for name, times in taken.items():
        rates, ratios = num_envs * 1e3 / times, np.median(reference / times, 0)  # (rounds, wall and CPU)
        rows[name] = {
            **figure("ms", times[:, 0]),
            **figure("steps_per_s", rates[:, 0]),
            "steps_per_cpu_s": float(np.median(rates[:, 1])),
            "speed_ratio": float(ratios[0]),
            "cpu_speed_ratio": float(ratios[1]),
        }
    request = {"task": config.task, "num_envs": num_envs, "rounds": rounds, "steps": steps}
    note = f"ms: one step of all {num_envs} environments; ratios: to the first row, paired round by round."
    columns = ("ms", "steps_per_s", "steps_per_cpu_s", "speed_ratio", "cpu_speed_ratio")
    return Report("env", request, columns, rows, note)


def _contenders(config: Config) -> dict[str, contextlib.AbstractContextManager[Callable[[], object]]]:
    """Ways to step the environments of a task; each begins when entered."""
    suite, _, game = config.task.partition("_")
    plain = dataclasses.replace(config.env, atari=dataclasses.replace(config.env.atari, native=False))
    native = dataclasses.replace(config.env, atari=dataclasses.replace(config.env.atari, native=True))
    ways = {name: dataclasses.replace(plain, workers=name) for name in ("inline", "process")}
    atari = suite in ("atari", "atari100k")
    ways |= {"native": native} if atari else {}
    ours = {name: _ours(config, env) for name, env in ways.items()}
    return {ALONE: _alone(game, config.env), **ours} if atari else dict(ours)


@contextlib.contextmanager
def _ours(config: Config, env: EnvConfig) -> Iterator[Callable[[], object]]:
    alone = EnvsAlone(make_vector_env(config.task, env, env.num_envs, config.seed, training=True))
    try:
        yield alone
    finally:
        alone.close()


@contextlib.contextmanager
def _alone(game: str, config: EnvConfig) -> Iterator[Callable[[], object]]:
    """ale-py's own, as it comes, with these options."""
    from ale_py.vector_env import AtariVectorEnv

    atari, rng = config.atari, np.random.default_rng(0)
    env = AtariVectorEnv(
        game,
        config.num_envs,
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
    try:
        env.reset(seed=0)
        actions = rng.integers(len(env.ale.get_action_set()), size=(_DRAWN, config.num_envs))
        turns = itertools.cycle(actions)
        yield lambda: env.step(next(turns))
    finally:
        env.close()
