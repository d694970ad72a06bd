"""Sweep files: what they mean, and that a mistake is told with its file, line and the nearest valid name."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest

from dreamer.envs.interface import TaskError
from dreamer.presets import load_config
from dreamer.schema import ConfigError, options
from dreamer.sweeps.draws import DISTRIBUTIONS, read_draw
from dreamer.sweeps.expand import draw, expand
from dreamer.sweeps.spec import EarlyStop, RayTask
from dreamer.sweeps.spec_file import find_sweep, load_sweep, sweep_names


def sweep_of(tmp_path: Path, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_sweep(path)


def runs_of(tmp_path: Path, text: str):
    return expand(sweep_of(tmp_path, text), tmp_path / "runs")


# --- What a file means -------------------------------------------------------------------------


def test_grid_times_seeds(tmp_path):
    runs = runs_of(
        tmp_path,
        """
configs: [debug]
options: {run: {log_every: 7}, model.units: 16}
grid:
  run.train_ratio: [16, 32, 64]
  task: [toy_catch, gym_CartPole-v1]
seeds: [3, 5]
""",
    )
    assert len(runs) == 3 * 2 * 2
    assert runs[0].name == "train_ratio_16.0-toy_catch-seed3"
    assert {run.config.seed for run in runs[:6]} == {3}  # one of everything first
    first = runs[1]
    assert first.name == "train_ratio_16.0-gym_CartPole-v1-seed3"
    assert (first.config.task, first.config.run.train_ratio) == ("gym_CartPole-v1", 16)
    assert first.config.logdir == str(tmp_path / "runs" / first.name)
    debug = load_config(["debug"])
    for run in runs:
        assert (run.config.run.log_every, run.config.model.units) == (7, 16)
        assert run.config.model.deter == debug.model.deter  # the preset's


def test_named_runs_and_list_multiply_and_presets_apply_in_order(tmp_path):
    runs = runs_of(
        tmp_path,
        """
name: two
configs: [debug]
runs:
  plain:
  big: {configs: size12m, loss.dyn: 2}
list:
- {model.units: 8}
- {configs: [cpu], model.units: 24}
""",
    )
    names = ["plain-units_8", "plain-cpu-units_24", "big-units_8", "big-cpu-units_24"]
    assert [run.name for run in runs] == [f"{name}-seed0" for name in names]
    plain, _, _, last = (run.config for run in runs)
    assert (plain.model.deter, plain.loss.dyn) == (16, 1.0)
    assert (last.model.deter, last.loss.dyn, last.model.units) == (2048, 2.0, 24)
    assert last.run.batch_length == load_config(["cpu"]).run.batch_length


def test_names_tell_options_with_one_last_part_apart(tmp_path):
    runs = runs_of(tmp_path, "configs: [debug]\ngrid:\n  loss.policy: [1]\n  run.eval_policy: [mode]\n")
    assert runs[0].name == "policy_1.0-eval_policy_mode-seed0"
    runs = runs_of(tmp_path, "configs: [debug]\ngrid:\n  env.toy.size: [16]\n  env.crafter.size: [[64, 64]]\n")
    assert runs[0].name == "env.toy.size_16-env.crafter.size_64_64-seed0"


RANDOM = """
configs: [debug]
random:
  runs: {runs}
  seed: {seed}
  options:
    optimizer.learning_rate: {{log_uniform: [1e-5, 1e-3]}}
    loss.rep: {{uniform: [0, 2]}}
    model.units: {{choice: [8, 16]}}
    run.batch_size: {{int: [2, 4]}}
