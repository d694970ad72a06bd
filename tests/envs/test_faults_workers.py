"""Environments that die, hang, raise or return garbage while a run goes on, and exact states of all environments."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
from fake_envs import Scripted
from faulty_env import GARBAGE, HARMLESS, Faulty, action, faulty
from waiting import alive, until

from dreamer.env_config import EnvConfig
from dreamer.envs import (
    Batch,
    EnvError,
    ProcessVectorEnv,
    TaskError,
    VectorEnv,
    env_seed,
    make_vector_env,
)
from dreamer.envs.faults import LONGEST_WAIT, TRIES, FaultBudget
from dreamer.envs.interface import Env, Fault

ROOT = Path(__file__).resolve().parents[2]
N = 3
STEPS = 24
#: When, and where, the trouble is.
WHEN, WHO = 9, 1
WORKERS = ["inline", "process"]
RUN_SEED = 5


def first_seed(index: int = WHO, attempt: int = 0) -> int:
    return env_seed(RUN_SEED, True, index, attempt)


def vector_env(workers: str, make: Callable[[int, int], Env] = faulty, **options: Any) -> Any:
    """Workers import what `make` names: let that be light."""
    options = {"restart_seconds": 0, **options}
    return make_vector_env("own", EnvConfig(workers=workers, **options), N, RUN_SEED, True, make)


def actions(steps: int = STEPS, trouble: str | None = None, seed: int = 0) -> list[np.ndarray]:
    """Harmless actions (N,), but for one environment's trouble."""
    chosen = np.random.default_rng(seed).integers(0, HARMLESS, (steps, N)).astype(np.int32)
    if trouble is not None:
        chosen[WHEN, WHO] = action(trouble)
    return list(chosen)


def play(env: VectorEnv, chosen: list[np.ndarray]) -> list[Batch]:
    batches = []
    for one in chosen:
        env.step_async({"action": one})
        batches.append(env.step_wait())
    return batches


def same(one: list[Batch], two: list[Batch], rows: list[int]) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[key][rows], b[key][rows]) for key in a)
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def undisturbed():
    env = vector_env("inline")
    env.reset()
    batches = play(env, actions())
    assert env.take_faults() == []
    assert sum(batch["is_last"].sum() for batch in batches) >= 6
    env.close()
    return batches


def hurry(env: ProcessVectorEnv, seconds: float) -> None:
    """Shorten the patience with the workers that are there; starting new ones may take long on a busy machine."""
    for worker in env._workers.values():
        worker._timeout = seconds


def check_fault(workers: str, trouble: str, undisturbed: list[Batch], patience: float | None = None) -> Fault:
    """One environment gets into trouble: it starts over, with a fresh seed, and the others notice nothing."""
    env = vector_env(workers)
    env.reset()
    if patience is not None:
        hurry(env, patience)
    batches = play(env, actions(trouble=trouble))
    (fault,) = env.take_faults()
    assert env.take_faults() == []
    assert fault.env == WHO and fault.message.startswith("own, environment 1")
    others = [index for index in range(N) if index != WHO]
    assert same(batches, undisturbed, others)
    assert same(batches[:WHEN], undisturbed[:WHEN], [WHO])
    seeds = [batch["vector"][WHO, 0] for batch in batches]
    assert seeds == [np.float32(first_seed(attempt=0))] * WHEN + [np.float32(first_seed(attempt=1))] * (STEPS - WHEN)
    begun = {key: value[WHO] for key, value in batches[WHEN].items()}
    assert begun["is_first"] and not begun["is_last"] and begun["reward"] == 0
    assert begun["vector"][1:3].tolist() == [1, 0], "the first step of a new environment's first episode"
    env.close()
    return fault


@pytest.mark.parametrize(
    ("workers", "trouble"),
    [("inline", trouble) for trouble in ("raise", "disconnect", *GARBAGE)]
    + [("process", trouble) for trouble in ("raise", "disconnect", "missing key", "nan reward")],
)
def test_exceptions_and_garbage(workers, trouble, undisturbed):
    fault = check_fault(workers, trouble, undisturbed)
    assert fault.kind == ("garbage" if trouble in GARBAGE else "raised")
    assert "Traceback" in fault.traceback
    if trouble == "raise":
        assert fault.message == "own, environment 1 failed: ZeroDivisionError: as told"
        assert "faulty_env.py" in fault.traceback
    if trouble == "one of several classes":
        assert "expected 'classes' to be from 0 to below [2, 4], got [1 5]" in fault.message


