"""Makes the components of a run from its configuration: logdir, environments, agent, replay; the start-up summary."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dreamer.agent import Agent, TrainState
from dreamer.config import Config
from dreamer.contradictions import check_gigabytes, unmet
from dreamer.envs import TaskError, VectorEnv, list_suites, make_vector_env
from dreamer.envs.vector import MakeEnv
from dreamer.model import act_by_planner, act_by_policy
from dreamer.paths import PathError, absolute, make_folder
from dreamer.presets import CONFIG_FILE, ConfigError
from dreamer.records.display import Row, device_row, format_bytes, format_count, parameters_row
from dreamer.records.system import versions
from dreamer.replay import Replay, ReplayError, bytes_per_step, choose_storage, machine_memory
from dreamer.run.devices import choose_device, compute_dtype
from dreamer.run.shares import own_seed, share
from dreamer.types import Space, Spaces, replay_fields, visible

#: What a run has in its logdir: folders, and files of records.
_FOLDERS = ("checkpoints", "best", "replay", "tensorboard", "videos", "reports")
_RECORDS = ("metrics.jsonl", "scores.jsonl")
#: Number of characters, the last ones, of a task in the automatic name of a folder.
_NAME_LENGTH = 80


def resolve_logdir(config: Config) -> Config:
    """The configuration with a logdir: the one given, or a new folder under runs/ named after task, time and seed."""
    if config.logdir:
        return config
    name = re.sub(r"[^\w.+-]+", "_", config.task)[-_NAME_LENGTH:]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return dataclasses.replace(config, logdir=str(absolute(Path("runs") / f"{name}-{stamp}-seed{config.seed}")))


def prepare_logdir(logdir: Path) -> None:
    """Makes the folder of a run. PathError if nothing can be written there, or if it holds files that are not a run's:
    they would be truncated."""
    make_folder(logdir)
    if os.path.isdir(logdir / CONFIG_FILE):
        raise PathError(f"expected the folder of a run, got {str(logdir)!r}, where {CONFIG_FILE} is a folder itself")
    for name in _FOLDERS:
        if os.path.lexists(logdir / name) and not os.path.isdir(logdir / name):
            raise PathError(f"expected the folder of a run, got {str(logdir)!r}, where {name} is no folder")
    if os.path.exists(logdir / CONFIG_FILE) or os.path.exists(logdir / "checkpoints"):
        return
    for name in _RECORDS:
        if os.path.isfile(logdir / name) and os.path.getsize(logdir / name):
            raise PathError(
                f"expected a new folder or that of a run, got {str(logdir)!r}, which has no {CONFIG_FILE} but a {name} "
                "of something else; choose another --logdir, or remove that file"
            )


#: The task of a run whose environments come from a user's function, unless the user gave it a name.
OWN_TASK = "make_env"


def is_listed(task: str) -> bool:
    """Whether the task's name belongs to one of our suites."""
    return task.partition("_")[0] in list_suites()


def name_own_task(config: Config) -> Config:
    """The configuration for a user's own environment, which must not have the name of one of ours.

    Its frames count like those of a Gymnasium environment: agent steps times `env.gym.repeat`.
    """
    return dataclasses.replace(config, task=OWN_TASK) if is_listed(config.task) else config


#: What the start-up summary says about a resume, by whether the environments can be restored.
RESUME = {
    True: "exact: the environments can be restored",
    False: "the environments cannot be restored: episodes under way are closed as abandoned, new ones begin",
}


def training_envs(config: Config, restarts: int, make_env: MakeEnv | None) -> VectorEnv:
    """The training environments of this process; each process and each restart of the run gives them different seeds,
    or they would repeat themselves."""
    seed = own_seed(config.seed, restarts)
    return make_vector_env(config.task, config.env, share(config.env.num_envs), seed, training=True, make=make_env)


def evaluation_envs(config: Config, make_env: MakeEnv | None, count: int, seed: int | None = None) -> VectorEnv:
    seed = config.seed if seed is None else seed
    return make_vector_env(config.task, config.env, count, seed, training=False, make=make_env)


def make_agent(config: Config, observations: Spaces, actions: Spaces, devices: Sequence[jax.Device] = ()) -> Agent:
    """The agent on the chosen device, or on as many of these `devices` as the options say; ConfigError if the devices
    do not fit, or if the networks cannot be built for these spaces."""
    device = choose_device(config.run.platform)
    try:
        chooses = act_by_policy if config.planner.name is None else act_by_planner(config.planner)
        return Agent(observations, actions, config, compute_dtype(config.run, device), devices, chooses)
    except ValueError as error:
        raise ConfigError(str(error)) from error


#: Bytes that the training state has for each weight: itself and the two moments of its gradient.
_WEIGHT_BYTES = 12


