"""`Agent` in other programs: what it takes, what it refuses and remembers, and many environments at once."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import threading
from collections.abc import Mapping
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_envs import Nested
from gymnasium.vector import SyncVectorEnv
from test_docs_run import ROOT, fences
from tiny_runs import tiny_agent

import dreamer
from dreamer import agent as core
from dreamer.cli import main
from dreamer.envs.spaces import action_leaves, observation_leaves
from dreamer.presets import ConfigError, load_config, save_config
from dreamer.run.adapters import EnvAdapter, NamedAdapter, read_batch, read_observation, rows, stack
from dreamer.saves.checkpoint import CheckpointError
from dreamer.types import Space, Spaces, visible

VECTOR: Spaces = {"vector": Space("vector", (3,))}
CHOICE: Spaces = {"action": Space("discrete", (), (4,))}


#: Environments of every batch here: each number is compiled anew.
MANY = 8


@functools.cache
def weights() -> tuple[core.Agent, Any]:
    made = tiny_agent(VECTOR, CHOICE)
    params = made.init(0)["params"]
    # Those of a fresh policy are so even that it always does the same.
    policy = params["actor_critic"]["policy"]
    params["actor_critic"]["policy"] = jax.tree.map(lambda x: x + np.cos(np.arange(x.size)).reshape(x.shape), policy)
    return made, params


def agent(sample: bool = False, env: Any = None) -> dreamer.Agent:
    return dreamer.Agent(*weights(), np.array([0, 7], np.uint32), env=env, sample=sample)


def memory(one: dreamer.Agent) -> dict[str, np.ndarray]:
    return {key: np.array(value, np.float32) for key, value in (one._carry or {}).items()}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], row: Any = slice(None)) -> None:
    """The memory `other`, of one environment or of all, is that of `row` of the first."""
    for key, value in other.items():
        np.testing.assert_allclose(one[key][row], value, rtol=1e-4, atol=1e-5)


# --- What is refused ---------------------------------------------------------------------------

NAMED = NamedAdapter(VECTOR)
PICTURE = NamedAdapter({"image": Space("image", (8, 8, 3)), "mode": Space("discrete", (2,), (3, 5))})
MASKED = NamedAdapter({"vector": Space("vector", (2,)), "action_mask": Space("discrete", (4,), (2,) * 4)})
IMAGE, MODE = np.zeros((8, 8, 3), np.uint8), np.zeros(2, np.int64)


class Gradient:
    """An array of another library that numpy cannot have."""

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.\nUse detach().")


@pytest.mark.parametrize(
    ("adapter", "observation", "words"),
    [
        (NAMED, np.array([0, np.nan, 0]), "finite numbers (float32) in observation 'vector', got nan as vector[1]"),
        (NAMED, [0, 0, -np.inf], "got -inf as vector[2]"),
        (NAMED, [1e39, 0, 0], "got 1e+39 as vector[0]"),
        (NAMED, (np.zeros(3), {}), "the pair (observation, info) of env.reset(); pass its first"),
        (NAMED, (np.zeros(3), 0.0, False, False, {}), "the five values of env.step(); pass its first"),
        (NAMED, np.zeros(4), "expected the observations of training, vector float32[3]; got vector float64[4]"),
        (NAMED, np.zeros(3, complex), "got vector complex128[3]"),
        (NAMED, {"wrong": np.zeros(3)}, "got wrong float64[3]"),
        (NAMED, 0.0, "got vector float64[]"),
        (NAMED, np.zeros((5, 3)), "got vector float64[5, 3]; it is a batch of 5: one for each of 5 environments takes"),
        (NAMED, [[0, 0, 0]], "it is a batch of 1"),
        (NAMED, {"vector": np.zeros((2, 3))}, "it is a batch of 2"),
        (NAMED, [[0, 0], [0]], "expected numbers as 'vector', got list: "),
        (NAMED, None, "got vector object[]"),
        (NAMED, ["a", "b", "c"], "got vector <U1[3]"),
        (NAMED, Gradient(), "got Gradient: Can't call numpy() on Tensor that requires grad."),
        (NAMED, {}, "got nothing"),
        (NAMED, {"vector": np.zeros(3), "speed": 1.0}, "got vector float64[3], speed float64[]; differing: speed"),
        (NAMED, {"vector": np.zeros(3), "is_first": True}, "say that an episode begins with `first`"),
        (PICTURE, IMAGE, "expected a mapping with image, mode, got ndarray"),
        (PICTURE, {"image": IMAGE}, "training, image uint8[8, 8, 3], mode int32[2]; got image uint8"),
        (PICTURE, {"image": IMAGE / 255, "mode": MODE}, "(255 * image).astype(np.uint8)"),
        (PICTURE, {"image": IMAGE == 0, "mode": MODE}, "(255 * image).astype(np.uint8)"),
        (PICTURE, {"image": IMAGE.transpose(2, 0, 1), "mode": MODE}, "image uint8[3, 8, 8]"),
        (PICTURE, {"image": IMAGE - np.int64(1), "mode": MODE}, "bytes from 0 to 255 in observation 'image', got -1"),
        (PICTURE, {"image": IMAGE, "mode": MODE / 2}, "differing: mode"),
        (PICTURE, {"image": IMAGE, "mode": [3, 0]}, "classes below [3 5] in observation 'mode', got 3 as mode[0]"),
        (MASKED, {"vector": [0, 0], "action_mask": np.zeros(4, bool)}, "allows at least one action"),
        (MASKED, {"vector": [0, 0]}, "action_mask int32[4]; got vector"),
        (MASKED, {"vector": [0, 0], "action_mask": [0, 2, 0, 0]}, "classes from 0 to 1 in observation 'action_mask'"),
    ],
)  # fmt: skip
def test_observations_that_are_refused(adapter, observation, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_observation(adapter, observation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "observation",
    [
        [1, 0, 2],
        (1.0, 0, 2),
        np.array([1, 0, 2]),
        np.array([1, 0, 2], np.float16),
        jnp.array([1, 0, 2.0]),
        {"vector": [1, 0, 2], "log/wood": 3},
    ],
)
def test_arrays_of_any_kind_are_taken(observation):
    (value,) = read_observation(NAMED, observation).values()
    assert value.dtype == np.float32 and value.tolist() == [1, 0, 2]


def nested_adapter() -> tuple[EnvAdapter, Nested]:
    env = Nested()
    see, act = observation_leaves(env.observation_space), action_leaves(env.action_space)
    return EnvAdapter(env, *({leaf.key: leaf.space for leaf in leaves} for leaves in (see, act))), env


def test_observations_of_an_environment_are_checked_by_key():
    adapter, env = nested_adapter()
    good = env.observation_space.sample()
    assert read_observation(adapter, good).keys() == {leaf.key for leaf in observation_leaves(env.observation_space)}
    for change, words in [
        ({"camera": good["camera"].transpose(1, 0, 2)}, r"'camera' of shape \(12, 10, 3\), .* got \(10, 12, 3\)"),
        ({"camera": good["camera"][None]}, r"got \(1, 12, 10, 3\)"),
        ({"number": np.float32(np.nan)}, "got nan as number"),
        ({"mode": 0}, "whole numbers from 2 to 5, got "),
        ({"wood": 3}, "got wood beside them"),
        ({"parts": (good["parts"][0],)}, "with 'parts/1/bits'"),
        ({"grid": Gradient()}, "requires grad"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_observation(adapter, {**good, **change})
    with pytest.raises(ValueError, match=r"the pair \(observation, info\) of env.reset"):
        read_observation(adapter, (good, {}))
    several = gymnasium.vector.utils.batch_space(env.observation_space, 3).sample()
    with pytest.raises(ValueError, match="it is a batch of 3"):
        read_observation(adapter, several)


@pytest.mark.parametrize(
    ("observations", "words"),
    [
        (np.zeros(3), "it is a single observation, which act takes"),
        (np.zeros((0, 3)), "at least one environment, got none"),
        ([], "at least one environment, got none"),
        ([np.zeros(3), np.full(3, np.nan)], "environment 1: expected finite numbers"),
        (np.zeros((2, 4)), "environment 0: expected the observations of training"),
        ({"vector": np.zeros(())}, "stacked along a leading axis"),
        ((np.zeros((2, 3)), {}), "of env.reset(); pass its first"),
        ((np.zeros((2, 3)), np.zeros(2), np.zeros(2), np.zeros(2), {}), "of env.step(); pass its first"),
    ],
)
def test_batches_that_are_refused(observations, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_batch(NAMED, observations)


@pytest.mark.parametrize("env", ["CartPole-v1", Nested, object(), {"observation_space": 1}])
def test_what_is_no_environment(env):
    with pytest.raises(ValueError, match="expected a Gymnasium environment"):
        EnvAdapter(env, VECTOR, CHOICE)


def test_batches_of_nested_spaces_are_taken_apart_and_put_together_as_gymnasium_does():
    adapter, env = nested_adapter()
    singles = [env.observation_space.sample() for _ in range(3)]
    utils = gymnasium.vector.utils
    whole = utils.concatenate(env.observation_space, singles, utils.create_empty_array(env.observation_space, 3))
    seen, stacked = read_batch(adapter, whole)
    assert stacked
    for one, single in zip(seen, singles, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, read_observation(adapter, single))
    actions = [env.action_space.sample() for _ in range(3)]
    jax.tree.map(
        np.testing.assert_array_equal,
        stack(actions),
        utils.concatenate(env.action_space, actions, utils.create_empty_array(env.action_space, 3)),
    )
    assert rows(singles, adapter.tuples) == (singles, False)


# --- Memory ------------------------------------------------------------------------------------


def test_what_is_refused_leaves_no_trace():
    one, other = agent(), agent()
    for step in range(3):
        observation = np.full(3, step, np.float32)
        with pytest.raises(ValueError, match="finite"):
            one.act(np.array([np.nan, 0, 0]))
        with pytest.raises(ValueError, match="True or False"):
            one.act(observation, {})
        assert one.act(observation) == other.act(observation)
    same(memory(one), memory(other))
    assert all(np.isfinite(value).all() for value in memory(one).values())


def test_a_batch_is_as_many_agents():
    """Other episodes in every row, which begin at other times; one program for it."""
    rng = np.random.default_rng(0)
    many, single = agent(), [agent() for _ in range(MANY)]
    programs, chosen = many._agent.policy._cache_size(), []
    for step in range(6):
        observations = rng.normal(size=(MANY, 3))
        first = rng.random(MANY) < 0.3
        if step == 3:
            many.reset(first)
            for index in np.flatnonzero(first):
                single[index].reset()
            first[:] = False
        expected = [one.act(x, bool(f)) for one, x, f in zip(single, observations, first, strict=True)]
        actions = many.act_batch(observations, first)
        assert actions.tolist() == [int(action) for action in expected] and actions.shape == (MANY,)
        for row, one in enumerate(single):
            same(memory(many), memory(one), [row])
        chosen += actions.tolist()
    assert len(set(chosen)) > 1 and memory(many)["deter"].std(0).max() > 1e-3
    assert many._agent.policy._cache_size() <= programs + 2  # for many environments, and for one
    assert isinstance(many.act_batch(list(observations)), list)


def test_rows_begin_episodes_apart():
    many = agent()
    fresh = memory_after(many, np.ones((MANY, 3)))
    begun = np.arange(MANY) == 1
    later = memory_after(many, np.ones((MANY, 3)), begun)
    same(later, {key: value[begun] for key, value in fresh.items()}, begun)
    assert not np.allclose(later["deter"][~begun], fresh["deter"][~begun])
    many.reset(np.arange(MANY) == 0)
    many.reset(np.arange(MANY) == 2)
    last, begun = memory_after(many, np.ones((MANY, 3))), np.isin(np.arange(MANY), (0, 2))
    same(last, {key: value[begun] for key, value in fresh.items()}, begun)
    assert (np.abs(last["deter"] - fresh["deter"]).max(1)[~begun] > 1e-3).all()


def memory_after(one: dreamer.Agent, observations: np.ndarray, first: Any = None) -> dict[str, np.ndarray]:
    one.act_batch(observations, first)
    return memory(one)


def test_the_number_of_environments_changes_after_a_reset_only():
    many = agent()
    many.act_batch(np.zeros((MANY, 3)))
    for call in (lambda: many.act_batch(np.zeros((3, 3))), lambda: many.act(np.zeros(3))):
        with pytest.raises(ValueError, match=rf"expected {MANY} observations, .* got \d; call reset\(\)"):
            call()
    for wrong in ([True], [0] * MANY, True):
        with pytest.raises(ValueError, match=f"first as {MANY} booleans"):
            many.act_batch(np.zeros((MANY, 3)), wrong)
        with pytest.raises(ValueError, match=f"ended as {MANY} booleans"):
            many.reset(wrong)
    many.reset()
    many.act(np.zeros(3))


def test_sampled_batches_repeat_and_rows_differ():
    draws = [[one.act_batch(np.ones((MANY, 3))).tolist() for _ in range(4)] for one in (agent(True), agent(True))]
    assert draws[0] == draws[1]
    assert len({tuple(row) for row in np.array(draws[0]).T}) > 1


# --- Copies, threads, processes ----------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_on_alone_with_the_same_weights(copied):
    one = agent()
    one.act(np.ones(3))
    twin = copied(one)
    assert twin._params is one._params and twin._agent is one._agent
    same(memory(one), memory(twin))
    one.act(np.array([5.0, -2.0, 0.0]))
    twin.act(np.ones(3))
    assert not np.array_equal(memory(one)["stoch"], memory(twin)["stoch"])
    fresh = copied(agent())
    fresh.act(np.ones(3))


def test_an_agent_is_not_pickled():
    with pytest.raises(TypeError, match=r"load it where it is to act: dreamer.Agent.load\(logdir\)"):
        pickle.dumps(agent())


def test_two_threads_at_once_are_told(monkeypatch):
    one = agent()
    inside, go = threading.Event(), threading.Event()
    policy = one._agent.policy

    class Slow:
        def policy(self, *arguments: Any) -> Any:
            inside.set()
            assert go.wait(60)
            return policy(*arguments)

        init_policy = staticmethod(one._agent.init_policy)

    monkeypatch.setattr(one, "_agent", Slow())
    thread = threading.Thread(target=one.act, args=(np.ones(3),))
    thread.start()
    assert inside.wait(60)
    for call in (lambda: one.act(np.ones(3)), one.reset, lambda: copy.copy(one)):
        with pytest.raises(RuntimeError, match=r"one thread at a time.*copy.copy\(agent\).*act_batch"):
            call()
    go.set()
    thread.join()
    one.act(np.ones(3))  # in turns


def test_a_fork_is_told(monkeypatch):
    one, here = agent(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with pytest.raises(RuntimeError, match="got a fork of it.*spawn"):
        one.act(np.ones(3))


# --- Vectors of Gymnasium ----------------------------------------------------------------------


class Counter(gymnasium.Env):
    """Sees its step and its length; ends after a length of its own, by termination."""

    observation_space = gs.Box(-np.inf, np.inf, (3,))
    action_space = gs.Discrete(4, start=2)

    def __init__(self, length: int = 3) -> None:
        self.length, self.time = length, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return np.array([0, self.length, 1], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.time += 1
        return np.array([self.time, self.length, 1], np.float32), 1.0, self.time == self.length, False, {}


def test_the_example_of_the_readme_plays_episodes_as_single_agents_do(monkeypatch):
    """As it stands: a vector that resets by itself, on the step after the end. Every environment's actions are those of
    an agent that plays its episodes alone."""
    (block,) = [b for b in fences((ROOT / "README.md").read_text(), ROOT / "README.md") if "act_batch" in b.text]
    lengths = [3, 5, 4, 7, 2, 6, 3, 8]
    assert len(lengths) == MANY
    envs = SyncVectorEnv([lambda n=n: Counter(n) for n in lengths])
    played: list[np.ndarray] = []
    step = envs.step
    monkeypatch.setattr(envs, "step", lambda actions: (played.append(actions), step(actions))[1])
    many = agent(env=envs)
    monkeypatch.setattr(gymnasium, "make_vec", lambda task, num_envs: envs)
    monkeypatch.setattr(dreamer.Agent, "load", lambda logdir, env: many)
    exec(compile(block.text, str(block), "exec"), {})
    taken = np.stack(played)
    assert taken.shape == (1000, 8)
    for index, length in ((0, 3), (3, 7)):
        alone, env, row = agent(env=Counter(length)), Counter(length), []
        while len(row) < 40:
            obs, done = env.reset()[0], False
            alone.reset()
            while not done:
                row.append(alone.act(obs))
                obs, _, done, _, _ = env.step(row[-1])
            row.append(None)  # the vector asks for one more action, and does not execute it
        pairs = [(a, b) for a, b in zip(taken[:40, index], row[:40], strict=True) if b is not None]
        assert all(a == b for a, b in pairs) and len(pairs) > 25


# --- Loading -----------------------------------------------------------------------------------


def test_folders_that_are_no_run(tmp_path, capsys):
    run = tmp_path / "all" / "mine"
    (run / "checkpoints" / "000000000010").mkdir(parents=True)
    save_config(load_config(["quickstart"]), run / "config.yaml")
    for path, words in [
        (tmp_path / "nothing", "there is no such folder"),
        (tmp_path / "all", "runs lie in it: mine"),
        (run / "checkpoints" / "000000000010", f"it lies in the run {run}"),
        (run / "config.yaml", f"it lies in the run {run}"),
    ]:
        with pytest.raises(ConfigError, match=rf"expected the folder of a run.*{re.escape(words)}"):
            dreamer.Agent.load(path)
        for command in (["eval", str(path)], ["collect", "toy_catch", str(tmp_path / "out"), "--from", str(path)]):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1


def test_a_run_that_has_saved_nothing_yet(tmp_path, monkeypatch):
    save_config(load_config(["quickstart"]), tmp_path / "config.yaml")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    with pytest.raises(
        CheckpointError, match="found none; a run saves every run.checkpoint_every, and when it is asked"
    ):
        dreamer.Agent.load(f"~/{tmp_path.name}")
    for seed in range(2):
        (tmp_path / f"seed_{seed}").mkdir()
        save_config(load_config(["quickstart"]), tmp_path / f"seed_{seed}" / "config.yaml")
    with pytest.raises(
        CheckpointError, match="expected a run of one seed, got several in .*; give one: seed_0, seed_1"
    ):
        dreamer.Agent.load(str(tmp_path))


def test_log_keys_are_not_seen():
    assert read_observation(NamedAdapter(visible({**VECTOR, "log/wood": Space("vector", ())})), np.zeros(3)).keys() == {
        "vector"
    }
