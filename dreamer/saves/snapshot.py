"""One checkpoint on disk: written whole or not at all, and checked byte for byte on reading.

A snapshot is a folder::

    state/           the arrays, written by orbax as one flat dict {"params.encoder.kernel": array, ...}
    meta.json        whatever else the caller wants back: counters, generator states, manifests
    files/           further files of the caller, bytes
    manifest.json    path, shape and dtype of every array; size and checksum of every file above,
                     and of this one

It is built under a hidden name and becomes valid by one last rename.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dreamer.paths import make_durable

FORMAT = 3
#: Prefix of folders that are being written; a leftover one was interrupted.
PARTIAL = ".partial-"
#: Prefix of folders that are being deleted.
TRASH = ".trash-"

#: Arrays that earlier programs of the same format stored elsewhere: the beginning of their path, then and now.
_MOVED = {("slow_value",): ("slow", "value")}
_SHOWN_DIFFERENCES = 8
#: Paths that are safe for orbax: it puts them into patterns, where [ ] * ? match other names, and into JSON.
_PLAIN = re.compile(r"[A-Za-z0-9/._+=,@:~-]+")

Leaves = dict[tuple[str | int, ...], np.ndarray]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the message says which and what to do."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, cut short or changed."""


class CheckpointMismatchError(CheckpointError):
    """An intact checkpoint holds other arrays than the caller expects. `differences`: one line each."""

    def __init__(self, folder: Path, differences: Sequence[str]) -> None:
        self.differences = list(differences)
        shown = "\n  ".join(self.differences[:_SHOWN_DIFFERENCES])
        more = len(self.differences) - _SHOWN_DIFFERENCES
        rest = f"\n  and {more} more" if more > 0 else ""
        super().__init__(
            f"checkpoint {folder} does not fit this model, {len(self.differences)} arrays differ:\n  {shown}{rest}\n"
            "Use the options the run was started with (its config.yaml), or another --logdir."
        )


def flatten(tree: Any) -> Leaves:
    """Arrays of a pytree by path. Dict keys may be strings or integers; joined by dots, paths must be unique."""
    leaves: Leaves = {}
    names: set[str] = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = tuple(_key(k) for k in keys)
        if _name(path) in names:
            raise CheckpointError(f"expected array paths that differ when joined by dots, {_name(path)} comes twice")
        names.add(_name(path))
        leaves[path] = leaf
    return leaves


def to_host(tree: Any) -> Leaves:
    """Copies of all arrays of a tree, in host memory: nothing the caller does later reaches them."""
    leaves = flatten(tree)
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise CheckpointError(
                f"expected raw uint32 key data, {_name(path)} is a typed key: use jax.random.key_data"
            )
    host = jax.device_get(list(leaves.values()))
    # What came from an accelerator is already fresh memory; on the CPU it may still be the donated buffer itself.
    fresh = [isinstance(x, jax.Array) and all(d.platform != "cpu" for d in x.devices()) for x in leaves.values()]
    return {p: np.asarray(h) if f else np.array(h) for (p, f, h) in zip(leaves, fresh, host, strict=True)}


