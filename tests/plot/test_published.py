"""The published scores that ship with the package: all there, with their caveats, and right."""

import csv

import numpy as np
import pytest

from dreamer.plot import published
from dreamer.schema import ConfigError


def test_all_tasks_are_there():
    found = published.published()
    counts = {name: sum(c.source.name == name for c in found.values()) for name in published.sources()}
    assert counts == {"dmc_proprio": 18, "dmc_vision": 20, "atari100k": 26}
    assert sum(curve.whole for curve in found.values()) == 8 + 4 + 6
    for curve in found.values():
        assert (np.diff(curve.x) > 0).all() and curve.x[-1] == curve.source.frames
        assert np.isfinite(curve.mean).all()


def test_a_curve_by_the_numbers_of_its_file():
    """dmc_proprio, cartpole swingup, first bin: 62.76, std 11.33 over 5 seeds; Student's t for 4 degrees: 2.776."""
    curve = published.published()["dmc_proprio-cartpole_swingup"]
    assert (curve.x[0], curve.mean[0], curve.seeds[0]) == (10_000, 62.76, 5)
    assert curve.high[0] - curve.mean[0] == pytest.approx(2.776 * 11.33 / 2)
    assert (curve.final, curve.final_std) == (851.0, 14.58)
    assert curve.name == "dmc_proprio-cartpole_swingup"


@pytest.mark.parametrize("curve", [c for c in published.published().values() if c.whole], ids=lambda c: c.name)
def test_the_final_score_is_the_mean_of_the_last_tenth_of_the_curve(curve):
    """Two files that say the same, but for bins in which a seed had no episode."""
    assert curve.at(0.9 * curve.x[-1], curve.x[-1]) == pytest.approx(curve.final, rel=0.03, abs=0.5)


def test_only_a_final_score_is_a_flat_last_tenth():
    curve = published.published()["atari100k-alien"]
    assert not curve.whole and curve.x.tolist() == [360_000, 400_000] and curve.mean.tolist() == [977.9, 977.9]
    assert np.isnan(curve.at(0, 100_000)) and curve.at(380_000, 400_000) == 977.9


def test_axes():
    """Action repeat 2 and 1/4 update a frame on DeepMind Control, 4 and 1/32 on Atari; hours nobody published."""
    control, atari = (published.published()[name] for name in ("dmc_vision-walker_walk", "atari100k-pong"))
    assert control.along("agent_steps").x[-1] == 500_000 and control.along("updates").x[-1] == 250_000
    assert atari.along("agent_steps").x[-1] == 100_000 and atari.along("updates").x[-1] == 12_500
    with pytest.raises(ConfigError, match="have no hours"):
        atari.along("hours")


def test_means_over_a_span():
    curve = published.published()["dmc_proprio-cartpole_swingup"]
    assert curve.at(0, 20_000) == pytest.approx((62.76 + 189) / 2)
    assert curve.at(12_000, 15_000) == pytest.approx((62.76 + 189) / 2)  # between two: a straight line
    assert np.isnan(curve.at(490_000, 500_000))


def test_names():
    assert [curve.name for curve in published.find("dmc_walker_walk")] == [
        "dmc_proprio-walker_walk",
        "dmc_vision-walker_walk",
    ]
    assert [curve.name for curve in published.find("dmc_vision-walker_walk")] == ["dmc_vision-walker_walk"]
    assert published.find("atari100k_pong") == published.find("atari_pong")
    with pytest.raises(ConfigError, match=r"no published scores of 'dmc_waker_walk'; nearest: dmc_walker_walk"):
        published.find("dmc_waker_walk")
    with pytest.raises(ConfigError, match=r"there are atari_alien, .*dmc_walker_walk"):
        published.find("crafter_reward")


def test_caveats_are_kept():
    """What makes these curves no like-for-like comparison is said beside each, and in the folder's own page."""
    sources = published.sources()
    assert all(word in sources["dmc_proprio"].caveat for word in ("May 2023", "size S", "1e-4", "repeat 1", "size1m"))
    assert all(word in sources["dmc_vision"].caveat for word in ("12M", "512", "8 to 10 seeds"))
    assert all(word in sources["atari100k"].caveat for word in ("200M", "128", "256", "sticky actions (0.25)"))
    page = (published.FOLDER / "README.md").read_text()
    assert all(
        word in page for word in ("e3f0224", "2411f7d", "2024-04-26", "population", "right edge", "Crafter", "sticky")
    )
    for file in published.FOLDER.glob("*.csv"):
        assert f"`{file.name}`" in page
        with file.open() as stream:
            assert len({len(row) for row in csv.reader(stream)}) == 1
