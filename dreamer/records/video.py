"""Videos as GIF files, and the dream video: what happened, what the model imagined, and how far off it was."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dreamer.paths import whole_file

#: Border of the steps that the model has seen, and of those it imagines; the colour-blind can tell them apart too.
CONTEXT_COLOR = (40, 130, 220)
IMAGINED_COLOR = (240, 150, 30)

#: Longest side of recorded frames, pixels.
MAX_SIDE = 320
#: Longest side to which frames are enlarged, pixels.
SHORTEST_SIDE, LARGEST_SIDE = 128, 1280
#: In the dream video: sequences side by side, and the least side of their images, pixels.
SEQUENCES, TILE = 5, 64

_BACKGROUND = (22, 22, 26)
_TEXT = (225, 225, 225)
_SAMPLED_PIXELS = 1 << 17


def encode_gif(frames: np.ndarray, fps: float = 15) -> bytes:
    """An endlessly repeating GIF of uint8 frames (T, H, W, 3) or (T, H, W, 1).

    Frames whose shorter side is below SHORTEST_SIDE pixels are enlarged by a whole factor, without blur, as far as the
    longer one stays within LARGEST_SIDE. All frames share one palette: exact up to 256 colours, else made from pixels
    of the whole video. Players only know delays in 1/100 s, so the frame rate is rounded to that.
    """
    frames = _as_rgb(frames)
    palette, indices = _quantize(frames)
    scale = max(1, min(enlargement(min(frames.shape[1:3]), SHORTEST_SIDE), LARGEST_SIDE // max(frames.shape[1:3])))
    images = []
    for index in indices:
        image = Image.fromarray(index.repeat(scale, 0).repeat(scale, 1))
        image.putpalette(palette.tobytes())
        images.append(image)
    delay = max(20, 10 * round(100 / fps))
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=delay, loop=0)
    return file.getvalue()


def save_gif(path: Path | str, frames: np.ndarray, fps: float = 15) -> Path:
    """Encodes frames, see `encode_gif`, and writes the file."""
    with whole_file(Path(path), sync=False) as file:
        file.write(encode_gif(frames, fps))
    return Path(path)


def reduced(frame: np.ndarray) -> np.ndarray:
    """A frame uint8 (H, W, C) with no side above MAX_SIDE: means over squares of a whole number of pixels.

    If a frame is narrower than such a square, one pixel stands for each square.
    """
    factor = -(-max(frame.shape[:2]) // MAX_SIDE)
    if factor == 1:
        return frame
    if min(frame.shape[:2]) < factor:
        return frame[::factor, ::factor]
    height, width = (side // factor for side in frame.shape[:2])
    squares = frame[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
    return (squares.mean((1, 3)) + 0.5).astype(np.uint8)


def gif_size(gif: bytes) -> tuple[int, int]:
    """Height and width of an encoded GIF, pixels."""
    width, height = np.frombuffer(gif, "<u2", count=2, offset=6)
    return int(height), int(width)


def enlargement(side: int, wanted: int) -> int:
    """The least whole factor that brings `side` to `wanted` pixels."""
    return max(1, -(-wanted // side))


def dream_grid(true: np.ndarray, predicted: np.ndarray, context: int) -> np.ndarray:
    """The dream video, uint8 (T, height, width, 3): one column per sequence, rows true, predicted, error.

    true, predicted  (B, T, H, W, C) with C 1 or 3, uint8 or floats in [0, 1].
    context          Leading steps whose images the model saw; after them it imagines from actions alone.

    The first SEQUENCES of the batch are shown, images enlarged by a whole factor to at least TILE pixels. The border of
    each image has CONTEXT_COLOR, then IMAGINED_COLOR. Error is grey where the prediction is right, brighter or darker
    where it is too bright or too dark.
    """
    if true.shape != predicted.shape or true.ndim != 5:
        raise ValueError(f"expected two videos (B, T, H, W, C) of one shape, got {true.shape} and {predicted.shape}")
    true, predicted = (_as_rgb(_as_uint8(v[:SEQUENCES])) for v in (true, predicted))
    error = np.clip(predicted.astype(np.int16) - true + 128, 0, 255).astype(np.uint8)
    count, steps, height, width, _ = true.shape
    scale = enlargement(min(height, width), TILE)
    rows = np.stack([true, predicted, error]).repeat(scale, 3).repeat(scale, 4)
    border = max(2, scale * min(height, width) // 32)
    gap = border
    cell_h, cell_w = scale * height + 2 * border, scale * width + 2 * border
    left, top = _gutter() + gap, _line() + gap
    canvas = np.empty((steps, top + 3 * (cell_h + gap), left + count * (cell_w + gap), 3), np.uint8)
    canvas[:] = _BACKGROUND
    colors = np.array([CONTEXT_COLOR if t < context else IMAGINED_COLOR for t in range(steps)], np.uint8)
    for r in range(3):
        for c in range(count):
            y, x = top + r * (cell_h + gap), left + c * (cell_w + gap)
            canvas[:, y : y + cell_h, x : x + cell_w] = colors[:, None, None]
            canvas[:, y + border : y + cell_h - border, x + border : x + cell_w - border] = rows[r, c]
    for r, name in enumerate(("true", "model", "error")):
        canvas[:, :, :left] = _write(canvas[0, :, :left], (gap, top + r * (cell_h + gap) + cell_h // 2), name)
    for t in range(steps):
        seen = t < context
        text = f"seen {t + 1}/{context}" if seen else f"imagined {t + 1 - context}/{steps - context}"
        strip = _write(canvas[t, : top - gap], (left, (top - gap) // 2), text, tuple(int(v) for v in colors[t]))
        canvas[t, : top - gap] = strip
    return canvas


def _write(image: np.ndarray, at: tuple[int, int], text: str, color: tuple[int, ...] = _TEXT) -> np.ndarray:
    """The image with text that starts at (x, middle y)."""
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text(at, text, fill=color, font=_font(), anchor="lm")
    return np.asarray(picture)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _gutter() -> int:
    return max(int(_font().getbbox(text)[2]) for text in ("true", "model", "error")) + 4


def _line() -> int:
    return 18


def _as_uint8(video: np.ndarray) -> np.ndarray:
    if video.dtype == np.uint8:
        return video
    return (np.clip(np.nan_to_num(video.astype(np.float32)), 0, 1) * 255 + 0.5).astype(np.uint8)


def _as_rgb(video: np.ndarray) -> np.ndarray:
    if video.dtype != np.uint8 or video.ndim < 4 or video.shape[-1] not in (1, 3) or 0 in video.shape:
        raise ValueError(f"expected uint8 frames (T, H, W, 3) or (T, H, W, 1), got {video.dtype} {video.shape}")
    return np.broadcast_to(video, (*video.shape[:-1], 3))


def _quantize(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Palette uint8 (256, 3) and indices uint8 (T, H, W)."""
    packed = frames.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    # A table of all 2^24 colours finds the used ones far faster than sorting the pixels would.
    used = np.zeros(1 << 24, np.bool_)
    used[packed] = True
    colors = np.flatnonzero(used)
    palette = np.zeros((256, 3), np.uint8)
    if len(colors) <= 256:
        palette[: len(colors)] = colors[:, None] >> np.array([16, 8, 0]) & 255
        position = np.zeros(1 << 24, np.uint8)
        position[colors] = np.arange(len(colors))
        return palette, position[packed]
    pixels = frames.reshape(-1, 3)
    sample = pixels[:: max(1, len(pixels) // _SAMPLED_PIXELS)]
    chooser = Image.fromarray(np.ascontiguousarray(sample[None])).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    # Dithering would flicker from frame to frame and double the size.
    mapped = [Image.fromarray(f).quantize(palette=chooser, dither=Image.Dither.NONE) for f in frames]
    found = np.array(chooser.getpalette(), np.uint8).reshape(-1, 3)
    palette[: len(found)] = found
    return palette, np.stack([np.asarray(image) for image in mapped])
