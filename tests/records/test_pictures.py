"""Pictures beside the loop: in order, none lost, errors where they can be seen; and budgets of bytes."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

from dreamer.records import video
from dreamer.records.logger import Logger, Steps
from dreamer.records.pictures import WAITING, Encoder, Pace, Picture, encode_png
from dreamer.run.collector import VIDEO_FRAMES


def at(agent_steps: int) -> Steps:
    return Steps(agent_steps, agent_steps, agent_steps)


def picture(size: int = 1) -> Picture:
    return Picture("gif", bytes(size), 1, 1)


def test_pictures_are_made_in_a_thread_and_delivered_in_order_by_the_caller():
    made, got = [], []

    def make(name: int) -> Picture:
        made.append(threading.current_thread().name)
        return picture(name + 1)

    encoder = Encoder(lambda label, found: got.append((label, len(found.data), threading.current_thread().name)))
    for name in range(10):
        encoder.add(name, lambda name=name: make(name))
    encoder.close()
    assert got == [(name, name + 1, threading.main_thread().name) for name in range(10)]
    assert len(made) == 10 and not [name for name in made if name == threading.main_thread().name]


def test_no_more_than_a_few_wait():
    """The one who brings too many waits for the oldest: memory is bounded, and nothing is dropped."""
    go, got = threading.Event(), []
    encoder = Encoder(lambda label, found: got.append(label))

    def make() -> Picture:
        assert go.wait(60)
        return picture()

    for name in range(WAITING):
        encoder.add(name, make)
    encoder.deliver()
    assert got == []
    threading.Timer(0.05, go.set).start()
    encoder.add(WAITING, make)
    assert got[:1] == [0]
    encoder.close()
    assert got == list(range(WAITING + 1))


def test_an_error_in_making_a_picture_is_raised_where_records_are_written(tmp_path):
    logger = Logger(tmp_path)
    logger.video(at(1), "dream", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logger.flush()
    logger.close()
    logger = Logger(tmp_path)
    logger.video(at(1), "dream", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="expected uint8 frames"):
        logger.close()


def test_a_checkpoint_has_all_pictures_that_came_before(tmp_path):
    logger = Logger(tmp_path)
    path = logger.video(at(1), "episode/video", lambda: np.zeros((3, 8, 8, 3), np.uint8))
    page = logger.page(at(1), "report/health", lambda: np.full((30, 40, 3), 200, np.uint8))
    offsets = logger.offsets()
    assert path.is_file() and page == tmp_path / "reports" / "report_health.png"
    assert offsets["pictures"] == path.stat().st_size + page.stat().st_size
    logger.close()


def test_a_page_keeps_its_colours():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20], image[20:, 30:] = (255, 255, 255), (213, 94, 0)
    found = encode_png(image)
    assert (found.ending, found.height, found.width) == ("png", 40, 60)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found.data)).convert("RGB")), image)


def test_a_budget_is_spent_in_step_with_the_run():
    pace, taken = Pace(1.0, 1000), []
    for step in range(0, 1001, 10):
        if pace.takes(50_000, step):
            taken.append(step)
    assert pace.spent == 50_000 * len(taken) == 1_000_000
    # 2 at once, 18 more over the run, evenly.
    assert taken[:3] == [0, 10, 60] and np.diff(taken[2:]).min() >= 50 and max(np.diff(taken)) <= 60
    assert Pace(None, 1).takes(10**12, 0)


def test_what_a_week_writes_stays_under_the_budget(tmp_path):
    """A week at 100 steps a second, reports every 20,000: every picture is offered, what the budget allows is kept.

    All sizes are a hundredth of real ones.
    """

    class Counter:
        bytes = pictures = 0

        def picture(self, steps: Steps, name: str, picture: Picture) -> None:
            self.bytes += len(picture.data)
            self.pictures += 1
            self.last = steps.agent_steps

        def __getattr__(self, name: str) -> object:
            return lambda *arguments: {}

    week, size = 7 * 24 * 3600 * 100, 25_000
    counter = Counter()
    logger = Logger(tmp_path, sinks=[counter], pictures=Pace(2.0, week))
    offered = 0
    for step in range(20_000, week + 1, 20_000):
        logger._deliver((at(step), "report/dream/image", tmp_path / "x.gif"), picture(size))
        offered += size
    assert offered > 7e7
    assert 1.9e6 < counter.bytes <= 2e6 and counter.pictures == 80 and counter.last > 0.98 * week
    # The file is always the newest.
    assert (tmp_path / "x.gif").stat().st_size == size
    logger.truncate({"pictures": 5}, None)
    assert logger.offsets()["pictures"] == 5


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64, 3), (64, 64, 3)), ((320, 320, 3), (320, 320, 3)),
        ((1000, 500, 3), (250, 125, 3)), ((321, 10, 1), (160, 5, 1)),
    ],
)  # fmt: skip
def test_large_frames_are_reduced(shape, expected):
    frame = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    small = video.reduced(frame)
    assert small.shape == expected and small.dtype == np.uint8
    factor = shape[0] // expected[0]
    block = frame[:factor, :factor].reshape(-1, shape[2]).mean(0)
    np.testing.assert_allclose(small[0, 0], block, atol=1)


def test_a_recording_is_bounded():
    assert VIDEO_FRAMES * video.MAX_SIDE**2 * 3 < 200e6
