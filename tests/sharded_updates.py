"""Run as a program, with eight simulated devices: the same updates on one device and on meshes; see `test_sharding`.

Writes the results to the folder it is given: arrays.npz, by "NAME/path", and facts.json. Where presets are named too,
one update of each, in the debug preset's size, as arrays "PRESET/NAME/path".
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import learner_data
import numpy as np
from learner_data import CHEAP, random_batch, small_config

from dreamer import compiler, transfer
from dreamer.agent import Agent
from dreamer.presets import load_config
from dreamer.saves.checkpoint import Checkpointer
from dreamer.saves.snapshot import flatten
from dreamer.types import Space

UPDATES = 10
#: Half the compile time again.
CHEAPER = CHEAP | {"xla_cpu_use_fusion_emitters": False}
MESHES = {"one": (1, 1), "data": (8, 1), "both": (4, 2)}
SPACES = {"position": Space("vector", (3,))}
ONE_ACTION = {"action": Space("discrete", (), (3,))}
#: So that one update has all that a preset's updates have.
EVENTFUL = {"world_models": {"actor_critic.evolution.after": 0, "actor_critic.evolution.every": 1,
                             "actor_critic.evolution.population": 4, "actor_critic.evolution.rollouts": 2}}  # fmt: skip
ACTIONS = {**ONE_ACTION, "walk": Space("vector", (2,))}


def agent_on(shape: tuple[int, int]) -> Agent:
    config = small_config(dict(deter=64, hidden=16, units=16, blocks=8, depth=8), optimizer=dict(learning_rate=1e-3))
    run = dataclasses.replace(config.run, batch_size=8, mesh_data=shape[0], mesh_model=shape[1])
    return Agent(SPACES, ACTIONS, dataclasses.replace(config, run=run), devices=jax.devices())


def named(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    return {f"{prefix}/{'.'.join(map(str, path))}": np.asarray(leaf) for path, leaf in flatten(tree).items()}


def update_presets(folder: Path, presets: Sequence[str]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for preset in presets:
        state: Any = None
        for name, (data, model) in MESHES.items():
            options = {"run.batch_size": 8, "run.mesh_data": data, "run.mesh_model": model, **EVENTFUL.get(preset, {})}
            config = load_config([preset, "debug"], options)
            agent = Agent(SPACES, ONE_ACTION, config, devices=jax.devices())
            over, batch = agent.devices, random_batch(agent, 0)
            if name == "one":
                state = transfer.read(agent.init(0))
            found = agent.train_step(over.place_state(state), over.place(batch))
            arrays |= named(f"{preset}/{name}", dict(enumerate(map(transfer.read, found))))
    save(folder, arrays)


def save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    as_saved = {k: v.astype(np.float32) if v.dtype.kind == "V" else v for k, v in arrays.items()}
    np.savez(folder / "arrays.npz", **as_saved)


def main(folder: Path, presets: Sequence[str] = ()) -> None:
    learner_data.B = 8
    compiler.options = lambda target: CHEAPER
    if presets:
        update_presets(folder, presets)
        return
    agents = {name: agent_on(shape) for name, shape in MESHES.items()}
    batches = [random_batch(agents["one"], seed) for seed in range(UPDATES)]
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {}
    saved = {name: Checkpointer(folder / name) for name in agents}
    start: Any = None
    on_the_way: list[Any] = []
    for name, agent in agents.items():
        over = agent.devices
        # Compiling `init` takes its time: once with a mesh is enough.
        state = over.place_state(start) if name == "data" else agent.init(0)
        start = transfer.read(state)
        arrays |= named(f"{name}/start", start)
        compiled = agent.train_step.lower(state, over.place(batches[0])).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        facts[name] = {
            "arguments": memory.argument_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "on_first": sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state)),
            "gathers": re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(.*op_name=\"([^\"]*)\"", text),
            "permutes": len(re.findall(r"(?:all-to-all|collective-permute)\(", text)),
        }
        for i, batch in enumerate(batches):
            if name == "one":
                on_the_way.append(transfer.read(state))
            else:  # each update from where one device was
                state = over.place_state(on_the_way[i])
            if i == UPDATES - 1:
                saved[name].save(i, over.one_copy(state), {})
            state, latents, metrics = compiled(state, over.place(batch))
            results = {"state": state, "latents": latents, "metrics": metrics}
            arrays |= named(f"{name}/{i}", {what: transfer.read(found) for what, found in results.items()})
        facts[name]["compiled"] = compiled
    for source, target in (("one", "data"), ("data", "one"), ("both", "one"), ("one", "both")):
        agent = agents[target]
        _, found, _ = saved[source].restore(jax.eval_shape(agent.init, 0))
        state, _, _ = facts[target]["compiled"](agent.devices.place_state(found), agent.devices.place(batches[-1]))
        arrays |= named(f"{source} to {target}", transfer.read(state))
    for fact in facts.values():
        fact.pop("compiled")
    save(folder, arrays)
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
