"""Batches to the device, latents back: in this order, in these rows, the same numbers every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from fake_envs import Script, Scripted
from flax import serialization
from replay_data import stored_steps
from tiny_runs import Collection, same, tiny_config, vector_env

from dreamer.agent import Agent
from dreamer.config import SelectionConfig
from dreamer.replay import Selection
from dreamer.run.learner import Learner
from dreamer.run.nonfinite import NonFiniteUpdateError

SCRIPTS: list[Script] = [
    [(1.0, False, False), (2.0, False, False), (3.0, True, False)],
    [(0.0, False, False)] * 7 + [(5.0, False, True)],
]
BATCH, LENGTH = 2, 8


def collected(steps: int = 40, seed: int = 0) -> Collection:
    collection = Collection(vector_env(lambda index, seed: Scripted(*SCRIPTS), 2), LENGTH + 1, seed=seed)
    collection.steps(steps)
    return collection


def learner_of(collection: Collection) -> Learner:
    # A run's own state: the collection keeps the one it acts with.
    return Learner(collection.agent, collection.agent.init(0), collection.replay, BATCH)


@pytest.fixture
def collection():
    return collected()


@pytest.fixture
def learner(collection):
    return learner_of(collection)


def spy(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Selection]]:
    """The order of gathering and writing back, with the selections."""
    events: list[tuple[str, Selection]] = []

    def watch(name: str, method: Callable[..., Any]) -> None:
        def call(selection: Selection, *rest: Any) -> Any:
            events.append((name, selection))
            return method(selection, *rest)

        monkeypatch.setattr(learner.replay, name, call)

    watch("gather", learner.replay.gather)
    watch("write", learner.replay.write)
    return events


def test_latents_of_an_update_land_before_the_batch_after_the_next_is_gathered(learner, monkeypatch):
    events = spy(learner, monkeypatch)
    for _ in range(4):
        learner.update()
    gathered = [selection for name, selection in events if name == "gather"]
    order = [(name, gathered.index(selection)) for name, selection in events]
    # Batch 1 is on its way while update 0 runs; latents of update 0 are there before batch 2 is gathered; and so on.
    assert order == [
        ("gather", 0), ("gather", 1),
        ("write", 0), ("gather", 2),
        ("write", 1), ("gather", 3),
        ("write", 2), ("gather", 4),
    ]  # fmt: skip
    learner.settle()
    assert [(name, gathered.index(selection)) for name, selection in events[len(order) :]] == [("write", 3)]


def test_several_updates_in_one_dispatch_land_together(learner, monkeypatch):
    events = spy(learner, monkeypatch)
    for count, following in ((3, 1), (1, 3), (3, 3)):
        metrics = learner.update(count, following)
        assert metrics["opt/loss"].shape == (() if count == 1 else (count,))
    assert metrics["opt/updates"].tolist() == [5, 6, 7]
    gathered = [selection for name, selection in events if name == "gather"]
    order = [(name, next(i for i, one in enumerate(gathered) if one is selection)) for name, selection in events]
    # Dispatches 0 1 2 take batches 012 3 456; those of the next wait while one runs.
    assert order == [
        ("gather", 0), ("gather", 1), ("gather", 2), ("gather", 3),
        ("write", 0), ("write", 1), ("write", 2), ("gather", 4), ("gather", 5), ("gather", 6),
        ("write", 3), ("gather", 7), ("gather", 8), ("gather", 9),
    ]  # fmt: skip


def test_one_dispatch_gives_the_numbers_of_single_updates_on_the_same_batches(monkeypatch):
    """Without latents landing in between, which is where they differ by definition."""
    found = []
    for counts in ((1, 1, 1), (3,)):
        learner, written = learner_of(collected()), []
        monkeypatch.setattr(learner.replay, "write", lambda selection, latents, to=written: to.append(latents))
        losses = np.concatenate([np.atleast_1d(learner.update(count)["opt/loss"]) for count in counts])
        learner.settle()
        assert len(written) == int(learner.state["updates"]) == 3
        found.append((jax.device_get(learner.state), [one["deter"].astype(np.float32) for one in written], losses))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)


def test_settling_between_updates_changes_no_order_of_writes_and_batches(learner, monkeypatch):
    events = spy(learner, monkeypatch)
    for _ in range(4):
        learner.update()
        learner.settle()
    gathered = [selection for name, selection in events if name == "gather"]
    writes = [i for i, (name, _) in enumerate(events) if name == "write"]
    for update, position in enumerate(writes):
        before = [s for name, s in events[:position] if name == "gather"]
        assert len(before) == update + 2
        assert events[position][1] is gathered[update]


def test_latents_land_in_their_own_rows(collection, monkeypatch):
    learner, agent, replay = learner_of(collection), collection.agent, collection.replay
    before = stored_steps(replay)
    returned: list[tuple[Selection, dict[str, np.ndarray]]] = []
    write = replay.write
    monkeypatch.setattr(replay, "write", lambda s, v: (returned.append((s, v)), write(s, v))[1])
    learner.update()
    learner.settle()
    ((selection, latents),) = returned
    expected = {key: before[key].copy() for key in ("deter", "stoch")}
    for b in range(BATCH):
        env, row = selection.env[b], selection.row[b]
        for t in range(LENGTH):
            for key, values in expected.items():
                values[env, row + 1 + t] = latents[key][b, t]
    after = stored_steps(replay)
    assert np.abs(after["deter"].astype(np.float32) - before["deter"].astype(np.float32)).max() > 0
    for key, values in expected.items():
        np.testing.assert_array_equal(after[key], values)
    for key in ("vector", "reward", "action", "is_first", "is_last", "is_terminal"):
        np.testing.assert_array_equal(after[key], before[key])
    # And they are the posterior that this batch has under the weights from before the update.
    state = agent.init(0)
    batch = {key: value[selection.env[:, None], selection.rows] for key, value in before.items()}
    again = agent.train_step(state, batch)[1]
    np.testing.assert_array_equal(latents["deter"], np.asarray(again["deter"]))


def test_the_weights_change_and_the_counter_counts(learner):
    start = jax.device_get(learner.params)
    for count in range(1, 4):
        metrics = learner.update()
        assert int(metrics["opt/updates"]) == count
    assert int(learner.state["updates"]) == 3
    # The very first update has a learning rate of 0, those after it not.
    assert not same(jax.device_get(learner.params), start)


def poison(collection: Collection, key: str, env: int = 0, row: int = 20) -> None:
    """Store NaN in one field of one step."""
    replay = collection.replay
    slot = replay._ring.slots(env, np.array([row]))
    shape = replay.fields[key].shape
    replay.storage.write_slots(slot, {key: np.full((1, *shape), np.nan, replay.fields[key].dtype)})


@pytest.mark.parametrize(("key", "term"), [("reward", "loss/rew = nan"), ("vector", "loss/vector = nan")])
def test_nan_in_the_data_names_terms_update_and_culprit(key, term, tmp_path):
    collection = collected()
    learner = learner_of(collection)
    poison(collection, key)
    with pytest.raises(NonFiniteUpdateError) as caught:
        for _ in range(50):
            learner.update()
    error = caught.value
    assert term in str(error)
    assert f"update {error.update} was not finite" in str(error)
    assert f"its batch has NaN or infinity in {key}" in str(error)
    assert "loss/con" not in str(error) or key == "vector"
    with np.load(error.dump(tmp_path)) as batch:
        assert np.isnan(batch[key]).any()
        assert batch["action"].shape == (BATCH, LENGTH + 1)
        assert batch["deter"].dtype == np.float32
    assert (tmp_path / f"nonfinite-update-{error.update}.npz").exists()
    # A broken update is never written back.
    assert np.isfinite(stored_steps(collection.replay)["deter"].astype(np.float32)).all()


def test_what_is_dumped_may_have_any_name(tmp_path):
    """Also those of arguments of numpy's own functions."""
    arrays = {name: np.arange(3.0) for name in ("file", "allow_pickle", "args", "a/b", "é [x]", "some.npy")}
    with np.load(NonFiniteUpdateError(1, {}, arrays).dump(tmp_path)) as found:
        assert {name: found[name].tolist() for name in arrays} == {name: [0, 1, 2] for name in arrays}