@pytest.mark.parametrize("pixel", [256, -1, np.nan])
def test_pixels_out_of_range(pixel):
    class Pixels(Scripted):
        observation_space = gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)

        def _observation(self, action: int) -> np.ndarray:
            return np.full((4, 4, 3), pixel if self.position == 3 else 255, np.float32)

    env = vector_env("inline", lambda index, seed: Pixels([(0.0, False, False)] * 10))
    env.reset()
    play(env, [np.zeros(N, np.int32)] * 2)
    assert env.take_faults() == []
    (batch,) = play(env, [np.zeros(N, np.int32)])
    assert batch["is_first"].all()
    assert [fault.kind for fault in env.take_faults()] == ["garbage"] * N
    env.close()


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        ("kill", "died", "exit code -9"),
        ("crash", "died", "exit code -11"),
        ("exit", "died", "exit code 7"),
        ("leave", "raised", "SystemExit: 8"),
    ],
)
def test_workers_that_end(trouble, kind, words, undisturbed):
    fault = check_fault("process", trouble, undisturbed)
    assert (fault.kind, words in fault.message) == (kind, True)
    assert (trouble in ("crash", "leave")) == ("faulty_env.py" in fault.traceback)


@pytest.mark.parametrize("trouble", ["sleep", "block"])
def test_workers_that_hang(trouble, undisturbed):
    """In Python, and in C that holds Python's lock."""
    fault = check_fault("process", trouble, undisturbed, patience=1.5)
    assert fault.kind == "hung" and "no answer for 1.5 seconds" in fault.message
    assert "faulty_env.py" in fault.traceback, "it says where"


def test_a_late_parent_is_no_hung_worker():
    """The time limit is the worker's: answers that waited for us count."""
    env = vector_env("process")
    env.reset()
    hurry(env, 0.3)
    env.step_async({"action": np.zeros(N, np.int32)})
    time.sleep(0.6)
    env.step_wait()
    assert env.take_faults() == []
    env.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_reset_that_fails_later(workers):
    seed_of_first = first_seed()
    env = vector_env(workers, lambda index, seed: Faulty(seed, bad_reset=seed == seed_of_first))
    env.reset()
    batches = play(env, actions())
    (fault,) = env.take_faults()
    assert (fault.env, fault.kind) == (WHO, "raised") and "the second level" in fault.message
    ends = [step for step, batch in enumerate(batches) if batch["is_last"][WHO]]
    begun = batches[ends[0] + 1]
    assert begun["is_first"][WHO] and begun["vector"][WHO, 0] == np.float32(first_seed(attempt=1))
    env.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_several_at_once(workers):
    env = vector_env(workers)
    env.reset()
    play(env, actions(1))  # one that returns garbage in its first step is told at once
    env.step_async({"action": np.array([action("raise"), 0, action("nan reward")], np.int32)})
    batch = env.step_wait()
    assert batch["is_first"].tolist() == [True, False, True]
    assert [(fault.env, fault.kind) for fault in env.take_faults()] == [(0, "raised"), (2, "garbage")]
    env.close()


@pytest.fixture
def waits(monkeypatch):
    """The waits before new attempts, in seconds; nothing waits."""
    kept: list[float] = []
    monkeypatch.setattr("dreamer.envs.faults.time.sleep", kept.append)
    return kept


@pytest.mark.parametrize("workers", WORKERS)
def test_it_waits_longer_and_longer(workers, waits):
    """The second environment cannot be made at its first three new attempts; a finished episode forgets them."""
    bad = [first_seed(attempt=attempt) for attempt in (1, 2, 3)]

    def make(index: int, seed: int) -> Any:
        if seed in bad:
            raise ConnectionRefusedError("no display")
        return Faulty(seed)

    env = vector_env(workers, make, restart_seconds=0.5)
    env.reset()
    batches = play(env, actions(trouble="raise"))
    assert waits == [0.5, 1, 2, 4]
    faults = env.take_faults()
    assert [fault.env for fault in faults] == [WHO] * 4
    assert ["no display" in fault.message for fault in faults] == [False, True, True, True]
    assert batches[-1]["vector"][WHO, 0] == np.float32(first_seed(attempt=4))
    assert any(batch["is_last"][WHO] for batch in batches[WHEN:])
    while not env.take_faults():
        play(env, [np.full(N, action("raise") * (np.arange(N) == WHO), np.int32)])
    assert waits[4:] == [0.5]
    env.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_what_cannot_be_recreated_ends_the_run(workers, waits):
    seed_of_first, who = first_seed(), WHO

    def make(index: int, seed: int) -> Any:
        if index == who and seed != seed_of_first:
            raise ConnectionRefusedError("no display")
        return Faulty(seed)

    env = vector_env(workers, make, restart_seconds=4)
    env.reset()
    play(env, actions(WHEN))
    with pytest.raises(EnvError, match=f"{TRIES} failures in a row: own, environment 1 failed.*no display"):
        play(env, actions(trouble="raise")[WHEN:])
    assert waits == [4, 8, 16, 32] + [LONGEST_WAIT] * (TRIES - 4)
    with pytest.raises(EnvError, match="closed"):
        play(env, actions(1))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("trouble", ["raise", "shape"])
