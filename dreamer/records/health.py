"""The health of a world model, in numbers: its predictions compared with what then happened in replayed sequences.

Plain numpy over the output of `Agent.report`. (B, T) are sequences as in replay: a step's reward came with it,
`is_first` begins an episode, `is_last` ends one, and `is_terminal` says that no time limit ended it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dreamer.types import PLANNED

#: A class is dead if its mean probability is below this share of a uniform one, 1 / K.
DEAD = 0.1
#: Ranks at which predictions are split into groups. Narrow at the ends, where rare events are (a reward, an end).
RANKS = (0.01, 0.03, *np.arange(0.1, 0.95, 0.1), 0.97, 0.99)

Arrays = Mapping[str, Any]


class Calibration(NamedTuple):
    """Predictions in groups by rank; for each group its means and its count, (groups,)."""

    predicted: np.ndarray
    observed: np.ndarray
    states: np.ndarray

    @property
    def error(self) -> float:
        """Mean gap between what a group predicts and what happened to it, weighted by its size."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.states))

    @property
    def bias(self) -> float:
        """Mean prediction minus mean observation: above 0, the model promises too much."""
        return float(np.average(self.predicted - self.observed, weights=self.states))


class Latents(NamedTuple):
    """How the S variables of the latent state are used, over all states of a batch."""

    mean: np.ndarray
    """Mean probability of every class, (S, K)."""
    entropy: np.ndarray
    """Mean entropy of a state's posterior, nats (S,)."""
    spread: np.ndarray
    """Entropy of the mean, nats (S,): 0 if it is always the same class, ln K if all are used evenly."""
    dead: np.ndarray
    """Share of the classes that are dead, (S,)."""


class Disagreement(NamedTuple):
    """How far an ensemble disagrees on states, beside how wrong the model is there."""

    curve: np.ndarray
    """Mean (T - T//2,) at each imagined step."""
    seen: float
    """Mean of the steps that were seen."""
    correlation: dict[str, float]
    """With the error of each prediction, over the imagined steps of all sequences; NaN where either never varies."""


