"""Checkpoints of a run: which exist, which are kept, and how writing overlaps with training.

Layout of a logdir::

    checkpoints/000000012000/    one snapshot per saved agent step, see `snapshot.py`
    best/000000000003/           weights of the best evaluation
    replay/                      chunk files of the replay, shared by all checkpoints

`save` copies the state before it returns (the next update may donate its buffers) and writes it in one
background thread; errors there surface at the next call as a CheckpointError.
"""

from __future__ import annotations

import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dreamer.paths import absolute
from dreamer.replay import ReplayError, prune
from dreamer.saves import snapshot
from dreamer.saves.snapshot import CheckpointError, CheckpointMismatchError, DamagedCheckpointError

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWarning",
    "Checkpointer",
    "DamagedCheckpointError",
]


#: Step, tree of arrays, meta data.
Restored = tuple[int, Any, dict[str, Any]]
_NAME = re.compile(r"(\d{12})(?:\.(\d+))?")
#: How often a read-only checkpointer tries again when a live run has deleted what it was reading.
_LOOKS = 5


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped; the message names it."""


class SavableReplay(Protocol):
    """What a checkpoint needs of the replay: write what is new, return a JSON-able manifest of the whole."""

    def save(self, folder: Path) -> dict[str, Any]: ...


class _Entry(NamedTuple):
    """A snapshot folder; `generation` counts repeated saves of the same step."""

    step: int
    generation: int
    folder: Path


class Checkpointer:
    """Saves and restores a run's state under its logdir.

    Open it for writing only while holding the logdir's lock. With `read_only` nothing is written, renamed
    or deleted, and a run that is still training may keep writing meanwhile.
    """

    def __init__(
        self, logdir: Path | str, keep: int = 2, milestone_every: int | None = None, read_only: bool = False
    ) -> None:
        """keep: newest checkpoints kept. milestone_every: agent steps; the first checkpoint in each is never
        removed."""
        if keep < 1:
            raise ValueError(f"expected to keep at least one checkpoint, got keep={keep}")
        self.logdir = absolute(logdir)
        self._keep, self._milestone_every, self._read_only = keep, milestone_every, read_only
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._verified: dict[Path, dict[str, Any]] = {}  # manifests
        if not read_only:
            self._clear_leftovers()

    @property
    def replay_folder(self) -> Path:
        return self.logdir / "replay"

    @property
    def _folder(self) -> Path:
        return self.logdir / "checkpoints"

    @property
    def _best_folder(self) -> Path:
        return self.logdir / "best"

    # Saving

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        replay: SavableReplay | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Saves `state` (pytree of arrays) and `meta` (JSON values, numpy arrays) as the checkpoint of `step`.

        files: further contents by name; read them in the `check` of `restore` (`snapshot.read_file`).
        Returns when the state is copied and the replay's new transitions are written; the rest happens in the
        background. Waits for a save that is still running; if that one failed, its CheckpointError is raised once this
        save is under way. The manifest of the replay comes back from `restore` as `meta["replay"]`.
        """
        failure = self._begin()
        leaves = snapshot.to_host(state)
        meta = dict(meta)
        if replay is not None:
            try:
                meta["replay"] = replay.save(self.replay_folder)
            except OSError as error:
                raise CheckpointError(self._failure(f"checkpoint {step}: replay", error)) from error
        self._start(f"checkpoint {step}", lambda: self._write(step, leaves, meta, files), failure)

    def save_best(self, score: float, params: Any, meta: Mapping[str, Any]) -> None:
        """Saves the weights of the best evaluation so far in place of the previous best. As `save`."""
        failure = self._begin()
        leaves, meta = snapshot.to_host(params), {**meta, "score": float(score)}
        self._start(f"best weights (score {score:g})", lambda: self._write_best(leaves, meta), failure)

    def poll(self) -> bool:
        """Whether no save is running; raises the CheckpointError of a failed one. Never waits."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Waits until everything is on disk; raises the CheckpointError of a failed save."""
        if (failure := self._settle()) is not None:
            raise failure

    close = wait

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()

    # Finding and restoring

    def steps(self) -> list[int]:
        """Agent steps of all checkpoints, oldest first, damaged ones included."""
        return sorted({entry.step for entry in _entries(self._folder)})

    def latest(self) -> int | None:
        """Agent step of the newest checkpoint; None: there is none."""
        return max(self.steps(), default=None)

    def restore(
        self,
        template: Any = None,
        step: int | None = None,
        parts: Iterable[str] | None = None,
        check: Callable[[dict[str, Any], Path], None] | None = None,
    ) -> Restored:
        """The newest intact checkpoint, or that of `step`: (agent step, tree of numpy arrays, meta).

        template  Tree with the expected structure, shapes and dtypes; None: nested dicts as saved.
        parts     Top-level keys of the state to read; None: all.
        check     Called with the meta data and the snapshot's folder, to load the replay for example; if it raises
                  ReplayError, OSError or DamagedCheckpointError, this checkpoint counts as damaged.

        Damaged checkpoints are skipped with a CheckpointWarning and, unless read-only, set aside under another
        name. Raises CheckpointMismatchError if an intact one does not fit the template, CheckpointError if none
        is left.
        """
        self.wait()

        def load(entry: _Entry) -> Restored:
            tree, meta = self._read(entry.folder, template, parts)
            if check is not None:
                check(meta, entry.folder)
            return entry.step, tree, meta

        return self._newest_intact(self._folder, load, step)

    def restore_best(self, template: Any = None) -> tuple[float, Any, dict[str, Any]]:
        """The weights of the best evaluation: (score, tree, meta). CheckpointError if there are none."""
        self.wait()
        load = lambda entry: (entry.step, *self._read(entry.folder, template))  # noqa: E731
        _, tree, meta = self._newest_intact(self._best_folder, load)
        return meta["score"], tree, meta

    def best_score(self) -> float | None:
        """Score of the best evaluation whose weights are kept; None: there is none."""
        self.wait()
        entries = _entries(self._best_folder)
        return snapshot.read_meta(entries[-1].folder)["score"] if entries else None

    def forget_best_after(self, agent_steps: int) -> None:
        """Sets aside best weights of a later step: the run continues from before them."""
        self.wait()
        for entry in _entries(self._best_folder):
            if snapshot.read_meta(entry.folder).get("agent_steps", 0) > agent_steps:
                _set_aside(entry.folder, "abandoned")

    def _read(self, folder: Path, template: Any, parts: Iterable[str] | None = None) -> tuple[Any, dict[str, Any]]:
        """As `snapshot.read`. Files that only this object may change are verified once between two saves."""
        manifest = self._verified.get(folder) or snapshot.verify(folder)
        if not self._read_only:
            self._verified[folder] = manifest
        return snapshot.read(folder, manifest, template, parts)

    def _newest_intact(self, folder: Path, load: Callable[[_Entry], Restored], step: int | None = None) -> Restored:
        for _ in range(_LOOKS):
            entries = [e for e in reversed(_entries(folder)) if step is None or e.step == step]
            if not entries:
                break
            damaged: list[tuple[_Entry, Exception]] = []
            for entry in entries:
                try:
                    result = load(entry)
                except (DamagedCheckpointError, ReplayError, OSError) as error:
                    damaged.append((entry, error))
                    continue
                for skipped, reason in damaged:
                    self._skip(skipped, reason)
                return result
            # A live run may have replaced what was listed here by newer ones.
            if not (self._read_only and any(not e.folder.exists() for e, _ in damaged)):
                reasons = "\n  ".join(str(reason) for _, reason in damaged)
                raise CheckpointError(f"every checkpoint in {folder} is damaged:\n  {reasons}\nUse another --logdir.")
        known = ", ".join(str(s) for s in sorted({e.step for e in _entries(folder)}))
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        found = known or "none; a run saves every run.checkpoint_every, and when it is asked to stop"
        raise CheckpointError(f"expected {wanted} in {folder}, found {found}")

    def _skip(self, entry: _Entry, reason: Exception) -> None:
        aside = "" if self._read_only else f"; set aside as {_set_aside(entry.folder, 'damaged')}"
        text = f"checkpoint {entry.folder.name} is damaged and was skipped for the one before it ({reason}){aside}"
        warnings.warn(text, CheckpointWarning, stacklevel=4)

    def _begin(self) -> CheckpointError | None:
        if self._read_only:
            raise CheckpointError(f"{self.logdir} was opened read-only; nothing can be saved there")
        self._verified.clear()
        return self._settle()

    def _settle(self) -> CheckpointError | None:
        """Waits for the running save; returns its error, if any, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._error = self._error, None
        return failure

    def _start(self, what: str, write: Callable[[], None], failure: CheckpointError | None) -> None:
        def work() -> None:
            try:
                write()
            except BaseException as error:  # Any error belongs to the thread that asked for the save.
                self._error = CheckpointError(self._failure(what, error))
                self._error.__cause__ = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        if failure is not None:
            raise failure

    def _failure(self, what: str, error: BaseException) -> str:
        return (
            f"{what} could not be written to {self.logdir}: {type(error).__name__}: {error}\n"
            "Earlier checkpoints are untouched; check the free space and permissions there."
        )

    # In the background thread

    def _write(
        self, step: int, leaves: snapshot.Leaves, meta: dict[str, Any], files: Mapping[str, bytes] | None
    ) -> None:
        entries = _entries(self._folder)
        generation = max((e.generation + 1 for e in entries if e.step == step), default=0)
        folder = self._folder / (f"{step:012d}" + (f".{generation}" if generation else ""))
        snapshot.write(folder, leaves, meta, files)
        for entry in entries:
            if entry.step > step:  # The run went back to an earlier checkpoint: this future never happened.
                _set_aside(entry.folder, "abandoned")
        self._prune()

    def _write_best(self, leaves: snapshot.Leaves, meta: dict[str, Any]) -> None:
        former = _entries(self._best_folder)
        number = former[-1].step + 1 if former else 0
        snapshot.write(self._best_folder / f"{number:012d}", leaves, meta)
        for entry in former:
            snapshot.remove(entry.folder)

    def _prune(self) -> None:
        """Deletes the checkpoints that need not be kept, then the replay files that none of the others name."""
        latest = {entry.step: entry for entry in _entries(self._folder)}
        keep = set(sorted(latest)[-self._keep :]) | self._milestones(latest)
        for entry in _entries(self._folder):
            if entry.step not in keep or entry != latest[entry.step]:
                snapshot.remove(entry.folder)
        try:
            manifests = [snapshot.read_meta(latest[step].folder).get("replay") for step in sorted(keep)]
        except DamagedCheckpointError:
            return  # Which files this checkpoint needs is unknown, so all of them stay.
        if manifests[-1] is None:
            return  # Saved without the replay, which says nothing about its files.
        prune(self.replay_folder, [manifest for manifest in manifests if manifest is not None])

    def _milestones(self, steps: Iterable[int]) -> set[int]:
        if self._milestone_every is None:
            return set()
        first: dict[int, int] = {}
        for step in sorted(steps):
            first.setdefault(step // self._milestone_every, step)
        return {step for index, step in first.items() if index > 0}

    def _clear_leftovers(self) -> None:
        for folder in (self._folder, self._best_folder):
            for partial in sorted(folder.glob(f"{snapshot.PARTIAL}*")):
                name = partial.name.removeprefix(snapshot.PARTIAL)
                text = f"checkpoint {name} in {folder} was interrupted while it was written; the one before it is used"
                warnings.warn(text, CheckpointWarning, stacklevel=3)
                shutil.rmtree(partial)
            for trash in folder.glob(f"{snapshot.TRASH}*"):
                shutil.rmtree(trash)


def _entries(folder: Path) -> list[_Entry]:
    """Snapshot folders by step, then generation."""
    try:
        matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"expected a folder of checkpoints in {folder}, got: {error.strerror}") from error
    return sorted(_Entry(int(m[1]), int(m[2] or 0), path) for m, path in matches if m)


def _set_aside(folder: Path, why: str) -> str:
    """Renames a snapshot that must no longer be found; it is left for a person to delete."""
    name, number = f"{why}-{folder.name}", 1
    while (folder.parent / name).exists():
        number += 1
        name = f"{why}-{folder.name}-{number}"
    folder.rename(folder.parent / name)
    return name
