"""The documents say only what is there: commands that parse, files, names, options and metrics that exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import dreamer
from dreamer.agent import Agent
from dreamer.cli import COMMANDS
from dreamer.commands import bench as bench_command
from dreamer.commands import collect as collect_command
from dreamer.commands import doctor as doctor_command
from dreamer.commands import eval as eval_command
from dreamer.commands import export as export_command
from dreamer.commands import play as play_command
from dreamer.commands import plot as plot_command
from dreamer.commands import sweep as sweep_command
from dreamer.commands import train as train_command
from dreamer.commands.arguments import planner_options, split_arguments
from dreamer.envs.interface import Fault
from dreamer.envs.registry import SUITES, check_task
from dreamer.model import act_by_planner
from dreamer.objectives import OBJECTIVES
from dreamer.planner_config import PlannerConfig
from dreamer.presets import load_config, preset_names, save_config
from dreamer.records.logger import Logger, Steps
from dreamer.records.meters import Aggregator, Stopwatch
from dreamer.replay import Replay
from dreamer.run.collector import Episode
from dreamer.run.loop import Run
from dreamer.run.signals import StopRequest
from dreamer.schema import options, sections
from dreamer.sweeps.spec_file import find_sweep
from dreamer.types import Space, replay_fields

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])

#: What looks like a file of ours and is one of a run's folder, of the reader, or a prefix of keys.
NOT_OURS = {"config.yaml", "my.yaml", "eval.gif", "log/"}
#: Options of pip, docker, kubectl and XLA.
FOREIGN_OPTIONS = {
    *("gpus", "rm", "no-deps"),
    "xla_force_host_platform_device_count",
    *("build", "build-arg", "target", "tag", "detach", "follow", "file", "filename", "time", "init", "tail"),
}  # fmt: skip

every_document = pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of a language, whatever their tags."""
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```$", path.read_text(), flags=re.M | re.S)


def spans(path: Path) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S))


def commands(path: Path) -> list[list[str]]:
    """Words of every command in shell blocks; comments, settings of variables and what is fed to a command left out."""
    text = re.sub(r"<<'END'\n.*?^END$", "", "\n".join(blocks(path, "sh")), flags=re.M | re.S).replace("\\\n", " ")
    lines = [shlex.split(part, comments=True) for line in text.splitlines() for part in line.split(" && ")]
    return [words[next(i for i, w in enumerate(words) if "=" not in w) :] for words in lines if words]


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """(command, arguments) where a line runs `dreamer`, through a script or in a container; else None."""
    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    if words[0] == "./scripts/train":
        return "train", words[1:]
    if words[0] == "export":
        return "train", shlex.split(words[1].split("=", 1)[1])
    if words[0] == "sbatch":
        return "train", [*words[3:], "--logdir", words[2]]
    if words[0] == "dreamer" or words[:2] == ["docker", "run"]:
        at = next(i for i, word in enumerate(words) if word.split(":")[0] == "dreamer")
        return (words[at + 1], words[at + 2 :]) if words[at + 1] in COMMANDS else None
    return None


@every_document
def test_commands_parse(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    (tmp_path / "runs" / "catch").mkdir(parents=True)
    save_config(load_config(["quickstart"], {}), tmp_path / "runs" / "catch" / "config.yaml")
    for words in commands(path):
        match program(words):
            case (_, ["--help"]):
                pass
            case ("train", arguments):
                config = train_command.train_config(arguments)
                if "my_" not in config.task:
                    check_task(config.task)
            case ("eval", arguments):
                planner_options(eval_command.parser().parse_known_args(arguments)[1])
            case ("collect", arguments):
                config, _ = collect_command.collect_config(*collect_command.parser().parse_known_args(arguments))
                check_task(config.task)
            case ("play", arguments):
                play_command.parser().parse_args(arguments)
            case ("export", arguments):
                export_command.parser().parse_args(arguments)
            case ("plot", arguments):
                plot_command.parser().parse_args(arguments)
            case ("sweep", arguments):
                find_sweep(sweep_command.parser().parse_args(arguments).file)
            case ("doctor", arguments):
                doctor_command.parser().parse_args(arguments)
            case ("bench", arguments):
                bench_command.loop_configs(bench_command.parser().parse_known_args(arguments)[1])
            case ("envs", ["check", task, *options]):
                configs, overrides = split_arguments(options)
                overrides.pop("steps", None)
                load_config(configs, {**overrides, "task": task})
                if "my_" not in task:
                    check_task(task)
            case ("envs", arguments):
                assert set(arguments) <= set(SUITES), words
            case None:
                known = {
                    "pip",
                    "docker",
                    "tensorboard",
                    "apt-get",
                    "cat",
                    "python",
                    "kubectl",
                    "source",
                    "mkdir",
                    "git",
                    "cd",
                    "dreamer",
                }
                assert words[0].removeprefix(".venv/bin/") in known or (ROOT / words[0]).is_file(), words
            case other:
                raise AssertionError(f"{other} is no command of the program")


@every_document
def test_options_and_presets_exist(path):
    known = {*options(), "configs", "help", "plan", "slow", *FOREIGN_OPTIONS}
    parsers = [eval_command.parser(), collect_command.parser(), export_command.parser(), doctor_command.parser()]
    parsers += [play_command.parser()]
    parsers += [plot_command.parser(), sweep_command.parser()]
    bench_command.add_parts(bench := argparse.ArgumentParser().add_subparsers())
    parsers += bench.choices.values()
    known |= {name.removeprefix("--") for p in parsers for a in p._actions for name in a.option_strings}
    text = "\n".join([*blocks(path, "sh"), *spans(path)])
    for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", text):
        assert name in known or name.startswith("env.gym.kwargs."), f"{path.name}: --{name}"
    for names in re.findall(r"--configs((?: [\w./]+)+)", text):
        for name in names.split():
            assert name in preset_names() or name.endswith(".yaml"), f"{path.name}: preset {name}"
    for group in re.findall(r"(?:\.|dreamer)\[([a-z0-9,]+)\]|DREAMER_EXTRAS=([a-z0-9,]+)", text):
        assert set("".join(group).split(",")) <= EXTRAS, group


@every_document
def test_links_and_files_exist(path):
    text = path.read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"
    for span in spans(path):
        name, _, test = span.partition("::")
        if not re.fullmatch(r"[\w./-]+(\.(py|ya?ml|toml|md|txt|gif)|/)", name) or name in NOT_OURS:
            continue
        places = [folder / name for folder in (ROOT, ROOT / "dreamer", ROOT / "docs") if (folder / name).exists()]
        assert places, f"{path.name}: {span}"
        assert not test or f"def {test}(" in places[0].read_text(), f"{path.name}: {span}"


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_into_pages_lead_to_headings(path):
    for page, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([^)]+)\)", path.read_text()):
        assert anchor in anchors(path.parent / page if page else path), f"{path.name} links to {page}#{anchor}"


def line_of(name: str, path: Path) -> int:
    """The line of a file, from 1, that defines a class, function or constant."""
    defines = re.compile(rf"(class|def) {name}\b|{name}\b[^=]*= ")
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if defines.match(line))


@every_document
def test_links_to_code_lead_to_the_line_that_defines_it(path):
    links = re.findall(r"\[`[\w.]*?(\w+)`\]\(([\w./-]+\.py)(?:#L(\d+))?\)", path.read_text())
    moved = [
        f"{name}: {file}#L{at}"
        for name, file, line in links
        if (at := line_of(name, path.parent / file)) != int(line or 0)
    ]
    assert not moved, f"{path.name} should link to {', '.join(moved)}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the package or something in one."""
    parts = name.removeprefix("dreamer.").split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["dreamer", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return hasattr(dreamer, parts[0]) and all(hasattr(getattr(dreamer, parts[0]), part) for part in parts[1:])


@every_document
def test_dotted_names_exist(path):
    """`rssm.RSSM.step`, `run.train_ratio`: code or options, if the first part is one of ours."""
    ours = {p.stem for p in (ROOT / "dreamer").iterdir()} | {name.split(".")[0] for name in sections()} | {"dreamer"}
    for span in spans(path):
        if re.fullmatch(r"[a-z]\w*(\.\w+)+(\(\))?", span) and span.split(".")[0] in ours - {""}:
            name = span.removesuffix("()")
            if re.search(r"\.(py|ya?ml|toml|md|gif|jsonl)$", name):
                continue
            assert name in options() or name in sections() or resolves(name), f"{path.name}: {span}"


@every_document
def test_python_examples_use_what_is_public(path):
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dreamer":
                assert node.attr in dreamer.__all__
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "agent":
                assert hasattr(dreamer.Agent, node.attr)


def test_the_picture_of_the_house_is_complete():
    """Every module has its line in docs/architecture.md, and every line its module."""
    (picture,) = (b for b in blocks(ROOT / "docs" / "architecture.md", "text") if b.startswith("dreamer/"))
    shown, folders = set(), list[str]()
    for line in picture.splitlines()[1:]:
        indent, name = re.match(r"([* ] +)(\S+)", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            shown.add("".join([*folders, name]))
    files = {str(p.relative_to(ROOT / "dreamer")) for p in (ROOT / "dreamer").rglob("*.py")}
    assert shown == {name for name in files if not name.endswith(("__init__.py", "__main__.py"))}


def test_walks_go_through_files_that_are_there_and_through_none_twice():
    walks = [b for b in blocks(ROOT / "docs" / "architecture.md", "text") if re.match(r"\S+\.py ", b)]
    assert len(walks) == 2
    for walk in walks:
        files = [line.split()[0] for line in walk.splitlines()]
        assert len(set(files)) == len(files) and all((ROOT / "dreamer" / file).is_file() for file in files)


def test_the_table_of_presets_says_what_they_set():
    text = (ROOT / "docs" / "environments.md").read_text()
    rows = re.findall(r"^\| `--configs (\w+)` \| [^|]+ \| ([\d,]+) \| (\d+) \| (\d+) \|$", text, flags=re.M)
    expected = {p.stem for p in (ROOT / "configs" / "presets").glob("*.yaml")}
    assert {row[0] for row in rows} == expected
    for name, steps, ratio, envs in rows:
        config = load_config([name])
        said = (int(steps.replace(",", "")), float(ratio), int(envs))
        assert said == (config.run.agent_steps, config.run.train_ratio, config.env.num_envs), name


# --- Metrics -----------------------------------------------------------------------------------

OBSERVATIONS = {"image": Space("image", (16, 16, 3)), "position": Space("vector", (2,))}
ACTIONS = {"action": Space("discrete", (), (3,)), "push": Space("vector", (2,))}
MODULES = ("encoder", "rssm", "objective", "reward", "cont", "ensemble", "policy", "value")
STANDS_FOR = {
    "<key>": "image|position", "<action>": "action|push", "<name>": "wood", "<module>": "|".join(MODULES)
}  # fmt: skip
#: What `SystemMeter` gives where there are workers and a GPU.
SYSTEM = (
    "ram_gigabytes", "ram_free_gigabytes", "workers_ram_gigabytes", "disk_free_gigabytes", "device_gigabytes",
    "device_peak_gigabytes", "gpu_load", "gpu_gigabytes",
)  # fmt: skip


class Recorder:
    """A sink that notes the names of pictures."""

    def __init__(self) -> None:
        self.pictures: set[str] = set()

    def picture(self, steps, name, picture):
        self.pictures.add(name)

    def __getattr__(self, name):
        return lambda *arguments: None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every name that a run writes: the loop's own logging over a learner whose updates are only traced."""
    logdir, recorder = tmp_path_factory.mktemp("run"), Recorder()
    every = [name for name in OBJECTIVES if name not in ("probe", "autoencoding")]
    config = load_config(["debug"], {"loss.objective": every, "model.ensemble": 2})
    planner = act_by_planner(PlannerConfig(name="random_shooting", horizon=1, candidates=2))
    agent = Agent(OBSERVATIONS, ACTIONS, config, chooses=planner)
    fields = replay_fields(OBSERVATIONS, ACTIONS, agent.extras)
    shape = (config.run.batch_size, config.run.batch_length + 1)
    batch = {k: jax.ShapeDtypeStruct((*shape, *f.shape), f.dtype) for k, f in fields.items()}
    metrics = jax.eval_shape(agent.train_step, jax.eval_shape(agent.init, 0), batch)[2]
    evolved = Agent(OBSERVATIONS, ACTIONS, load_config(["debug"], {"actor_critic.gradient": "evolution"}))
    metrics |= jax.eval_shape(evolved.train_step, jax.eval_shape(evolved.init, 0), batch)[2]

    frames = np.zeros((2, 8, 8, 3), np.uint8)
    episode = Episode(0, 1.0, 2, {"wood/mean": 0.0, "wood/max": 0.0}, [frames[0]])
    images, vectors = np.zeros((2, 8, 16, 16, 3), np.float32), np.zeros((2, 8, 2), np.float32)
    seen, numbers = {"image": images, "position": vectors}, np.ones((2, 8), np.float32)
    views = {"true": seen, "pred": seen, "guess": dict.fromkeys(seen, 1.0)}
    drawn = np.random.default_rng(0).random((2, 8), np.float32)
    views |= dict.fromkeys(("open_reward", "open_cont", "reward", "cont", "value", "kl"), numbers)
    views |= {"error": dict.fromkeys(seen, drawn)} | dict.fromkeys(("disagreement", "open_reward", "open_cont"), drawn)
    views |= {"probs": np.full((2, 8, 4, 4), 0.25), "param_norm": dict.fromkeys(MODULES, 1.0)}
    views |= dict.fromkeys(("dream_reward", "dream_cont"), np.ones((2, 8, 4)))
    run = mock.MagicMock()
    run.config, run.logdir, run.steps = config, logdir, Steps(0, 0, 0)
    run.logger = Logger(logdir, sinks=(recorder,))
    run.metrics, run.watch = Aggregator(), Stopwatch()
    run.replay = Replay(fields, 1, 100, 9, seed=0)
    for _ in range(20):
        run.replay.add({name: np.zeros((1, *field.shape), field.dtype) for name, field in fields.items()})
    run.system.result.return_value = dict.fromkeys(SYSTEM, 1.0)
    run.schedule.dispatches.return_value, run.updates = [(1, 1)], 0
    metrics = {name: np.float32(1) for name in metrics}
    run.learner.update.return_value = metrics
    run.learner.state = {"key": np.zeros(2, np.uint32), "updates": 0, "params": None}
    run.learner.batch = {"reward": np.zeros((2, 9))} | dict.fromkeys(
        ("is_first", "is_last", "is_terminal"), np.zeros((2, 9), bool)
    )
    run.learner.metrics = metrics
    run.agent.report.return_value, run.agent.config = views, config
    run.agent.devices.one_copy.side_effect = lambda state: state
    run.evaluator.return_value = [episode]
    run.checkpointer.best_score.return_value, run.stop, run.failed = None, StopRequest(), None
    for name in ("loop.py", "components.py", "learner.py", "feed.py"):
        for section in re.findall(r'\.section\("(\w+)"\)', (ROOT / "dreamer" / "run" / name).read_text()):
            with run.watch.section(section):
                pass
    run.updated.side_effect = lambda count, metrics: Run.updated(run, count, metrics)
    Run.update(run)
    Run._log_episodes(run, [episode])
    Run._evaluation_fault(run, Fault(0, "raised", "an error", ""))
    Run._log_metrics(run)
    Run.report(run)
    Run.evaluate(run)
    run.logger.close()
    lines = [json.loads(line) for file in logdir.glob("*.jsonl") for line in file.read_text().splitlines()]
    return recorder.pictures.union(*lines)


def documented() -> set[str]:
    """Names in the first column of the tables of docs/metrics.md."""
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), flags=re.M)
    assert len(rows) == len(set(rows)), "a name is defined twice"
    return set(rows)


def pattern(name: str) -> str:
    for stands, names in STANDS_FOR.items():
        name = name.replace(stands, f"({names})")
    return name


def test_every_metric_is_documented(written):
    known = [pattern(name) for name in documented()]
    assert {name for name in written if not any(re.fullmatch(p, name) for p in known)} == set()


def test_every_documented_metric_is_written(written):
    assert {name for name in documented() if not any(re.fullmatch(pattern(name), w) for w in written)} == set()


def test_the_run_above_is_not_empty(written):
    assert {"train/loss/dyn", "train/rand/action", "episode/score", "eval/score", "fps/policy"} <= written
    assert {"time/eval", "report/dream/image", "episode/video", "replay/ratio", "step"} <= written
    assert {"report/health", "report/bias/value", "report/return_gap", "train/opt/module_grad_norm/rssm"} <= written
