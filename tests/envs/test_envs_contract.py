"""One contract for every environment, inline and in worker processes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.env_config import EnvConfig
from dreamer.envs import Batch, VectorEnv, env_seed, list_tasks, make_env, make_vector_env
from dreamer.types import TRANSITION_FIELDS


@dataclasses.dataclass(frozen=True)
class Case:
    """A task with its options. `limit`: a short time limit, so that every rollout sees several episodes."""

    task: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: int | None = 9
    steps: int = 40
    marks: tuple[pytest.MarkDecorator, ...] = ()


#: Wheels for Python 3.11 and 3.12 on x86-64 Linux only: tests/allowed_skips.txt.
needs_procgen = pytest.mark.skipif(importlib.util.find_spec("procgen") is None, reason="procgen-mirror is missing")


CASES = {
    "toy": Case("toy_catch", limit=None),
    "toy-moving": Case("toy_catch", {"toy": {"background": "moving"}}, limit=None),
    "toy-gridworld": Case("toy_gridworld"),
    "toy-gridworld-cells": Case("toy_gridworld", {"toy": {"grid": {"layout": "random", "side": 5, "observe": "cell"}}}),
    "atari": Case("atari100k_pong"),
    "atari-gray": Case("atari_breakout", {"atari": {"gray": True, "size": (96, 96), "actions": "all", "sticky": 0.25}}),
    "atari-native": Case("atari100k_pong", {"atari": {"native": True}}),
    "atari-native-gray": Case(
        "atari_breakout", {"atari": {"native": True, "gray": True, "size": (40, 64), "actions": "all", "sticky": 0.25}}
    ),
    "dmc-vector": Case("dmc_cartpole_swingup", {"dmc": {"repeat": 2}}),
    "dmc-scalars": Case("dmc_hopper_hop"),
    "dmc-pixels": Case("dmc_cartpole_balance", {"dmc": {"pixels": True}}, steps=12),
    "crafter": Case("crafter_reward", limit=20, steps=24),
    "crafter-wide": Case("crafter_noreward", {"crafter": {"size": (48, 72)}}, limit=8, steps=10),
    "bsuite": Case("bsuite_catch_noise/3", steps=24),
    "bsuite-one-step": Case("bsuite_memory_size/0", limit=None),
    "minigrid": Case("minigrid_DoorKey-6x6-v0", steps=24),
    "minigrid-full": Case("minigrid_MultiRoom-N2-S4-v0", {"minigrid": {"view": "full", "size": (40, 56)}}, steps=24),
    "memory-maze": Case("memorymaze_9x9", limit=3, steps=9, marks=(pytest.mark.slow,)),
    "memory-maze-large": Case(
        "memorymaze_15x15", {"memorymaze": {"size": 32}}, limit=2, steps=3, marks=(pytest.mark.slow,)
    ),
    "vizdoom": Case("vizdoom_take_cover", steps=24),
    "vizdoom-limit": Case("vizdoom_take_cover", {"vizdoom": {"max_tics": 5, "size": (48, 64)}}, limit=None, steps=12),
    "carracing": Case("gym_CarRacing-v3", {"gym": {"size": (64, 64)}}, limit=4, steps=9),
    "procgen": Case("procgen_coinrun", steps=24, marks=(needs_procgen,)),
    "procgen-large": Case(
        "procgen_starpilot",
        {"procgen": {"size": (96, 96), "mode": "easy", "levels": 3, "start_level": 7}},
        steps=12,
        marks=(needs_procgen,),
    ),
    "minecraft": Case("minecraft_diamond", limit=4, steps=12),
    "dmlab": Case("dmlab_language_execute_random_task", limit=4, steps=12),
    "gym-cartpole": Case("gym_CartPole-v1", limit=None),
    "gym-pendulum": Case("gym_Pendulum-v1", {"gym": {"repeat": 2}}),
    "gym-frozenlake": Case("gym_FrozenLake-v1", limit=None),
    "gym-blackjack": Case("gym_Blackjack-v1", limit=None),
    "gym-render": Case("gym_Acrobot-v1", {"gym": {"render": True, "size": (40, 56)}}, steps=12),
    "gym-nested": Case("gym_fake_envs:Nested-v0", limit=None),
}
#: Episodes that begin alike for as long as the test on seeds plays; test_envs_suites.py plays ViZDoom for longer.
BEGIN_ALIKE = {"crafter-wide", "vizdoom", "vizdoom-limit"}
N = 2


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    """Minecraft and DMLab are played by stand-ins of their packages, here and in worker processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "stand_ins")
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("minerl", "deepmind_lab")]:
        del sys.modules[name]


