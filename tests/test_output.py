"""What is printed: it stands there as it is, and wherever it goes, it ends no program."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import pytest
import rich.console
import rich.markup
from fake_envs import Scripted
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType
from tiny_runs import share_agents, tiny_config

import dreamer
from dreamer.bench import measuring, plan
from dreamer.cli import main
from dreamer.doctor import checkup
from dreamer.doctor.findings import Finding
from dreamer.process import unfailing_output
from dreamer.records.display import Evaluation, Row, evaluation_table, start_summary
from dreamer.run.nonfinite import NonFiniteActionError
from dreamer.saves.checkpoint import Checkpointer
from dreamer.terminal import Console, Table

ROUND = [(0.0, False, False)] * 4 + [(1.0, True, False)]
#: What rich would take for markup, a closing tag without an opening one, and a picture.
NAME = "py_a[/b]/[red]team:boom:/e.py:Env"


# --- Streams that fail -------------------------------------------------------------------------


def closed_pipe() -> int:
    """`| head`: nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_terminal() -> int:
    theirs, ours = pty.openpty()
    os.close(theirs)
    return ours


def full_pipe() -> int:
    """Somebody made it non-blocking, and its reader, who lives on, has not read for a while."""
    _, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(2**16))
    return writing


BROKEN = [closed_pipe, full_disk, closed_terminal, full_pipe]


@pytest.fixture
def broken():
    """Makes text streams of such descriptors, and ends them quietly."""
    made: list[TextIO] = []

    def make(kind: Callable[[], int]) -> TextIO:
        made.append(open(kind(), "w"))
        return made[-1]

    yield make
    with open(os.devnull, "w") as nowhere:
        for stream in made:
            os.dup2(nowhere.fileno(), stream.fileno())
            stream.close()


@contextlib.contextmanager
def standing_for(stdout: TextIO | None, stderr: TextIO | None) -> Iterator[None]:
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former


def print_much() -> None:
    for _ in range(3):
        print("a line", flush=True)
        sys.stdout.writelines(["long" * 10_000, "\n"])
        Console().print("from the console", Table("a table"))


@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_that_is_printed_raises(kind, broken):
    with pytest.raises(OSError), standing_for(broken(kind), io.StringIO()):
        print_much()
    stream, told = broken(kind), io.StringIO()
    with standing_for(stream, told), unfailing_output():
        print_much()
    if kind is not full_pipe:
        stream.flush()  # Python's last one, which has an exit code of its own where it fails
    assert told.getvalue().count("\n") == (kind in (full_disk, closed_terminal))
    if kind is full_disk:
        assert told.getvalue() == "dreamer: standard output is lost: No space left on device\n"


@pytest.mark.parametrize("kind", BROKEN)
def test_standard_error_may_fail_as_well(kind, broken):
    with standing_for(broken(full_disk), broken(kind)), unfailing_output():
        print_much()
        print("a line", file=sys.stderr, flush=True)


def test_output_goes_on_when_there_is_room_again(tmp_path, broken):
    stream = broken(full_disk)
    with standing_for(stream, io.StringIO()), unfailing_output(), (tmp_path / "out").open("w") as again:
        print("lost", flush=True)
        os.dup2(again.fileno(), stream.fileno())
        print("kept", flush=True)
    assert (tmp_path / "out").read_text() == "kept\n"


def test_a_closed_stream_is_like_none():
    closed = io.StringIO()
    closed.close()
    with standing_for(closed, closed), unfailing_output():
        print_much()
    with standing_for(None, None), unfailing_output():
        print_much()
        sys.stderr.write("nowhere")


def test_characters_that_an_encoding_lacks_become_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with standing_for(stream, io.StringIO()), unfailing_output():
        print("é → run/\udcff, plain")
        Console().print("→", start_summary("é", [Row("name", "→")]))
    found = raw.getvalue().decode()
    assert found.startswith("\\xe9 \\u2192 run/\\udcff, plain\n\\u2192")


def test_streams_are_as_before_afterwards():
    before = sys.stdout, sys.stderr
    with unfailing_output():
        within = sys.stdout
        with unfailing_output():
            assert sys.stdout is within
        sys.stdout = io.StringIO()  # somebody's own
    assert (sys.stdout, sys.stderr) == before


def test_files_never_become_standard_output():
    """Without one, the first file to be opened would be what libraries print to."""
    code = (
        "from dreamer.process import unfailing_output\n"
        "with unfailing_output():\n"
        "    file = open('/dev/null')\n"
        "    print('nowhere')\n"
        "    raise SystemExit(10 + file.fileno())"
    )
    ended = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "$0" >&- 2>&- <&-', code], check=False)
    assert ended.returncode >= 13