@dataclasses.dataclass(frozen=True)
class Health:
    """All figures. Curves and calibrations with nothing to compare are left out or None."""

    curves: dict[str, np.ndarray]
    """Error (T - T//2,) at each imagined step, by name of the prediction: observation keys, reward, cont."""
    seen: dict[str, float]
    """Mean error of the steps that were seen."""
    guess: dict[str, float]
    """Mean error of always predicting the mean."""
    kl: np.ndarray
    free_nats: float
    latents: Latents | None
    calibrations: dict[str, Calibration]
    """reward, cont, value."""
    imagined: np.ndarray | None
    """Mean discounted sum (H,) of the first h imagined rewards, from states of the newest sequences ..."""
    real: np.ndarray | None
    """... and of the real ones that followed the same states."""
    param_norm: dict[str, float]
    planned: float | None = None
    """Mean return that a planner expected in states of the newest sequences, if one acts ..."""
    came: np.ndarray | None = None
    """... and what came of it, (H,): the first h real rewards, and the critic's value of the state after them."""
    disagreement: Disagreement | None = None
    """If there is an ensemble."""

    @np.errstate(invalid="ignore", over="ignore")
    def scalars(self) -> dict[str, float]:
        """What goes into the logs: finite numbers only."""
        values = {f"seen_error/{name}": error for name, error in self.seen.items()}
        values |= {f"imagined_error/{name}": float(np.nanmean(curve)) for name, curve in self.curves.items()}
        values |= {f"guess_error/{name}": error for name, error in self.guess.items()}
        values |= {"kl": float(self.kl.mean()), "kl_free": float((self.kl < self.free_nats).mean())}
        if (latents := self.latents) is not None:
            values |= {"latent_entropy": float(latents.entropy.mean()), "latent_dead": float(latents.dead.mean())}
            values["latent_spread"] = float(latents.spread.mean())
        for name, calibration in self.calibrations.items():
            values |= {f"calibration_error/{name}": calibration.error, f"bias/{name}": calibration.bias}
        if self.imagined is not None and self.real is not None:
            values |= {"imagined_return": float(self.imagined[-1]), "real_return": float(self.real[-1])}
            values["return_gap"] = values["imagined_return"] - values["real_return"]
        if self.planned is not None and self.came is not None:
            values |= {"planned_return": self.planned, "planned_gap_first": self.planned - float(self.came[0])}
            values["planned_gap"] = self.planned - float(self.came[-1])
        if (found := self.disagreement) is not None:
            values |= {"seen_disagreement": found.seen, "imagined_disagreement": float(np.nanmean(found.curve))}
            values |= {f"disagreement_correlation/{name}": value for name, value in found.correlation.items()}
        values |= {f"param_norm/{name}": norm for name, norm in self.param_norm.items()}
        return {name: value for name, value in values.items() if np.isfinite(value)}


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is left out
def measure(
    views: Arrays,
    batch: Arrays,
    newest: tuple[Arrays, Arrays] | None,
    discount: float,
    free_nats: float,
    with_critic: bool = True,
) -> Health:
    """views: `Agent.report` of a batch as trained on; batch: its reward and flags, (B, T+1) as from replay.

    newest: the same two for the newest sequences, collected by the current policy; None if there are none. They give
    the calibration of the value and the returns, which belong to a policy; where a planner acts, the latter also has
    what it planned, `PLANNED`, (B, T+1). discount: gamma. with_critic: whether that includes the critic's part.
    """
    reward, first, last, terminal = flags(batch)
    half = reward.shape[1] // 2
    within = reachable(first, half)
    live = 1.0 - terminal
    errors = {**views["error"], "reward": np.abs(views["open_reward"] - reward)}
    errors["cont"] = np.abs(views["open_cont"] / discount - live)
    guess = {name: float(value) for name, value in views["guess"].items()}
    guess |= {name: float(np.abs(x - x.mean()).mean()) for name, x in (("reward", reward), ("cont", live))}
    curves = {name: masked_mean(error, within)[half:] for name, error in errors.items()}
    calibrations = {
        "reward": calibrate(views["reward"], reward),
        "cont": calibrate(views["cont"] / discount, live),
    }
    imagined = real = planned = came = None
    if newest is not None:
        found, recent = newest
        reward, _, last, terminal = flags(recent)
        returns, known = observed_returns(reward, found["value"], terminal, last, discount)
        if known.any():
            calibrations["value"] = calibrate(found["value"][known], returns[known])
        horizon = min(found["dream_reward"].shape[2], reward.shape[1]) - 1
        followed, known = real_returns(reward, terminal, last, discount, horizon)
        if known.any():
            dreamed = imagined_returns(found["dream_reward"], found["dream_cont"])[..., :horizon]
            imagined, real = dreamed[known].mean(0), followed[known].mean(0)
            if PLANNED in recent:
                planned = float(np.asarray(recent[PLANNED], np.float64)[:, 1:][known].mean())
                rest = values_after(
                    np.asarray(found["value"], np.float64) * with_critic, terminal, last, discount, horizon
                )
                came = (followed + rest)[known].mean(0)
    return Health(
        curves={name: curve for name, curve in curves.items() if np.isfinite(curve).any()},
        seen={name: float(error[:, :half].mean()) for name, error in errors.items()},
        guess=guess,
        kl=np.asarray(views["kl"], np.float64),
        free_nats=free_nats,
        latents=latent_usage(views["probs"]) if "probs" in views else None,
        calibrations=calibrations,
        imagined=imagined,
        real=real,
        param_norm={name: float(norm) for name, norm in views["param_norm"].items()},
        planned=planned,
        came=came,
        disagreement=disagreement(views["disagreement"], errors, within) if "disagreement" in views else None,
    )


