"""Many devices, simulated: the shape of the mesh, what lies where, and numbers that do not depend on any of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded_updates import UPDATES
from tiny_runs import eight_devices

from dreamer.agent import Agent
from dreamer.config import RunConfig
from dreamer.presets import load_config
from dreamer.sharding import LARGE, MODEL, OneDevice, mesh_shape, rule
from dreamer.types import Space

HERE = Path(__file__).resolve().parent

# The shape of the mesh

SMALL = LARGE - 1


@pytest.mark.parametrize(
    ("options", "slices", "parameters", "devices", "processes", "expected"),
    [
        ({}, 1, SMALL, 1, 1, (1, 1)),
        ({}, 1, SMALL, 8, 1, (8, 1)),
        ({}, 1, SMALL, 6, 1, (4, 1)),  # 5 and 6 do not divide 16
        ({}, 4, SMALL, 8, 1, (4, 1)),  # slices of 4 sequences
        ({}, 1, LARGE, 8, 1, (1, 8)),
        ({}, 1, LARGE, 6, 1, (2, 2)),  # of 2, 3 and 6 only 2 divides 16
        ({}, 1, LARGE, 16, 4, (4, 4)),  # four machines of four devices: one copy on each
        ({}, 1, SMALL, 16, 4, (16, 1)),
        ({"mesh_data": 1}, 1, SMALL, 8, 1, (1, 1)),
        ({"mesh_data": 2}, 1, SMALL, 8, 1, (2, 1)),
        ({"mesh_model": 2}, 1, SMALL, 8, 1, (4, 2)),
        ({"mesh_model": 1}, 1, LARGE, 8, 1, (8, 1)),
        ({"mesh_data": 2, "mesh_model": 4}, 1, SMALL, 8, 1, (2, 4)),
        ({"batch_size": 6}, 1, SMALL, 8, 1, (6, 1)),
    ],
)
def test_shape_of_the_mesh(options, slices, parameters, devices, processes, expected):
    assert mesh_shape(RunConfig(**options), slices, parameters, devices, processes) == expected


@pytest.mark.parametrize(
    ("options", "slices", "devices", "processes", "says"),
    [
        ({"mesh_data": 2}, 1, 1, 1, "at most 1 devices, .* run.mesh_data x run.mesh_model = 2 x 1; lower"),
        ({"mesh_data": 4, "mesh_model": 4}, 1, 8, 1, "at most 8 devices, .* 4 x 4"),
        ({"mesh_model": 2}, 1, 1, 1, "at most 1 devices, .* 1 x 2"),
        ({"mesh_data": 3}, 1, 8, 1, "run.batch_size to be a multiple of .* 3 x 1, got 16"),
        ({"mesh_data": 8}, 4, 8, 1, "run.batch_size / optimizer.accumulate = 16 / 4 .* multiple of .* 8 x 1, got 4"),
        ({"mesh_data": 2}, 1, 8, 2, "a mesh of all 8 devices"),
        ({"mesh_model": 8}, 1, 8, 2, "whole rows in each of the 2 processes, .* let run.mesh_model divide 4"),
        ({"batch_size": 6}, 1, 4, 2, "multiple of .* 4 x 1, got 6"),
    ],
)
def test_a_mesh_that_cannot_be(options, slices, devices, processes, says):
    with pytest.raises(ValueError, match=says):
        mesh_shape(RunConfig(**options), slices, SMALL, devices, processes)


# What lies where


@pytest.fixture(scope="module")
def leaves():
    """Path -> shape of every weight of the size 100m for images and vectors."""
    spaces = {"image": Space("image", (64, 64, 3)), "speed": Space("vector", (5,))}
    agent = Agent(spaces, {"action": Space("discrete", (), (6,))}, load_config(["size100m"]))
    found, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(agent.init, 0)["params"])
    return {".".join(key.key for key in path): leaf.shape for path, leaf in found}


def test_nearly_all_weights_are_divided(leaves):
    size = lambda paths: sum(int(np.prod(leaves[path])) for path in paths)  # noqa: E731
    divided = [path for path, shape in leaves.items() if rule(path, shape, 8) == P(MODEL)]
    assert size(divided) > 0.93 * size(leaves)
    assert "world_model.rssm.gates.kernel" in divided and "world_model.rssm.mix.kernel" in divided
    # Five inputs are not divided by eight devices; convolutions, biases and scales stay whole.
    whole = leaves.keys() - set(divided)
    assert "world_model.encoder.mlp.layers.0.linear.kernel" in whole
    assert {path for path in leaves if ".convs." in path or not path.endswith("kernel")} <= whole


def test_one_device_has_no_mesh():
    actions = {"action": Space("discrete", (), (3,))}
    agent = Agent({"speed": Space("vector", (5,))}, actions, load_config(["debug"]), devices=jax.devices()[:1])
    assert type(agent.devices) is OneDevice


# The same numbers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(arrays, facts) of `sharded_updates.py`: updates on one device, and each of them on 8 x 1 and 4 x 2 ones."""
    folder = tmp_path_factory.mktemp("sharded")
    subprocess.run([sys.executable, HERE / "sharded_updates.py", folder], env=eight_devices(), check=True)
    return dict(np.load(folder / "arrays.npz")), json.loads((folder / "facts.json").read_text())


