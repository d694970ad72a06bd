"""The benchmark of Atari's environments runs, and compares with ale-py's own."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from dreamer.diagnostics.bench_envs import ALONE, Speed, main, measure


def test_every_contender_is_measured() -> None:
    before = psutil.Process().num_threads()
    found = measure("pong", "atari100k", num_envs=2, rounds=2, steps=4)
    assert list(found) == [ALONE, "env.atari.native", "one process each"]
    assert all(np.isfinite(speed).all() and speed.steps > 0 for speed in found.values())
    assert found[ALONE].ratio == found[ALONE].cpu_ratio == 1
    assert psutil.Process().num_threads() <= before


def test_it_prints_a_line_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"one": Speed(1234.4, 600.0, 1.0, 1.0), "other": Speed(700.0, 300.0, 0.567, 0.5)}
    monkeypatch.setattr("dreamer.diagnostics.bench_envs.measure", lambda *arguments: found)
    main(["--setting", "atari100k"])
    text = capsys.readouterr().out
    assert "pong, 16 environments, preset atari100k" in text
    assert "1234 steps/s (100%)" in text and "700 steps/s ( 57%)" in text