def test_a_configuration_that_never_worked_is_not_tried_again(workers, trouble, waits):
    class Never(Faulty):
        def reset(self) -> Any:
            result = super().reset()
            return {**result, "vector": np.zeros(2, np.float32)} if trouble == "shape" else 1 / 0

    env = vector_env(workers, lambda index, seed: Never(seed))
    with pytest.raises(EnvError if trouble == "raise" else TaskError) as error:
        env.reset()
    assert ("own, environment 0 failed: " if trouble == "raise" else "expected 'vector' of shape (4,)") in str(
        error.value
    )
    assert waits == []
    env.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_drawing_that_raises_gives_no_picture(workers, undisturbed):
    env = vector_env(workers, lambda index, seed: Faulty(seed, bad_picture="raise"))
    env.reset()
    assert env.render() is None
    batches = play(env, actions())
    assert env.render() is None
    assert same(batches, undisturbed, [0, 1, 2]) and env.take_faults() == []
    env.close()


@pytest.mark.parametrize(("trouble", "kind"), [("kill", "died"), ("sleep", "hung")])
def test_drawing_that_ends_the_worker_gives_no_picture(trouble, kind, undisturbed):
    seed_of_first = first_seed(0)
    env = vector_env(
        "process", lambda index, seed: Faulty(seed, bad_picture=trouble if seed == seed_of_first else None)
    )
    env.reset()
    hurry(env, 1.5)
    play(env, actions(4))
    assert env.render() is None and env.render() is None
    assert not env.restorable
    with pytest.raises(EnvError, match="step first"):
        env.get_state()
    batches = play(env, actions()[4:])
    assert [(fault.env, fault.kind) for fault in env.take_faults()] == [(0, kind)]
    assert batches[0]["is_first"][0]
    assert same(batches, undisturbed[4:], [1, 2])
    env.close()


def test_the_budget_counts_within_its_minutes():
    now = 0.0
    budget = FaultBudget(EnvConfig(failure_limit=2, failure_minutes=1), clock=lambda: now)
    fault = Fault(3, "died", "own, environment 3: gone", 'Traceback:\n  File "/home/me/own.py", line 7, in step\n')
    budget.add(fault)
    now = 50.0
    budget.add(fault)
    now = 61.0
    budget.add(fault)  # the first one was more than a minute ago
    with pytest.raises(EnvError, match="at most 2 failures.*within 1 minutes, got 3.*failure_limit") as error:
        budget.add(fault)
    assert "own, environment 3: gone (/home/me/own.py, line 7, in step)" in str(error.value)
    strict, lenient = (FaultBudget(EnvConfig(failure_limit=limit)) for limit in (0, None))
    with pytest.raises(EnvError, match="at most 0 failures"):
        strict.add(fault)
    for _ in range(100):
        lenient.add(fault)


