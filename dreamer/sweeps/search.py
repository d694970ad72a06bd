"""Search that learns from the scores of earlier runs, by Optuna. Its state is in the sweep's folder."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.schema import ConfigError
from dreamer.sweeps.expand import PlannedRun, check_tasks, draw, drawn_variant, plan_run
from dreamer.sweeps.progress import FAILED
from dreamer.sweeps.scheduler import RunEntry
from dreamer.sweeps.spec import Sweep
from dreamer.sweeps.views import LAST

JOURNAL = "search.log"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"search needs optuna ({error}); install it with `pip install 'dreamer[optuna]'`") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Search:
    """A source of runs: each trial is one choice of options, run once for each seed; its score is the mean of their
    final scores, higher is better."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        assert sweep.search is not None
        self._optuna = _optuna()
        self._sweep, self._folder, self._drawn = sweep, folder, sweep.search
        self._queue: collections.deque[RunEntry] = collections.deque()
        self._trials: dict[int, list[RunEntry]] = {}
        # Planning one that the sampler may choose shows mistakes in the file before anything starts.
        check_tasks([self._plan(0, draw(self._drawn, 0), sweep.seeds[0])])

    @functools.cached_property
    def _study(self) -> Any:
        optuna = self._optuna
        self._folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(self._folder / JOURNAL))
        study = optuna.create_study(
            study_name=self._sweep.name,
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize",
            load_if_exists=True,
        )
        # A sampler restarted with the same seed would repeat itself; it takes 32 bits.
        study.sampler = optuna.samplers.TPESampler(seed=(self._drawn.seed + len(study.trials)) % 2**32)
        return study

    def _plan(self, number: int, values: Mapping[str, Any], seed: int) -> PlannedRun:
        return plan_run(self._sweep, (drawn_variant(self._drawn, f"trial{number:03d}", values),), seed, self._folder)

    def _entries(self, number: int, params: Mapping[str, Any]) -> list[RunEntry]:
        draws = self._drawn.draws
        values = {n: d.values[params[n]] if d.kind == "choice" else params[n] for n, d in draws.items()}
        entries = [RunEntry(self._plan(number, values, seed)) for seed in self._sweep.seeds]
        self._trials[number] = entries
        return entries

    def begun(self) -> list[RunEntry]:
        """The runs of all trials so far."""
        found: list[RunEntry] = []
        for trial in self._study.trials:
            found += self._entries(trial.number, self._params(trial))
            self._judge(trial.number)
        return found

    def _params(self, trial: Any) -> dict[str, Any]:
        """The options of a stored trial."""
        if set(trial.params) == set(self._drawn.draws):
            return dict(trial.params)
        raise ConfigError(
            f"{self._folder / JOURNAL}: trial {trial.number} has other options ({', '.join(trial.params) or 'none'}) "
            f"than the file; give the old ones or another --logdir"
        )

    def next(self) -> RunEntry | None:
        """The next run, of a trial that has begun or of a new one."""
        if not self._queue:
            if len(self._study.trials) >= self._drawn.count:
                return None
            trial = self._study.ask(self._spaces())
            self._queue += self._entries(trial.number, trial.params)
        return self._queue.popleft()

    def told(self, entry: RunEntry) -> None:
        """A run is over: once all runs of its trial are, the search learns their score."""
        for number, entries in self._trials.items():
            if entry in entries:
                self._judge(number)

    def _judge(self, number: int) -> None:
        entries, states = self._trials[number], self._optuna.trial.TrialState
        if self._study.trials[number].state.is_finished() or not all(entry.over for entry in entries):
            return
        scores = [entry.progress.score(share=LAST) for entry in entries]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores) or any(entry.state.status == FAILED for entry in entries):
            self._study.tell(number, state=states.FAIL)
        else:  # also if a run was stopped early: its score until then says enough
            self._study.tell(number, float(np.mean(known)))

    def _spaces(self) -> dict[str, Any]:
        """The spaces of all options, asked at once so that no trial is ever stored with only some of them."""
        return {
            name: d.distribution.space(self._optuna.distributions, d.values) for name, d in self._drawn.draws.items()
        }
