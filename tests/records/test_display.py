"""What is drawn fits the terminal and says what is true."""

import io
import re

import pytest

from dreamer.records import display
from dreamer.records.display import Display, Evaluation, Row
from dreamer.records.logger import Steps
from dreamer.terminal import Console


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def console(width, terminal):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, color_system=None)


def text(console):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def render(renderable, width):
    target = console(width, False)
    target.print(renderable)
    return text(target)


def run(target, steps=100, total=400, **kwargs):
    """One step a second, ten agent steps each, an episode of score 0, 1, 2, ... every second."""
    clock = Clock()
    with Display("toy_catch", total * 10, console=target, clock=clock, **kwargs) as progress:
        for step in range(steps):
            clock.now += 1
            progress.episode(step)
            progress.update(Steps(10 * step, 40 * step, 5 * step))
    return text(target)


@pytest.mark.parametrize("width", [80, 120])
def test_live_panel(width):
    shown = run(console(width, True)).rstrip().splitlines()[-5:]
    assert all(len(line) == width - 3 for line in shown)  # A ^C echoed by the terminal still fits.
    last = "\n".join(shown)
    assert "toy_catch" in last and "…" not in last
    assert "score 89.50" in last and "mean of last 20, 100 episodes" in last
    assert "990 / 4,000 agent steps" in last and "495 updates" in last
    assert "10 steps/s" in last and "25 %" in last and "5:01 left" in last  # 3010 steps at 10 a second
    curve = re.search("[▁▂▃▄▅▆▇█]{8,}", last).group()
    assert curve[0] == "▁" and curve[-1] == "█" and list(curve) == sorted(curve)


def test_live_panel_of_a_long_run_fits_80_columns():
    target, clock = console(80, True), Clock()
    with Display("atari100k_montezuma_revenge", 200_000_000, console=target, clock=clock) as progress:
        progress.update(Steps(0, 0, 0), "compiling")
        assert "none yet" in text(target) and "compiling" in text(target)
        for step in range(3):
            clock.now += 100_000
            for score in (-1234.5, 98765.4):
                progress.episode(score)
            progress.update(Steps(50_000_000 * step, 200_000_000 * step, 25_000_000 * step))
    last = text(target).rstrip().splitlines()[-5:]
    assert [len(line) for line in last] == [77] * 5 and "100,000,000 / 200,000,000 agent steps" in last[2]


def test_plain_lines_where_there_is_no_terminal():
    lines = run(console(80, False)).splitlines()
    assert len(lines) == 11  # At once, every ten seconds, and at the end.
    assert lines[-1].startswith("toy_catch  990/4,000 steps (25 %)  score 89.50  100 episodes  495 updates")
    assert lines[-1].endswith("5:01 left") and "\x1b" not in "".join(lines)


def test_plain_lines_on_request_in_a_terminal():
    assert "╭" not in run(console(80, True), live=False)


def test_resumed_run_counts_its_own_speed_only():
    target, clock = console(80, False), Clock()
    with Display("t", 10_000, console=target, clock=clock) as progress:
        for step in (5000, 5010, 5020):
            progress.update(Steps(step, step, step))
            clock.now += 20
    assert "0.50 steps/s" in text(target).splitlines()[1]


def test_printing_while_live_stays_above():
    target = console(80, True)
    with Display("t", 10, console=target) as progress:
        progress.update(Steps(1, 1, 1))
        progress.print("checkpoint saved")
        progress.update(Steps(2, 2, 2))
    assert "checkpoint saved" in text(target) and text(target).rstrip().endswith("╯")


def test_evaluation_table():
    results = [
        Evaluation("toy_catch", [3, 3, 2, 2], best=3),
        Evaluation("atari_pong", [-21, 21], normalized=1.184),
        Evaluation("gym_Unknown-v0", [0.125]),
    ]
    rows = {
        line.split("│")[1].strip(): line.split("│")
        for line in render(display.evaluation_table(results), 120).splitlines()
        if "│" in line
    }
    cells = {name: [c.strip() for c in row[2:-1]] for name, row in rows.items()}
    assert cells["task"] == ["episodes", "mean", "std", "min", "max", "best possible", "of best", "of human"]
    assert cells["toy_catch"] == ["4", "2.50", "0.50", "2", "3", "3", "83 %", ""]
    assert cells["atari_pong"] == ["2", "0", "21", "-21", "21", "", "", "118 %"]
    assert cells["gym_Unknown-v0"] == ["1", "0.12", "0", "0.12", "0.12", "", "", ""]
    crafter = Evaluation("crafter_reward", [1.5], further={"crafter_score": 12.25})
    with_score = render(display.evaluation_table([*results, crafter]), 140)
    assert "crafter score" in with_score and "12" in with_score
    single = render(display.evaluation_table(results[:1]), 80)
    assert "of best" in single and "human" not in single and max(map(len, single.splitlines())) <= 80


def test_start_summary_is_loud_about_an_unwanted_cpu():
    loud = display.device_row("cpu", "2 cores", "auto")
    assert loud.loud and "no accelerator" in loud.value
    assert not display.device_row("cpu", "2 cores", "cpu").loud
    assert not display.device_row("gpu", "NVIDIA H100", "auto").loud
    target = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    rows = [loud, display.parameters_row({"encoder": 1_200_000, "rssm": 800_000}), Row("replay", "4.3 kB per step")]
    target.print(display.start_summary("dreamer train", rows))
    output = target.file.getvalue()
    device, rest = [line for line in output.splitlines() if "no accelerator" in line][0], output.split("parameters")[1]
    assert "43m" in device and "43m" not in rest  # A yellow background.
    assert "2.0M (encoder 1.2M, rssm 800.0K)" in text(target)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 5, ""),
        ([1, 1, 1], 5, "▄▄▄"),
        ([0, 7], 5, "▁█"),
        (range(8), 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7, float("nan")], 2, "▁█"),
        ([1, 2], 0, ""),
    ],
)
def test_sparkline(values, width, expected):
    assert display.sparkline(list(values), width) == expected


def test_formats():
    numbers = [0, 0.01234, 2.5, 481.23, -3, 12340.4, float("nan")]
    assert [display.format_number(x) for x in numbers] == ["0", "0.0123", "2.50", "481.2", "-3", "12,340", "nan"]
    assert [display.format_count(x) for x in (950, 12_300, 4.5e6, 1.2e9)] == ["950", "12.3K", "4.5M", "1.2B"]
    assert [display.format_bytes(x) for x in (512, 29_100, 61.4e9)] == ["512 B", "29.1 kB", "61.4 GB"]
    durations = [display.format_duration(x) for x in (42, 723, 11_100, 183_700)]
    assert durations == ["0:42", "12:03", "3:05:00", "2d 3h"]
