"""Many devices: a mesh with the axes `data` and `model`, rules for how arrays lie on it, and programs compiled for it.

Every device works on its own sequences of the batch: the batch is divided over both axes. Weights, optimizer state and
slow critic have one copy in each row of the mesh, divided over `model` as `RULES` say: with one device along `model`,
each device has all of them. An update gathers the weights once, before it uses them, and leaves each device its part of
the summed gradients. Everything else about the batch is global: means, percentiles, norms, checks of finiteness.

`OneDevice` and `ManyDevices` have the same interface; with one device nothing is compiled differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dreamer.config import RunConfig

Tree = Any

DATA, MODEL = "data", "model"

#: Leaf path -> layout of the leaf; the first pattern found in the path counts. A leaf whose size is not divisible by
#: the devices along `model` stays whole. Optimizer state and slow critic have the paths of the weights inside theirs.
RULES: tuple[tuple[str, P], ...] = (
    (r"\bcnn\.(convs|out)\b", P()),  # a few percent of all weights, and their first axes are short
    (r"\.kernel$", P(MODEL)),  # (inputs, outputs), and (blocks, inputs, outputs)
    (r"", P()),  # biases, norms, counters
)

#: Models of at least this many parameters are divided over the devices of a process unless the options say otherwise.
LARGE = 100_000_000

#: What an argument or a result of a program is: the training state or the parameters in it, a batch (B, ...), batches
#: (K, B, ...), or anything of which every device has all.
STATE, WEIGHTS, BATCH, BATCHES, WHOLE = "state", "weights", "batch", "batches", "whole"


def mesh_shape(run: RunConfig, slices: int, parameters: int, devices: int, processes: int = 1) -> tuple[int, int]:
    """(devices along `data`, along `model`). ValueError if there are too few, or if they do not divide the batch.

    slices: parts of a batch that are processed one after another. devices, processes: how many there are.
    """
    local, batch = devices // processes, run.batch_size // slices
    model = run.mesh_model
    if model is None:
        model = max(m for m in _divisors(local) if batch % m == 0) if parameters >= LARGE else 1
    data = run.mesh_data
    if data is None:
        fits = [d for d in range(1, devices // model + 1) if batch % (d * model) == 0]
        data = max(devices // model, 1) if processes > 1 or not fits else max(fits)
    chosen = f"run.mesh_data x run.mesh_model = {data} x {model}"
    if data * model > devices:
        raise ValueError(f"expected at most {devices} devices, as many as there are, got {chosen}; lower one of them")
    if processes > 1 and (data * model != devices or local % model):
        raise ValueError(
            f"expected a mesh of all {devices} devices, with whole rows in each of the {processes} processes, got "
            f"{chosen}; leave both options out, or let run.mesh_model divide {local}"
        )
    if batch % (data * model):
        part = (
            f"run.batch_size / optimizer.accumulate = {run.batch_size} / {slices}" if slices > 1 else "run.batch_size"
        )
        raise ValueError(f"expected {part} to be a multiple of {chosen}, got {batch}; change one of them")
    return data, model


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def rule(path: str, shape: tuple[int, ...], model: int) -> P:
    """The layout of a leaf of this dotted path and shape with `model` devices along that axis."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
    fits = len(spec) <= len(shape) and all(name is None or n % model == 0 for name, n in zip(spec, shape, strict=False))
    return spec if fits else P()


class OneDevice:
    """All arrays on JAX's default device."""

    shape = (1, 1)

    def jit(self, function: Callable, inputs: Sequence[str], outputs: Sequence[str] | str, **options: Any) -> Any:
        """`jax.jit`; inputs, outputs: what the arguments and results are (`STATE`, ...)."""
        return jax.jit(function, **options)

    def jit_local(self, function: Callable, inputs: Sequence[str], **options: Any) -> Any:
        """A program of this process alone, with one copy of the weights as its first argument: to act, to report."""
        return jax.jit(function, **options)

    def gathered(self, tree: Tree) -> Tree:
        """Inside a program: parameters (or a part of them) as every device needs them to compute."""
        return tree

    def divided(self, params: Tree) -> Tree:
        """Inside a program: a tree like the parameters, in the layout of the training state."""
        return params

    def slices(self, batch: Tree) -> Tree:
        """Inside a program: slices of a batch (slices, B/slices, ...), each divided as a batch is."""
        return batch

    def place(self, batch: Tree) -> Tree:
        """A batch from host arrays (B, ...); with several processes, each passes its share of the sequences."""
        return jax.device_put(batch)

    def place_state(self, state: Tree) -> Tree:
        """A whole training state, from anywhere."""
        return jax.device_put(state)

    def one_copy(self, state: Tree) -> Tree:
        """A training state (or parts of it) on as few devices of this process as can hold it: to act with, to save."""
        return state


