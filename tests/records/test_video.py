"""GIFs decode to what was put in, and the dream video shows what it says."""

import io

import numpy as np
import pytest
from PIL import Image

from dreamer.records import video


def decode(gif):
    """Frames (T, H, W, 3), each repeated as long as it is shown, in units of the shortest one."""
    frames, durations = [], []
    with Image.open(io.BytesIO(gif)) as image:
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.repeat(np.stack(frames), np.array(durations) // min(durations), axis=0)


def smooth(steps, height, width, seed=0):
    """A natural-looking video with many thousand colors."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(noise).resize((width + steps, height), Image.Resampling.BICUBIC))
    return np.stack([large[:, t : t + width] for t in range(steps)])


@pytest.mark.parametrize("shape", [(5, 128, 130), (1, 200, 128), (4, 210, 160)])
def test_few_colors_are_exact(shape):
    rng = np.random.default_rng(1)
    colors = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    frames = colors[rng.integers(0, 256, shape)]
    np.testing.assert_array_equal(decode(video.encode_gif(frames)), frames)


def test_identical_frames_keep_their_time():
    frames = np.zeros((6, 128, 128, 3), np.uint8)
    frames[4:, :, :, 0] = 200
    np.testing.assert_array_equal(decode(video.encode_gif(frames)), np.concatenate([frames[3:5].repeat([2, 1], 0)]))


def test_many_colors_are_close():
    frames = smooth(12, 128, 140)
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) > 2000
    error = np.abs(decode(video.encode_gif(frames)).astype(float) - frames)
    # A plain median cut has 7.4 here, and nothing in 256 colors is far below 5.8: these frames hold a whole rainbow.
    assert error.mean() < 6.5 and np.quantile(error, 0.99) < 25


def test_palette_serves_all_frames():
    """A scene change: the second half has no color in common with the first."""
    frames = np.concatenate([smooth(6, 128, 128) // 4, 255 - smooth(6, 128, 128, seed=1) // 4])
    error = np.abs(decode(video.encode_gif(frames)).astype(float) - frames)
    assert error.mean(axis=(1, 2, 3)).max() < 4


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), 4), ((32, 48), 4), ((64, 64), 2), ((84, 84), 2), ((210, 160), 1)]
)
def test_small_images_are_enlarged_without_blur(size, scale):
    frames = np.random.default_rng(0).choice(np.array([0, 90, 255], np.uint8), (3, *size, 3))
    gif = video.encode_gif(frames)
    assert video.gif_size(gif) == (size[0] * scale, size[1] * scale)
    np.testing.assert_array_equal(decode(gif), frames.repeat(scale, 1).repeat(scale, 2))


def test_grayscale_and_frame_rate():
    frames = np.random.default_rng(0).integers(0, 256, (3, 130, 130, 1), dtype=np.uint8)
    gif = video.encode_gif(frames, fps=20)
    np.testing.assert_array_equal(decode(gif), frames.repeat(3, -1))
    with Image.open(io.BytesIO(gif)) as image:
        assert image.info["duration"] == 50 and image.info["loop"] == 0


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_wrong_frames_are_refused(bad):
    with pytest.raises(ValueError, match="expected uint8 frames"):
        video.encode_gif(bad)


def test_file_is_replaced_whole(tmp_path):
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    path = video.save_gif(tmp_path / "deep" / "a.gif", frames)
    video.save_gif(path, frames + 3)
    np.testing.assert_array_equal(decode(path.read_bytes())[0, 0, 0], [3, 3, 3])
    assert [p.name for p in path.parent.iterdir()] == ["a.gif"]


def find_tiles(frame, color):
    """(y, x) of the upper left pixel inside each border of this color, two pixels wide, by rows."""
    mask = np.pad((frame == color).all(-1), 2)

    def at(dy, dx):
        return mask[2 + dy : 2 + dy + frame.shape[0], 2 + dx : 2 + dx + frame.shape[1]]

    return np.argwhere(at(0, 0) & at(1, 1) & ~at(2, 2) & ~at(-1, 0) & ~at(0, -1) & at(1, 2) & at(2, 1)) + 2


def test_dream_grid_shows_true_predicted_error():
    rng = np.random.default_rng(0)
    true = rng.integers(100, 150, (2, 5, 64, 64, 3), dtype=np.uint8)
    shift = np.array([0, 30])[:, None, None, None, None]
    predicted = (true + shift).astype(np.uint8)
    grid = video.dream_grid(true, predicted, context=3)
    assert grid.dtype == np.uint8 and grid.shape[0] == 5
    for t, color in [(0, video.CONTEXT_COLOR), (2, video.CONTEXT_COLOR), (3, video.IMAGINED_COLOR)]:
        corners = find_tiles(grid[t], color)
        assert len(corners) == 6, "three rows of two sequences"
        tiles = [grid[t, y : y + 64, x : x + 64] for y, x in corners]
        np.testing.assert_array_equal(tiles[0], true[0, t])
        np.testing.assert_array_equal(tiles[1], true[1, t])
        np.testing.assert_array_equal(tiles[2], predicted[0, t])
        np.testing.assert_array_equal(tiles[3], predicted[1, t])
        assert (tiles[4] == 128).all() and (tiles[5] == 158).all()


@pytest.mark.parametrize("size", [(84, 84), (210, 160), (32, 48), (7, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_dream_grid_takes_any_size(size, channels):
    true = np.random.default_rng(0).integers(0, 256, (7, 3, *size, channels), dtype=np.uint8)
    grid = video.dream_grid(true, np.random.default_rng(1).random(true.shape, np.float32) * 3 - 1, context=1)
    assert grid.ndim == 4 and grid.shape[-1] == 3
    scale = max(1, -(-64 // min(size)))
    assert grid.shape[1] >= 3 * size[0] * scale and 5 * size[1] * scale <= grid.shape[2] < 7 * size[1] * scale + 60


def test_a_dream_grid_of_two_shapes_is_refused():
    true = np.zeros((1, 2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="of one shape"):
        video.dream_grid(true, true[:, :1], context=1)
