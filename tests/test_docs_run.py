"""Commands in the documents carry a tag that says what running them takes, and those that can be run are run.

The words after ```sh say it (GitHub shows the block as any other shell block):

    run            at once, without a network: the default suite runs it
    slow           minutes: the slow suite runs it, in order, in a fresh copy of the project
    needs=X,Y      not run here, only parsed (tests/test_docs.py); X is one of `NEEDS`
    step=NAME      which part of the newcomer's path a slow block is
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import until

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What a block may need that a test has not.
NEEDS = {
    "docker": "a Docker daemon",
    "gpu": "an accelerator, or a day of a CPU",
    "cluster": "Kubernetes, SLURM or several machines",
    "time": "more minutes than a test may take",
    "yours": "files, packages or runs of the reader",
    "system": "rights to change the machine",
}
#: A block with one of these is a part of the newcomer's path, or stands for itself.
STEPS = ("install", "train", "watch", "resume", "evaluate", "plot")
SHELLS = ("sh", "bash")
OTHERS = ("python", "text", "yaml", "json")
#: What begins a line that is a command, in whatever kind of block.
PROGRAMS = r"^(\$ |\./scripts/|(dreamer|pip|docker|kubectl|sbatch|tensorboard) [a-z-])"


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, the words after the fence, its text."""

    path: Path
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def is_shell(self) -> bool:
        return self.words[:1] == ("sh",) or self.words[:1] == ("bash",)

    @property
    def step(self) -> str | None:
        return next((word.removeprefix("step=") for word in self.words if word.startswith("step=")), None)

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def fences(text: str, path: Path) -> Iterator[Block]:
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S):
        yield Block(path, text[: found.start()].count("\n") + 1, tuple(found[1].split()), found[2])


def blocks(path: Path, tag: str | None = None) -> list[Block]:
    """Fenced blocks of a document; with a tag, the shell blocks that carry it."""
    found = fences(path.read_text(), path)
    return [block for block in found if tag is None or (block.is_shell and tag in block.words)]


def fault(block: Block) -> str | None:
    """What is wrong with a block's tags; None: nothing."""
    language, *tags = block.words or ("",)
    if language not in (*SHELLS, *OTHERS):
        return f"expected one of {', '.join((*SHELLS, *OTHERS))} after ```, got {language!r}"
    if language in OTHERS:
        odd = re.search(PROGRAMS, block.text, flags=re.M) if language != "text" else None
        return "commands belong in a block that begins ```sh and a tag" if odd or tags else None
    kinds = [tag for tag in tags if tag in ("run", "slow") or tag.startswith("needs=")]
    steps = [tag for tag in tags if tag.startswith("step=")]
    if len(kinds) != 1 or len(kinds) + len(steps) != len(tags):
        return f"expected ```{language} and one of run, slow, needs={'|'.join(NEEDS)}, got {' '.join(block.words)!r}"
    unknown = set(kinds[0].removeprefix("needs=").split(",")) - {*NEEDS, "run", "slow"}
    if unknown or (block.step and (block.step not in STEPS or kinds != ["slow"])):
        return f"unknown {unknown or block.step}; known: needs={'|'.join(NEEDS)}, slow step={'|'.join(STEPS)}"
    return None


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_command_is_tagged(path):
    assert [f"{block}: {wrong}" for block in blocks(path) if (wrong := fault(block))] == []


@pytest.mark.parametrize(
    ("words", "text", "good"),
    [
        ("sh run", "dreamer envs\n", True),
        ("sh slow step=train", "./scripts/train\n", True),
        ("sh needs=docker,gpu", "docker run x\n", True),
        ("text", "a tree\n", True),
        ("sh", "dreamer envs\n", False),
        ("", "dreamer envs\n", False),
        ("console", "$ dreamer envs\n", False),
        ("sh run slow", "dreamer envs\n", False),
        ("sh needs=luck", "dreamer envs\n", False),
        ("sh run step=train", "dreamer envs\n", False),
        ("sh slow step=lunch", "dreamer envs\n", False),
        ("yaml", "dreamer train --seed 1\n", False),
    ],
)
def test_what_counts_as_tagged(words, text, good):
    (block,) = fences(f"a\n```{words}\n{text}```\nb\n", ROOT / "x.md")
    assert (fault(block) is None) == good


