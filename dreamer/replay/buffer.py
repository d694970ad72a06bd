"""The replay buffer: steps go in, sequences come out, latents are written back.

One ring per environment; `ring.py` says what a row is. A sequence is one context step, whose stored latent starts the
recurrence, followed by T trained steps::

    index      0    1    2   ...   T
    role       c    t    t         t         gather returns all 1 + T, write takes values of the T trained ones

It stays within one environment and never crosses the write position; it may span ends of episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import SelectionConfig
from dreamer.replay.memory import Fields, Kind, budget, bytes_per_step, latents_of
from dreamer.replay.persistence import check_manifest, describe
from dreamer.replay.ring import ReplayError, Ring
from dreamer.replay.selection import Selection, Selector, landing
from dreamer.replay.storage import SlotStorage, make_storage
from dreamer.types import LOG_PREFIX

#: Most stretches waiting in the online queue, or four per environment if that is more.
LONGEST_QUEUE = 256
_COUNTERS = ("inserts", "sequences", "online", "written", "write_dropped")


class Replay:
    """N rings of steps.

    fields        What a step consists of; `write` may change the latents among them.
    num_envs      N.
    capacity      Steps kept over all environments; each keeps capacity // N.
    length        1 + T, the context step and the trained ones.
    seed          The run's seed; selection derives its own random stream from it.
    online        Serve each new stretch of data once, ahead of other sequences.
    selection     The mixture to draw from after the online queue; None: uniform.
    storage       Where the steps are kept.
    folder        Disk storage: where its files are, and the only place where it can be saved.
    device_bytes  Device storage: its free memory; None: it has no memory of its own.

    `budget` says what the storage needs in memory, on disk and on the device, and what is available.

    ReplayError if the capacity is too small for one sequence or too large for what the machine has.
    """

    def __init__(
        self,
        fields: Fields,
        num_envs: int,
        capacity: int,
        length: int,
        seed: int,
        online: bool = True,
        selection: SelectionConfig | None = None,
        storage: Kind = "host",
        folder: Path | None = None,
        device_bytes: int | None = None,
    ):
        rows = capacity // num_envs
        if length < 2:
            raise ReplayError(f"expected a length of at least 2 (a context and a trained step), got {length}")
        if rows < length:
            raise ReplayError(
                f"expected a capacity of at least {num_envs * length} steps ({num_envs} environments times a sequence"
                f" of {length}), got {capacity}; raise --replay.capacity or lower --run.batch_length"
            )
        if objects := [name for name, field in fields.items() if field.dtype.hasobject]:
            raise ReplayError(f"expected fields of plain numbers, got Python objects in {objects}")
        self.fields = dict(fields)
        self.length = length
        self._latents = latents_of(self.fields)
        self._ring = Ring(num_envs, rows)
        self.budget = budget(storage, self.fields, folder, device_bytes)
        self.budget.check(num_envs * rows)
        self.storage = make_storage(storage, self.fields, self._ring, folder)
        limit = max(LONGEST_QUEUE, 4 * num_envs) if online else None
        self._selector = Selector(self._ring, length, seed, limit, selection or SelectionConfig())
        self._marks: set[tuple[int, int]] = set()  # (env, row) of stored steps that were marked as last
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._all = np.arange(num_envs)

    @property
    def num_envs(self) -> int:
        return self._ring.num_envs

    @property
    def capacity(self) -> int:
        """Steps kept over all environments: the capacity asked for, rounded down to a multiple of N."""
        return self._ring.num_envs * self._ring.rows

    @property
    def nbytes_per_step(self) -> int:
        return bytes_per_step(self.fields)

    @property
    def nbytes(self) -> int:
        """Bytes of all steps at capacity. Fewer are in use before the rings are full."""
        return self.capacity * self.nbytes_per_step

    def __len__(self) -> int:
        """Stored steps over all environments."""
        return len(self._ring)

    @property
    def starts(self) -> int:
        """Number of positions at which a whole sequence starts."""
        return int(self._ring.starts(self.length).sum())

    def add(self, step: Mapping[str, np.ndarray], envs: Sequence[int] | None = None) -> None:
        """Append one step of each environment: (N, ...) per field, copied. Keys that begin with `log/` are left out.

        envs  Distinct environments that the entries belong to, if not all N in order.

        ReplayError if a field is missing, unknown, or of another shape or kind.
        """
        ids = self._all if envs is None else np.asarray(envs, np.int64)
        if envs is not None and (len(np.unique(ids)) < len(ids) or not np.isin(ids, self._all).all()):
            raise ReplayError(f"expected distinct environments among {self.num_envs}, got {ids.tolist()}")
        values = {name: np.asarray(value) for name, value in step.items() if not name.startswith(LOG_PREFIX)}
        if values.keys() != self.fields.keys():
            raise ReplayError(
                f"expected a step with the fields {sorted(self.fields)}, got {sorted(values)}"
                f" (missing {sorted(self.fields.keys() - values)}, unknown {sorted(values.keys() - self.fields)})"
            )
        for name, value in values.items():
            self._check_value(name, value, (len(ids),))
        self.storage.add(ids, self._ring.head[ids], values)
        self._ring.head[ids] += 1
        self._selector.update(ids)
        self._counters["inserts"] += len(ids)

    def select(self, batch: int) -> Selection:
        """Positions of `batch` sequences (B), from the online queue first, then from the mixture.

        ReplayError if no environment holds a whole sequence yet.
        """
        selection = self._selector.select(batch)
        self._counters["sequences"] += len(selection)
        self._counters["online"] += int(selection.online.sum())
        return selection

    def newest(self, batch: int) -> Selection | None:
        """The newest `batch` sequences (B), those of an environment end to end; None if there are fewer.

        For inspection, not for training: nothing is drawn or counted.
        """
        order = np.arange(batch)
        env = order % self.num_envs
        row = self._ring.head[env] - 1 - (order // self.num_envs + 1) * (self.length - 1)
        if (row < self._ring.tail[env]).any():
            return None
        return Selection(env, row, np.zeros(batch, bool), self.length)

    def gather(self, selection: Selection) -> dict[str, np.ndarray]:
        """The steps of a selection: fresh arrays (B, 1 + T, ...) of every field.

        ReplayError if one of them was overwritten since it was selected.
        """
        self._check_alive(selection)
        return self.storage.gather(selection.env, selection.row, selection.length)

    def write(self, selection: Selection, values: Mapping[str, np.ndarray]) -> int:
        """Replace latents of the trained steps of a selection by `values` (B, T, ...). Returns how many steps changed.

        Steps that were overwritten since are left alone. Where sequences overlap, the later one in the batch wins.
        A value "priority" (B, T) goes to `prioritize`.
        """
        if "priority" in values:
            self.prioritize(selection, values["priority"])
            values = {name: value for name, value in values.items() if name != "priority"}
        if unknown := sorted(values.keys() - set(self._latents)):
            raise ReplayError(f"expected latents among {list(self._latents)}, got {unknown}")
        arrays = {name: np.asarray(value) for name, value in values.items()}
        for name, value in arrays.items():
            self._check_value(name, value, (len(selection), selection.length - 1))
        source = self._landing(selection)
        env = np.repeat(selection.env, selection.length - 1)[source]
        flat = {name: value.reshape(-1, *self.fields[name].shape)[source] for name, value in arrays.items()}
        self.storage.put(env, selection.rows[:, 1:].reshape(-1)[source], flat)
        return len(source)

    def slots(self, selection: Selection) -> np.ndarray:
        """Where device storage holds a selection: int32 (B, 1 + T), for `device.gather`.

        ReplayError if one of them was overwritten since it was selected.
        """
        self._check_alive(selection)
        return self._ring.slots(selection.env[:, None], selection.rows).astype(np.int32)

    def write_slots(self, selection: Selection) -> np.ndarray:
        """Where the latents of a selection go in device storage: int32 (B, T), for `device.write`, which must follow.

        Steps that were overwritten since, or that a later sequence of the batch has too, get slots beyond the end.
        """
        assert isinstance(self.storage, SlotStorage), "only storages in memory are addressed by slots"
        source = self._landing(selection)
        slots = np.full(len(selection) * (selection.length - 1), self.capacity, np.int32)
        slots[source] = self._ring.slots(selection.env[:, None], selection.rows[:, 1:]).reshape(-1)[source]
        self.storage.touch(slots[source])
        return slots.reshape(len(selection), -1)

    def _landing(self, selection: Selection) -> np.ndarray:
        """`landing` of a selection; overwritten steps are counted."""
        source, dropped = landing(self._ring, selection)
        self._counters["written"] += len(source)
        self._counters["write_dropped"] += dropped
        return source

    @property
    def prioritised(self) -> bool:
        """Whether priorities are used."""
        return self._selector.priorities is not None

    def prioritize(self, selection: Selection, values: np.ndarray) -> None:
        """Set the priorities of a selection's sequences to the mean of `values` (B, T) over their trained steps.

        Sequences that were overwritten since are left alone; negative means count as 0. ReplayError if values are not
        finite, or if no fraction of the mixture is prioritised.
        """
        if self._selector.priorities is None:
            raise ReplayError("expected no priorities: no fraction is prioritised; set --replay.selection.prioritised")
        values = np.asarray(values, np.float64)
        if values.shape != (expected := (len(selection), selection.length - 1)):
            raise ReplayError(f"expected priorities of shape {expected}, got {values.shape}")
        self._selector.priorities.prioritize(selection.env, selection.row, values.mean(1))

    def stats(self) -> dict[str, float]:
        """What the log shows under `replay/`; counts are since the beginning of the run, across resumes."""
        counters, queue = self._counters, self._selector.queue
        trained = counters["sequences"] * (self.length - 1)
        return {
            "items": float(len(self)),
            "fill": len(self) / self.capacity,
            **{name: float(counters[name]) for name in ("inserts", "sequences", "written", "write_dropped")},
            "ratio": trained / max(counters["inserts"], 1),
            "online_served": float(counters["online"]),
            "online_waiting": float(0 if queue is None else len(queue)),
            "online_dropped": float(0 if queue is None else queue.dropped),
            "gigabytes": len(self) * self.nbytes_per_step / 1e9,
        }

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what is new since the last save into `folder`. Returns a manifest for `load`, JSON-able.

        OSError if the disk fails; saving may be tried again.
        """
        tail = self._ring.tail
        self._marks = {(env, row) for env, row in self._marks if row >= tail[env]}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        selector = self._selector.save(folder)
        files = self.storage.save(folder)
        return {
            **describe(self.fields, self.num_envs),
            "length": self.length,
            "head": self._ring.head.tolist(),
            "tail": self._ring.tail.tolist(),
            **files,
            "marks": sorted([env, row] for env, row in self._marks),
            "selector": selector,
            "counters": dict(self._counters),
        }

    def load(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Become the buffer that `manifest` describes, bit for bit: content, counters, random stream, online queue.

        The capacity may differ; a smaller ring keeps the newest steps. If the length differs, the online queue starts
        with the data to come. ReplayError if fields or number of environments differ or a file is missing, truncated
        or corrupted; the buffer is then empty, and another manifest can be loaded.
        """
        self.clear()
        try:
            self._load(Path(folder), manifest)
        except (KeyError, TypeError, ValueError) as error:
            self.clear()
            raise ReplayError(f"the replay manifest is damaged ({error!r}); use an older checkpoint") from error
        except BaseException:
            self.clear()
            raise

    def abandon(self, envs: Sequence[int]) -> None:
        """The newest step of each of these environments becomes its episode's last, not terminal: no step follows."""
        for env in envs:
            if self._ring.head[env] > self._ring.tail[env]:
                self._mark_last(env, self._ring.head[env : env + 1] - 1)

    def close_open_episodes(self) -> int:
        """Abandon all open episodes. Returns how many steps were marked as last.

        For a run that continues after `load`, whose environments start over.
        """
        marked = 0
        for env, (tail, head) in enumerate(zip(self._ring.tail, self._ring.head, strict=True)):
            rows = np.arange(tail, head)
            first, last = (self.storage.take(name, env, rows) for name in ("is_first", "is_last"))
            begins_next = np.append(first[1:], True)[: len(first)]
            cut = rows[begins_next & ~last]
            self._mark_last(env, cut)
            marked += len(cut)
        return marked

    def _mark_last(self, env: int, rows: np.ndarray) -> None:
        self.storage.mark_last(env, rows)
        self._marks.update((int(env), row) for row in rows.tolist())

    def clear(self) -> None:
        """Forget all steps and counts. The random stream continues, and files on disk stay."""
        self._ring.reset()
        self.storage.clear()
        self._marks.clear()
        self._selector.clear()
        self._counters = dict.fromkeys(_COUNTERS, 0)

    def _load(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        check_manifest(manifest, self.fields, self.num_envs)
        head = np.array(manifest["head"], np.int64)
        tail = np.maximum(np.array(manifest["tail"], np.int64), head - self._ring.rows)
        counters = {name: int(manifest["counters"][name]) for name in _COUNTERS}
        self.storage.load(folder, manifest, head, tail)
        self._ring.reset(head, tail)
        for env, row in manifest["marks"]:
            if row >= tail[env]:
                self._mark_last(env, np.array([row]))
        self._selector.load(folder, manifest["selector"])
        self._counters = counters

    def _check_alive(self, selection: Selection) -> None:
        if not self._ring.alive(selection.env[:, None], selection.rows).all():
            raise ReplayError("expected a selection that is still stored, got overwritten steps; gather before adding")

    def _check_value(self, name: str, value: np.ndarray, leading: tuple[int, ...]) -> None:
        field = self.fields[name]
        expected = (*leading, *field.shape)
        if value.shape != expected:
            raise ReplayError(f"expected {name!r} of shape {expected}, got {value.shape}")
        if value.dtype != field.dtype and not np.can_cast(value.dtype, field.dtype, "same_kind"):
            raise ReplayError(f"expected {name!r} of dtype {field.dtype}, got {value.dtype}; convert it before")
