"""Minecraft and DMLab, against stand-ins of their packages' documented interfaces (tests/envs/stand_ins)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.env_config import DmlabConfig, EnvConfig, MinecraftConfig
from dreamer.envs import EnvError, TaskError, list_tasks, make_env
from dreamer.envs.suites.dmlab import ACTIONS as LAB_ACTIONS
from dreamer.envs.suites.dmlab import DMLab, word_numbers
from dreamer.envs.suites.minecraft import ACTIONS, MILESTONES
from dreamer.envs.suites.minecraft import make as make_minecraft

F, T = False, True
INDEX = {name: np.int32(index) for index, name in enumerate(ACTIONS)}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_ins")
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("minerl", "deepmind_lab"):
            del sys.modules[name]


def play(env: Any, *names: str) -> list[dict]:
    return [env.step({"action": INDEX[name]}) for name in names]


# Minecraft


def minecraft(**options: Any) -> Any:
    return make_minecraft("diamond", EnvConfig(minecraft=MinecraftConfig(**options)), 0)


def test_the_25_actions_of_the_paper():
    assert len(ACTIONS) == 25
    assert {"noop", "attack", "turn_up", "jump", "place_furnace", "equip_iron_pickaxe"} <= set(ACTIONS)
    assert {"craft_planks", "nearbyCraft_iron_pickaxe", "nearbySmelt_iron_ingot"} <= set(ACTIONS)
    env = minecraft()
    env.reset()
    play(env, *ACTIONS)  # the stand-in checks every key and value
    assert len(env.env._env.given) == 25


def test_what_is_seen():
    env = minecraft(size=(32, 48))
    first = env.reset()
    spaces = env.observation_spaces
    assert spaces["image"].shape == first["image"].shape == (32, 48, 3)
    assert spaces["inventory"].shape == (14,), "15 items, the two kinds of logs as one"
    assert first["health"] == 1 and first["hunger"] == 0.5 and first["breath"] == 1
    assert {key for key in spaces if key.startswith("log/")} == {f"log/item_{item}" for item in MILESTONES}
    assert np.array_equal(env.render(), first["image"])
    env.close()
    assert env.env._env.closed


def test_milestones_give_1_once_and_health_its_share():
    env = minecraft()
    env.reset()
    # A log after the third attack, the other kind after the sixth; the fifth step costs 2 of 20 health.
    steps = play(env, *["attack"] * 6, "craft_planks", "craft_planks", "equip_iron_pickaxe", "nearbyCraft_iron_pickaxe")
    rewards = [float(step["reward"]) for step in steps]
    np.testing.assert_allclose(rewards, [0, 0, 1, 0, -0.001, 0, 1, 0, 0, -0.001], atol=1e-7)
    assert steps[5]["log/item_log"] == 2, "both kinds count"
    assert steps[-1]["log/item_planks"] == 2 and steps[-1]["log/item_iron_pickaxe"] == 0
    assert steps[-1]["inventory"].sum() == steps[-1]["inventory_max"].sum() == 4
    env.reset()
    again = play(env, *["attack"] * 3)
    assert [float(step["reward"]) for step in again] == [0, 0, 1], "each episode counts anew"


def test_the_most_that_was_owned_stays():
    env = minecraft()
    env.reset()
    play(env, *["attack"] * 3)
    env.env._env.inventory["log"] = env.env._env.inventory["log2"] = 0
    (step,) = play(env, "noop")
    assert step["inventory"].sum() == 0 and step["inventory_max"].sum() == 1


def test_death_is_terminal_and_the_time_limit_is_not():
    env = minecraft()
    env.reset()
    steps = play(env, *["noop"] * 50)  # ten times 2 of 20
    assert [bool(step["is_last"]) for step in steps] == [F] * 49 + [T] == [bool(s["is_terminal"]) for s in steps]
    env = minecraft(steps=3)
    for _ in range(2):
        env.reset()
        steps = play(env, *["noop"] * 3)
        assert [bool(step["is_last"]) for step in steps] == [F, F, T]
        assert not steps[-1]["is_terminal"]


def test_jumps_go_on_and_attacks_only_at_the_usual_speed():
    def given(env: Any, key: str) -> list[int]:
        return [action[key] for action in env.env._env.given]

    env = minecraft(sticky_jump=3)
    env.reset()
    play(env, "jump", "noop", "back", "noop", "attack", "noop")
    assert given(env, "jump") == [1, 1, 1, 0, 0, 0]
    assert given(env, "forward") == [1, 1, 1, 0, 0, 0]
    assert given(env, "attack") == [0, 0, 0, 0, 1, 0], "blocks break fast: no need to go on"
    env = minecraft(break_speed=1.0, sticky_attack=3, sticky_jump=2)
    env.reset()
    play(env, "attack", "noop", "jump", "noop", "jump", "noop", "noop")
    assert given(env, "attack") == [1, 1, 1, 0, 0, 0, 0]
    assert given(env, "jump") == [0, 0, 0, 0, 1, 1, 0], "no jump while attacking"
    env.reset()
    play(env, "noop")
    assert given(env, "jump")[-1] == 0


def test_the_view_keeps_within_its_limit():
    env = minecraft()
    env.reset()
    play(env, *["turn_up"] * 6, *["turn_down"] * 9, "turn_left")
    pitches = [action["camera"][0] for action in env.env._env.given]
    assert pitches == [-15] * 4 + [0] * 2 + [15] * 8 + [0] * 2
    assert env.env._env.given[-1]["camera"].tolist() == [0, -15]


def test_blocks_break_as_fast_as_asked():
    assert minecraft(break_speed=7.0).env._env.start == ["<BreakSpeedMultiplier>7.0</BreakSpeedMultiplier>"]


def test_a_lost_client_is_an_error():
    env = minecraft()
    env.reset()
    env.env._env.fail = True
    with pytest.raises(EnvError, match="the client is gone"):
        play(env, "noop")


def test_every_episode_has_a_world_of_its_own():
    one, two = minecraft(), minecraft()
    first, second = one.reset()["image"], one.reset()["image"]
    assert not np.array_equal(first, second)
    assert np.array_equal(two.reset()["image"], first) and np.array_equal(two.reset()["image"], second)


# DMLab


def test_the_30_levels_and_15_actions():
    assert len(list_tasks()["dmlab"]) == len(set(list_tasks()["dmlab"])) == 30
    assert "dmlab_psychlab_visual_search" in list_tasks()["dmlab"]
    assert len(LAB_ACTIONS) == 15 and len({tuple(sorted(action.items())) for action in LAB_ACTIONS}) == 15
    env = DMLab("rooms_watermaze", DmlabConfig(repeat=1), seed=0)
    env.reset()
    for index in range(15):
        env.step({"action": np.int32(index)})
    assert env._lab.level == "contributed/dmlab30/rooms_watermaze"
    assert env._lab.given[0] == [0, 0, 0, 1, 0, 0, 0] and env._lab.given[-1] == [0, 0, 0, 0, 1, 0, 0]
    assert env._lab.given[12] == [-60, 0, 0, 1, 0, 0, 0]
    env.close()
    assert env._lab.closed


def test_a_level_of_ten_steps():
    env = DMLab("rooms_watermaze", DmlabConfig(), seed=0)
    assert set(env.observation_spaces) == {"image"}
    for _ in range(2):
        steps = [env.reset(), *(env.step({"action": np.int32(0)}) for _ in range(10))]
        assert [float(step["reward"]) for step in steps] == [0] + [4] * 10
        assert [bool(step["is_last"]) for step in steps] == [F] * 10 + [T]
        assert [bool(step["is_terminal"]) for step in steps] == [F] * 10 + [T]
        assert np.array_equal(steps[-1]["image"], steps[-2]["image"]), "the last picture stays"
        assert np.array_equal(env.render(), steps[-1]["image"])


def test_instructions_of_language_levels():
    env = DMLab("language_execute_random_task", DmlabConfig(size=(32, 48)), seed=0)
    first, second = env.reset(), env.step({"action": np.int32(0)})
    assert first["image"].shape == (32, 48, 3)
    for step in (first, second):
        assert step["instruction"].shape == (32, 32) and step["instruction"].dtype == np.float32
        assert (step["instruction"][5:] == 0).all() and (step["instruction"][:5] != 0).all()
    assert np.array_equal(first["instruction"][:4], second["instruction"][:4]), "pick the red ball"
    assert not np.array_equal(first["instruction"][4], second["instruction"][4])
    numbers = word_numbers("Pick, pick THE ball! " + "word " * 40)
    assert numbers[0] == numbers[2] != numbers[1] and len(numbers) == 32 and (numbers > 0).all()
    assert (word_numbers("") == 0).all()


# Both


def test_by_their_names():
    for task in ("minecraft_diamond", "dmlab_explore_object_rewards_few"):
        env = make_env(task, EnvConfig(), seed=1)
        assert env.reset()["is_first"]
        env.close()


@pytest.mark.parametrize(
    ("task", "module", "words"),
    [("minecraft_diamond", "minerl", "minerl@v0.4.4"), ("dmlab_rooms_watermaze", "deepmind_lab", "bazel build")],
)
def test_the_missing_package_is_told_with_where_to_get_it(task, module, words, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(TaskError, match=f"expected the package {module!r}.*{words}"):
        make_env(task, EnvConfig(), seed=0)