def check_networks_fit(config: Config, agent: Agent) -> None:
    """ConfigError if the training state of one agent exceeds the memory of the devices that hold it."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(agent.shapes))
    stats = _memory_stats(choose_device(config.run.platform))
    room = machine_memory() if stats is None else stats["bytes_limit"] * agent.devices.shape[1]
    if weights * _WEIGHT_BYTES > room:
        raise ConfigError(
            f"expected networks that memory has room for, got {format_count(weights)} parameters, "
            f"{format_bytes(weights * _WEIGHT_BYTES)} with their optimizer state, of {format_bytes(room)}; "
            "take a smaller size (--configs size12m), or lower model.deter, model.hidden or model.units"
        )


def replay_limit(config: Config, step_bytes: int = 1) -> int:
    """Most steps that the options allow. step_bytes: of one step, if the limit is given in gigabytes."""
    size = config.replay.gigabytes
    return config.replay.capacity if size is None else int(size * 1e9) // step_bytes


def replay_capacity(config: Config, preloaded: int = 0, step_bytes: int = 1) -> int:
    """Steps to make room for: never more than the run collects or begins with (`preloaded`), and at least a little more
    than one sequence per environment. step_bytes: see `replay_limit`."""
    envs, length = share(config.env.num_envs), config.run.batch_length + 1
    collected = share(config.run.agent_steps + config.env.num_envs) if config.run.collect else 0
    limit = share(replay_limit(config, step_bytes))
    needed = min(limit, preloaded + collected)
    return max(math.ceil(needed / envs), length + 1) * envs


def make_replay(config: Config, agent: Agent, preloaded: int = 0) -> Replay:
    """An empty replay with room for `preloaded` steps too; ConfigError if it does not fit this machine, or is too small
    for training to begin."""
    fields = replay_fields(agent.observations, agent.actions, agent.extras)
    step_bytes = bytes_per_step(fields)
    check_gigabytes(config, replay_limit(config, step_bytes), step_bytes)
    capacity = replay_capacity(config, preloaded, step_bytes)
    folder, free = Path(config.logdir) / "replay", free_device_bytes(choose_device(config.run.platform))
    kind = config.replay.storage
    if agent.devices.shape != (1, 1):
        free = None  # batches come from the host, each part straight to its device
        if kind == "device":
            raise ConfigError(
                "expected replay.storage auto, host or disk with several devices, got device; or compute on one: "
                "--run.mesh_data 1 --run.mesh_model 1"
            )
    if kind == "auto":
        kind = choose_storage(fields, capacity, folder, free)
    try:
        return Replay(
            fields,
            share(config.env.num_envs),
            capacity,
            config.run.batch_length + 1,
            own_seed(config.seed),
            online=config.replay.online,
            selection=config.replay.selection,
            storage=kind,
            folder=folder,
            device_bytes=free,
        )
    except ReplayError as error:
        raise ConfigError(str(error)) from error


def _memory_stats(device: jax.Device) -> dict[str, int] | None:
    """What an accelerator reports about its memory; None: it has none of its own, or does not report it."""
    return device.memory_stats() if device.platform != "cpu" else None


def free_device_bytes(device: jax.Device) -> int | None:
    """Free memory of an accelerator; None as in `_memory_stats`."""
    stats = _memory_stats(device)
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def module_sizes(params: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters of each module."""
    modules = {**params["world_model"], **params["actor_critic"]}
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in modules.items()}


def mesh_rows(agent: Agent) -> list[Row]:
    """How many devices share the work; nothing if there is only one."""
    data, model = agent.devices.shape
    if data * model == 1:
        return []
    copies = "each has all weights" if model == 1 else f"the weights divided over {model}"
    return [Row("devices", f"{data} x {model} (run.mesh_data x run.mesh_model): a batch divided over all, {copies}")]


def summary_rows(config: Config, agent: Agent, state: TrainState, replay: Replay, envs: VectorEnv) -> list[Row]:
    """The lines of the start-up summary."""
    device = jax.tree.leaves(state["params"])[0].devices().pop()
    found = versions()
    needs, has, stored = replay.budget.needs, replay.budget.has, replay.capacity
    shares = [f"{format_bytes(stored * needs[m])} of {format_bytes(has[m])} {m}" for m in replay.budget.holds]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    disk = stored * needs["disk"] + (config.run.checkpoint_keep + 1) * weights
    observations = ", ".join(f"{k} {s.shape}" for k, s in visible(agent.observations).items())
    actions = ", ".join(f"{k} {s.classes or s.shape}" for k, s in agent.actions.items())
    where = type(envs).__name__.removesuffix("VectorEnv").lower()
    return [
        device_row(device.platform, device.device_kind, config.run.platform),
        Row(
            "versions",
            f"python {found['python']}, jax {found['jax']}, flax {found['flax']}, dreamer {found['dreamer']}",
        ),
        Row("task", f"{config.task}, {envs.num_envs} environments ({where}), seed {config.seed}"),
        Row("spaces", f"{observations} -> {actions}"),
        *mesh_rows(agent),
        parameters_row(module_sizes(state["params"])),
        Row("compute", f"{agent.dtype.name}, batch {config.run.batch_size} x {config.run.batch_length}"),
        Row("updates", f"{config.updates_per_step:g} per agent step (train ratio {config.run.train_ratio:g})"),
        Row(
            "replay",
            f"{format_bytes(replay.nbytes_per_step)} per step, {format_bytes(replay.nbytes)} for {stored:,} steps;"
            f" {replay.budget.kind} storage, up to {', '.join(shares)}",
        ),
        Row("disk", f"up to about {format_bytes(disk)}, checkpoints included, of {format_bytes(has['disk'])} free"),
        *(Row("will not happen", text) for text in unmet(config, len(replay) > 0)),
        Row("resume", RESUME[bool(envs.restorable)]),
        Row("logdir", config.logdir),
    ]


def spaces_to_json(spaces: Spaces) -> dict[str, Any]:
    return {key: dataclasses.asdict(space) for key, space in spaces.items()}


def spaces_from_json(data: Mapping[str, Any]) -> dict[str, Space]:
    return {
        key: Space(s["kind"], tuple(s["shape"]), None if s["classes"] is None else tuple(s["classes"]))
        for key, s in data.items()
    }


def check_spaces_as_trained(agent: Agent, envs: VectorEnv) -> None:
    """TaskError if the agent cannot play in these environments because they see or do something else."""
    for what, trained, found in (
        ("observations", agent.observations, envs.observation_spaces),
        ("actions", agent.actions, envs.action_spaces),
    ):
        ours, theirs = visible(trained), visible(found)
        if ours != theirs:
            raise TaskError(f"expected the {what} that the agent was trained with, {ours}, got {theirs}")
