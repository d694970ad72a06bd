"""Environments that reach beyond themselves: what they do to the process they run in ends with the call."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from failing_env import Failing, Rounds
from fake_envs import Scripted
from faulty_env import Faulty
from tiny_runs import share_agents, tiny_config

from dreamer import cli
from dreamer.env_config import EnvConfig
from dreamer.envs import EnvError, TaskError, VectorEnv, make_vector_env
from dreamer.envs.interface import picture, restorable
from dreamer.envs.workers import fence
from dreamer.envs.workers.fence import EscapeError, Fence, fenced
from dreamer.run.signals import StopRequest
from dreamer.run.training import ENVIRONMENTS_FAILED, train
from dreamer.saves.checkpoint import Checkpointer

WORKERS = ["inline", "process"]


class Leaving(BaseException):
    """What no `except Exception` catches."""


ESCAPES = [SystemExit(0), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Leaving("now")]


class Told(Faulty):
    """Does in each method what it is told to, by the method's name, from the `first` call on."""

    def __init__(self, told: Mapping[str, Callable[[], Any]], first: int = 0) -> None:
        super().__init__(1)
        self.told, self.first, self.calls = told, first, dict.fromkeys(told, 0)
        self._do("make")

    def _do(self, name: str) -> Any:
        if name not in self.told:
            return None
        self.calls[name] += 1
        return self.told[name]() if self.calls[name] > self.first else None

    def reset(self) -> Any:
        self._do("reset")
        return super().reset()

    def step(self, action: Any) -> Any:
        self._do("step")
        return super().step(action)

    def render(self) -> Any:
        drawn = self._do("render")
        return super().render() if drawn is None else drawn

    def get_state(self) -> Any:
        self._do("get_state")
        return super().get_state()

    def set_state(self, state: Any) -> None:
        self._do("set_state")
        super().set_state(state)

    @property
    def restorable(self) -> bool:
        self._do("restorable")
        return True

    def close(self) -> None:
        self._do("close")


def vector(make: Callable[[int, int], Any], workers: str = "inline", count: int = 1) -> VectorEnv:
    return make_vector_env("own", EnvConfig(workers=workers, restart_seconds=0), count, 0, True, make)


def step(env: VectorEnv) -> dict[str, np.ndarray]:
    env.step_async({"action": np.zeros(env.num_envs, np.int32)})
    return env.step_wait()


def throw(error: BaseException) -> Callable[[], Any]:
    def throwing() -> Any:
        raise error

    return throwing


# What ends programs


@pytest.mark.parametrize("error", ESCAPES, ids=repr)
def test_what_ends_programs_becomes_an_error(error):
    with pytest.raises(EscapeError, match=type(error).__name__) as caught:
        fenced(throw(error))
    assert caught.value.__cause__ is error
    with pytest.raises(ZeroDivisionError):
        fenced(lambda: 1 / 0)
    assert fenced(max, 3, 4) == 4


@pytest.mark.parametrize("method", ["reset", "step"])
def test_leaving_costs_an_episode(method):
    """What workers do then is in `test_faults_workers.py`."""
    env = vector(lambda index, seed: Told({method: sys.exit}, first=1))
    env.reset()
    batches = [step(env) for _ in range(12)]
    faults = env.take_faults()
    assert faults and {fault.kind for fault in faults} == {"raised"}
    assert "SystemExit" in faults[0].message and "test_envs_fence.py" in faults[0].traceback
    assert sum(int(batch["is_first"][0]) for batch in batches) >= len(faults)
    env.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_leaving_elsewhere_costs_nothing(workers):
    told = {name: throw(Leaving()) for name in ("close", "get_state", "restorable")}
    drawn = [lambda: [lambda: 0], sys.exit]  # leaves, then what no pickle holds
    env = vector(lambda index, seed: Told({**told, "render": lambda: drawn.pop()()}), workers)
    env.reset()
    assert env.render() is None and env.render() is None and not env.restorable
    with pytest.raises(EnvError):
        env.get_state()
    step(env)
    assert env.take_faults() == []
    env.close()


@pytest.mark.parametrize("method", ["make", "reset"])
def test_leaving_at_the_start_is_an_error_in_one_line(method, capsys):
    def play(arguments: Any) -> int:
        vector(lambda index, seed: Told({method: sys.exit})).reset()
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run_command", play)
        assert cli.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "own, environment 0 failed: SystemExit" in line and "test_envs_fence.py, line" in line


def test_a_property_that_fails_is_named():
    class Bare(Faulty):
        @property
        def action_spaces(self) -> Any:
            raise SystemExit("no spaces today")

        @action_spaces.setter
        def action_spaces(self, spaces: Any) -> None: ...

    with pytest.raises(EnvError, match="environment 0 failed: SystemExit: no spaces today"):
        vector(lambda index, seed: Bare(seed))


