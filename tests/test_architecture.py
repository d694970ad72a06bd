"""Who may import whom, proved over the import graph of the package."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dreamer"

# Each row may import from rows at or above it. A folder counts as one module.
LAYERS = [
    [
        "paths",
        "types",
        "values",
        "contradictions",
        "env_config",
        "planner_config",
        "config",
        "yaml_files",
        "process",
        "terminal",
        "nvidia",
    ],
    ["features", "sharding", "parts"],
    ["kernels", "one_kernel", "few_kernels"],
    ["networks", "distributions", "optimizer", "evolution", "scans", "compiler"],
    ["coders", "latents", "rssm"],
    ["objectives", "ensemble"],
    ["world_model"],
    ["actor_critic", "insight"],
    ["behaviours", "imagination", "planners"],
    ["model"],
    ["agent"],
    ["dreaming"],
    ["schema"],
    ["presets"],
    ["transfer"],
    ["records", "saves", "data"],
    ["run"],
    ["dream_env"],
    ["play"],
    ["plot", "doctor", "bench"],
    ["sweeps"],
    ["commands"],
    ["cli"],
    ["__main__", "__init__"],
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
CLOSED = {"envs", "replay"}  # these know only the vocabulary
VOCABULARY = {"paths", "types", "values", "contradictions", "env_config", "planner_config", "config"}
PRINTING = {"process", "terminal"}
SEE_WHOLE_CONFIG = {
    "model",
    "agent",
    "schema",
    "presets",
    "records",
    "saves",
    "data",
    "run",
    "play",
    "bench",
    "sweeps",
    "commands",
}
SEE_WHOLE_CONFIG |= {"__init__"}
OPTIONAL = set(
    """
    dm_control mujoco crafter Box2D pygame tensorflow torch moviepy minerl minari wandb mlflow bsuite
    minigrid memory_maze labmaze vizdoom procgen gym3 cffi dm_env deepmind_lab matplotlib optuna ray
    submitit aiohttp stable_baselines3 evosax
    """.split()
)
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """`envs` for dreamer/envs/suites/toy.py, `rssm` for dreamer/rssm.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path, top_level: bool = False) -> list[tuple[str, tuple[str, ...]]]:
    """(module, imported names) of every import in a file, or of those that run when it is loaded."""
    tree = ast.parse(path.read_text())
    found = []

    def visit(node: ast.AST) -> None:
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, ()) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found.append((node.module, tuple(alias.name for alias in node.names)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def rooms_imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports from."""
    found = set()
    for module, names in imports(path):
        first, _, rest = module.partition(".")
        if first != "dreamer":
            continue
        if rest:
            found.add(rest.split(".")[0])
        else:  # `from dreamer import x`: a module or a name of the package itself
            found |= {name if name in RANK or name in CLOSED else "__init__" for name in names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own, others = room(path), rooms_imported(path) - {room(path)}
    if own in CLOSED:
        assert others <= VOCABULARY | PRINTING
        return
    assert own in RANK, f"{path} has no place in the picture of the house: add it to LAYERS"
    for other in others:
        if other == "__init__":  # the version
            continue
        if other in CLOSED:
            assert RANK[own] > RANK["agent"], f"{own} may not know {other}"
        else:
            assert RANK[other] <= RANK[own], f"{own} may not import {other}"


def test_no_room_imports_another_both_ways():
    graph = {(room(path), other) for path in FILES for other in rooms_imported(path) if other != room(path)}
    assert not {pair for pair in graph if pair[::-1] in graph}


def test_every_row_names_a_room_that_is_there():
    assert {name for row in LAYERS for name in row} | CLOSED == {room(path) for path in FILES}


def test_no_file_name_occurs_twice():
    names = collections.Counter(path.name for path in FILES if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1]


def test_the_vocabulary_stands_alone():
    for name in VOCABULARY | PRINTING:
        path = PACKAGE / f"{name}.py"
        assert rooms_imported(path) <= VOCABULARY
        assert not {"jax", "flax"} & {module.split(".")[0] for module, _ in imports(path)}


def test_no_circles():
    """Modules, not rooms, and only what is imported when a module is loaded."""
    names = {".".join(("dreamer", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in FILES}
    graph = {
        name: {
            target
            for module, imported in imports(path, top_level=True)
            for target in (module, *(f"{module}.{i}" for i in imported))
            if target in names and target != name
        }
        for name, path in names.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_only_few_see_the_whole_config():
    for path in FILES:
        if any(module == "dreamer.config" and "Config" in names for module, names in imports(path)):
            assert room(path) in SEE_WHOLE_CONFIG, f"{path} gets the slice it needs, not the whole Config"


def test_environments_and_replay_load_without_jax():
    for path in FILES:
        if room(path) in CLOSED and path.name != "functional.py":  # which is JAX, and which nothing else there imports
            top = {module.split(".")[0] for module, _ in imports(path, top_level=True)}
            assert not {"jax", "flax", "optax"} & top, path


def test_optional_packages_load_when_they_are_needed():
    for path in FILES:
        top = {module.split(".")[0] for module, _ in imports(path, top_level=True)}
        assert not OPTIONAL & top, path


def test_text_for_people_goes_through_the_terminal():
    """rich's own console and tables take brackets in names for markup; so does everything that speaks of markup."""
    for path in FILES:
        if room(path) == "terminal":
            continue
        taken = {(module, name) for module, names in imports(path) for name in (names or ("",))}
        assert not {found for found in taken if found[0] in ("rich.markup", "rich.table")}, path
        assert not {("rich", "print"), ("rich.console", "Console"), ("rich.console", "")} & taken, path
        text = path.read_text()
        assert "from_markup" not in text and "[/]" not in text, path


def test_nobody_reaches_into_the_privates_of_others():
    """Names with an underscore are used where they are made; suites have no other way with some packages."""
    for path in FILES:
        if path.parent.name == "suites":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
        own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {"_exit", "_SubParsersAction", "_replace"}  # of os, argparse and named tuples: no others do this
        for node in nodes:
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            names += [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
            found = [n for n in names if n.startswith("_") and not n.startswith("__") and n not in own]
            assert not found, f"{path}:{node.lineno}: {found}"


def test_names_say_what_is_inside():
    for path in FILES:
        assert not VAGUE & set(path.relative_to(PACKAGE).with_suffix("").parts), path
