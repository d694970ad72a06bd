"""The page of the world model's health: eight charts. `docs/health.md` says how to read it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dreamer.records.drawing import COLORS, FAINT, GRAY, INK, Axes, Page
from dreamer.records.health import Calibration, Health, Latents

_PANEL = (400, 290)
_HEAD = 46
#: Most curves of the first chart.
_CURVES = 6
#: The least norm on the scale; smaller norms are drawn there.
_LEAST = 1e-9

Place = tuple[float, float]


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is not drawn
def draw(health: Health, gradients: Mapping[str, float], caption: str) -> np.ndarray:
    """uint8 (H, W, 3). gradients: norm by module, of the newest update; empty if there was none."""
    width, height = _PANEL
    page = Page(4 * width, _HEAD + 2 * height)
    page.text((20, 10), "World model health", 20)
    page.text((4 * width - 20, 16), caption, 13, GRAY, "ra")
    places = [(float(column * width), float(_HEAD + row * height)) for row in range(2) for column in range(4)]
    _errors(page, places[0], health)
    _kl(page, places[1], health)
    if health.latents is not None:
        _latents(page, places[2], health.latents)
    _norms(page, places[3], health, gradients)
    words = {
        "reward": ("Reward: predicted and real", "reward"),
        "cont": ("Continue: predicted and real", "probability"),
        "value": ("Value: predicted and what followed", "discounted return"),
    }
    for place, name in zip(places[4:7], words, strict=True):
        _calibration(page, place, *words[name], health.calibrations.get(name))
    _returns(page, places[7], health)
    return page.array()


def _errors(page: Page, at: Place, health: Health) -> None:
    """Errors over imagined steps, relative to a constant guess: at 1 the model knows nothing. Beside them, if there is
    an ensemble, how far it disagrees."""
    known = [name for name in health.curves if health.guess[name] > 0]
    relative = {name: health.curves[name] / health.guess[name] for name in known[:_CURVES]}
    top = max([1.2, *(min(float(np.nanmax(curve)), 3.0) for curve in relative.values())])
    steps = max([len(curve) for curve in relative.values()], default=1)
    words = "error / error of guessing the mean, along the real actions"
    axes = Axes(page, at, _PANEL, "Prediction error", words, ("imagined steps", ""), (0, steps), (0, top))
    axes.frame()
    axes.rule((0, steps), (1, 1))
    for color, (name, curve) in zip(COLORS, relative.items(), strict=False):
        seen = health.seen[name] / health.guess[name]
        axes.curve(np.arange(steps + 1), np.append(seen, curve), color, name)
    if (found := health.disagreement) is not None and (most := float(np.nanmax(found.curve))) > 0:
        axes.curve(np.arange(steps + 1), np.append(found.seen, found.curve) / most, INK, "disagreement / its most")
    if not relative:
        axes.note("nothing varied in these sequences")


def _kl(page: Page, at: Place, health: Health) -> None:
    """How surprised the model is by what it sees: distribution over states."""
    values = health.kl.reshape(-1)
    top = max(2 * health.free_nats, float(np.quantile(values, 0.99)), 1e-3)
    count, edges = np.histogram(np.minimum(values, top), 30, (0, top))
    share = count / len(values)
    free = float((values < health.free_nats).mean())
    words = f"mean {values.mean():.2f} nats, {free:.0%} of states under the free {health.free_nats:g}"
    labels = ("nats; last bar: this and more", "share of states")
    axes = Axes(page, at, _PANEL, "Surprise: KL(posterior, prior)", words, labels, (0, top), (0, 1.05 * share.max()))
    axes.frame()
    for height, low, high in zip(share, edges[:-1], edges[1:], strict=True):
        axes.bar((low, high - 0.1 * (high - low)), (0, height), FAINT if high <= health.free_nats else COLORS[0])
    axes.rule((health.free_nats,) * 2, (0, 1.05 * share.max()), COLORS[1])


def _latents(page: Page, at: Place, found: Latents) -> None:
    """Mean probability of each class of each variable, classes sorted."""
    variables, classes = found.mean.shape
    most = math.log(classes)
    words = f"{found.dead.mean():.0%} of classes dead, entropy {found.entropy.mean() / most:.0%} of the most"
    labels = ("variables; classes of each sorted by use, top to bottom", "")
    axes = Axes(page, at, _PANEL, "Use of the latents", words, labels, (0, variables), (0, classes))
    order = np.argsort(-found.spread)
    share = -np.sort(-found.mean[order], 1).T  # (K, S)
    strength = np.clip(np.log(np.maximum(share, 1e-6) * 100 * classes) / math.log(100 * classes), 0, 1)[..., None]
    dark, light = np.array(COLORS[0]), np.array((244, 247, 250))
    pixels = (light + strength * (dark - light)).astype(np.uint8)
    pixels[share < 0.1 / classes] = (246, 220, 205)
    page.pixels((axes.left, axes.top), (axes.right - axes.left, axes.bottom - axes.top), pixels)
    axes.frame(y_ticks=False)
    page.text((axes.left - 5, axes.top), "1", 11, INK, "ra")
    page.text((axes.left - 5, axes.bottom), str(classes), 11, INK, "rd")


def _norms(page: Page, at: Place, health: Health, gradients: Mapping[str, float]) -> None:
    """Parameters and gradients by module."""
    names = list(health.param_norm)
    pairs = [(health.param_norm[name], gradients.get(name, 0.0)) for name in names]
    seen = [max(value, _LEAST) for pair in pairs for value in pair if value > 0 and math.isfinite(value)] or [1.0]
    limits = (10.0 ** math.floor(math.log10(min(seen))), 10.0 ** math.ceil(math.log10(max(seen)) + 0.01))
    words = "the newest gradient, before clipping"
    axes = Axes(page, at, _PANEL, "Norms by module", words, ("norm", ""), limits, (0, len(names)), log_x=True)
    axes.frame(y_ticks=False)
    for i, (name, pair) in enumerate(zip(names, pairs, strict=True)):
        middle = len(names) - i - 0.5
        page.text((axes.left - 5, axes.at(limits[0], middle)[1]), name, 11, INK, "rm")
        for value, color, low in ((pair[0], COLORS[0], 0.04), (pair[1], COLORS[1], -0.32)):
            if value > 0:
                axes.bar((limits[0], value), (middle + low, middle + low + 0.28), color)
    page.text((axes.right - 56, axes.top - 3), "weights", 11, COLORS[0], "rd")
    page.text((axes.right, axes.top - 3), "gradient", 11, COLORS[1], "rd")


def _calibration(page: Page, at: Place, title: str, unit: str, found: Calibration | None) -> None:
    """Means of groups: predicted across, observed upwards; on the diagonal, predictions come true."""
    if found is None:
        axes = Axes(page, at, _PANEL, title, "", (f"predicted {unit}", "real"), (0, 1), (0, 1))
        axes.note("no sequence shows what followed")
        return
    both = np.concatenate([found.predicted, found.observed])
    low, high = float(both.min()), float(both.max())
    margin = 0.05 * (high - low) if high - low > 1e-9 else 0.5
    limits = (low - margin, high + margin)
    words = f"mean gap {found.error:.3g}, bias {found.bias:+.3g}, {found.states.sum():,} states"
    axes = Axes(page, at, _PANEL, title, words, (f"predicted {unit}", "real"), limits, limits)
    axes.frame()
    axes.rule(limits, limits)
    axes.curve(found.predicted, found.observed, COLORS[0], dots=True)


def _returns(page: Page, at: Place, health: Health) -> None:
    """The reward that the policy dreams of, and what it really gets from the same states."""
    title, labels = "Return: imagined and real", ("steps from the same states", "discounted sum")
    if health.imagined is None or health.real is None:
        axes = Axes(page, at, _PANEL, title, "", labels, (0, 1), (0, 1))
        axes.note("no new sequences to compare with")
        return
    planned = [] if health.came is None else [np.full(1, health.planned), health.came]
    both = np.append(np.concatenate([health.imagined, health.real, *planned]), 0.0)
    span = max(float(both.max() - both.min()), 1e-6)
    gap = float(health.imagined[-1] - health.real[-1])
    words = f"imagined {health.imagined[-1]:.3g}, real {health.real[-1]:.3g}, gap {gap:+.3g}"
    limits = (float(both.min()) - 0.05 * span, float(both.max()) + 0.2 * span)
    axes = Axes(page, at, _PANEL, title, words, labels, (0, len(health.real)), limits)
    axes.frame()
    steps = np.arange(len(health.real) + 1)
    axes.curve(steps, np.append(0.0, health.real), COLORS[0], "real")
    axes.curve(steps, np.append(0.0, health.imagined), COLORS[1], "imagined")
    if health.came is not None and health.planned is not None:
        axes.rule((0, len(health.came)), (health.planned, health.planned), COLORS[2])
        axes.curve(steps[1:], health.came, COLORS[2], "real + critic; line: planned")
