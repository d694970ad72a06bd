"""A real run's TensorBoard as a person sees it, in headless Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser import Browser, free_port, open_browser, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """A run of the debug preset; DREAMER_TEST_LOGDIR: another one that is there."""
    if given := os.environ.get("DREAMER_TEST_LOGDIR"):
        return Path(given)
    folder = tmp_path_factory.mktemp("runs") / "debug"
    command = [sys.executable, "-m", "dreamer", "train", "--configs", "debug", "--run.display", "false"]
    subprocess.run([*command, "--logdir", str(folder)], check=True, capture_output=True, timeout=900)
    return folder


@pytest.fixture(scope="module")
def viewer(logdir):
    """Its address."""
    port = free_port()
    program = Path(sys.executable).with_name("tensorboard")
    command = [str(program), "--logdir", logdir.name, "--port", str(port), "--load_fast", "false"]
    with subprocess.Popen(command, cwd=logdir.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="module")
def browser(viewer):
    with open_browser() as browser:
        wait_for("TensorBoard", lambda: browser.go(viewer) is None and "TensorBoard" in browser.text())
        yield browser


def visit(browser: Browser, viewer: str, tab: str, words: list[str], images: int = 0) -> str:
    """The text of a tab when all words, and so many loaded pictures, are on it."""
    browser.go("about:blank")
    browser.go(f"{viewer}/#{tab}")

    def shown() -> str | None:
        text = browser.text()
        missing = [word for word in words if word not in text]
        return text if not missing and len(browser.images()) >= images else None

    return wait_for(f"{tab}: {words} and {images} pictures", shown)


def test_the_first_page_has_the_groups_a_video_and_the_health_page(browser, viewer, shots):
    groups = [
        "1_score", "2_health", "3_world_model", "4_behaviour", "5_optimizer", "6_replay", "7_speed", "8_system",
    ]  # fmt: skip
    visit(browser, viewer, "timeseries", [*groups, "/mean_score"], images=1)
    browser.screenshot(shots / "tensorboard.png")


def test_pictures_are_the_health_page_a_dream_and_an_episode(browser, viewer, shots):
    visit(browser, viewer, "images", ["health", "dream/image"], images=2)
    sizes = {(image["width"], image["height"]) for image in browser.images()}
    assert (1600, 626) in sizes and len(sizes) >= 2, sizes
    browser.screenshot(shots / "tensorboard_images.png")


def test_the_charts_of_health_are_laid_out(browser, viewer, shots):
    visit(browser, viewer, "custom_scalars", ["health", "return of the policy: imagined and real", "score"])
    browser.screenshot(shots / "tensorboard_charts.png")


def test_hyper_parameters_are_those_of_one_run(browser, viewer, shots):
    text = visit(browser, viewer, "hparams", ["run.train_ratio", "Trial ID"])
    browser.screenshot(shots / "tensorboard_hparams.png")
    assert [line for line in text.splitlines() if line == "tensorboard"] == ["tensorboard"], "one row, one run"


def test_options_are_there_as_text(browser, viewer):
    visit(browser, viewer, "text", ["options"])