@pytest.mark.parametrize("kind", [closed_pipe, full_disk])
def test_listings_end_with_their_own_code(kind, broken):
    stream, program = broken(kind), [sys.executable, "-m", "dreamer", "--version"]
    ended = subprocess.run(program, stdout=stream, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 0
    assert ended.stderr.count(b"\n") == (kind is full_disk)
    with standing_for(stream, io.StringIO()):
        assert main(["envs"]) == 0


@pytest.mark.parametrize("kind", [closed_pipe, full_disk])
def test_a_run_that_nobody_sees_trains_and_saves(kind, broken, tmp_path, monkeypatch):
    share_agents(monkeypatch)
    config = tiny_config(logdir=str(tmp_path), run__agent_steps=20, run__final_eval=False, run__eval_every=None)

    class Talking(Scripted):
        def step(self, action: Any) -> Any:
            print("a step", flush=True)
            return super().step(action)

    with standing_for(broken(kind), io.StringIO()):
        assert dreamer.train(config, make_env=lambda index, seed: Talking(ROUND)) == 0
    assert Checkpointer(tmp_path, read_only=True).latest() == 20
    assert "failures" not in (tmp_path / "metrics.jsonl").read_text()


def test_numbers_that_are_not_finite_keep_their_code_on_a_full_disk(tmp_path, monkeypatch, capsys):
    share_agents(monkeypatch)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def loop(run: Any, stop: Any) -> None:
        raise NonFiniteActionError(5, {})

    monkeypatch.setattr("dreamer.run.loop.Run.loop", loop)
    monkeypatch.setattr(NonFiniteActionError, "dump", fail)
    config = tiny_config(logdir=str(tmp_path), run__agent_steps=20)
    assert dreamer.train(config, make_env=lambda index, seed: Scripted(ROUND)) == 3
    assert "could not be written ([Errno 28] No space left on device)" in capsys.readouterr().out


# --- Text as it is -----------------------------------------------------------------------------


def shown(what: RenderableType, console: type[rich.console.Console] = Console) -> str:
    out = io.StringIO()
    console(file=out, width=400, color_system=None).print(what)
    return out.getvalue()


def test_the_name_of_these_tests_is_a_hard_one():
    with pytest.raises(rich.markup.MarkupError):
        shown(NAME, rich.console.Console)


@given(st.text("[]/\\:ab$_ #(){}|", min_size=1))
def test_any_text_is_printed_as_it_is(text):
    assert shown(text) == f"{text}\n"
    table = Table(text)
    table.add_column(text, no_wrap=True)
    table.add_row(text)
    for console in (Console, rich.console.Console):
        assert shown(table, console).count(text.strip()) >= 3


def test_lines_are_left_whole_and_tables_fit():
    out, path = io.StringIO(), "runs/" + "long name " * 20
    console = Console(file=out, width=40)
    console.print("go on with:", path)
    console.print(start_summary(path, [Row("logdir", path)]))
    first, *table = out.getvalue().splitlines()
    assert first == f"go on with: {path}"
    assert max(map(len, table)) <= 40


@pytest.mark.parametrize("console", [Console, rich.console.Console])
@pytest.mark.parametrize(
    "table",
    [
        evaluation_table([Evaluation(NAME, [1.0], further={NAME: 1.0})], NAME),
        start_summary(NAME, [Row(NAME, NAME), Row("loud", NAME, True)]),
        checkup.table([Finding(NAME, "fail", NAME, NAME)]),
        plan.table([plan.Figure(NAME, NAME, NAME, {})]),
        measuring._table(measuring.Report(NAME, {}, (NAME,), {NAME: {NAME: NAME}}), {}),
    ],
    ids=["evaluation", "summary", "doctor", "plan", "bench"],
)
def test_tables_show_names_as_they_are(table, console):
    assert NAME in shown(table, console)


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    from dreamer.records.display import Display, Steps

    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with Display("toy_catch", 100, True, Console(file=out, force_terminal=True)) as display:
        display.update(Steps(50, 50, 1))
    assert out.getvalue().startswith("toy_catch  50/100 steps (50 %)")


def test_a_word_without_end_is_cut_in_the_middle_of_an_error(capsys):
    assert main(["plot", f"a{'9' * 3000}b"]) == 2
    told = capsys.readouterr().err
    assert len(told) < 1000 and told.count("\n") == 1
    assert f"a{'9' * 100}" in told and "..." in told and "99b'" in told