def each(*names: str) -> pytest.MarkDecorator:
    """The test once per case, with the marks of the case."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=CASES[name].marks) for name in names])


def vector_env(case: Case, workers: str, seed: int = 3, training: bool = True) -> VectorEnv:
    config = EnvConfig(workers=workers, time_limit=case.limit, **case.options)
    return make_vector_env(case.task, config, N, seed, training)


def rollout(case: Case, workers: str, seed: int = 3, training: bool = True, scale: float = 1.0) -> list[Batch]:
    """Random actions from one fixed stream; continuous ones times `scale`."""
    env = vector_env(case, workers, seed, training)
    rng = np.random.default_rng(0)
    try:
        batches = [env.reset()]
        for _ in range(case.steps):
            actions = {key: np.stack([space.sample(rng) for _ in range(N)]) for key, space in env.action_spaces.items()}
            scaled = {k: v * np.float32(scale) if v.dtype == np.float32 else v for k, v in actions.items()}
            env.step_async(scaled)
            batches.append(env.step_wait())
        return batches
    finally:
        env.close()


@functools.cache
def reference(name: str) -> list[Batch]:
    return rollout(CASES[name], "inline")


def same(one: list[Batch], two: list[Batch]) -> bool:
    return all(
        set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(one, two, strict=True)
    )


@each(*CASES)
def test_shapes_dtypes_and_values(name):
    env = make_env(CASES[name].task, EnvConfig(**CASES[name].options), seed=0)
    fields = {key: (space.shape, space.dtype) for key, space in env.observation_spaces.items()}
    fields |= {key: ((), np.dtype(dtype)) for key, dtype in TRANSITION_FIELDS.items()}
    for batch in reference(name):
        assert {key: (value.shape[1:], value.dtype) for key, value in batch.items()} == fields
        assert all(len(value) == N for value in batch.values())
        for key, space in env.observation_spaces.items():
            assert np.isfinite(batch[key]).all()
            if space.classes is not None:
                flat = batch[key].reshape(N, -1)
                assert (flat >= 0).all() and (flat < np.array(space.classes)).all()
    env.close()


@each(*CASES)
def test_flags_tell_one_story(name):
    batches = reference(name)
    assert batches[0]["is_first"].all() and not batches[0]["is_last"].any()
    for before, after in zip(batches, batches[1:], strict=False):
        assert np.array_equal(after["is_first"], before["is_last"]), "a first step follows a last one, and nothing else"
    for batch in batches:
        assert not batch["reward"][batch["is_first"]].any(), "the first step has reward 0"
        assert not (batch["is_terminal"] & ~batch["is_last"]).any(), "terminal implies last"
        assert not (batch["is_first"] & batch["is_last"]).any()
    ends = np.array([batch["is_last"] for batch in batches])
    assert ends.any(0).all(), "the rollout saw the end of an episode in every environment"
    limit = CASES[name].limit
    if limit is not None:
        steps = 0
        for batch in batches:
            steps = 0 if batch["is_first"][0] else steps + 1
            assert batch["is_last"][0] or steps < limit


@each(*CASES)
def test_worker_processes_give_the_same_numbers(name):
    """At once: equal seeds give equal episodes, and inline and worker environments agree."""
    assert same(rollout(CASES[name], "process"), reference(name))


@each(*(name for name in CASES if name not in BEGIN_ALIKE))
def test_seeds_differ(name):
    """Environments of a run differ, and evaluation environments differ from training ones."""
    short = dataclasses.replace(CASES[name], steps=min(12, CASES[name].steps))
    training = reference(name)[: short.steps + 1]
    assert not same(training, rollout(short, "inline", training=False))
    assert not same(training, rollout(short, "inline", seed=4))
    rows = [[{key: value[i] for key, value in batch.items()} for batch in training] for i in range(N)]
    assert not same(*rows)


@pytest.mark.parametrize("name", ["dmc-vector", "gym-pendulum", "gym-nested"])
def test_actions_beyond_the_bounds_are_clipped(name):
    case = dataclasses.replace(CASES[name], steps=8)
    assert same(rollout(case, "inline", scale=1e6), rollout(case, "inline", scale=1e9))


@pytest.mark.parametrize("workers", ["inline", "process"])
@pytest.mark.parametrize("name", ["toy", "atari-gray", "atari-native", "gym-cartpole", "gym-nested", "dmc-vector"])
def test_render_and_fresh_arrays(name, workers):
    env = vector_env(CASES[name], workers)
    first = env.reset()
    kept = {key: value.copy() for key, value in first.items()}
    for _ in range(3):
        env.step_async({key: np.stack([space.zeros()] * N) for key, space in env.action_spaces.items()})
        env.step_wait()
    assert all(np.array_equal(first[key], kept[key]) for key in kept), "a batch must not change after it was returned"
    picture = env.render()
    assert picture is not None and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3
    env.close()
    env.close()


def test_reset_in_the_middle_begins_new_episodes():
    for workers in ("inline", "process"):
        env = vector_env(CASES["toy"], workers)
        env.reset()
        env.step_async({"action": np.ones(N, np.int32)})
        assert env.reset()["is_first"].all()
        env.step_async({"action": np.ones(N, np.int32)})
        assert not env.step_wait()["is_first"].any()
        env.close()


def test_seeds_of_a_run_are_all_different():
    """At every attempt; and the first ones are those that stored runs began with."""
    kinds = itertools.product(range(4), (True, False), range(16), range(16))
    seeds = [env_seed(*one) for one in kinds]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    first = [env_seed(0, True, 0), env_seed(7, False, 3), env_seed(5, True, 15)]
    assert first == [2968811710, 1916955614, 1101709037]


def test_every_suite_lists_its_tasks():
    tasks = list_tasks()
    assert len(tasks["atari"]) == len(tasks["atari100k"]) == 57
    assert "atari100k_up_n_down" in tasks["atari100k"]
    assert tasks["toy"] == ["toy_catch", "toy_gridworld"]
    assert tasks["crafter"] == ["crafter_reward", "crafter_noreward"]
    assert "gym_CartPole-v1" in tasks["gym"]
    assert "minigrid_DoorKey-8x8-v0" in tasks["minigrid"] and "minigrid_MultiRoom-N4-S5-v0" not in tasks["minigrid"]
    assert len(tasks["minigrid"]) > 60
    assert len(tasks["procgen"]) == 16 and len(tasks["memorymaze"]) == 4 and tasks["vizdoom"] == ["vizdoom_take_cover"]
    from dm_control import suite

    known = {f"dmc_{domain}_{task}" for domain, task in suite.ALL_TASKS if domain != "lqr"}
    assert set(tasks["dmc"]) == known
