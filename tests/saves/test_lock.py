"""One run per logdir, and leaving cleanly on a signal."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dreamer.process import STOP_SIGNALS
from dreamer.run.signals import StopRequest
from dreamer.saves.lock import LogdirInUseError, LogdirLock

HOLDER = """
import sys, time
from dreamer.saves.lock import LogdirLock
with LogdirLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_run_is_refused_and_told_who_holds_it(tmp_path, holder):
    with pytest.raises(LogdirInUseError, match=rf"in use by a live run \(pid {holder.pid} on .*another --logdir"):
        LogdirLock(tmp_path).acquire()


def test_killed_run_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with LogdirLock(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_released_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        with LogdirLock(tmp_path / "new") as lock:
            with pytest.raises(LogdirInUseError, match="in use"):
                LogdirLock(tmp_path / "new").acquire()
            with pytest.raises(LogdirInUseError, match="this very process"):
                lock.acquire()
    assert (tmp_path / "new" / ".lock").read_text() == ""


def test_two_logdirs_do_not_meet(tmp_path):
    with LogdirLock(tmp_path / "a"), LogdirLock(tmp_path / "b"):
        assert (tmp_path / "a" / ".lock").exists() and (tmp_path / "b" / ".lock").exists()


def test_holders_children_do_not_keep_the_lock(tmp_path):
    with LogdirLock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with LogdirLock(tmp_path):
            assert child.poll() is None
    finally:
        child.communicate(b"\n")


@pytest.fixture
def default_handlers():
    """Those of a program in the foreground: shells let what they start in the background ignore some signals."""
    former = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"], ids=str)
def test_first_signal_sets_the_flag(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.requested and stop.signal == number
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGQUIT])
def test_a_second_one_from_the_keyboard_raises(first, second):
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_what_is_ignored_or_means_something_else_stays_so(number):
    """nohup ignores SIGHUP; another program around has signals of its own."""
    heard = []
    for handler in (signal.SIG_IGN, lambda *_: heard.append(number)):
        former = signal.signal(number, handler)
        try:
            with StopRequest() as stop:
                os.kill(os.getpid(), number)
                assert not stop and signal.getsignal(number) is handler
        finally:
            signal.signal(number, former)
    assert heard == [number]


@pytest.mark.usefixtures("default_handlers")
def test_repeated_terminate_only_asks_again():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGTERM


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