def write(folder: Path, leaves: Leaves, meta: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
    """Writes a snapshot to `folder`, which must not exist; it appears there complete or not at all."""
    partial = folder.with_name(PARTIAL + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # Orbax refuses arrays without elements; the manifest alone says everything about them.
        stored = {_name(p): a for p, a in leaves.items() if a.size}
        if stored:
            with _orbax() as saver, _plainly_named(partial) as place:
                saver.save(place / "state", args=ocp.args.PyTreeSave(stored))
        (partial / "meta.json").write_text(json.dumps(meta, default=_encode), encoding="utf-8")
        for name, data in (files or {}).items():
            (partial / "files").mkdir(exist_ok=True)
            (partial / "files" / name).write_bytes(data)
        manifest = {
            "format": FORMAT,
            "arrays": [[list(p), list(a.shape), a.dtype.name] for p, a in leaves.items()],
            "files": {f.relative_to(partial).as_posix(): _seal(f) for f in _files(partial)},
        }
        manifest["crc32"] = _digest(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        _seal(partial / "manifest.json")
        for directory in [partial, *(d for d in partial.rglob("*") if d.is_dir())]:
            make_durable(directory)
        os.rename(partial, folder)
        make_durable(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Deletes a snapshot in such a way that an interruption leaves no half of it under its name."""
    trash = folder.with_name(TRASH + folder.name)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta dict alone, without looking at the arrays."""
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"), object_hook=_decode)
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder}: meta.json cannot be read ({error})") from error


def read_file(folder: Path, name: str) -> bytes | None:
    """One of the caller's files, None if there is none of this name; ask for it after `read` has verified it.

    CheckpointError if it belongs to another user: unpickling it may run any code.
    """
    path = folder / "files" / name
    try:
        owner = path.stat().st_uid
        if hasattr(os, "getuid") and owner != os.getuid():
            raise CheckpointError(f"{path}: expected a file of the user who resumes the run, got one of user {owner}")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error})") from error


def read(
    folder: Path, manifest: Mapping[str, Any], template: Any = None, parts: Iterable[str] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads a snapshot: (tree of numpy arrays, meta).

    manifest  What `verify` returned for it.
    template  Tree whose structure, shapes and dtypes the snapshot must have (arrays or
              ShapeDtypeStruct); None: nested dicts as they were saved.
    parts     Top-level keys to read; None: all. A template then holds these keys only.
    """
    chosen = None if parts is None else set(parts)
    stored = {
        tuple(path): jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for path, shape, dtype in manifest["arrays"]
    }
    places = {_place(path): path for path in stored if chosen is None or _place(path)[0] in chosen}
    saved = {place: stored[path] for place, path in places.items()}
    if chosen is not None and (absent := chosen - {p[0] for p in saved}):
        raise CheckpointMismatchError(folder, [f"{name}: not in the checkpoint" for name in sorted(absent)])
    expected = None if template is None else flatten(template)
    if expected is not None and (differences := _compare(expected, saved)):
        raise CheckpointMismatchError(folder, differences)
    loaded = _load(folder, {path: stored[path] for path in places.values()})
    arrays = {place: loaded[path] for place, path in places.items()}
    meta = read_meta(folder)
    if expected is None:
        return _nest(arrays), meta
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[p] for p in expected]), meta


def _place(path: tuple) -> tuple:
    """Where an array of this path belongs today."""
    return next((now + path[len(then) :] for then, now in _MOVED.items() if path[: len(then)] == then), path)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a snapshot whose files are all as written; DamagedCheckpointError otherwise."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        if manifest.pop("crc32") != _digest(manifest):
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder}: manifest.json is missing or unreadable ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{folder}: expected checkpoint format {FORMAT}, got {version}; use a matching version")
    for name, (size, checksum) in files.items():
        try:
            got = (folder / name).stat().st_size
            if got != size:
                raise DamagedCheckpointError(f"{folder}: {name} has {got} bytes, expected {size}")
            if _checksum(folder / name) != checksum:
                raise DamagedCheckpointError(f"{folder}: the contents of {name} have changed")
        except OSError as error:
            raise DamagedCheckpointError(f"{folder}: {name} cannot be read ({error.strerror})") from error
    return manifest


def _digest(manifest: Mapping[str, Any]) -> int:
    """Checksum of the manifest's own contents."""
    return zlib.crc32(json.dumps(manifest).encode())


def _orbax() -> ocp.Checkpointer:
    """Writes and reads for this process alone: if there are others, it does not wait for them."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """An absolute path of the folder that orbax can take: its own, or that of a temporary link."""
    folder = folder.absolute()
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    usual = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix="dreamer-", dir=usual if _PLAIN.fullmatch(usual) else "/tmp") as place:
        link = Path(place) / "snapshot"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _load(folder: Path, saved: Mapping[tuple, jax.ShapeDtypeStruct]) -> Leaves:
    """Reads the named arrays as numpy, whatever device they were saved from."""
    stored = {_name(p): s for p, s in saved.items() if s.size}
    values: dict[str, np.ndarray] = {}
    if stored:
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
        request = ocp.args.PyTreeRestore(item=stored, restore_args=how, partial_restore=True)
        try:
            with _orbax() as loader, _plainly_named(folder) as place:
                values = loader.restore(place / "state", args=request)
        except (ValueError, KeyError, OSError) as error:
            what = str(error).partition(" [tensorstore_spec")[0]
            raise DamagedCheckpointError(f"{folder}: the arrays in state/ cannot be read ({what})") from error
    return {p: values[_name(p)] if s.size else np.zeros(s.shape, s.dtype) for p, s in saved.items()}


def _compare(expected: Mapping[tuple, Any], saved: Mapping[tuple, jax.ShapeDtypeStruct]) -> list[str]:
    def show(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences = []
    for path in [*expected, *(p for p in saved if p not in expected)]:
        if path not in saved:
            differences.append(f"{_name(path)}: expected {show(expected[path])}, not in the checkpoint")
        elif path not in expected:
            differences.append(f"{_name(path)}: {show(saved[path])} in the checkpoint, not in this model")
        elif show(expected[path]) != show(saved[path]):
            differences.append(f"{_name(path)}: expected {show(expected[path])}, checkpoint has {show(saved[path])}")
    return differences


def _nest(arrays: Leaves) -> Any:
    """Nested dicts from paths; positions in lists and tuples come back as integer keys."""
    if set(arrays) == {()}:
        return arrays[()]
    tree: dict = {}
    for path, array in arrays.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return tree


def _key(entry: Any) -> str | int:
    for attribute in ("key", "idx", "name"):
        if isinstance(value := getattr(entry, attribute, None), str | int):
            return value
    raise CheckpointError(f"expected strings or integers as keys of the state, got {entry!r}")


def _name(path: Sequence[str | int]) -> str:
    return ".".join(str(k) for k in path)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _seal(path: Path) -> tuple[int, int]:
    """Forces a file to the disk and returns its size and checksum."""
    make_durable(path)
    return path.stat().st_size, _checksum(path)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _encode(value: Any) -> Any:
    """What JSON lacks: numpy scalars become numbers, arrays keep their exact bytes."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        return {
            "__array__": base64.b64encode(array.tobytes()).decode(),
            "dtype": str(array.dtype),
            "shape": array.shape,
        }
    raise TypeError(f"expected JSON values or arrays in the meta data of a checkpoint, got {type(value).__name__}")


def _decode(value: dict[str, Any]) -> Any:
    if "__array__" not in value:
        return value
    data = bytearray(base64.b64decode(value["__array__"]))
    return np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