@pytest.mark.parametrize("later", WORKERS)
@pytest.mark.parametrize("before", WORKERS)
def test_states_continue_to_the_bit(before, later):
    """With an environment that was recreated before, and one that is recreated after: its seed is the third."""
    first = vector_env(before)
    assert first.restorable
    first.reset()
    play(first, actions(trouble="raise"))
    states = first.get_state()
    assert all(isinstance(state, bytes) for state in states) and len(states) == N
    picture = first.render()
    expected = play(first, actions(trouble="nan reward", seed=1))
    second = vector_env(later)
    second.set_state(states)
    assert np.array_equal(second.render(), picture)
    assert same(play(second, actions(trouble="nan reward", seed=1)), expected, [0, 1, 2])
    assert expected[-1]["vector"][WHO, 0] == np.float32(first_seed(attempt=2))
    assert [fault.kind for fault in second.take_faults()] == ["garbage"]
    with pytest.raises(EnvError, match="expected a state for each of 3 environments, got 2"):
        second.set_state(states[:2])
    first.close()
    second.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_what_cannot_be_restored_says_so(workers, undisturbed):
    class Sealed(Faulty):
        restorable = False

    class Broken(Faulty):
        def get_state(self) -> Any:
            raise NotImplementedError("no snapshots")

        def set_state(self, state: Any) -> None:
            raise NotImplementedError("no snapshots")

    env = vector_env(workers, lambda index, seed: Sealed(seed))
    env.reset()
    assert not env.restorable
    with pytest.raises(EnvError, match="expected an environment that can be restored, got a Sealed"):
        env.get_state()
    assert same(play(env, actions()), undisturbed, [0, 1, 2])
    env.close()
    env = vector_env(workers, lambda index, seed: Broken(seed))
    env.reset()
    with pytest.raises(EnvError, match="own, environment .*no snapshots"):
        env.get_state()
    with pytest.raises(EnvError, match="own, environment .*no snapshots"):
        env.set_state([good_state()] * N)
    env.close()


def good_state() -> bytes:
    env = vector_env("inline")
    env.reset()
    try:
        return env.get_state()[0]
    finally:
        env.close()


def test_native_environments_cannot_be_restored():
    env = make_vector_env("atari_pong", EnvConfig(atari={"native": True}), 2, 0, True)
    assert not env.restorable and env.take_faults() == []
    for attempt in (env.get_state, lambda: env.set_state([b"", b""])):
        with pytest.raises(EnvError, match="env.atari.native false"):
            attempt()
    env.close()


def held() -> dict[str, Any]:
    """What this process and its children hold of the system."""
    me = psutil.Process()
    children = me.children(recursive=True)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": sorted(child.pid for child in children if child.pid in servers(me)),
        "workers": len(children) - len(servers(me)),
        "their descriptors": {child.pid: child.num_fds() for child in children if child.pid in servers(me)},
        "zombies": sum(child.status() == psutil.STATUS_ZOMBIE for child in children),
        "threads": threading.active_count(),
        "shared memory": len(os.listdir("/dev/shm")),
    }


def servers(me: psutil.Process) -> set[int]:
    """Direct children: the server that workers come from, and multiprocessing's own."""
    return {child.pid for child in me.children()}


def check_leaks(restarts: int) -> None:
    troubles = ["raise", "kill", "nan reward", "leave"]
    env = vector_env("process", lambda index, seed: Faulty(seed, spawns=True))
    env.reset()

    def restart(count: int) -> None:
        for number in range(count):
            env.step_async({"action": np.array([0, action(troubles[number % len(troubles)]), 1], np.int32)})
            assert env.step_wait()["is_first"][WHO]
        assert len(env.take_faults()) == count
        play(env, actions(1))

    restart(2)
    before = held()
    restart(restarts)
    until(lambda: held() == before, 10, f"{before}, got {held()}")
    env.close()
    until(lambda: held()["workers"] == 0, 10, "the end of environments' own processes")


def test_restarts_leave_nothing_behind():
    check_leaks(20)


@pytest.mark.slow
def test_two_hundred_restarts_leave_nothing_behind():
    check_leaks(200)


ORPHANS = """
import sys, time
import numpy as np
from dreamer.env_config import EnvConfig
from dreamer.envs import make_vector_env
from faulty_env import Faulty, action

env = make_vector_env(
    "own", EnvConfig(workers="process"), 4, 0, True, lambda index, seed: Faulty(seed, spawns=index in (0, 2))
)
env.reset()
troubles = ["sleep", "block", "block"]
env.step_async({"action": np.array([0, *map(action, troubles)], np.int32)})
time.sleep(0.5)
print("ready", flush=True)
time.sleep(1000)
"""


def test_nothing_outlives_a_killed_parent():
    """Idle workers, busy ones, ones that hang in C, and what their environments have started: gone in seconds."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    family = psutil.Process(process.pid).children(recursive=True)
    # The server and multiprocessing's tracker, the guard, 4 workers, 2 of their children.
    assert len(family) == 9
    process.kill()
    process.communicate(timeout=30)
    until(lambda: not any(alive(member.pid) for member in family), 5, f"the end of {family}")
