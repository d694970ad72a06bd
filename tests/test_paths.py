"""Paths as people give them: names of any kind, `~`, places that cannot be, and what lies in the working folder."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from dreamer.cli import main
from dreamer.config import Config
from dreamer.envs import TaskError, check_task
from dreamer.envs.interface import restorable
from dreamer.paths import PROGRAM, PathError, absolute, brief, check_file, check_folder, make_folder
from dreamer.plot import request
from dreamer.plot.curves import find
from dreamer.presets import ConfigError, check_resume, load_config, save_config
from dreamer.run.factories import prepare_logdir, resolve_logdir
from dreamer.run.training import train
from dreamer.saves.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from dreamer.saves.lock import LogdirInUseError, LogdirLock
from dreamer.sweeps.on_ray import on_a_machine

ODD_NAMES = ("[lr=1e-4]", "a[0-9]b?*", "größe 🙂 #1 %20 '{0}'", "-x,$HOME", "two\nlines")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder of a test, and its home folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def gone(here, monkeypatch):
    """A working folder that was deleted."""
    place = here / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    return place


def nobody(*arguments):
    raise KeyError("no such user")


# --- From the root -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "path"),
    [("x", "x"), ("./~x", "~x"), ("~", "home"), ("~/x", "home/x"), ("a/~/b", "a/~/b"), (Path("x/y"), "x/y")],
)
def test_a_path_begins_at_the_root(here, given, path):
    assert absolute(given) == here / path
    assert absolute("/" + str(given)) == Path("/" + str(given))


def test_a_relative_path_may_begin_beside_a_file(here):
    assert absolute("x", Path("/there")) == Path("/there/x") and absolute("~/x", Path("/there")) == here / "home" / "x"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("r/[exp1]", "r/[exp1]"), (".", "."), ("--x", "./--x"), ("./~x", "./~x"), ("/elsewhere/r", "/elsewhere/r")],
)
def test_a_path_is_printed_as_people_write_it_and_leads_back(here, given, shown):
    path = absolute(given)
    assert brief(path) == shown and absolute(shown) == path


@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_variable_the_list_of_users_knows(here, monkeypatch, home):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert absolute("~/x") == Path(pwd.getpwuid(os.getuid()).pw_dir) / "x"
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(PathError, match=r"your home folder \(HOME is not set\), found none, got '~/x'; .* in full"):
        absolute("~/x")


@pytest.mark.parametrize("text", ["", "a\0b", "\udcff", "~no-such-user/x"])
def test_names_that_no_file_can_have(here, text):
    with pytest.raises(PathError, match=r"^expected .*"):
        absolute(text)


def test_options_that_are_paths_do_not_depend_on_the_working_folder(here, tmp_path):
    Path("my.yaml").write_text("logdir: ~/runs/y\nreplay:\n  preload: data\n")
    read = load_config(["my.yaml"], {"from_checkpoint": "~/teacher"})
    home = here / "home"
    assert (read.logdir, read.replay.preload) == (str(home / "runs" / "y"), str(here / "data"))
    assert read.from_checkpoint == str(home / "teacher")
    assert Config(logdir=Path("runs")).logdir == str(here / "runs")
    assert Config().logdir == "" and Config().from_checkpoint is None
    save_config(read, "saved.yaml")
    assert load_config(["saved.yaml"]) == read


def test_a_path_that_cannot_be_names_its_option(here):
    for name in ("logdir", "from_checkpoint", "replay.preload"):
        with pytest.raises(ConfigError, match=rf"^--{name}: expected the home folder of a user 'no-such-user'[^\n]*$"):
            load_config([], {name: "~no-such-user/x"})


def test_a_run_that_moved_with_what_it_began_from_is_the_same_run(here):
    def config(place: str, source: str, data: str | None = None) -> Config:
        paths = {"logdir": f"{place}/run", "from_checkpoint": source, "replay.preload": data}
        return load_config(["debug"], {name: path for name, path in paths.items() if path is not None})

    for old, new in ((config("a", "a/t", "a/d"), config("b", "b/t", "b/d")), (config("a", "a/t"), config("b", "a/t"))):
        assert [change.name for change in check_resume(old, new)] == ["logdir"]
    for old, new in ((config("a", "a/t"), config("a", "a/u")), (config("a", "t"), config("a", "t", "d"))):
        with pytest.raises(ConfigError, match="cannot change on resume"):
            check_resume(old, new)


def test_a_long_task_makes_no_folder_that_cannot_be(here):
    config = resolve_logdir(load_config([], {"task": f"py_{'/long' * 99}/[a b].py:Env"}))
    prepare_logdir(Path(config.logdir))
    assert Path(config.logdir).parent == here / "runs" and "_a_b_.py_Env-" in config.logdir


# --- Names of any kind ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_checkpoint_is_read_back_whatever_its_folder_is_called(here, monkeypatch, name):
    saver = Checkpointer(Path("runs") / name)
    monkeypatch.chdir("/")  # as an environment might
    saver.save(1, {"w": np.arange(3.0)}, {"m": 1})
    saver.wait()
    reader = Checkpointer(here / "runs" / name, read_only=True)
    assert (reader.restore()[1]["w"] == np.arange(3.0)).all()
    assert os.listdir(here / "runs" / name) == ["checkpoints"]


def test_a_folder_of_temporary_files_may_have_such_a_name_too(here, monkeypatch):
    (here / "[t]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here / "[t]"))
    with Checkpointer(here / "[r]") as saver:
        saver.save(1, {"w": np.ones(1)}, {})
    assert saver.restore()[0] == 1


def test_arrays_that_cannot_be_read_are_a_damaged_checkpoint(here, monkeypatch):
    with Checkpointer("run") as saver:
        saver.save(1, {"w": np.ones(1)}, {})

    def refuse(*arguments, **options):
        raise ValueError("NOT_FOUND: params.w [tensorstore_spec='long']")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", refuse)
    with pytest.raises(CheckpointError, match=r"in state/ cannot be read \(NOT_FOUND: params.w\)") as caught:
        saver.restore()
    assert not isinstance(caught.value, DamagedCheckpointError)  # the one that says what to do


def test_patterns_of_runs_below_folders_of_any_name(here):
    for run in ("[lr]/a1", "[lr]/a2", "l/a3"):
        (here / run).mkdir(parents=True)
        (here / run / "scores.jsonl").touch()
    names = lambda *patterns: [file.parent.name for _, file in find(patterns, [])]  # noqa: E731
    assert names("[lr]/a*") == names("./[lr]/a?") == names("mine=[lr]/a[12]") == ["a1", "a2"]
    assert names("[l]/a*") == ["a3"] and names("**/a*") == ["a1", "a2", "a3"]
    (here / "home").symlink_to(here / "[lr]")
    assert names("~/a1") == ["a1"] and names("mine=~/a*") == ["a1", "a2"]


@pytest.mark.parametrize(
    ("out", "files"),
    [
        ("fig", ["fig.png", "fig.svg", "fig.md"]),
        ("fig.png", ["fig.png", "fig.svg", "fig.md"]),
        ("fig.PDF", ["fig.png", "fig.svg", "fig.pdf", "fig.md"]),
        ("a.b/v1.2.md", ["v1.2.png", "v1.2.svg", "v1.2.md"]),
        (".", ["plot.png", "plot.svg", "plot.md"]),
    ],
)
def test_the_ending_of_a_plot_is_given_once(here, out, files):
    found = request.outputs(request.Request(["x"], out=absolute(out)))
    assert [path.name for path in found] == files
    assert {path.parent for path in found} == {here / "a.b" if out.startswith("a.b") else here}


def test_a_lock_holds_by_every_name_of_its_folder(here):
    (here / "run").mkdir()
    (here / "link").symlink_to("run")
    with LogdirLock("run"), pytest.raises(LogdirInUseError, match="in use by a live run"):
        LogdirLock(here / "link").acquire()


# --- Places that cannot be -----------------------------------------------------------------------


@pytest.fixture
def places(here):
    (here / "file").touch()
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    (here / "folder").mkdir()
    return here


IMPOSSIBLE = {
    "file": "file is a file",
    "file/x": "file is a file",
    "dangling": "dangling is a link to nowhere, which is not there",
    "loop/x": "loop is a link to loop",
    "/proc/nowhere/x": "No such file or directory",
    "/dev/null": "/dev/null is a file",
    "x" * 300: "File name too long",
    f"folder/{'x' * 300}/y": "File name too long",
}


@pytest.mark.parametrize(("place", "why"), IMPOSSIBLE.items(), ids=[place[:20] for place in IMPOSSIBLE])
def test_a_folder_that_cannot_be_made(places, place, why):
    with pytest.raises(PathError, match=rf"^expected a folder that can be written to, got [^\n]*{why}[^\n]*another$"):
        make_folder(absolute(place))
    if not place.startswith("/proc"):  # where nothing but trying tells
        with pytest.raises(PathError, match=rf"^expected a folder that can be written to, got [^\n]*{why}"):
            check_folder(absolute(place))


def test_a_folder_that_may_not_be_written_to(here, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    make_folder(here)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # the superuser may write anywhere
    with pytest.raises(PathError, match="got '.*': Permission denied; name another"):
        make_folder(here)


@pytest.mark.parametrize("file", ["folder", "file/x", "dangling/x", "x" * 300, "/proc/x"])
def test_a_file_that_cannot_be_written(places, file):
    check_file(places / "folder" / "new" / "fine.gif")
    assert os.listdir(places / "folder" / "new") == []
    with pytest.raises(PathError, match=r"^expected [^\n]*$"):
        check_file(absolute(file))


COMMANDS = {
    "train": ("train", "--configs", "debug", "--run.platform", "cpu", "--logdir", "{}"),
    "plan": ("train", "--configs", "debug", "--run.platform", "cpu", "--logdir", "{}", "--plan"),
    "dry run": ("sweep", "tiny", "--dry-run", "--logdir", "{}"),
    "collect": ("collect", "toy_catch", "{}", "--steps", "5"),
    "export": ("export", "folder", "{}"),
    "plot": ("plot", "folder", "--out", "{}/plot"),
    "sweep": ("sweep", "tiny", "--logdir", "{}"),
    "bench": ("bench", "update", "--json", "{}/x.json"),
    "eval": ("eval", "{}"),
    "eval video": ("eval", "run", "--video", "{}/x.gif"),
    "export from": ("export", "{}", "new"),
    "configs": ("train", "--configs", "{}.yaml"),
    "teacher": ("train", "--configs", "debug", "--run.platform", "cpu", "--logdir", "new", "--from_checkpoint", "{}"),
    "data": ("train", "--configs", "debug", "--run.platform", "cpu", "--logdir", "new", "--replay.preload", "{}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_one_line(places, capfd, command):
    (places / "run").mkdir()
    save_config(load_config(["debug"]), places / "run" / "config.yaml")
    before = sorted(os.listdir(places))
    for place in ("file", "dangling", "file/x", "~no-such-user/x", "x" * 300):
        assert main([word.format(place) for word in COMMANDS[command]]) == 2
        said = capfd.readouterr()
        assert said.err.count("\n") == 1 and said.err.startswith("dreamer: error: "), said.err
    assert set(os.listdir(places)) - set(before) <= {"new"}


def test_records_of_something_else_are_not_cut_off(here):
    for name in ("metrics.jsonl", "scores.jsonl"):
        folder = here / name.removesuffix(".jsonl")
        folder.mkdir()
        (folder / name).write_text("precious\n")
        with pytest.raises(PathError, match=rf"no config.yaml but a {name} of something else; choose another"):
            train(load_config(["debug"], {"logdir": str(folder)}))
        assert (folder / name).read_text() == "precious\n"
        (folder / "config.yaml").touch()
        prepare_logdir(folder)
    for name in ("config.yaml", "replay"):
        folder = here / f"with {name}"
        folder.mkdir()
        (folder / "config.yaml").mkdir() if name == "config.yaml" else (folder / "replay").touch()
        with pytest.raises(PathError, match="expected the folder of a run"):
            prepare_logdir(folder)


def test_a_working_folder_that_is_gone(gone, capsys):
    assert main(["train", "--configs", "debug"]) == main(["train", "--configs", "x.yaml"]) == 2
    assert main(["plot", "x"]) == main(["eval", "x"]) == 2
    assert capsys.readouterr().err.count("it is gone") == 4
    assert load_config(["debug"], {"logdir": str(gone.parent / "x")}).logdir == str(gone.parent / "x")
    check_task("gym_CartPole-v1")
    with pytest.raises(TaskError, match="importable module 'mine.py'.*is gone"):
        check_task("py_mine.py:Env")


# --- What lies in the working folder ---------------------------------------------------------------

MODULE = """
import gymnasium
from gymnasium import spaces