def test_a_person_s_ctrl_c_is_not_the_environment_s(request):
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))

    def pressed() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with StopRequest(), pytest.raises(KeyboardInterrupt):
        fenced(pressed)
    with pytest.raises(KeyboardInterrupt):
        fenced(pressed)


def test_a_child_that_is_let_go_on_ends_there(tmp_path):
    """One that forks and leaves by `sys.exit` in the child must not leave a second run behind."""
    read, write = os.pipe()

    def forks() -> None:
        if os.fork() == 0:
            sys.exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads
        fenced(forks)
    os.write(write, b"x")  # whoever gets here says so
    _, status = os.wait()
    os.close(write)
    assert os.read(read, 10) == b"x" and os.waitstatus_to_exitcode(status) == 1
    os.close(read)


def test_code_that_leaves_when_it_is_imported(tmp_path, capsys):
    (tmp_path / "script.py").write_text("import sys\n\nMyEnv = None\nsys.exit(0)\n")
    assert cli.main(["train", "--task", f"py_{tmp_path}/script.py:MyEnv", "--logdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "SystemExit: 0" in line and "script.py, line 4" in line


# What belongs to the process


@pytest.fixture
def surroundings():
    """Nothing that a test leaves behind harms the next."""
    folder, limit, handlers = os.getcwd(), sys.getrecursionlimit(), [signal.getsignal(n) for n in fence.SIGNALS]
    with warnings.catch_warnings():
        yield
    os.chdir(folder)
    sys.setrecursionlimit(limit)
    for number, handler in zip(fence.SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def seen() -> dict[str, Any]:
    return {
        "folder": os.getcwd(),
        "stdout": sys.stdout,
        "stderr": sys.stderr,
        "limit": sys.getrecursionlimit(),
        "errors": [row for row in warnings.filters if row[0] == "error"],
        "numpy": np.geterr(),
        "handlers": [signal.getsignal(number) for number in fence.SIGNALS],
    }


def spoil(folder: Path) -> None:
    os.chdir(folder)
    sys.stdout = sys.stderr = io.StringIO()
    sys.setrecursionlimit(sys.getrecursionlimit() - 10)
    warnings.simplefilter("error")
    np.seterr(all="raise")
    for number in fence.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("ending", [None, ZeroDivisionError(), SystemExit()], ids=repr)
def test_the_process_stays_as_it_was(ending, surroundings, tmp_path):
    def spoils() -> None:
        spoil(tmp_path)
        if ending is not None:
            raise ending

    before = seen()
    if ending is None:
        fenced(spoils)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011
            fenced(spoils)
    after = seen()
    sys.stdout, sys.stderr = before["stdout"], before["stderr"]
    assert after == before


def test_a_step_changes_neither_streams_nor_limits(surroundings, tmp_path):
    before, guarded = seen(), Fence()
    guarded.step(spoil, tmp_path)
    after = seen()
    sys.stdout, sys.stderr = before["stdout"], before["stderr"]
    for name in ("stdout", "stderr", "limit", "errors", "numpy"):
        assert after[name] == before[name], name
    guarded(lambda: None)
    assert os.getcwd() == before["folder"], "the next call that is no step notices"


def test_an_environment_keeps_its_own_folder(surroundings, tmp_path):
    home = os.getcwd()
    folders = [tmp_path / name for name in "ab"]
    seen_by: list[list[str]] = [[], []]

    def make(index: int, seed: int) -> Told:
        folders[index].mkdir()
        look = lambda: seen_by[index].append(os.getcwd())  # noqa: E731
        return Told({"make": lambda: os.chdir(folders[index]), "reset": look, "step": look})

    env = vector(make, count=2)
    assert os.getcwd() == home
    env.reset()
    step(env)
    assert os.getcwd() == home
    assert [set(paths) for paths in seen_by] == [{str(folder)} for folder in folders]
    env.close()


def test_an_alarm_rings_only_while_its_environment_runs():
    def rings(*_: Any) -> None:
        raise TimeoutError("ring")

    def set_alarm(seconds: float) -> None:
        signal.signal(signal.SIGALRM, rings)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    handler, timer = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    guarded = Fence()
    try:
        guarded(set_alarm, 0.05)
        time.sleep(0.1)
        with pytest.raises(TimeoutError, match="ring"):
            guarded.step(time.sleep, 10)
        guarded.step(int)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


THREADS = """
import sys, threading, time
from dreamer import cli
from dreamer.run import signals
def command(arguments):
    threading.Thread(target=time.sleep, args=(60,), name="server").start()
    threading.Thread(target=time.sleep, args=(0.01,), name="quick").start()
    print("done")
    return 4
signals.GRACE, cli.run_command = 0.3, command
sys.exit(cli.main())
"""


def test_threads_that_are_left_running_do_not_keep_the_process():
    found = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=50)
    assert (found.returncode, found.stdout) == (4, "done\n")
    assert "ended without server, left running" in found.stderr


CLOSES = """
import os, sys
from dreamer.envs.workers.fence import Fence
fence = Fence()
for call in (fence.step, fence):
    call(sys.stdout.close)
    print("printed")
fence(os.close, 1)
file = open(sys.argv[1], "w")
print("and not into a file", flush=True)
"""


def test_streams_that_are_closed_are_opened_again(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", CLOSES, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == ["printed", "printed", "and not into a file"]
    assert (tmp_path / "file").read_text() == ""


def test_options_of_jax_are_restored_and_refused():
    def make(index: int, seed: int) -> Rounds:
        jax.config.update("jax_enable_x64", True)
        return Rounds()

    with pytest.raises(TaskError, match="jax_enable_x64 True in place of False.*--env.workers process"):
        vector(make)
    assert not jax.config.jax_enable_x64


def test_a_request_to_stop_gets_its_signals_back():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop


def test_closing_that_hangs_is_left(monkeypatch):
    def hangs() -> None:
        try:
            time.sleep(100)
        except Exception:  # noqa: S110
            pass

    monkeypatch.setattr(fence, "CLOSING", 0.1)
    handler = signal.getsignal(signal.SIGALRM)
    env, begun = vector(lambda index, seed: Told({"close": hangs})), time.monotonic()
    env.close()
    assert time.monotonic() - begun < 10
    assert signal.getsignal(signal.SIGALRM) is handler


def test_a_fence_is_quick():
    """Against an empty call, which shares the machine's load: an order of magnitude, no figure."""
    guarded, count = Fence(), 2000

    def spent(call: Callable[[], Any]) -> float:
        rounds = []
        for _ in range(7):
            begun = time.process_time()
            for _ in range(count):
                call()
            rounds.append((time.process_time() - begun) / count)
        return min(rounds)

    assert spent(lambda: guarded.step(int)) < 5e-6 + 10 * spent(lambda: 0)


# One object in several places


class Wrapped(gymnasium.Wrapper):
    """A wrapper of the user's."""


def test_one_object_for_all_is_refused():
    one, world = Rounds(), Scripted([(1.0, True, False)])
    for make in (lambda index, seed: one, lambda index, seed: world, lambda index, seed: Wrapped(world)):
        with pytest.raises(TaskError, match="got one object twice"):
            vector(make, count=2)
    alone = vector(lambda index, seed: world)
    with pytest.raises(TaskError, match="got one object twice"):
        vector(lambda index, seed: Wrapped(world))
    alone.close()
    vector(lambda index, seed: world).close()


def test_environments_that_were_forgotten_are_in_nobody_s_way():
    one = Rounds()
    gone = weakref.ref(vector(lambda index, seed: one))
    gc.collect()
    assert gone() is None
    vector(lambda index, seed: one).close()


def test_a_proof_leaves_the_only_object_alone():
    closed: list[bool] = []

    class Only(Scripted):
        def close(self) -> None:
            closed.append(True)

    world = Only([(1.0, False, False)] * 3 + [(1.0, True, False)])
    env = vector(lambda index, seed: world)
    env.reset()
    assert not env.restorable
    assert not closed and world.episode == 0
    env.close()


# Asking whether it can be restored


def test_an_error_behind_restorable_is_no_yes():
    class Broken(Rounds):
        @property
        def restorable(self) -> bool:
            return self.nothing

        def get_state(self) -> None: ...

        def set_state(self, state: None) -> None: ...

    class Says(Broken):
        restorable = False

    class Silent(Rounds):
        def get_state(self) -> None: ...

        def set_state(self, state: None) -> None: ...

    with pytest.raises(AttributeError, match="nothing"):
        restorable(Broken())
    assert not restorable(Says()) and restorable(Silent()) and not restorable(Rounds())
    assert not vector(lambda index, seed: Broken()).restorable


@pytest.mark.parametrize("error", [RuntimeError("no"), AttributeError("no"), SystemExit(0)], ids=repr)
def test_closing_that_fails_disproves_nothing(error):
    class Stuck(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
            return 0, {}

        def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
            return 1, 1.0, False, False, {}

        def close(self) -> None:
            raise error

    env = vector(lambda index, seed: Stuck())
    env.reset()
    assert env.restorable and env.get_state()
    env.close()


# Pictures


@pytest.mark.parametrize(
    ("drawn", "shape"),
    [
        (np.zeros((4, 5), np.uint8), (4, 5, 3)),
        (np.zeros((4, 5, 1), np.uint8), (4, 5, 3)),
        (np.zeros((4, 5, 4), np.uint8), (4, 5, 3)),
        (np.zeros((4, 5, 3), np.uint8), (4, 5, 3)),
        (None, None),
        (np.zeros((4, 5, 3)), EnvError),
        (np.zeros((4, 5, 2), np.uint8), EnvError),
        (np.zeros((0, 5, 3), np.uint8), EnvError),
        ([np.zeros((4, 5, 3), np.uint8)], EnvError),
        ("a picture", EnvError),
    ],
)  # fmt: skip
def test_what_counts_as_a_picture(drawn, shape):
    if shape is EnvError:
        with pytest.raises(EnvError, match="expected a picture uint8"):
            picture(drawn)
    else:
        found = picture(drawn)
        assert found is None if shape is None else found is not None and found.shape == shape


# Whole runs


class Chatty(Told):
    """A vector is all that the shared agents know."""

    def __init__(self, told: Mapping[str, Callable[[], Any]], first: int = 0) -> None:
        super().__init__(told, first)
        rounds = Rounds()
        self.rounds, self.observation_spaces, self.action_spaces = (
            rounds,
            rounds.observation_spaces,
            rounds.action_spaces,
        )

    def reset(self) -> Any:
        self._do("reset")
        return self.rounds.reset()

    def step(self, action: Any) -> Any:
        self._do("step")
        return self.rounds.step(action)


QUICK = {
    "env__num_envs": 1, "env__restart_seconds": 0.0, "run__eval_every": None, "run__report_every": None,
    "run__final_eval": False, "run__train_ratio": 1e-6,
}  # fmt: skip


def test_a_run_in_which_every_episode_fails_does_not_end_well(tmp_path, monkeypatch, capsys):
    share_agents(monkeypatch)
    config = tiny_config(logdir=str(tmp_path), run__agent_steps=20, **QUICK)
    assert train(config, lambda index, seed: Chatty({"step": sys.exit}, first=2)) == ENVIRONMENTS_FAILED
    assert "expected episodes that end by themselves, got none, and 6" in " ".join(capsys.readouterr().out.split())
    assert Checkpointer(tmp_path, read_only=True).latest() == 20


@pytest.mark.parametrize("when", ["made", "played"])
def test_an_evaluation_that_fails_for_good_saves_first(when, tmp_path, monkeypatch, capsys):
    share_agents(monkeypatch)
    monkeypatch.setattr("dreamer.envs.faults.TRIES", 2)
    made: list[int] = []

    def make(index: int, seed: int) -> Any:
        made.append(seed)
        # Training's own; the one that is tried; evaluation's.
        if len(made) > (2 if when == "made" else 3):
            sys.exit(0)
        return Failing("raise", None) if len(made) == 3 else Rounds()

    quick = {**QUICK, "run__eval_every": 8}
    config = tiny_config(logdir=str(tmp_path), run__agent_steps=40, run__eval_episodes=3, **quick)
    assert train(config, make) == ENVIRONMENTS_FAILED
    assert "stopped: evaluation: " in " ".join(capsys.readouterr().out.split())
    assert Checkpointer(tmp_path, read_only=True).latest() == 8


def test_one_object_for_training_and_evaluation_is_refused_at_the_start(tmp_path, monkeypatch):
    share_agents(monkeypatch)
    one = Rounds()
    config = tiny_config(logdir=str(tmp_path), run__agent_steps=20, **{**QUICK, "run__final_eval": True})
    with pytest.raises(TaskError, match="got one object twice"):
        train(config, lambda index, seed: one)


def test_states_that_are_not_given_or_taken_back_cost_their_episodes(tmp_path, monkeypatch, capsys):
    share_agents(monkeypatch)
    make = lambda index, seed: Chatty({"set_state": sys.exit})  # noqa: E731
    unsaved = lambda index, seed: Chatty({"get_state": sys.exit})  # noqa: E731
    assert train(tiny_config(logdir=str(tmp_path / "unsaved"), run__agent_steps=8, **QUICK), unsaved) == 0
    assert "the environments' states cannot be saved" in " ".join(capsys.readouterr().out.split())
    assert not Checkpointer(tmp_path / "unsaved", read_only=True).restore(parts=())[2]["exact"]
    assert train(tiny_config(logdir=str(tmp_path), run__agent_steps=20, **QUICK), make) == 0
    assert Checkpointer(tmp_path, read_only=True).restore(parts=())[2]["exact"]
    capsys.readouterr()
    assert train(tiny_config(logdir=str(tmp_path), run__agent_steps=40, **QUICK), make) == 0
    assert "could not be restored, and begin new episodes" in " ".join(capsys.readouterr().out.split())
    scores = [json.loads(line)["episode/score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert scores == [7.0] * 4