def disagreement(found: np.ndarray, errors: Arrays, within: np.ndarray) -> Disagreement:
    """found: the ensemble's (B, T); errors: (B, T) by name; within: the steps (B, T) that can be predicted, of which
    the second half is imagined."""
    half = within.shape[1] // 2
    imagined = within[:, half:]
    x = np.asarray(found, np.float64)
    pairs = {name: (x[:, half:][imagined], np.asarray(error)[:, half:][imagined]) for name, error in errors.items()}
    correlation = {name: _correlation(*pair) for name, pair in pairs.items()}
    return Disagreement(masked_mean(x, within)[half:], float(x[:, :half].mean()), correlation)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, of two vectors."""
    x, y = (z - z.mean() for z in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    sizes = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / sizes) if sizes > 0 else np.nan


def flags(batch: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """reward float64, is_first, is_last, is_terminal bool of the trained steps, (B, T) of (B, T+1)."""
    names = ("is_first", "is_last", "is_terminal")
    first, last, terminal = (np.asarray(batch[name])[:, 1:].astype(bool) for name in names)
    return np.asarray(batch["reward"], np.float64)[:, 1:], first, last, terminal


def reachable(first: np.ndarray, half: int) -> np.ndarray:
    """Which steps (B, T) an open loop from step half - 1 can predict: those seen, and those of the same episode."""
    later = np.cumsum(first[:, half:], 1) == 0
    return np.concatenate([np.ones((len(first), half), bool), later], 1)


def masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the sequences where `mask` is true: (B, T) -> (T,); NaN where no sequence is left."""
    count = mask.sum(0)
    total = np.where(mask, np.asarray(values, np.float64), 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def latent_usage(probs: np.ndarray) -> Latents:
    """The usage of latents, from posterior probabilities (B, T, S, K)."""
    flat = np.asarray(probs, np.float64).reshape(-1, *probs.shape[-2:])
    mean = flat.mean(0)
    dead = (mean < DEAD / mean.shape[1]).mean(1)
    return Latents(mean, _entropy(flat).mean(0), _entropy(mean), dead)


def calibrate(predicted: np.ndarray, observed: np.ndarray) -> Calibration:
    """Groups of predictions by rank, each with its mean and the mean of what was observed.

    Equal predictions stay together; those that span a rank form a group of their own.
    """
    predicted, observed = (np.asarray(x, np.float64).reshape(-1) for x in (predicted, observed))
    edges = np.unique(np.quantile(predicted, RANKS))
    group = np.searchsorted(edges, predicted, "left") + np.searchsorted(edges, predicted, "right")
    count = np.bincount(group)
    used = count > 0
    means = [(np.bincount(group, weights=x)[used] / count[used]) for x in (predicted, observed)]
    return Calibration(means[0], means[1], count[used])


def observed_returns(
    reward: np.ndarray, value: np.ndarray, terminal: np.ndarray, last: np.ndarray, discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """(discounted returns (B, T) after each step, which of them are known).

    Gₜ = rₜ₊₁ + γ(1-terminalₜ₊₁)Gₜ₊₁ with the real rewards to the end of the episode. Where a time limit or the end of
    the sequence cuts it short, the critic's value there stands for the rest. Returns are known for the first half,
    where at least T/2 real rewards or an end of the episode follow; a last step has none.
    """
    returns = np.asarray(value, np.float64).copy()
    for t in range(reward.shape[1] - 2, -1, -1):
        rest = np.where(last[:, t + 1], value[:, t + 1], returns[:, t + 1])
        returns[:, t] = reward[:, t + 1] + discount * ~terminal[:, t + 1] * rest
    known = ~last
    known[:, max(1, reward.shape[1] // 2) :] = False
    return returns, known


def imagined_returns(reward: np.ndarray, cont: np.ndarray) -> np.ndarray:
    """Sums (..., H) of the first h imagined rewards: Σₖ₌₁..ₕ (c₁ ... cₖ₋₁) rₖ, from (..., H+1), which begins with the
    state itself. c includes gamma.
    """
    reward, cont = np.asarray(reward, np.float64), np.asarray(cont, np.float64)
    weight = np.cumprod(np.concatenate([np.ones_like(cont[..., :1]), cont[..., 1:-1]], -1), -1)
    return np.cumsum(weight * reward[..., 1:], -1)


def real_returns(
    reward: np.ndarray, terminal: np.ndarray, last: np.ndarray, discount: float, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """(sums (B, T, H) of the first h real rewards after each step, for which steps (B, T) they are known).

    Σₖ₌₁..ₕ γᵏ⁻¹ rₜ₊ₖ, nothing after a terminal step. Unknown where a time limit or the end of the sequence comes within
    the H steps, and for last steps.
    """
    count, length = reward.shape
    sums, known = np.zeros((count, length, horizon)), np.zeros((count, length), bool)
    for t in range(length - 1):
        alive, whole, total = ~last[:, t], ~last[:, t], np.zeros(count)
        for k in range(1, horizon + 1):
            if t + k < length:
                total = total + np.where(alive, discount ** (k - 1) * reward[:, t + k], 0)
                ended = alive & last[:, t + k]
                whole = whole & ~(ended & ~terminal[:, t + k] & (k < horizon))
                alive = alive & ~last[:, t + k]
            else:
                whole = whole & ~alive
            sums[:, t, k - 1] = total
        known[:, t] = whole
    return sums, known


def values_after(
    value: np.ndarray, terminal: np.ndarray, last: np.ndarray, discount: float, horizon: int
) -> np.ndarray:
    """γʰ v(sₜ₊ₕ), (B, T, H): what the critic (B, T) expects after the first h steps; 0 where the episode has ended
    for good by then, and where the sequence ends (`real_returns` says which sums are known)."""
    found = np.zeros((*value.shape, horizon))
    for t in range(value.shape[1] - 1):
        going = ~last[:, t]
        for k in range(1, min(horizon, value.shape[1] - 1 - t) + 1):
            found[:, t, k - 1] = np.where(going & ~terminal[:, t + k], discount**k * value[:, t + k], 0)
            going = going & ~last[:, t + k]
    return found


def _entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, nats."""
    return -(probs * np.log(np.maximum(probs, 1e-30))).sum(-1)
