"""Arithmetic in docs/sizing.md: what the presets and the sizes give, computed anew."""

import re
from pathlib import Path

import jax
import pytest

from dreamer.agent import Agent
from dreamer.presets import load_config
from dreamer.types import Space

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "sizing.md").read_text()


def test_updates_of_the_presets():
    rows = re.findall(
        r"^\| `([a-z0-9_ ]+)` \| ([\d,]+) \| (\d+) \| (\d+) x (\d+) \| ([\d.]+) \| ([\d,]+) \|$", PAGE, re.M
    )
    assert len(rows) == 7
    for names, *said in rows:
        config = load_config(names.split())
        run, per_step = config.run, config.updates_per_step
        expected = [run.agent_steps, run.train_ratio, run.batch_size, run.batch_length, per_step]
        numbers = [float(word.replace(",", "")) for word in said]
        assert numbers == [*expected, run.agent_steps * per_step], names


SIZES = re.findall(r"^\| `(size\w+)` \| (\d+) \| ([\d.]+)M \| ([\d.]+) GB \| ([\d,]+) bytes \|$", PAGE, flags=re.M)


@pytest.mark.parametrize("row", SIZES, ids=lambda row: row[0])
def test_a_size_has_the_parameters_and_bytes_of_the_table(row):
    name, *said = row
    observations, actions = {"image": Space("image", (64, 64, 3))}, {"action": Space("discrete", (), (17,))}
    agent = Agent(observations, actions, load_config(["crafter", name]))
    state = jax.eval_shape(agent.init, 0)
    deter, millions, gigabytes, latents = (float(word.replace(",", "")) for word in said)
    assert deter == agent.config.model.deter
    assert millions == round(sum(x.size for x in jax.tree.leaves(state["params"])) / 1e6, 1)
    assert gigabytes == round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e9, 2)
    fields = agent.extras.values()
    assert latents == sum(int(jax.numpy.dtype(f.dtype).itemsize) * int(f.shape[0]) for f in fields)


def test_every_size_is_in_the_table():
    assert [row[0] for row in SIZES] == ["size" + size for size in ("1m", "12m", "25m", "50m", "100m", "200m", "400m")]
