"""Small charts drawn with Pillow alone, for pages that every run writes: panels with axes, lines, points and bars."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

#: Colours that the colour-blind can tell apart too (Okabe and Ito).
COLORS: tuple[Color, ...] = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))
INK: Color = (40, 40, 44)
FAINT: Color = (222, 222, 226)
GRAY: Color = (125, 125, 132)
PAPER: Color = (255, 255, 255)

#: Everything is drawn larger by this factor and then reduced, which smooths the lines.
_FINE = 2


class Page:
    """A white page of `width` x `height` pixels."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._image = Image.new("RGB", (width * _FINE, height * _FINE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: tuple[float, float], text: str, size: int = 12, color: Color = INK, anchor: str = "la") -> None:
        """anchor: as Pillow's: first left, middle or right, then ascender, middle or descender."""
        self._draw.text(_fine(at), text, fill=color, font=_font(size * _FINE), anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], color: Color = INK, width: float = 1) -> None:
        self._draw.line([_fine(point) for point in points], fill=color, width=max(1, round(width * _FINE)))

    def box(self, corner: tuple[float, float], other: tuple[float, float], color: Color) -> None:
        (x0, y0), (x1, y1) = _fine(corner), _fine(other)
        self._draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=color)

    def dot(self, at: tuple[float, float], radius: float, color: Color) -> None:
        x, y = _fine(at)
        r = radius * _FINE
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def pixels(self, corner: tuple[float, float], size: tuple[float, float], values: np.ndarray) -> None:
        """An image uint8 (H, W, 3), stretched without blur."""
        width, height = (max(1, round(x)) for x in _fine(size))
        image = Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)
        x, y = _fine(corner)
        self._image.paste(image, (round(x), round(y)))

    def array(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return np.asarray(self._image.resize(self._size, Image.Resampling.BOX))


class Axes:
    """One chart on a page: a title, a frame, two scales, and a line of words below the title.

    at, size: of the whole panel, pixels. x, y: (least, largest) of the scales; log_x: in powers of ten.
    """

    def __init__(
        self,
        page: Page,
        at: tuple[float, float],
        size: tuple[float, float],
        title: str,
        words: str,
        labels: tuple[str, str],
        x: tuple[float, float],
        y: tuple[float, float],
        log_x: bool = False,
    ) -> None:
        self.page, self._log_x, self._keys = page, log_x, 0
        self.left, self.right = at[0] + 58, at[0] + size[0] - 14
        self.top, self.bottom = at[1] + 46, at[1] + size[1] - 40
        self.x, self.y = _widened(*x), _widened(*y)
        page.text((self.left, at[1]), title, 15)
        page.text((self.left, at[1] + 22), words, 11, GRAY)
        page.text(((self.left + self.right) / 2, at[1] + size[1] - 6), labels[0], 11, GRAY, "md")
        page.text((self.right, self.top - 3), labels[1], 11, GRAY, "rd")

    def frame(self, y_ticks: bool = True) -> None:
        """Grid lines and numbers."""
        page = self.page
        for value in ticks(*self.y) if y_ticks else ():
            at = self.at(self.x[0], value)[1]
            page.line([(self.left, at), (self.right, at)], FAINT)
            page.text((self.left - 5, at), number(value), 11, INK, "rm")
        for value in decades(*self.x) if self._log_x else ticks(*self.x):
            at = self.at(value, self.y[0])[0]
            page.line([(at, self.top), (at, self.bottom)], FAINT)
            page.text((at, self.bottom + 4), number(value), 11, INK, "ma")
        page.line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], GRAY)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is on the page; points beyond the scales are put at their ends."""
        places = [self.x[0], self.x[1], x]
        low, high, place = (math.log10(max(v, 1e-30)) for v in places) if self._log_x else places
        across = min(max((place - low) / (high - low), 0), 1)
        up = min(max((y - self.y[0]) / (self.y[1] - self.y[0]), 0), 1)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def curve(self, x: np.ndarray, y: np.ndarray, color: Color, name: str = "", dots: bool = False) -> None:
        """A line through finite points."""
        good = np.isfinite(y)
        points = [self.at(a, b) for a, b in zip(x[good], y[good], strict=True)]
        if len(points) > 1:
            self.page.line(points, color, 2)
        for point in points if dots or len(points) == 1 else ():
            self.page.dot(point, 3.5, color)
        if name:
            self.key(name, color)

    def rule(self, x: tuple[float, float], y: tuple[float, float], color: Color = GRAY) -> None:
        """A thin line from (x[0], y[0]) to (x[1], y[1])."""
        self.page.line([self.at(x[0], y[0]), self.at(x[1], y[1])], color, 1.5)

    def bar(self, x: tuple[float, float], y: tuple[float, float], color: Color) -> None:
        self.page.box(self.at(x[0], y[0]), self.at(x[1], y[1]), color)

    def key(self, name: str, color: Color) -> None:
        """The next line of the legend, in the upper left corner."""
        y = self.top + 10 + 15 * self._keys
        self.page.box((self.left + 4, y - 7), (self.left + 36 + 6.5 * len(name), y + 8), PAPER)
        self.page.line([(self.left + 8, y), (self.left + 24, y)], color, 3)
        self.page.text((self.left + 30, y), name, 11, INK, "lm")
        self._keys += 1

    def note(self, text: str) -> None:
        """Words in place of a chart."""
        at = ((self.left + self.right) / 2, (self.top + self.bottom) / 2)
        self.page.text(at, text, 12, GRAY, "mm")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in a range: multiples of 1, 2 or 5 times a power of ten, about `count`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range, at most six."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**p for p in powers][:: max(1, -(-len(powers) // 6))]


def number(value: float) -> str:
    """Short: 0.25, 12,000, 1e-05."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) >= 1 else f"{value:.4g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    return (low, high) if high - low > 1e-12 * max(1.0, abs(low)) else (low - 0.5, high + 0.5)


def _fine(point: tuple[float, float]) -> tuple[float, float]:
    return point[0] * _FINE, point[1] * _FINE


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