class ManyDevices(OneDevice):
    """Arrays over a mesh. It may span processes; then all of them make the same calls in the same order."""

    def __init__(self, devices: Sequence[jax.Device], shape: tuple[int, int], state: Tree) -> None:
        """shape: see `mesh_shape`; devices: at least as many, those of a process side by side; state: of arrays or
        ShapeDtypeStructs, the training state."""
        self.shape = shape
        self.mesh = Mesh(np.array(devices[: shape[0] * shape[1]]).reshape(shape), (DATA, MODEL))
        self._specs = jax.tree_util.tree_map_with_path(lambda path, x: rule(_dotted(path), x.shape, shape[1]), state)
        mine = [row for row in self.mesh.devices if row[0].process_index == jax.process_index()]
        #: The devices of one copy of the state.
        self._row = Mesh(mine[0][None], (DATA, MODEL))
        self._alone = [row.process_index for row in self.mesh.devices[:, 0]] == [jax.process_index()] * shape[0]
        self._copied: tuple[Tree, Tree] | None = None

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def shardings(self, kind: str) -> Tree:
        """Sharding, or tree of shardings, of what a program takes or gives."""
        if kind == STATE:
            return jax.tree.map(self._sharding, self._specs)
        return self._sharding({BATCH: P((DATA, MODEL)), BATCHES: P(None, (DATA, MODEL)), WHOLE: P()}[kind])

    def jit(self, function: Callable, inputs: Sequence[str], outputs: Sequence[str] | str, **options: Any) -> Any:
        into = tuple(map(self.shardings, inputs))
        out = self.shardings(outputs) if isinstance(outputs, str) else tuple(map(self.shardings, outputs))
        return jax.jit(function, in_shardings=into, out_shardings=out, **options)

    def jit_local(self, function: Callable, inputs: Sequence[str], **options: Any) -> Any:
        if self.shape[1] > 1:
            whole = NamedSharding(self._row, P())
            weights = jax.tree.map(lambda spec: NamedSharding(self._row, spec), self._specs["params"])
            into = tuple(weights if kind == WEIGHTS else whole for kind in inputs)
            options |= {"in_shardings": into, "out_shardings": whole}
        compiled = jax.jit(function, **options)
        return lambda params, *rest: compiled(self.one_copy(params), *rest)

    def gathered(self, tree: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(tree, self.shardings(WHOLE))

    def divided(self, params: Tree) -> Tree:
        shardings = jax.tree.map(self._sharding, self._specs["params"])
        return jax.lax.with_sharding_constraint(params, shardings)

    def slices(self, batch: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(batch, self.shardings(BATCHES))

    def place(self, batch: Tree) -> Tree:
        sharding = self.shardings(BATCH)
        if self._alone:
            return jax.device_put(batch, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def place_state(self, state: Tree) -> Tree:
        if self._alone:
            return jax.device_put(state, self.shardings(STATE))

        def one(x: Any, sharding: NamedSharding) -> jax.Array:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return x
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(one, state, self.shardings(STATE))

    def one_copy(self, state: Tree) -> Tree:
        if self._copied is None or self._copied[0] is not state:
            self._copied = state, jax.tree.map(self._of_row, state)
        return self._copied[1]

    def _of_row(self, leaf: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        row = [parts[device] for device in self._row.devices[0]]
        if len(row) == 1:
            return row[0]
        sharding = NamedSharding(self._row, _spec(leaf))
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, row)


def own_share(tree: Tree) -> Tree:
    """Results as host arrays; of results divided over processes, the sequences of this one."""
    return jax.tree.map(_own_share, tree)


def _own_share(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        return jax.device_get(leaf)
    axis = next(i for i, name in enumerate(_spec(leaf)) if name is not None)
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[axis].start or 0)
    return np.concatenate(jax.device_get([shard.data for shard in shards]), axis)


def _spec(leaf: jax.Array) -> P:
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding.spec


def _dotted(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)


def make_devices(devices: Sequence[jax.Device], run: RunConfig, slices: int, state: Callable[[], Tree]) -> OneDevice:
    """What to compute on: `devices` as the options say; without any, JAX's default device.

    slices: parts of a batch that are processed one after another; state: gives ShapeDtypeStructs of the training state.
    ValueError if the options do not fit the devices.
    """
    if not devices:
        return OneDevice()
    if len(devices) == 1:
        mesh_shape(run, slices, 0, 1)
        return OneDevice()
    shapes = state()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    shape = mesh_shape(run, slices, parameters, len(devices), jax.process_count())
    return OneDevice() if shape == (1, 1) else ManyDevices(devices, shape, shapes)
