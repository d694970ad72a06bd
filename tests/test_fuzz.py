"""Whatever is typed, written into a file or stepped: a run, or one line and exit code 2, and never a traceback of ours.

The default suite draws a sample; `./scripts/test --slow` draws the 10,000 command lines, files and values, and trains
in 300 drawn environments.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import io
import itertools
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as gs
import jax
import numpy as np
import pytest
import rich.console
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dreamer.agent
from dreamer import cli
from dreamer.envs.audit import audit
from dreamer.envs.audit_table import rows
from dreamer.envs.vector import adopt
from dreamer.presets import load_config, preset_names, save_config
from dreamer.run import factories
from dreamer.run import training as training
from dreamer.schema import options, sections

ROOT = Path(__file__).resolve().parent.parent

# --- What is typed -----------------------------------------------------------------------------

NUMBERS = (
    "0 -0 1 -1 2 3 7 16 64 0.5 -0.5 1e-9 1e-320 1e5 1e300 -1e300 1e400 inf -inf nan 2147483647 2147483648 4294967295 "
    "4294967296 9223372036854775807 9223372036854775808 18446744073709551616 1_000 0x10 1e3 1,5 ٣ ½ +5 5. .5"
).split()
WORDS = [
    *("", " ", "null", "~", "none", "true", "false", "True", "yes", "auto", "cpu", "gpu", "mode", "sample", "uniform"),
    *("toy_catch", "gym_CartPole-v1", "atari_pong", "atari_nosuch", "py_no.such:Env", "gym_nosuch-v0", "nosuch_task"),
    *("[1", "{a: 1", "{a: 1}", "[]", "{}", "[1, 2]", "[[1]]", "(", "a: b: c", "*x", "&x 1", "!!python/object:os.x"),
    *("64,64", "0,0", "-1,64", "64", "64,64,3", "1,", ",", "[64, 64]", "nan,1", "a,b", "1e9,1e9"),
    *("--", "-", "-1", "=", "a=b", "[red]", "[/]", "$HOME", "%s", "{0}", "\\", "'", '"', "\n", "\t", "\x1b[31m"),
    *("/dev/null", "/dev/full", "/proc/self/mem", "/nosuch/dir", "no/such/run", "~", "~nosuch/x", "x" * 300, "größe🙂"),
    *("9" * 5000, "[" * 300, "\udcff", "(?P<", "a{99999999}", ".*", "^$"),
]
NAMES = [*options(), *sections()]
values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8), st.integers().map(str))


@st.composite
def misspelt(draw: st.DrawFn) -> str:
    """The name of an option with one character too few, too many, or another one."""
    name = draw(st.sampled_from(NAMES))
    at = draw(st.integers(0, len(name)))
    return name[:at] + draw(st.sampled_from(["", "x", ".", "_", "-", "A"])) + name[at + draw(st.integers(0, 1)) :]


option_names = st.one_of(st.sampled_from(list(options())), st.sampled_from(NAMES), misspelt())


@st.composite
def override(draw: st.DrawFn) -> list[str]:
    """One option as it is typed: with a space, with an equals sign, alone."""
    name, value = draw(option_names), draw(values)
    return draw(st.sampled_from([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]]))


configs = st.one_of(
    st.sampled_from([*preset_names(), "debgu", "", "no/such.yaml", "/", "size1m.yaml", "."]), st.text(max_size=5)
)
overrides = st.lists(override(), max_size=4).map(lambda parts: list(itertools.chain.from_iterable(parts)))
#: Each command, its own words, and numbers of positional arguments that it can be given.
OWN = {
    "eval": ["--episodes", "--video", "--policy", "--seed", "--platform"],
    "collect": ["--steps", "--from", "--policy"],
    "export": ["--unfinished"],
    "envs": ["check", "--steps", "toy", "atari"],
    "plot": ["--reference", "--x", "--bins", "--window", "--out", "--format", "--task"],
    "sweep": ["--logdir", "--jobs", "--devices", "--backend", "--dry-run", "--report"],
    "doctor": ["--logdir", "--platform", "--json"],
    "bench": ["update", "policy", "replay", "env", "loop", "--rounds", "--json", "--compare", "--size", "--steps"],
}


@st.composite
def command_line(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(["train"] * 6 + list(OWN)))
    if command == "train":
        chosen = draw(st.lists(configs, max_size=2))
        line = ["train", *(["--configs", *chosen] if chosen else []), *draw(overrides)]
        return line + draw(st.sampled_from([[], [], [], ["--plan"]]))
    words = st.lists(st.one_of(st.sampled_from(OWN[command]), values), max_size=4)
    return [command, *draw(words), *draw(overrides)]


def start(*args: Any, **kwargs: Any) -> int:
    """Stands in for what takes long, once its arguments have been accepted."""
    return 0


#: Where commands begin what takes long.
BEGINNINGS = {
    "dreamer.run.training": {"train": start},
    "dreamer.run.collect_episodes": {"collect_episodes": start},
    "dreamer.bench.plan": {"print_plan": start},
    "dreamer.doctor.checkup": {"run_doctor": start},
}


@contextlib.contextmanager
def nothing_begins() -> Iterator[None]:
    kept = {name: sys.modules.get(name) for name in BEGINNINGS}
    sys.modules.update({name: types.SimpleNamespace(**what) for name, what in BEGINNINGS.items()})
    from dreamer.commands import bench

    def measured(given: Any, rest: list[str]) -> None:
        bench.bench_config(rest)

    parts, platforms = dict(bench.PARTS), jax.config.jax_platforms
    bench.PARTS.update(dict.fromkeys(parts, measured))
    try:
        yield
    finally:
        bench.PARTS.update(parts)
        jax.config.update("jax_platforms", platforms)
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module


@contextlib.contextmanager
def in_folder() -> Iterator[Path]:
    """An empty working folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def outcome(line: list[str]) -> tuple[int, str]:
    """(exit code, what stands on stderr) of ``dreamer LINE`` in this process; exceptions pass through."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(line)
        except SystemExit as left:  # argparse, after --help
            code = left.code if isinstance(left.code, int) else 1
    return code, err.getvalue()


def check_outcome(line: list[str]) -> int:
    """Runs it; the exit code, which is one of ours, and errors stand in one line."""
    code, told = outcome(line)
    assert code in (0, 1, 2), f"{line}: exit code {code}"
    if code == 2 and told:
        lines = told.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("dreamer: error: "), f"{line}: {told}"
        assert len(told) < 3000, f"{line}: {len(told)} characters"
    return code


def many(sample: int, all_of_them: int) -> Any:
    """A sample in the default suite, all of them in the slow one."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(sample, id="sample"), pytest.param(all_of_them, id="all", marks=pytest.mark.slow)]
    )