def shell(script: str, folder: Path, binaries: Path) -> subprocess.Popen[bytes]:
    """Starts a block as it stands, in a process group of its own, as a terminal does. It prints to `output.txt`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHON", "DREAMER_EXTRAS")}
    there = kept | {"PATH": f"{binaries}:{os.environ['PATH']}", "COLUMNS": "120"}
    (folder / "output.txt").write_bytes(b"")
    with (folder / "output.txt").open("ab") as out:
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.Popen(command, cwd=folder, env=there, stdout=out, stderr=out, start_new_session=True)


def control_c(process: subprocess.Popen[bytes]) -> int:
    """As in a terminal: every process of the group gets SIGINT. Returns the exit code."""
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(180)


def finish(block: Block, folder: Path, binaries: Path, before: str = "") -> str:
    """Runs a block to its end, which must be a good one; returns what it printed."""
    code = shell(before + block.text, folder, binaries).wait()
    printed = (folder / "output.txt").read_text()
    assert code == 0, f"{block}: exit code {code}\n{block.text}\n{printed[-4000:]}"
    return printed


@pytest.mark.parametrize("path", [p for p in DOCS if blocks(p, "run")], ids=lambda p: p.name)
def test_commands_that_take_no_time(path, tmp_path):
    for block in blocks(path, "run"):
        assert finish(block, tmp_path, Path(sys.executable).parent).strip(), f"{block} prints nothing"


# --- The newcomer's path, and what follows it --------------------------------------------------


def the(step: str) -> Block:
    (block,) = [block for block in blocks(ROOT / "README.md", "slow") if block.step == step]
    return block


def copy_of_the_project(folder: Path) -> Path:
    """What a fresh clone holds, changes that are not committed included."""
    clone = folder / "dreamer"
    ignored = shutil.ignore_patterns(".venv", ".git", ".cache", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, clone, ignore=ignored)
    return clone


def agent_steps(logdir: Path) -> int:
    """Agent steps of the newest checkpoint; 0: none."""
    return max((int(re.match(r"\d+", p.name)[0]) for p in (logdir / "checkpoints").glob("[0-9]*")), default=0)


def watch(clone: Path, binaries: Path) -> None:
    """TensorBoard as the README starts it, in a second terminal, answers at the address that it prints."""
    terminal = clone.parent / "second terminal"
    terminal.mkdir()
    board = shell(f"cd {shlex.quote(str(clone))}\n" + the("watch").text, terminal, binaries)

    def address() -> str | None:
        found = re.search(r"http://\S+:\d+/", (terminal / "output.txt").read_text())
        return found and found[0]

    try:
        until(lambda: address() is not None, 120, "address", board)
        with urllib.request.urlopen(address(), timeout=30) as page:
            assert page.status == 200 and b"TensorBoard" in page.read()
    finally:
        control_c(board)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The newcomer's path: train, watch, stop, resume, evaluate, plot, each command as the README has it."""
    clone = copy_of_the_project(tmp_path_factory.mktemp("newcomer"))
    binaries, logdir = clone / ".venv" / "bin", clone / "runs" / "catch"
    run = shell(the("train").text, clone, binaries)
    try:
        until((logdir / "metrics.jsonl").exists, 1200, "metrics", run)
        watch(clone, binaries)
        assert control_c(run) == 0, (clone / "output.txt").read_text()[-4000:]
    finally:
        run.kill()
    assert "resume with: dreamer train --logdir" in (clone / "output.txt").read_text()
    assert 0 < agent_steps(logdir) < 12_000
    finish(the("resume"), clone, binaries)
    assert agent_steps(logdir) == 12_000
    assert "100 %" in finish(the("evaluate"), clone, binaries)
    finish(the("plot"), clone, binaries)
    return clone


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_newcomer_s_path(walked):
    """All of it has happened; what it leaves is there."""
    runs = walked / "runs"
    assert (runs / "catch.gif").stat().st_size > 1000
    for ending in ("png", "svg", "md"):
        assert (runs / f"catch-curve.{ending}").stat().st_size > 100
    assert list((runs / "catch" / "videos").glob("*.gif"))


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("path", [p for p in DOCS if blocks(p, "slow")], ids=lambda p: p.name)
def test_slow_commands(path, walked):
    """In order, after the newcomer's path, in its folder."""
    before = f"source {walked}/.venv/bin/activate\n"
    for block in blocks(path, "slow"):
        if block.step is None:
            finish(block, walked, walked / ".venv" / "bin", before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_installation_of_the_readme(tmp_path):
    """In a fresh environment, far from any other. Network: installation only."""
    clone = copy_of_the_project(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    finish(the("install"), clone, tmp_path / "venv" / "bin")
    shown = subprocess.run([tmp_path / "venv" / "bin" / "dreamer", "envs", "dmc"], capture_output=True, text=True)
    assert "dmc_walker_walk" in shown.stdout