def part(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of "NAME/path" by path."""
    return {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal but for the order of sums in float32."""
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        # LaProp divides gradients by their size before it averages: what is rounding in a tiny one shows.
        atol = 2e-4 if ".momentum." in path else 3e-6
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", ["data", "both"])
def test_updates_are_those_of_one_device(runs, name):
    """A draw at the very edge between two classes may fall to the other one where sums are rounded otherwise, and then
    changes the samples that follow: of these ten updates, it may happen to one, whose loss stays close."""
    arrays, _ = runs
    for path, value in part(arrays, "one/start").items():
        np.testing.assert_array_equal(arrays[f"{name}/start/{path}"], value, err_msg=path)
    differing = []
    for i in range(UPDATES):
        try:
            assert_close(part(arrays, f"{name}/{i}"), part(arrays, f"one/{i}"))
        except AssertionError as error:
            differing.append(f"update {i}: {error}")
    assert len(differing) <= 1, "\n".join(differing)
    losses = [arrays[f"one/{i}/metrics.opt/loss"] for i in range(UPDATES)]
    np.testing.assert_allclose([arrays[f"{name}/{i}/metrics.opt/loss"] for i in range(UPDATES)], losses, rtol=0.05)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("move", ["one to data", "data to one", "both to one", "one to both"])
def test_checkpoints_move_between_devices(runs, move):
    """What one has saved, another goes on from as from its own."""
    arrays, _ = runs
    target, found = move.split()[-1], part(arrays, move)
    assert len(found) > 100
    for path, value in found.items():
        np.testing.assert_array_equal(value, arrays[f"{target}/{UPDATES - 1}/state.{path}"], err_msg=path)


def test_memory_falls_with_the_model_axis(runs):
    _, facts = runs
    one, data, both = facts["one"], facts["data"], facts["both"]
    assert one["on_first"] == one["state"] == data["on_first"]
    assert both["on_first"] < 0.6 * both["state"]
    # The compiled programs say the same: on each device a state and its share of the batch.
    saved = one["on_first"] - both["on_first"]
    assert data["arguments"] - both["arguments"] == pytest.approx(saved, rel=0.05)
    # Donation leaves no copy: every leaf of the state but the key is updated in place.
    for fact in facts.values():
        assert fact["aliased"] >= 0.99 * fact["on_first"]


def test_devices_exchange_weights_and_returns_only(runs):
    """The batch stays divided: nothing of it is gathered but the returns, whose percentiles are global."""
    _, facts = runs
    for name in ("data", "both"):
        others = [(shape, where) for shape, where in facts[name]["gathers"] if "sharding_constraint" not in where]
        assert len(others) == 1 and "percentile" in others[0][1], others
        assert facts[name]["permutes"] == 0
    assert len(facts["data"]["gathers"]) == 1


# A whole run


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(tmp_path):
    """Training on 4 x 2 devices with a report and an evaluation, then on one."""
    command = [sys.executable, HERE / "sharded_run.py", "--logdir", tmp_path, "--run.batch_size=8"]
    command += ["--run.updates_per_dispatch=2", "--run.train_ratio=64"]
    eight = eight_devices()
    mesh = ["--run.mesh_model=2", "--log.videos=true", "--run.report_every=100"]
    subprocess.run([*command, *mesh, "--run.agent_steps=120"], env=eight, cwd=HERE, check=True)
    subprocess.run([*command, "--run.agent_steps=140"], cwd=HERE, check=True)
    for wrong, says in (
        ("--run.mesh_model=2", "at most 1 devices"),
        ("--replay.storage=device", "with several devices"),
    ):
        surroundings = os.environ if "mesh" in wrong else eight
        refused = [*command, wrong, "--run.agent_steps=160"]
        said = subprocess.run(refused, env=surroundings, cwd=HERE, capture_output=True, text=True)
        assert said.returncode == 2 and says in said.stderr, said
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 140