def drawn(strategy: st.SearchStrategy, examples: int, check: Callable[[Any], None]) -> None:
    """Checks so many examples, not shrunk in rounds that would take longer than finding them."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), print_blob=False)
    @given(strategy)
    def property_holds(value: Any) -> None:
        check(value)

    property_holds()


@many(120, 4_000)
def test_command_lines(examples):
    codes: collections.Counter[int] = collections.Counter()
    with in_folder(), nothing_begins():
        drawn(command_line(), examples, lambda line: codes.update([check_outcome(line)]))
    assert codes[2] > examples / 4 and codes[0] > 0, codes


# --- What stands in files ----------------------------------------------------------------------


def _mutations(text: str) -> st.SearchStrategy[str]:
    """A good file with one place spoilt."""
    lines = text.splitlines(keepends=True)
    at = st.integers(0, len(lines) - 1)
    marks = ("{", "}", "[", "]", ": ", "- ", "&a ", "*a ", "<<: ", "!!set ", "%", "#", "'", '"', "? ", "| ", "\x00")
    spoilt = st.sampled_from([*marks, "\t", "---\n", "...\n"])
    place = st.integers(0, max(len(text) - 1, 0))
    return st.one_of(
        st.builds(lambda i: "".join(lines[:i] + lines[i + 1 :]), at),
        st.builds(lambda i, j: "".join(lines[:i] + [lines[j]] + lines[i:]), at, at),
        st.builds(lambda i, s: text[:i] + s + text[i:], place, spoilt),
        st.builds(lambda i, s: text[:i] + s + text[i + 1 :], place, spoilt),
        st.builds(lambda i: text[:i], place),
    )


PRESETS = [path.read_text() for path in (*ROOT.glob("configs/presets/*.yaml"), *ROOT.glob("configs/sweeps/*.yaml"))]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), values.filter(lambda v: len(v) < 400))


@st.composite
def option_file(draw: st.DrawFn) -> str:
    """Options in groups, with values that fit or do not."""
    lines = []
    for name in draw(st.lists(st.sampled_from(list(options())), min_size=1, max_size=3)):
        *groups, last = name.split(".")
        for depth, group in enumerate(groups):
            lines.append(f"{'  ' * depth}{group}:")
        value = draw(st.one_of(st.sampled_from(NUMBERS + WORDS), scalars.map(repr)))
        lines.append(f"{'  ' * len(groups)}{last}: {value}")
    return "\n".join(lines)


documents = st.one_of(
    st.sampled_from(PRESETS).flatmap(_mutations),
    option_file(),
    st.text(alphabet=st.sampled_from("ab: -[]{}&*!|>'\"%#\n\t,?<1."), max_size=30),
    st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(values, inner, max_size=3)),
        max_leaves=8,
    ).map(repr),
)


@many(60, 3_000)
def test_files(examples):
    codes: collections.Counter[int] = collections.Counter()
    with in_folder() as folder, nothing_begins():

        def check(text: str) -> None:
            (folder / "f.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
            codes.update([check_outcome(["train", "--configs", "f.yaml"])])
            codes.update([check_outcome(["sweep", "f.yaml", "--dry-run"])])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dreamer.sweeps.dry_run.print_dry_run", start)
            drawn(documents, examples, check)
    assert codes[2] > examples / 4 and codes[0] > 0, codes


# --- Values from Python ------------------------------------------------------------------------

objects = st.one_of(
    scalars,
    st.sampled_from(
        [np.float32(2), np.int64(3), np.bool_(True), np.array([1, 2]), np.array(5), np.nan, Path("x"), b"x"]
    ),
    st.sampled_from(
        [(1, 2), [1, 2], {1: 2}, {"a": (1, np.nan)}, {"a": {"b": [Path("x")]}}, set(), object(), print, int]
    ),
    st.sampled_from([re.compile("x"), 1j, range(3), types.SimpleNamespace(a=1), "64,64", (0, 0), (64, -1), ()]),
    st.integers(min_value=-(2**70), max_value=2**70),
)


@many(150, 3_000)
def test_values_from_python(examples):
    """A value is refused in one line, or the configuration can be written down and read back as it is."""
    accepted: collections.Counter[bool] = collections.Counter()
    with in_folder() as folder:

        def check(given: tuple[str, Any]) -> None:
            name, value = given
            try:
                config = load_config(["debug"], {name: value})
            except ValueError as error:
                assert "\n" not in str(error), f"{name} {value!r}: {error}"
                accepted[False] += 1
                return
            save_config(config, folder / "config.yaml")
            assert load_config([folder / "config.yaml"]) == config, f"{name} {value!r}"
            accepted[True] += 1

        drawn(st.tuples(st.sampled_from([*options(), "env.gym.kwargs.x"]), objects), examples, check)
    assert accepted[True] > examples / 50 and accepted[False] > examples / 4, accepted


# --- Environments ------------------------------------------------------------------------------

DTYPES = [np.float32, np.float64, np.uint8, np.int64, np.int8, np.bool_, np.float16]
SHAPES = [
    (), (1,), (3,), (0,), (2, 2), (8, 8, 3), (8, 8), (3, 8, 8), (12, 64, 64), (4, 16, 16, 3), (64, 64, 1), (1, 1, 3),
    (5, 90, 3),
]  # fmt: skip
BOUNDS = [(0, 255), (-1, 1), (0, 1), (-np.inf, np.inf), (-(10.0**30), 1), (1, 1)]
KEYS = [
    "a", "b", "a/b", "image", "vector", "deter", "stoch", "reward", "action", "is_first", "log/x", "", " ", "[x]",
    "action_mask", "priority",
]  # fmt: skip


def box(shape: tuple[int, ...], dtype: Any, bounds: tuple[float, float]) -> gs.Space:
    dtype = np.dtype(dtype)
    low, high = bounds
    if dtype.kind in "iub":
        info = np.iinfo(dtype) if dtype.kind != "b" else types.SimpleNamespace(min=0, max=1)
        low, high = max(low, info.min), min(high, info.max)
    if dtype == np.float16:
        low, high = np.clip([low, high], -6e4, 6e4)
    return gs.Box(low, high, shape, dtype)


elementary = st.one_of(
    st.builds(box, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(BOUNDS)),
    st.builds(gs.Discrete, st.integers(1, 300), start=st.integers(-3, 3)),
    st.builds(gs.MultiDiscrete, st.sampled_from([[2, 3], [1], [[2, 2], [3, 3]]])),
    st.builds(gs.MultiBinary, st.sampled_from([1, 3, (2, 2)])),
    st.sampled_from(
        [gs.Text(3), gs.Sequence(gs.Discrete(2)), gs.Graph(gs.Box(-1, 1, (2,)), None), gs.Dict({}), gs.Tuple(())]
    ),
)
nested = st.recursive(
    elementary,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(KEYS), inner, min_size=1, max_size=3).map(gs.Dict),
        st.lists(inner, min_size=1, max_size=3).map(gs.Tuple),
    ),
    max_leaves=4,
)
#: What may come in place of a sensible value.
ODD: list[Any] = [
    None, np.nan, np.inf, "x", -1, 1e30, [], {}, np.zeros(3), np.zeros((2, 2, 3), np.uint8), np.array([0.5]), True,
    object(),
]  # fmt: skip
ERRORS: list[type[BaseException]] = [
    ValueError, RuntimeError, AttributeError, KeyError, SystemExit, MemoryError, StopIteration, AssertionError,
    OSError, EOFError,
]  # fmt: skip


class Drawn(gymnasium.Env):
    """An environment that does what its plan says: `odd` values by place, an error at a place from the nth call on."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.calls, self._space = plan, collections.Counter[str](), copy.deepcopy(plan["observations"])
        self.observation_space, self.action_space = plan["observations"], plan["actions"]
        self.render_mode = plan.get("render_mode")
        for name in plan.get("without", ()):
            delattr(self, name)
        self.metadata = plan.get("metadata", {"render_modes": ["rgb_array"]})
        self._fail("construct")

    def _fail(self, place: str) -> None:
        self.calls[place] += 1
        where, after, error = self.plan.get("error", (None, 0, None))
        if where == place and self.calls[place] > after:
            raise error("as drawn")

    def _value(self, place: str, right: Any) -> Any:
        where, after, value = self.plan.get("odd", (None, 0, None))
        return value if where == place and self.calls[place.split(".")[0]] > after else right

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self._space.seed(seed)
        self.time = 0
        self._fail("reset")
        return self._value("reset", (self._value("reset.observation", self._seen()), self._value("reset.info", {})))

    def _seen(self) -> Any:
        return self._space.sample()

    def step(self, action: Any) -> Any:
        self.time += 1
        self._fail("step")
        value = lambda name, right: self._value(f"step.{name}", right)  # noqa: E731
        result = (value("observation", self._seen()), value("reward", 1.0), value("terminated", self.time >= 4))
        return self._value("step", (*result, value("truncated", False), value("info", {})))

    def render(self) -> Any:
        self._fail("render")
        return self._value("render", np.zeros((8, 8, 3), np.uint8))

    def close(self) -> None:
        self._fail("close")