class MyEnv(gymnasium.Env):
    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 1, 1.0, False, False, {}


gymnasium.register("MyEnv", MyEnv)
"""
#: Plays in worker processes; the names of modules follow: of ours, and of the standard library.
PLAY = """
import sys
import numpy as np
from dreamer.env_config import EnvConfig
from dreamer.envs import make_vector_env

for task in sys.argv[1:]:
    envs = make_vector_env(task, EnvConfig(workers="process"), 1, 0, True)
    envs.reset()
    envs.step_async({"action": np.zeros((1,), np.int32)})
    print(task, envs.step_wait()["reward"].tolist())
    envs.close()
"""
WRONG = "print('the wrong program', flush=True)\nraise SystemExit(9)\n"


@pytest.fixture
def traps(here):
    """A working folder with modules that are called like others."""
    for name in ("dreamer", "random", "argparse", "jax", "gymnasium", "signal"):
        (here / f"{name}.py").write_text(WRONG)
    return here


def output(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_this_program_starts_itself_whatever_lies_around(traps):
    assert output(*PROGRAM, "plot", "--help").startswith("usage: dreamer plot")


def test_modules_of_the_working_folder_come_last(here):
    (here / "argparse.py").write_text(WRONG)
    assert output(sys.executable, "-m", "dreamer", "plot", "--help").startswith("usage: dreamer plot")


def test_a_task_of_ray_runs_this_program_though_the_working_folder_comes_first(traps):
    (traps / "task").write_bytes(cloudpickle.dumps(on_a_machine(str(traps))))
    script = (
        f"import sys, cloudpickle\nsys.path.insert(0, {str(traps)!r})\ntask = cloudpickle.load(open('task', 'rb'))\n"
    )
    words = [sys.executable, "-P", "-c", "print('ran')"]
    assert (
        output(sys.executable, "-P", "-c", f"{script}print(task({words!r}, __import__('pathlib').Path('.'), {{}}))")
        == "0\n"
    )
    assert (traps / "sweep.log").read_text() == "ran\n"


def test_a_module_is_found_by_either_suite_and_in_workers(traps):
    (traps / "my_env.py").write_text(MODULE)
    played = output(sys.executable, "-P", "-c", PLAY, "gym_my_env:MyEnv", "py_my_env:MyEnv")
    assert played == "gym_my_env:MyEnv [1.0]\npy_my_env:MyEnv [1.0]\n"


def test_a_module_that_another_one_hides_is_named_with_its_place(here):
    (here / "wave.py").write_text(MODULE)
    with pytest.raises(TaskError, match=r"in wave \(/.*wave.py\), which has none.*name the file: py_wave.py:MyEnv"):
        check_task("py_wave:MyEnv")
    check_task("py_wave.py:MyEnv")


def test_a_file_is_found_again_after_the_working_folder_has_changed(here, monkeypatch):
    from dreamer.env_config import EnvConfig
    from dreamer.envs import make_env

    (here / "mine_too.py").write_text(MODULE.replace('"MyEnv"', '"Mine"'))
    check_task("py_mine_too.py:MyEnv")
    monkeypatch.chdir("/")
    assert restorable(make_env("py_mine_too.py:MyEnv", EnvConfig(), 0)) in (True, False)
