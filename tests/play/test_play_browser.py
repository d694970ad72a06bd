"""The page of `dreamer play` as a person uses it: the quickstart's run, headless Chromium, real strokes of keys."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import KEYS, Browser, open_browser, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out") / "played"


@pytest.fixture(scope="module")
def address(quickstart_run, recordings) -> Iterator[str]:
    command = [sys.executable, "-m", "dreamer", "play", str(quickstart_run), "--port", "0", "--out", str(recordings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = ""
        while not (found := re.search(r"http://\S+", lines)):
            assert (line := process.stdout.readline()), lines
            lines += line
        yield found[0]
        process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser(1280, 800) as browser:
        yield browser


@pytest.fixture
def page(browser, address) -> Browser:
    browser.go(address)
    wait_for("the first frame", lambda: browser.run("return document.body.dataset.step") == "0")
    return browser


def step(page: Browser) -> int:
    return int(page.run("return document.body.dataset.step"))


def words(page: Browser, name: str) -> str:
    return page.run(f"return document.getElementById('{name}').textContent")


def pixels(page: Browser, name: str) -> list[int]:
    """Everything on a canvas."""
    data = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    return page.run(f"const c = document.getElementById('{name}'); return [...{data}]")


def press(page: Browser, key: str) -> None:
    """One step by a key, while the game is paused."""
    before = step(page)
    page.press(KEYS.get(key, key))
    wait_for(f"a step by {key}", lambda: step(page) == before + 1, 20)


def paddle(page: Browser, name: str) -> float:
    """Where the green paddle of catch is on a canvas: the mean column of its pixels, in shares of the width."""
    script = f"""
        const c = document.getElementById('{name}');
        const d = c.getContext('2d').getImageData(0, c.height - 1, c.width, 1).data, found = [];
        for (let x = 0; x < c.width; x++) if (d[4*x+1] > 130 && d[4*x] < 130) found.push(x);
        return found.reduce((a, b) => a + b, 0) / found.length / c.width;"""
    return page.run(script)


def test_keys_move_the_paddle_in_the_dream_and_in_reality_alike(page, shots):
    for key in ("left",) * 7:  # to the wall
        press(page, key)
    assert "alike" in words(page, "parted"), "the first ball falls as the model has seen it"
    # The next ball comes from anywhere: from here on they may differ in the ball, but not in the paddle.
    press(page, "left")
    places = [(paddle(page, "dream"), paddle(page, "real"))]
    assert places[0] == pytest.approx((1 / 8, 1 / 8), abs=0.05)
    for key in ("right", "d", "right"):
        press(page, key)
        places.append((paddle(page, "dream"), paddle(page, "real")))
    dreamed, real = zip(*places, strict=True)
    assert list(real) == sorted(set(real)) and real[-1] - real[0] == pytest.approx(3 / 8, abs=0.01)
    assert dreamed == pytest.approx(real, abs=0.07)
    assert words(page, "acted") == "person: right"
    page.screenshot(shots / "play.png")


def test_the_first_steps_are_equal_in_pictures(page):
    for key in (".", "left", "right", ".", "."):
        press(page, key)
        differences = [abs(a - b) for a, b in zip(pixels(page, "dream"), pixels(page, "real"), strict=True)]
        assert sum(differences) / len(differences) < 0.01 * 255


def test_a_rewound_step_has_the_same_picture_and_is_a_place_to_branch(page):
    shown: list[Any] = [(pixels(page, "dream"), pixels(page, "real"))]
    for key in ("left", "left", "right", "."):
        press(page, key)
        shown.append((pixels(page, "dream"), pixels(page, "real")))
    assert shown[0] != shown[1] != shown[2]
    for at in (3, 2, 1, 0):
        page.press(",")
        wait_for("a step back", lambda at=at: step(page) == at, 20)
        assert (pixels(page, "dream"), pixels(page, "real")) == shown[at]
    assert words(page, "step-shown") == "step 0 of 4"
    press(page, "left")
    assert words(page, "step-shown") == "step 1" and (pixels(page, "dream"), pixels(page, "real")) == shown[1]


def test_the_policy_plays_at_the_speed_asked_for_to_the_end_and_is_recorded(page, recordings, shots):
    page.run("const who = document.getElementById('who'); who.value = 'policy'; who.onchange()")
    page.run("const speed = document.getElementById('speed'); speed.value = 10; speed.oninput()")
    begun = time.monotonic()
    page.press("p")
    wait_for("the end", lambda: step(page) == 23 or "over" in words(page, "state"), 60)
    assert time.monotonic() - begun > 1.5
    score = float(words(page, "dream-score").split()[1])
    assert score > 1.5, "the policy catches the balls that it dreams of"
    page.press("r")
    wait_for("a new episode", lambda: step(page) == 0, 20)
    unsure = "return document.getElementById('dream-box').classList.contains('unsure')"
    marked = [page.run(unsure) for _ in range(8) if press(page, ".") is None]
    assert marked == [False] * 7 + [True], "nobody can know where the second ball will fall"
    page.screenshot(shots / "play_policy.png")
    for button, ending in (("gif", ".gif"), ("episode", ".npz")):
        page.run(f"document.getElementById('{button}').click()")
        wait_for("a recording", lambda ending=ending: words(page, "message").endswith(ending), 30)
    assert {path.suffix for path in recordings.iterdir()} == {".gif", ".npz"}


def test_tabs_are_games_of_their_own(page, address):
    press(page, "left")
    page.run(f"window.open('{address}')")
    assert step(page) == 1


def test_other_tokens_and_other_pages_are_turned_away(browser, address):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}x")
    assert error.value.code == 403
    error.value.close()
    # A page of another origin has the token, and a browser that says so.
    socket = address.replace("http://", "ws://").replace("/?", "/play?")
    browser.go("data:text/html,<title>elsewhere</title>")
    browser.run(f"window.said = []; const s = new WebSocket('{socket}'); "
                "s.onopen = () => said.push('open'); s.onclose = () => said.push('closed')")  # fmt: skip
    wait_for("an answer", lambda: browser.run("return said.length"), 20)
    assert browser.run("return said") == ["closed"]