def test_the_first_broken_update_of_a_dispatch_is_named(learner):
    learner.update(1, 3)
    broken = learner._waiting[1]
    broken.device = {**broken.device, "reward": broken.device["reward"] * np.nan}
    broken.batch = {**broken.batch, "reward": broken.batch["reward"] * np.nan}
    learner.update(3)
    with pytest.raises(NonFiniteUpdateError, match="update 3 was not finite: .*loss/rew = nan") as caught:
        learner.settle()
    assert "its batch has NaN or infinity in reward" in str(caught.value)


@pytest.mark.parametrize("read", [Learner.settle, Learner.progress])
def test_broken_weights_are_found_by_the_next_update(learner, read):
    learner.update()
    value = learner.state["params"]["world_model"]["reward"]
    learner.state["params"]["world_model"]["reward"] = jax.tree.map(lambda x: x * np.nan, value)
    learner.update()
    with pytest.raises(NonFiniteUpdateError, match="update 2 was not finite: .*loss/rew = nan"):
        read(learner)


def stored(progress: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return serialization.msgpack_restore(serialization.msgpack_serialize(progress))


def test_a_learner_without_updates_has_nothing_on_its_way(learner):
    progress = stored(learner.progress())
    assert progress == {"newest": None, "waiting": []}
    learner.restore(progress)
    assert learner.batch is None and learner._waiting == []


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_on_its_way_survives_a_resume(tmp_path, settled, count):
    """Two learners, one of them made from the other's files in the middle: all that follows is equal, bit for bit."""
    collection = collected()
    learner = learner_of(collection)
    for _ in range(3):
        learner.update(count, count)
    if settled:
        learner.settle()
    progress = stored(learner.progress())
    state = jax.tree.map(np.array, jax.device_get(learner.state))
    manifest = json.loads(json.dumps(collection.replay.save(tmp_path)))

    resumed = collected(0)
    resumed.replay.load(tmp_path, manifest)
    again = Learner(resumed.agent, jax.device_put(state), resumed.replay, BATCH)
    again.restore(progress)
    assert same(again.batch, learner.batch)
    for _ in range(3):
        ours, theirs = learner.update(count, count), again.update(count, count)
        assert same(jax.device_get(ours), jax.device_get(theirs))
        assert same(learner.batch, again.batch)
    learner.settle()
    again.settle()
    assert same(jax.device_get(learner.state), jax.device_get(again.state))
    assert same(stored_steps(collection.replay), stored_steps(resumed.replay))
    assert collection.replay.stats() == resumed.replay.stats()


@pytest.mark.parametrize("storage", ["disk", "device"])
@pytest.mark.parametrize("count", [1, 3])
def test_where_the_buffer_lies_changes_no_number(storage, count, tmp_path):
    """Rings that wrap while batches are on their way, and an end to the pipeline in the middle."""
    runs = []
    for kind in ("host", storage):
        envs = vector_env(lambda index, seed: Scripted(*SCRIPTS), 2)
        collection = Collection(envs, LENGTH + 1, rows=20, storage=kind, folder=tmp_path / kind)
        collection.steps(15)
        learner = learner_of(collection)
        metrics = []
        for update in range(8):
            metrics.append(jax.device_get(learner.update(count, 1 if update == 2 else count)))
            if update == 4:
                learner.settle()
            collection.steps(3)
        batch = jax.device_get(dict(learner.batch or {}))
        progress = learner.progress()
        learner.settle()
        found = stored_steps(collection.replay)
        runs.append((metrics, batch, progress, jax.device_get(learner.state), found, collection.replay.stats()))
    ours, theirs = runs
    assert theirs[5] == ours[5] and ours[5]["written"] > 0
    for mine, other in zip(ours[:5], theirs[:5], strict=True):
        assert same(mine, other)


@pytest.mark.parametrize("storage", ["host", "device"])
def test_the_model_s_loss_is_the_priority(storage, tmp_path, monkeypatch):
    envs = vector_env(lambda index, seed: Scripted(*SCRIPTS), 2)
    mixture = SelectionConfig(uniform=0.0, prioritised=1.0)
    collection = Collection(envs, LENGTH + 1, storage=storage, folder=tmp_path, selection=mixture)
    collection.steps(40)
    config = tiny_config(replay__selection__prioritised=1.0)
    agent = Agent(envs.observation_spaces, envs.action_spaces, config)
    learner = Learner(agent, agent.init(0), collection.replay, BATCH)
    told: list[tuple[Selection, np.ndarray]] = []
    prioritize = collection.replay.prioritize
    monkeypatch.setattr(collection.replay, "prioritize", lambda s, v: (told.append((s, v)), prioritize(s, v))[1])
    metrics = jax.device_get(learner.update())
    learner.settle()
    ((_, values),) = told
    assert values.shape == (BATCH, LENGTH) and (values > 0).all()
    scales = {"vector": 1.0, "rew": 1.0, "con": 1.0, "dyn": 1.0, "rep": 0.1}
    expected = sum(scale * metrics[f"loss/{name}"] for name, scale in scales.items())
    np.testing.assert_allclose(values.mean(), expected, rtol=1e-5)
