"""A game without its server: keys, the real environment taken back, the timeline, commands, recordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_runs import tiny_config

from dreamer.envs.interface import TaskError, transition
from dreamer.envs.suites.toy import Catch
from dreamer.play.game import Game, why_alone
from dreamer.play.keyboard import keyboard, keys_of
from dreamer.play.real_world import RealWorld, runs_code
from dreamer.play.session import CommandError, Session
from dreamer.play.timeline import Timeline, difference
from dreamer.presets import run_config
from dreamer.replay.episodes import EpisodeFolder
from dreamer.run.training import train
from dreamer.types import Space

CHOICE = {"action": Space("discrete", (), (3,))}


# Keys


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("LEFT", ["ArrowLeft"]),
        ("move_up", ["ArrowUp"]),
        ("UPRIGHTFIRE", ["ArrowRight", "ArrowUp", "Space"]),
        ("forward", ["ArrowUp"]),
        ("FIRE", ["Space"]),
        ("place_table", []),
        ("collect left", []),
        ("NOOP", []),
    ],
)
def test_names_of_actions_mean_keys(name, keys):
    assert keys_of(name) == keys


def test_named_actions_have_keys_of_their_own_and_the_longest_chords_come_first():
    names = ["NOOP", "FIRE", "UP", "LEFT", "UPLEFT", "sleep", "place_stone"]
    board = keyboard({"action": Space("discrete", (), (7,))}, {"action": names})
    assert board["idle"] == {"action": 0}
    pressed = {tuple(key["keys"]): key["action"]["action"] for key in board["keys"]}
    assert pressed == {
        ("ArrowLeft", "ArrowUp"): 4, ("Space",): 1, ("ArrowUp",): 2, ("ArrowLeft",): 3, ("Digit1",): 5, ("Digit2",): 6,
    }  # fmt: skip
    assert len(board["keys"][0]["keys"]) == 2


def test_unnamed_choices_have_digits_and_few_of_them_arrows():
    two, three, many = (keyboard({"action": Space("discrete", (), (n,))}, {}) for n in (2, 3, 40))
    pressed = lambda board: {key["keys"][0]: key["action"]["action"] for key in board["keys"]}  # noqa: E731
    assert pressed(two) == {"ArrowLeft": 0, "ArrowRight": 1, "Digit1": 0, "Digit2": 1} and two["idle"] is None
    assert pressed(three)["ArrowRight"] == 2 and three["idle"] == {"action": 1}
    assert len(set(pressed(many))) == len(many["keys"]) and many["idle"] == {"action": 0}


def test_numbers_are_pushed_by_arrows_while_the_others_rest():
    board = keyboard({"push": Space("vector", (3,)), "turn": Space("vector", (2,))}, {})
    pressed = {key["keys"][0]: key["action"] for key in board["keys"]}
    assert pressed["ArrowDown"] == {"push": [0, -1, 0], "turn": [0, 0]}
    assert board["idle"] == {"push": [0, 0, 0], "turn": [0, 0]}


# The real environment


@pytest.mark.parametrize(
    ("task", "code"),
    [("toy_catch", 0), ("gym_CartPole-v1", 0), ("gym_mine:Env-v0", 1), ("py_file.py:Env", 1), ("plugin_thing", 1)],
)
def test_a_task_that_names_code_is_not_run_unless_asked_for(task, code):
    assert runs_code(task) == bool(code)
    assert ("--real yes" in why_alone("py_x:Y", "auto")) and not why_alone("py_x:Y", "yes")
    assert "--real no" in why_alone("toy_catch", "no") and "function" in why_alone("my_own", "yes")


def world(seed: int = 0) -> RealWorld:
    return RealWorld(lambda: Catch(16, 5, seed), {"image": Space("image", (16, 16, 3))}, CHOICE)


def test_the_real_environment_goes_back_exactly():
    actions = [{"action": np.int32(a)} for a in np.random.default_rng(0).integers(0, 3, 39)]
    one = world()
    seen = [one.reset(), *(one.step(action) for action in actions)]
    assert one.names == {"action": ["left", "stay", "right"]} and one.restorable
    for steps in (30, 17, 16, 3, 0):
        assert one.back(steps)
        again = [one.step(action) for action in actions[steps : steps + 9]]
        for before, after in zip(seen[steps + 1 :], again, strict=False):
            assert before is not None and after is not None
            np.testing.assert_array_equal(before.transition["image"], after.transition["image"])
            assert before.transition["reward"] == after.transition["reward"]
    assert not one.back(1000)


def test_an_environment_that_fails_says_why_and_does_not_come_back():
    class Breaks(Catch):
        def step(self, action):
            raise RuntimeError("the motor burnt")

    one = RealWorld(lambda: Breaks(16, 1, 0), {"image": Space("image", (16, 16, 3))}, CHOICE)
    assert one.reset() is not None and one.step({"action": np.int32(0)}) is None
    assert "the motor burnt" in str(one.failure) and one.reset() is None and not one.back(0)
    with pytest.raises(TaskError, match="expected the spaces of training"):
        RealWorld(lambda: Catch(8, 1, 0), {"image": Space("image", (16, 16, 3))}, CHOICE)
    with pytest.raises(TaskError, match="can be made, got .*no disk"):
        RealWorld(lambda: (_ for _ in ()).throw(OSError("no disk")), {}, {})


# The timeline


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("catch")
    quiet = {"run__train_ratio": 1e-6, "run__eval_every": None, "run__final_eval": False}
    assert train(tiny_config(logdir=str(folder), run__agent_steps=60, **quiet)) == 0
    return folder


@pytest.fixture(scope="module")
def game(logdir, tmp_path_factory) -> Game:
    """Of a model whose dreams do not end by themselves."""
    game = Game(run_config(logdir), "auto", 0, tmp_path_factory.mktemp("out") / "played")
    cont = game.dreams.params["world_model"]["cont"]["out"]
    cont["bias"] = cont["bias"] + 50.0
    return game


@pytest.fixture
def session(game):
    session = game.session()
    yield session
    session.close()


def header(session: Session) -> dict[str, Any]:
    frame = session.frame()
    length = int.from_bytes(frame[:4], "little")
    return json.loads(frame[4 : 4 + length])


def pictures(session: Session) -> bytes:
    frame = session.frame()
    return frame[4 + int.from_bytes(frame[:4], "little") :]


def do(session: Session, command: str, /, **given: Any) -> str | None:
    return session.command(json.dumps({"do": command, **given}))


def test_a_rewound_moment_is_shown_as_it_was_and_the_same_actions_lead_to_the_same_future(session):
    shown = [pictures(session)]
    for action in (0, 2, 2, 1, 0):
        do(session, "act", action={"action": action})
        do(session, "step")
        shown.append(pictures(session))
    assert len(shown[0]) == 2 * 16 * 16 * 3 and len(set(shown)) == 6
    for at in (3, 0, 5, 1):
        do(session, "seek", at=at)
        assert pictures(session) == shown[at] and header(session)["last"] == 5
    for at, action in enumerate((2, 2, 1, 0), 1):
        do(session, "act", action={"action": action})
        do(session, "step")
        assert pictures(session) == shown[at + 1]
    do(session, "seek", at=2)
    do(session, "act", action={"action": 0})
    do(session, "step")
    assert pictures(session) != shown[3] and header(session)["last"] == 3


def test_the_real_steps_are_those_of_an_environment_with_the_same_actions(session, game):
    twin = game._world(0)
    twin._env.set_state(session.timeline.world._states[0])
    for action in (0, 0, 1, 2, 0, 0, 1):
        do(session, "act", action={"action": action})
        do(session, "step")
        expected = twin.step({"action": np.int32(action)})
        np.testing.assert_array_equal(session.timeline.now.seen.transition["image"], expected.transition["image"])
    told = header(session)
    reals = [moment.seen.transition["reward"] for moment in session.timeline.moments]
    assert told["scores"][1] == sum(reals) and told["action"] == {"action": [1]} and told["acted"] == "person"


class Told:
    """Dreams whose glimpses are given: a picture of one gray each, a reward, an entropy."""

    def __init__(self, agent: Any, rows: list[tuple[int, float, float]]) -> None:
        self.agent, self.rows = agent, rows
        self.observations = {"image": Space("image", (2, 2, 1))}

    def step(self, starts, states, actions, begins, index, seeds, counts):
        from dreamer.dreaming import Glimpse

        gray, reward, entropy = self.rows[int(counts[0])]
        one = lambda x, dtype=np.float32: np.array([x], dtype)  # noqa: E731
        image = {"image": np.full((1, 2, 2, 1), gray, np.uint8)}
        return states, Glimpse(image, one(reward), one(1), one(False, bool), one(0), one(entropy))


class Gray:
    """Real pictures of one gray each."""

    action_spaces = CHOICE
    observation_spaces = {"image": Space("image", (2, 2, 1))}

    def __init__(self, rows: list[tuple[int, float]]) -> None:
        self.rows, self.at = rows, 0

    def reset(self):
        self.at = -1
        return self.step({})

    def step(self, action):
        self.at += 1
        gray, reward = self.rows[self.at]
        return transition({"image": np.full((2, 2, 1), gray, np.uint8)}, reward, is_first=self.at == 0)

    def render(self):
        return None

    def close(self):
        pass


def parted(game: Game, dreamed: list[tuple[int, float, float]], real: list[tuple[int, float]]) -> list[Any]:
    """The moments of a timeline of given glimpses beside given real steps."""
    told = Told(game.dreams.agent, dreamed)
    one = RealWorld(lambda: Gray(real), told.observations, CHOICE)
    line = Timeline(told, lambda seen: {"deter": np.zeros((1, 1))}, one)  # type: ignore[arg-type]
    line.begin(0)
    for _ in dreamed[1:]:
        line.step({"action": np.int32(0)}, "person")
    return line.moments


def test_they_part_where_pictures_or_rewards_differ(game):
    # The start differs by 10 of 255: what follows may differ by twice that.
    moments = parted(game, [(10, 0, 1), (20, 0, 1), (21, 0, 1), (0, 0, 1)], [(0, 0), (0, 0), (0, 0), (0, 0)])
    assert [moment.parted for moment in moments] == [None, None, 2, 2]
    np.testing.assert_allclose([moment.difference for moment in moments], np.array([10, 20, 21, 0]) / 255, rtol=1e-6)
    moments = parted(game, [(0, 0, 1), (2, 0.4, 1), (2, 0.4, 1)], [(0, 0), (0, 0), (0, 1)])
    assert [moment.parted for moment in moments] == [None, None, 2]
    assert moments[-1].scores == (pytest.approx(0.8), 1.0)


def test_the_model_is_unsure_where_its_entropy_stands_out(game):
    entropies = [99, 2, 2.4, 2, 2.4, 2.8, 2, 2.6]
    moments = parted(game, [(0, 0, e) for e in entropies], [(0, 0)] * 8)
    assert [moment.unsure for moment in moments] == [False, False, False, False, False, True, False, False]


def test_differences_have_units():
    spaces = {"image": Space("image", (1, 1, 1)), "mode": Space("discrete", (2,), (3, 3)), "v": Space("vector", (1,))}
    ours = {"image": np.full((1, 1, 1, 1), 51, np.uint8), "mode": np.array([[1, 2]]), "v": np.array([[np.e - 1]])}
    theirs = {"image": np.zeros((1, 1, 1), np.uint8), "mode": np.array([1, 0]), "v": np.zeros(1)}
    assert difference(ours, theirs, spaces) == pytest.approx((0.2 + 0.5 + 1) / 3)


# Commands


def test_a_short_press_between_two_ticks_counts_once(session):
    do(session, "act", action={"action": 2}, tap=True)
    do(session, "act", action={"action": 1})
    session.tick()
    session.tick()
    taken = [int(moment.action["action"]) for moment in session.timeline.moments[:2]]
    assert taken == [2, 1]


def test_the_policy_acts_as_an_agent_would(session, game):
    do(session, "who", name="policy")
    before = session.timeline.now.state
    do(session, "step")
    model = game.dreams.agent.model(game.dreams.params)
    dist = model.actor_critic.policy(model.world_model.rssm.feature(before))["action"]
    assert session.timeline.moments[0].action["action"] == np.argmax(dist.mode()[0])


def test_planners_act_where_they_can_and_carry_their_plans_on(session, game, monkeypatch):
    names = session.hello()["actors"]
    assert names == ["person", "policy", "random_shooting", "cem", "mppi", "gradient", "mcts"], "catch is discrete"
    carried: list[Any] = []
    choose = game._actors.choose

    def spied(name: str, state: Any, observation: Any, memory: Any, seed: int, step: int) -> Any:
        carried.append(memory)
        return choose(name, state, observation, memory, seed, step)

    monkeypatch.setattr(game._actors, "choose", spied)
    do(session, "who", name="mppi")
    for _ in range(3):
        do(session, "step")
    do(session, "seek", at=1)
    do(session, "step")
    zeros = [not np.any(memory["plan"]) for memory in carried]
    assert zeros == [True, False, False, True], "what follows another moment is not its plan"
    assert {moment.actor for moment in session.timeline.moments[:-1]} == {"mppi"}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "nonsense", '{"do": 3}', '{"do": "_act"}', '{"do": "close"}', '{"do": "who", "name": "me"}',
        '{"do": "act"}', '{"do": "act", "action": {"action": 3}}', '{"do": "act", "action": {"action": true}}',
        '{"do": "act", "action": {"action": 1.0}}', '{"do": "act", "action": {"action": [1]}}',
        '{"do": "act", "action": {"other": 1}}', '{"do": "seek", "at": -1}', '{"do": "seek", "at": 1e300}',
        '{"do": "seek", "at": true}', '{"do": "speed", "fps": 61}', '{"do": "speed"}', '{"do": "play"}',
        '{"do": "save", "what": "../../x"}', '{"do": "save", "what": ["gif"]}',
    ],
)  # fmt: skip
def test_commands_that_make_no_sense_are_refused_and_change_nothing(session, text):
    before = header(session)
    with pytest.raises(CommandError):
        session.command(text)
    assert header(session) == before


def test_numbers_of_an_action_are_checked():
    from dreamer.play.actors import read_action

    spaces = {"push": Space("vector", (2,)), "keys": Space("discrete", (2,), (2, 3))}
    found = read_action({"push": [1, -0.5], "keys": [1, 2]}, spaces)
    assert (
        found["push"].tolist() == [1, -0.5] and found["push"].dtype == np.float32 and found["keys"].tolist() == [1, 2]
    )
    for push in ([1], [1, 1.01], [float("nan"), 0], "11", [True, 0], 0, [[1], [1]]):
        with pytest.raises(ValueError, match="expected"):
            read_action({"push": push, "keys": [0, 0]}, spaces)


# Recordings


def test_what_was_played_is_a_gif_and_an_episode_that_replay_reads(session, game, tmp_path):
    with pytest.raises(CommandError, match="at least one step"):
        do(session, "save", what="episode")
    for action in (0, 1, 2, 2):
        do(session, "act", action={"action": action})
        do(session, "step")
    gif = Path(str(do(session, "save", what="gif")).removeprefix("saved "))
    with Image.open(gif) as image:
        assert image.n_frames == 5 and image.width > 1.9 * image.height
    path = Path(str(do(session, "save", what="episode")).removeprefix("saved "))
    agent = game.dreams.agent
    source = EpisodeFolder(path.parent, agent.observations, agent.actions)
    assert source.lengths[-1] == 5
    episode = source.read(len(source.lengths) - 1)
    seen = [moment.seen.transition["image"] for moment in session.timeline.moments]
    np.testing.assert_array_equal(episode["image"], np.stack(seen))
    assert episode["action"][:4].tolist() == [0, 1, 2, 2]
    assert episode["is_last"].tolist() == [False] * 4 + [True] and not episode["is_terminal"].any()


def test_a_dream_alone_begins_like_an_episode_of_the_replay_and_is_recorded_itself(logdir, game, tmp_path):
    alone = Game(run_config(logdir), "no", 0, tmp_path / "played")
    session = alone.session()
    assert session.hello()["real"] is False and "--real no" in session.hello()["alone"]
    told = header(session)
    assert [name for name, *_ in told["pictures"]] == ["dream"] and told["parted"] is None
    starts = np.asarray(alone._starts().states["deter"])
    assert (starts == np.asarray(session.timeline.now.state["deter"])).all(-1).any()
    do(session, "step")
    path = Path(str(do(session, "save", what="episode")).removeprefix("saved "))
    assert path.name.startswith("0000_dream_1_")
    episode = EpisodeFolder(path.parent, alone.dreams.agent.observations, alone.dreams.agent.actions).read(0)
    dreamed = [moment.glimpse.observation["image"][0] for moment in session.timeline.moments]
    np.testing.assert_array_equal(episode["image"], np.stack(dreamed))


def test_sessions_share_nothing_but_the_model(game):
    one, other = game.session(), game.session()
    do(one, "step")
    assert header(other)["at"] == 0 and one.timeline.world is not other.timeline.world
    assert pictures(one) != pictures(other)
    shared = jax.tree.leaves(game.dreams.params)
    assert all(a is b for a, b in zip(shared, jax.tree.leaves(one.timeline.dreams.params), strict=True))


def test_a_history_that_is_full_stops_the_game(session, monkeypatch):
    session.timeline._most = 3
    do(session, "play", on=True)
    for _ in range(5):
        session.tick()
    told = header(session)
    assert told["last"] == 2 and told["full"] and not told["playing"]
    do(session, "reset")
    assert header(session)["last"] == 0
