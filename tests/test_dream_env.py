"""The dream of a run as other programs play it, through Gymnasium alone."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import gymnasium.spaces as gs
import numpy as np
import pytest
from fake_envs import Nested
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from tiny_runs import tiny_config

from dreamer.dream_env import DreamEnv, DreamVectorEnv
from dreamer.presets import ConfigError
from dreamer.run.export_episodes import export_episodes
from dreamer.run.training import train
from dreamer.saves.checkpoint import Checkpointer

#: Enough for some episodes, and no update, which would have to be compiled.
UNTRAINED = {"run__agent_steps": 60, "run__train_ratio": 1e-6, "run__eval_every": None, "run__final_eval": False}
DREAM = "dreamer.dream_env:Dream-v0"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """A run of the game of catch that has learned nothing."""
    folder = tmp_path_factory.mktemp("catch")
    assert train(tiny_config(logdir=str(folder), **UNTRAINED)) == 0
    return folder


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Path:
    """A run with many observations and actions, and without a picture that the decoder predicts."""
    folder = tmp_path_factory.mktemp("nested")
    keys = "grid|number|mode|parts"
    options = UNTRAINED | {"model__encoder_keys": keys, "model__decoder_keys": keys}
    assert train(tiny_config(logdir=str(folder), **options), lambda index, seed: Nested()) == 0
    return folder


@pytest.fixture(scope="module")
def episode(logdir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    export_episodes(logdir, folder)
    return sorted(folder.glob("*.npz"))[0]


@pytest.fixture(scope="module")
def env(logdir) -> DreamEnv:
    return DreamEnv(logdir, render_mode="rgb_array")


def test_it_passes_gymnasiums_check(logdir):
    env = gymnasium.make(DREAM, logdir=logdir, render_mode="rgb_array")
    assert env.observation_space == gs.Box(0, 255, (16, 16, 3), np.uint8) and env.action_space == gs.Discrete(3)
    check_env(env.unwrapped)
    env.close()


@pytest.mark.filterwarnings("ignore:.*(minimum|maximum) value is -?infinity")
def test_many_observations_and_actions_are_dicts(nested):
    env = gymnasium.make(DREAM, logdir=nested, render_mode="rgb_array")
    assert isinstance(env.observation_space, gs.Dict) and isinstance(env.action_space, gs.Dict)
    assert set(env.observation_space) == {"grid", "number", "mode", "parts/0", "parts/1/bits"}
    assert env.action_space["action/hands/0"] == gs.Box(-1, 1, (2,), np.float32)
    check_env(env.unwrapped)
    assert np.ptp(env.unwrapped.render()) > 0, "numbers without a picture are drawn"


def episode_of(env: DreamEnv, seed: int) -> list[tuple[bytes, float, bool, bool]]:
    found, over = [(env.reset(seed=seed)[0].tobytes(), 0.0, False, False)], False
    while not over:
        picture, reward, ended, cut, _ = env.step(len(found) % 3)
        over = ended or cut
        found.append((picture.tobytes(), reward, ended, cut))
    return found


def test_seeds_decide_everything(env):
    first = [episode_of(env, seed) for seed in range(8)]
    assert first == [episode_of(env, seed) for seed in range(8)]
    assert len({len(one) for one in first}) > 1, "ends are drawn"


def test_a_vector_is_its_environments_side_by_side(logdir):
    vector = gymnasium.make_vec(DREAM, num_envs=2, logdir=logdir, time_limit=4)
    assert isinstance(vector.unwrapped, DreamVectorEnv)
    alone = [DreamEnv(logdir, time_limit=4) for _ in range(2)]
    observations = vector.reset(seed=5)[0]
    expected = [one.reset(seed=5 + i)[0] for i, one in enumerate(alone)]
    np.testing.assert_array_equal(observations, np.stack(expected))
    over, ends = [False] * 2, 0
    for t in range(12):
        observations, rewards, ended, cut, _ = vector.step(np.array([0, t % 3]))
        for i, one in enumerate(alone):
            # An environment that is over ignores its action and begins again.
            told = (*one.reset()[:1], 0.0, False, False) if over[i] else one.step([0, t % 3][i])[:4]
            np.testing.assert_allclose(observations[i].astype(int), told[0].astype(int), atol=1)
            np.testing.assert_allclose(rewards[i], told[1], rtol=1e-3, atol=1e-5)
            assert (ended[i], cut[i]) == told[2:4]
            over[i] = bool(told[2] or told[3])
            ends += over[i]
    assert ends >= 3


def test_the_time_limit_cuts_and_what_is_over_must_be_reset(logdir):
    env = DreamEnv(logdir, time_limit=2)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)
    cuts = 0
    for seed in range(30):
        env.reset(seed=seed)
        _, _, ended, cut, _ = env.step(0)
        assert not cut
        if not ended:
            _, _, ended, cut, _ = env.step(0)
            assert cut == (not ended)
            cuts += cut
            with pytest.raises(ResetNeeded):
                env.step(0)
    assert cuts, "some episodes reached the limit"
    assert DreamEnv(logdir).reset() and DreamEnv(logdir)._stage.limit == 23, "the episodes of catch have 23 actions"


def test_a_recorded_episode_is_what_dreams_begin_in(logdir, episode, env):
    dream = DreamEnv(logdir, episode=episode)
    first = dream.reset(seed=0)[0]
    assert all((dream.reset()[0] == first).all() for _ in range(5)), "the first step, unless another is asked for"
    with np.load(episode) as file:
        recorded = dict(file)
    seen = dream._stage.dreams.watch({key: value[None] for key, value in recorded.items()})
    later = dream.reset(options={"start": 10})[0]
    begun = dream._stage._states
    for name, states in seen.items():
        np.testing.assert_array_equal(begun[name][0], states[0, 10])
    assert later.shape == first.shape
    for start in (len(recorded["reward"]), -1, "1"):
        with pytest.raises(ValueError, match="expected the option start from 0 to"):
            dream.reset(options={"start": start})
    with pytest.raises(ValueError, match="no option but start"):
        dream.reset(options={"begin": 1})


@pytest.mark.parametrize("action", [3, -1, 0.5, [0], "left"])
def test_actions_that_do_not_fit_are_refused(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected"):
        env.step(action)


def test_what_is_missing_is_named_with_a_remedy(tmp_path, logdir, monkeypatch):
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        DreamEnv(tmp_path)
    with pytest.raises(ConfigError, match=r"episode: .*cannot be read"):
        DreamEnv(logdir, episode=tmp_path / "none.npz")
    with pytest.raises(ValueError, match="expected a time_limit of at least one step"):
        DreamEnv(logdir, time_limit=0)
    restore = Checkpointer.restore

    def without_replay(self, template=None, step=None, parts=None, check=None):
        found, tree, meta = restore(self, template, step, parts)
        meta.pop("replay")
        if check is not None:
            check(meta, tmp_path)
        return found, tree, meta

    monkeypatch.setattr(Checkpointer, "restore", without_replay)
    with pytest.raises(ConfigError, match="begin in a recorded episode instead: episode=FILE.npz"):
        DreamEnv(logdir)