odd_places = ["reset", "step", "render", "reset.observation", "reset.info"]
odd_places += [f"step.{part}" for part in ("observation", "reward", "terminated", "truncated", "info")]
plans = st.fixed_dictionaries(
    {"observations": nested, "actions": st.one_of(st.sampled_from([gs.Discrete(3), gs.Box(-1, 1, (2,))]), nested)},
    optional={
        "odd": st.tuples(st.sampled_from(odd_places), st.integers(0, 3), st.sampled_from(ODD)),
        "error": st.tuples(
            st.sampled_from(["reset", "step", "render", "close", "construct"]),
            st.integers(0, 3),
            st.sampled_from(ERRORS),
        ),
        "without": st.sampled_from([["observation_space"], ["action_space"], ["render_mode"]]),
        "metadata": st.sampled_from([None, {}, {"render_modes": None}, {"render_fps": "x"}]),
        "render_mode": st.sampled_from(["rgb_array", "human", None, 3]),
    },
)


class Random(dreamer.agent.Agent):
    """The agent of runs in which nothing is learned: as it is, but nothing is compiled and actions are drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shapes, rng = jax.eval_shape(self.create, 0), np.random.default_rng(0)
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)

        def act(space: Any, count: int) -> np.ndarray:
            if space.classes is None:
                return rng.uniform(-1, 1, (count, *space.shape)).astype(np.float32)
            return (rng.random((count, *space.shape)) * np.array(space.classes).reshape(space.shape)).astype(np.int32)

        def policy(params: Any, carry: Any, obs: Any, key: Any) -> tuple:
            count = len(obs["is_first"])
            extras = {k: np.zeros((count, *field.shape), field.dtype) for k, field in self.extras.items()}
            return carry, {key: act(space, count) for key, space in self.actions.items()}, extras

        self.init, self.policy = lambda seed: zeros, policy


#: A run in which no update falls due.
QUICK = {
    **{"run.agent_steps": 24, "run.train_ratio": 1e-9, "run.report_every": None, "run.eval_every": None},
    **{"run.final_eval": False, "run.checkpoint_every": 12, "log.videos": True, "log.video_every": 1},
    **{"log.tensorboard": False, "env.restart_seconds": 0.0, "env.failure_limit": 2, "run.platform": "cpu"},
}


def train_in(plan: dict[str, Any], folder: Path, workers: str) -> int:
    """The exit code of a run in drawn environments, 2 for one line; everything else passes through."""
    config = load_config(["debug"], {**QUICK, "logdir": str(folder / "run"), "env.workers": workers})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return training.train(config, lambda index, seed: Drawn(plan))
        except cli.user_errors() as error:
            assert len(str(error).strip().splitlines()) == 1, f"{plan}: {error}"
            return 2


@many(6, 300)
def test_environments(examples, monkeypatch):
    """A run in any environment ends: done, refused in one line, or stopped for its failures with a checkpoint saved."""
    monkeypatch.setattr("dreamer.run.factories.Agent", Random)
    codes: collections.Counter[int] = collections.Counter()

    def check(plan: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            code = train_in(plan, Path(folder), "inline")
            assert code in (0, 2, 4), f"{plan}: exit code {code}"
            saved = list(Path(folder).glob("run/checkpoints/0*"))
            assert code == 2 or saved, f"{plan}: exit code {code}, nothing saved"
            codes.update([code])

    drawn(plans, examples, check)
    assert codes[0] and codes[2], codes
    print(dict(codes))


def checked(plan: dict[str, Any]) -> bool:
    """Whether `dreamer envs check` finds nothing wrong."""
    config = load_config(["debug"], QUICK)
    fits = functools.partial(factories.make_agent, config)
    try:
        report = audit(lambda seed: adopt(lambda index, seed: Drawn(plan), config.env, 0, seed), 30, fits)
    except cli.user_errors() as error:
        assert len(str(error).strip().splitlines()) == 1, f"{plan}: {error}"
        return False
    rich.console.Console(file=io.StringIO()).print(*rows(report))
    return not report.violations


@many(10, 300)
def test_what_training_refuses_the_check_finds(examples, monkeypatch):
    monkeypatch.setattr("dreamer.run.factories.Agent", Random)
    found: collections.Counter[tuple[int, bool]] = collections.Counter()

    def check(plan: dict[str, Any]) -> None:
        fine = checked(plan)
        with tempfile.TemporaryDirectory() as folder:
            code = train_in(plan, Path(folder), "inline")
        assert code == 0 or not fine, f"{plan}: training ends with {code}, and the check finds nothing"
        found.update([(code, fine)])

    drawn(plans, examples, check)
    assert sum(found.values()) and (examples < 100 or found[0, True]), found
