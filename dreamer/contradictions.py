"""Options that are valid alone but impossible together, and what was asked for but will not happen.

A contradiction is refused, with its numbers, when the configuration is made, before anything slow.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from dreamer.values import ConfigError

if TYPE_CHECKING:
    from dreamer.config import Config


def check(config: Config) -> None:
    """ValueError, in one line, for the first contradiction."""
    for rule in (_networks, _latent, _objectives, _planner, _behaviour, _ensemble, _batches, _devices, _seeds, _data):
        if fault := rule(config):
            raise ValueError(fault)


def _networks(config: Config) -> str | None:
    model = config.model
    if model.deter % model.blocks:
        return f"expected model.deter to be a multiple of model.blocks ({model.blocks}), got {model.deter}"
    if model.dynamics == "lstm" and model.deter % 2:
        return f"expected an even model.deter with an LSTM, half of it its cells, got {model.deter}; add or remove one"
    if model.bins % 2 == 0:
        return f"expected an odd number of model.bins, got {model.bins}; add or remove one"
    if model.min_std >= model.max_std:
        return f"expected model.min_std < model.max_std, got {model.min_std} and {model.max_std}"
    for name, pattern in (("encoder_keys", model.encoder_keys), ("decoder_keys", model.decoder_keys)):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"expected model.{name} to be a regular expression, got {pattern[:100]!r}: {error}"
    return None


def _latent(config: Config) -> str | None:
    model, mixture = config.model, config.model.latent == "mixture"
    for name, default in (("components", type(model)().components), ("temperature", type(model)().temperature)):
        if not mixture and (value := getattr(model, name)) != default:
            return (
                f"expected model.{name} {default:g} with model.latent {model.latent}, got {value:g}; nothing would "
                "read it: leave it out, or pass --model.latent mixture"
            )
    if mixture and config.loss.free_nats_of != "rep":
        return (
            f"expected loss.free_nats_of rep with model.latent mixture, got {config.loss.free_nats_of}; its dyn is a "
            "log-density, which free nats would cut off: pass --loss.free_nats_of rep"
        )
    return None


#: Options of the loss that only some objectives read.
_OF_OBJECTIVES = {
    "reconstruction": ("reconstruction", "autoencoding", "probe"),
    "redundancy_reduction": ("redundancy_reduction",),
    "predict_encoding": ("predict_encoding",),
    "self_prediction": ("self_prediction",),
    "target_rate": ("self_prediction",),
    "value_equivalence": ("value_equivalence",),
    "unroll": ("value_equivalence",),
}


def _objectives(config: Config) -> str | None:
    loss, named = config.loss, config.loss.objective
    decoders = [name for name in named if name in _OF_OBJECTIVES["reconstruction"]]
    if len(set(named)) < len(named) or len(decoders) > 1:
        one = "one of reconstruction, autoencoding and probe"
        return f"expected each objective once, and {one} at most, got {list(named)}; leave one out"
    untouched = type(loss)()
    for option, readers in _OF_OBJECTIVES.items():
        value, default = getattr(loss, option), getattr(untouched, option)
        if value != default and not set(readers) & set(named):
            return (
                f"expected loss.{option} {default:g} without {' or '.join(readers)} in loss.objective, got {value:g}; "
                "nothing would read it"
            )
    return None


def _behaviour(config: Config) -> str | None:
    behaviour, length = config.actor_critic, config.run.batch_length
    if behaviour.imagine_last is not None and behaviour.imagine_last > length:
        return f"expected actor_critic.imagine_last <= run.batch_length ({length}), got {behaviour.imagine_last}"
    if behaviour.return_low >= behaviour.return_high:
        return (
            "expected actor_critic.return_low < actor_critic.return_high, "
            f"got {behaviour.return_low:g} and {behaviour.return_high:g}"
        )
    if behaviour.noise and config.planner.name is not None:
        return f"expected actor_critic.noise 0 where a planner acts, got {behaviour.noise:g}; pass --planner.noise"
    if behaviour.explore and behaviour.gradient in ("none", "search", "evolution"):
        return (
            "expected actor_critic.gradient reinforce, dynamics or mixed with actor_critic.explore, which rewards what "
            f"is dreamt, got {behaviour.gradient}; name one of these"
        )
    if behaviour.gradient == "none":
        return _nobody_learns(config)
    if behaviour.gradient == "search" and "value_equivalence" not in config.loss.objective:
        return (
            "expected value_equivalence in loss.objective with actor_critic.gradient search, which learns by it, got "
            f"{list(config.loss.objective)}; add it"
        )
    evolves, evolution = behaviour.gradient == "evolution", behaviour.evolution
    if not evolves and evolution != type(evolution)():
        return (
            f"expected actor_critic.gradient evolution with options of actor_critic.evolution, got {behaviour.gradient}"
            "; nothing would read them: leave them out, or pass --actor_critic.gradient evolution"
        )
    if evolves and config.planner.name is not None:
        return (
            f"expected planner.name null with actor_critic.gradient evolution, got {config.planner.name}; its "
            "controller acts: pass --planner.name null"
        )
    if evolves and (places := config.run.batch_size * config.run.batch_length) < evolution.rollouts:
        return (
            f"expected actor_critic.evolution.rollouts <= run.batch_size x run.batch_length ({places}), got "
            f"{evolution.rollouts}; dreams begin at states of a batch"
        )
    return None


def _nobody_learns(config: Config) -> str | None:
    """With an untrained policy and critic, a planner must act that asks neither."""
    planner = config.planner
    alone = "with an untrained policy (actor_critic.gradient none)"
    if planner.name is None:
        return f"expected a planner {alone}, got planner.name null; name one: --planner.name cem"
    if planner.critic:
        return f"expected planner.critic false {alone}, whose critic knows nothing; pass --planner.critic false"
    if planner.name in ("mcts", "dream_mpc"):
        return f"expected a planner that asks no policy {alone}, got {planner.name}; name another: --planner.name cem"
    if share := planner.settled().policy_share:
        return f"expected planner.policy_share 0 {alone}, got {share:g}; pass --planner.policy_share 0"
    return None


def _planner(config: Config) -> str | None:
    planner = config.planner
    if planner.name is not None:
        try:
            planner.settled()
        except ConfigError as error:
            return str(error)
    elif given := planner.given():
        return f"expected planner.{given[0]} null without a planner, got a value; name one: --planner.name mppi"
    return None


def _ensemble(config: Config) -> str | None:
    """Whatever reads disagreement needs an ensemble; and returns of two kinds are not to be added."""
    planner, behaviour = config.planner, config.actor_critic
    if config.model.ensemble is None:
        for name, scale in (("planner.penalty", planner.penalty), ("actor_critic.explore", behaviour.explore)):
            if scale:
                return f"expected {name} 0 without an ensemble, got {scale:g}; have one: --model.ensemble 5"
    if planner.penalty and planner.name is None:
        return f"expected planner.penalty 0 without a planner, got {planner.penalty:g}; name one: --planner.name mppi"
    if behaviour.task_reward != 1 and not behaviour.explore:
        return (
            f"expected actor_critic.task_reward 1 without actor_critic.explore, got {behaviour.task_reward:g}; "
            "set --actor_critic.explore"
        )
    if behaviour.explore and planner.name is not None and planner.critic:
        return (
            "expected planner.critic false with actor_critic.explore, whose critic values what is unknown beside the "
            "task, got true; pass --planner.critic false"
        )
    return None


def _batches(config: Config) -> str | None:
    run, slices = config.run, config.optimizer.accumulate
    if run.batch_size % slices:
        return f"expected run.batch_size ({run.batch_size}) to be a multiple of optimizer.accumulate, got {slices}"
    whole = [("loss.free_nats_of", config.loss.free_nats_of, "mean"),
             ("loss.objective", config.loss.objective, "redundancy_reduction"),
             ("actor_critic.gradient", config.actor_critic.gradient, "none"),
             ("actor_critic.gradient", config.actor_critic.gradient, "search"),
             ("actor_critic.gradient", config.actor_critic.gradient, "evolution")]  # fmt: skip
    for name, got, needs in whole:
        if slices > 1 and (needs in got if isinstance(got, tuple) else needs == got):
            return f"expected optimizer.accumulate 1 with {name} {needs}, got {slices}; leave it out"
    devices = (run.mesh_data or 1) * (run.mesh_model or 1)
    if run.batch_size // slices % devices:
        return (
            f"expected run.batch_size / optimizer.accumulate ({run.batch_size} / {slices}) to be a multiple of "
            f"run.mesh_data x run.mesh_model, got {devices} devices; change one of them"
        )
    return None


def _devices(config: Config) -> str | None:
    run = config.run
    devices = (run.mesh_data or 1) * (run.mesh_model or 1)
    if run.seeds is not None and devices > 1:
        return f"expected run.mesh_data and run.mesh_model 1 or null with run.seeds, got {devices} devices"
    if run.process_id is not None and run.processes is not None and run.process_id >= run.processes:
        return (
            f"expected run.process_id from 0 to {run.processes - 1}, as run.processes is {run.processes}, "
            f"got {run.process_id}"
        )
    return None


def _seeds(config: Config) -> str | None:
    last = config.seed + (config.run.seeds or 1) - 1
    if last.bit_length() > 64:
        return f"expected seeds below 2^64, got {config.run.seeds} of them (run.seeds) from {config.seed}; lower --seed"
    return None


def _data(config: Config) -> str | None:
    if not config.run.collect and config.replay.preload is None:
        return "expected data to train on with run.collect false: give it with --replay.preload PATH"
    if config.replay.gigabytes is None and never_trains(config, config.replay.capacity):
        return (
            f"expected replay.capacity {least_capacity(config)} or more, {_why(config)}, got {config.replay.capacity}; "
            "raise it, or lower run.batch_size, run.batch_length or env.num_envs"
        )
    return None


# --- When training begins ------------------------------------------------------------------------


def filling_steps(config: Config) -> int:
    """Steps of each environment until B * T sequences can start; with r steps it has r - T starts."""
    run = config.run
    return run.batch_length + math.ceil(run.batch_size * run.batch_length / config.env.num_envs)


def least_capacity(config: Config) -> int:
    """The smallest replay, in steps, with which training ever begins."""
    return config.env.num_envs * filling_steps(config)


def never_trains(config: Config, capacity: int) -> bool:
    """Whether the run is to train, but a replay of `capacity` steps is always too small for training to begin."""
    run, envs = config.run, config.env.num_envs
    rows = max(math.ceil(capacity / envs), run.batch_length + 2)
    starts = envs * (rows - run.batch_length)
    return _asks_for_updates(config) and starts < run.batch_size * run.batch_length


def check_gigabytes(config: Config, steps: int, step_bytes: int) -> None:
    """ConfigError if `replay.gigabytes` has room for too few steps, of `step_bytes` each, to ever begin training."""
    if config.replay.gigabytes is not None and never_trains(config, steps):
        raise ConfigError(
            f"expected replay.gigabytes {least_capacity(config) * step_bytes / 1e9:.3g} or more, "
            f"{least_capacity(config)} steps of {step_bytes} bytes, {_why(config)}, got {config.replay.gigabytes:g}: "
            f"{steps} steps; raise it, or lower run.batch_size, run.batch_length or env.num_envs"
        )


def _asks_for_updates(config: Config) -> bool:
    return config.run.agent_steps * config.updates_per_step >= 1


def _why(config: Config) -> str:
    run = config.run
    return (
        f"or training never begins: it takes {run.batch_size * run.batch_length} places (run.batch_size x "
        f"run.batch_length) at which {run.batch_length} steps and the one before begin, over {config.env.num_envs} "
        "environments"
    )


# --- What will not happen ------------------------------------------------------------------------


def unmet(config: Config, filled: bool = False) -> list[str]:
    """What was asked for although the run's length or numbers leave no room for it: not a mistake, but worth a word.

    filled: whether replay has data when it starts.
    """
    run, envs, found = config.run, config.env.num_envs, []
    begins = envs * filling_steps(config)
    if run.collect and not filled and _asks_for_updates(config) and begins >= run.agent_steps:
        found.append(f"updates: training begins after agent step {begins}, the run ends at {run.agent_steps}")
    together = math.ceil(envs * config.updates_per_step)
    if run.updates_per_dispatch > max(together, 1):
        found.append(
            f"{run.updates_per_dispatch} updates in one program (run.updates_per_dispatch): never more than "
            f"{max(together, 1)} due in one step of all environments"
        )
    beyond = [("run.checkpoint_milestones", run.checkpoint_milestones)]
    beyond += [] if run.final_eval else [("run.eval_every", run.eval_every)]
    for name, interval in beyond:
        if interval is not None and interval > run.agent_steps:
            found.append(f"{name} {interval}: the run ends at {run.agent_steps}")
    return found