"""


def test_random_draws_are_reproducible_and_do_not_depend_on_their_number(tmp_path):
    few = runs_of(tmp_path, RANDOM.format(runs=3, seed=1))
    many = runs_of(tmp_path, RANDOM.format(runs=20, seed=1))
    other = runs_of(tmp_path, RANDOM.format(runs=3, seed=2))
    key = lambda run: (run.config.optimizer, run.config.loss, run.config.model, run.config.run)  # noqa: E731
    assert [run.name for run in few] == ["draw00-seed0", "draw01-seed0", "draw02-seed0"]
    assert [key(run) for run in few] == [key(run) for run in many[:3]]
    assert not any(key(a) == key(b) for a, b in zip(few, other, strict=True))
    assert len({key(run) for run in many}) == 20
    for run in many:
        assert 1e-5 <= run.config.optimizer.learning_rate <= 1e-3
        assert run.config.model.units in (8, 16) and run.config.run.batch_size in (2, 3, 4)


@pytest.mark.parametrize(
    ("kind", "values", "mean"),
    # log_uniform over [1, 100]: (100 - 1) / ln 100. int, choice: plain means.
    [("uniform", [1, 3], 2.0), ("log_uniform", [1, 100], 99 / np.log(100)), ("int", [1, 4], 2.5),
     ("choice", [1, 9], 5.0)],
)  # fmt: skip
def test_distributions_have_the_means_of_their_definitions(kind, values, mean):
    generator = np.random.default_rng(0)
    found = [DISTRIBUTIONS[kind].draw(generator, values) for _ in range(4000)]
    assert min(found) >= min(values) and max(found) <= max(values)
    np.testing.assert_allclose(np.mean(found), mean, rtol=0.05)


def test_logarithmic_integers_reach_both_ends_and_prefer_the_small():
    generator = np.random.default_rng(0)
    found = [DISTRIBUTIONS["log_int"].draw(generator, [1, 100]) for _ in range(4000)]
    assert set(found) >= {1, 2, 99} or {1, 2, 100} <= set(found)
    # Half of the mass lies below sqrt(0.5 * 100.5) - as on the logarithmic axis.
    assert np.mean(np.array(found) < np.sqrt(0.5 * 100.5)) == pytest.approx(0.5, abs=0.03)


def test_draws_are_the_same_in_every_process(tmp_path):
    """Numbers of a known generator: whoever changes how draws are made changes what sweeps on disk mean."""
    sweep = sweep_of(tmp_path, RANDOM.format(runs=1, seed=7))
    generator = np.random.default_rng([7, 0])
    expected = float(np.exp(generator.uniform(np.log(1e-5), np.log(1e-3))))
    assert draw(sweep.random, 0)["optimizer.learning_rate"] == pytest.approx(expected)


def test_settings_of_the_sweep_itself(tmp_path):
    sweep = sweep_of(
        tmp_path,
        "retries: 5\nretry_seconds: 0.5\nhours: 2\nearly_stop: {after: 0.5, runs: 2}\nslurm: {partition: gpu}\n"
        "ray: {num_gpus: 0.5}\n",
    )
    assert (sweep.retries, sweep.retry_seconds, sweep.hours) == (5, 0.5, 2.0)
    assert sweep.early_stop == EarlyStop(after=0.5, below=0.5, runs=2)
    assert (sweep.slurm, sweep.ray, sweep.name) == ({"partition": "gpu"}, RayTask(num_gpus=0.5), "mine")


# --- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("gird: {}\n", 1, "unknown key 'gird' of a sweep; nearest: grid"),
        ("configs: [debug]\n\nrun.train_ratio: 3\n", 3, "options of all runs go under `options:`"),
        ("grid:\n  run.train_ration: [1]\n", 2, "unknown option run.train_ration; nearest: run.train_ratio"),
        ("grid:\n  run.train_ratio: 3\n", 2, "expected the values of run.train_ratio to be a list, got 3"),
        ("grid:\n  run.train_ratio:\n  - 3\n  - fast\n", 4, "run.train_ratio: expected a number, got 'fast'"),
        ("options:\n  model:\n    deter: big\n", 3, "model.deter: expected an integer, got 'big'"),
        ("options:\n  seed: 3\n", 2, "seed is set by the sweep; write `seeds: [0, 1, 2]`"),
        ("options:\n  logdir: x\n", 2, "logdir is set by the sweep"),
        ("options: {run.train_ratio: -1}\n", 1, "run.train_ratio"),
        ("configs: [debug]\nruns:\n  a:\n    configs: [size12]\n", 4, "unknown preset 'size12'; nearest: size12m"),
        ("list: 3\n", 1, "expected list to be a list"),
        ("runs:\n  a: {}\n  a: {}\n", 3, "a is given twice"),
        ("random:\n  runs: 3\n", 1, "expected the key options"),
        ("random:\n  run: 3\n", 2, "unknown key 'run' of random; nearest: runs"),
        ("random:\n  runs: 0\n  options: {}\n", 2, "random.runs: expected a value greater than or equal to 1, got 0"),
        ("random:\n  runs: 1\n  options:\n    loss.rep: {unifrom: [0, 1]}\n", 4, "unknown distribution 'unifrom'"),
        ("random:\n  runs: 1\n  options:\n    loss.rep: 3\n", 4, "loss.rep: expected a distribution"),
        ("random:\n  runs: 1\n  options:\n    loss.rep: {log_uniform: [0, 1]}\n", 4, "each a number above 0"),
        ("random:\n  runs: 1\n  options:\n    model.units: {int: [1, 2.5]}\n", 4, "each a whole number"),
        ("random:\n  runs: 1\n  options:\n    model.units: {choice: [a]}\n", 4, "expected an integer, got 'a'"),
        ("seeds: [1, 1]\n", 1, "a list of different ones"),
        ("seeds: -1\n", 1, "seeds: expected their number"),
        ("early_stop: {afer: 0.3}\n", 1, "unknown key 'afer' of early_stop; nearest: after"),
        ("early_stop: {after: 2}\n", 1, "early_stop.after: expected a value less than or equal to 1, got 2"),
        ("retries: true\n", 1, "retries: expected a valid integer, got True"),
        ("search:\n  trials: 2.5\n  options: {}\n", 2, "search.trials: expected a valid integer"),
        ("search: {runs: 2}\n", 1, "unknown key 'runs' of search; known: options, trials, seed"),
        ("path: x\n", 1, "unknown key 'path' of a sweep"),
        ("name: a/b\n", 1, "expected a name that a folder can have"),
        ("name: ..\n", 1, "expected a name that a folder can have, without /, got '..'"),
        ("ray: {num_cpus: -1}\n", 1, "ray.num_cpus: expected a value greater than or equal to 0, got -1"),
        ("ray: {num_gpus: .nan}\n", 1, "expected a finite number, got nan"),
        ("ray: {num_gpus: many}\n", 1, "ray.num_gpus: expected a valid number"),
        ("slurm:\n  timeout_min: .inf\n", 2, "expected a finite number, got inf"),
        ("options:\n  env.gym.kwargs.g: 3\n", 2, "give env.gym.kwargs as a mapping, {g: value}"),
        ("seeds: [1\n", 2, "expected valid YAML"),
        ("- a\n", 1, "expected a sweep to be a mapping"),
    ],
)  # fmt: skip
def test_mistakes_point_at_their_line(tmp_path, text, line, says):
    with pytest.raises(ConfigError) as error:
        runs_of(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'mine.yaml'}:{line}: "), error.value
    assert says in str(error.value)


def test_options_that_do_not_fit_together_name_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.yaml: run deter_18-seed0: expected model.deter to be a multiple"):
        runs_of(tmp_path, "configs: [debug]\ngrid:\n  model.deter: [16, 18]\n")


def test_other_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="two runs are called units_8-seed0"):
        runs_of(tmp_path, "configs: [debug]\ngrid:\n  model.units: [8, 8]\n")
    with pytest.raises(TaskError, match="toy_cach"):
        runs_of(tmp_path, "configs: [debug]\ngrid:\n  task: [toy_catch, toy_cach]\n")
    with pytest.raises(ConfigError, match="expected log.jsonl true"):
        runs_of(tmp_path, "configs: [debug]\noptions: {log.jsonl: false}\n")
    with pytest.raises(ConfigError, match="expected `search` alone"):
        sweep_of(tmp_path, "grid:\n  loss.rep: [1]\nsearch:\n  trials: 2\n  options: {loss.rep: {uniform: [0, 1]}}\n")
    with pytest.raises(ConfigError, match="found an empty file"):
        sweep_of(tmp_path, "\n")
    with pytest.raises(ConfigError, match="unknown sweep 'tinny'; nearest: tiny"):
        find_sweep("tinny")
    with pytest.raises(ConfigError, match="found none at .*nothing.yaml"):
        find_sweep("nothing.yaml")


@pytest.mark.parametrize("found", [{"uniform": 3}, {"uniform": [3, 1]}, {"int": [True, 2]}, {"choice": []}, [1], {}])
def test_what_is_no_distribution(found):
    with pytest.raises(ConfigError, match="^here: loss.rep: expected"):
        read_draw("loss.rep", found, "here")


# --- The sweeps that come along ----------------------------------------------------------------

#: Number of runs of each, by hand.
RUNS = {
    "tiny": 4, "atari100k": 26 * 5, "dmc": 18 * 5, "ablations": 8 * 3 * 5, "sizes": 6 * 5, "replay_ratios": 5 * 5,
    "fidelity": 2 * 4 * 2 * 3,
}  # fmt: skip


def test_every_sweep_that_comes_along_is_counted():
    assert set(sweep_names()) == set(RUNS)


@functools.cache
def shipped(name: str):
    return expand(load_sweep(find_sweep(name)), Path("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_sweeps_that_come_along_are_valid_and_say_what_presets_say(name):
    path, runs = find_sweep(name), shipped(name)
    assert len(runs) == RUNS[name] and len({run.name for run in runs}) == len(runs)
    assert len({repr(run.config) for run in runs}) == len(runs)
    head = path.read_text().split("\n\n")[0]
    for word in ("Task", "Claim", "Hardware", "Hours", "Command"):
        assert re.search(rf"^# {word}: ", head, flags=re.M), word
    assert f"dreamer sweep {name}" in head


def test_benchmarks_are_the_published_tasks():
    from dreamer.plot.published import published

    for name, source in (("atari100k", "atari100k"), ("dmc", "dmc_proprio")):
        tasks = {run.config.task for run in shipped(name)}
        known = {curve.task for curve in published().values() if curve.source.name == source}
        plain = {task.replace("atari100k_", "atari_") for task in tasks}
        assert plain == known, name


def test_ablations_each_change_what_they_say():
    runs = {run.name: run.config for run in shipped("ablations")}
    base = runs["baseline-dmc_walker_walk-seed0"]
    names = {name.split("-")[0] for name in runs}
    assert len(names) == 8
    for name in names - {"baseline"}:
        config = runs[f"{name}-dmc_walker_walk-seed0"]
        changed = [o for o in options() if o != "logdir" and _value(base, o) != _value(config, o)]
        assert changed, name


def _value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_a_product_of_too_many_runs_is_refused_before_it_is_listed(tmp_path):
    values = ", ".join(map(str, range(1, 101)))
    names = ("run.train_ratio", "run.batch_size", "model.units", "model.hidden", "model.depth", "loss.rep")
    file = tmp_path / "wide.yaml"
    file.write_text("seeds: 3\ngrid:\n" + "".join(f"  {name}: [{values}]\n" for name in names))
    product = " x ".join(["100"] * len(names) + ["3"])
    with pytest.raises(ConfigError, match=f"at most 100,000 runs, got {product} = 3,000,000,000,000 "):
        expand(load_sweep(file), tmp_path)
