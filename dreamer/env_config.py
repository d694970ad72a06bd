"""The options of environments: how many, where they run, wrappers, and each suite's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from dreamer.values import LARGEST_SEED, REPEAT, STEPS, Size, group, option, plain


@group
class AtariConfig:
    """Atari through ale-py."""

    repeat: int = option(4, "Emulator frames per agent step", "frames", **REPEAT)
    size: Size = option((64, 64), "Image height and width", "pixels")
    gray: bool = option(False, "One gray channel instead of RGB")
    sticky: float = option(0.0, "Chance that the emulator repeats its last action", ge=0, le=1)
    actions: Literal["minimal", "all"] = option("minimal", "Action set")
    noops: int = option(30, "Most no-op actions at the start of an episode", "agent-free frames", ge=0, le=1_000_000)
    pooling: int = option(2, "Raw frames whose maximum is the observation", "frames", **REPEAT)
    max_frames: int = option(108_000, "Time limit of an episode", "frames", gt=0, le=10**9)
    terminal_on_life_loss: bool = option(False, "Mark a lost life as terminal for the learner (episode goes on)")
    native: bool = option(
        False, "Emulators in ale-py's C++ threads, whatever env.workers says: fast, but not the benchmark's pixels"
    )


@group
class DmcConfig:
    """DeepMind Control suite."""

    repeat: int = option(1, "Simulation control steps per agent step", "steps", **REPEAT)
    pixels: bool = option(False, "Observe a rendered image instead of the state vectors")
    size: Size = option((64, 64), "Image height and width", "pixels")
    camera: int | None = option(None, "Camera; null: 0, or 2 for the quadruped", ge=-1, le=1000)


@group
class CrafterConfig:
    """Crafter."""

    size: Size = option((64, 64), "Image height and width", "pixels")
    reward: bool = option(True, "false: Crafter's no-reward variant")


@group
class MinigridConfig:
    """MiniGrid."""

    view: Literal["partial", "full"] = option("partial", "Observe what the agent sees ahead of it, or the whole grid")
    size: Size = option((64, 64), "Image height and width", "pixels")


@group
class MemoryMazeConfig:
    """Memory Maze."""

    size: int = option(64, "Image height and width", "pixels", ge=16, le=4096)


@group
class VizdoomConfig:
    """ViZDoom."""

    size: Size = option((64, 64), "Image height and width", "pixels")
    max_tics: int = option(2100, "Time limit of an episode", "tics of 1/35 s", gt=0, le=10**9)


@group
class ProcgenConfig:
    """Procgen."""

    size: Size = option(
        (64, 64), "Image height and width; all but 64,64 are scaled down from a large picture, slow to draw", "pixels"
    )
    mode: Literal["easy", "hard"] = option("hard", "Difficulty of the levels")
    levels: int | None = option(None, "Number of different levels to draw from; null: unlimited", ge=1, le=10**9)
    start_level: int = option(0, "The first of these levels, where their number is limited", ge=0, le=10**9)


@group
class MinecraftConfig:
    """Minecraft through MineRL."""

    size: Size = option((64, 64), "Image height and width", "pixels")
    steps: int = option(36_000, "Time limit of an episode", "agent steps", gt=0, le=10**9)
    break_speed: float = option(100.0, "How many times as fast blocks break", gt=0, le=1e6)
    sticky_attack: int = option(
        30, "Steps that an attack lasts, where env.minecraft.break_speed is 1", ge=0, le=1_000_000
    )
    sticky_jump: int = option(10, "Steps that a jump lasts", ge=0, le=1_000_000)
    pitch_limit: float = option(60.0, "How far up and down one can look", "degrees", ge=0, le=90)


@group
class DmlabConfig:
    """DeepMind Lab."""

    repeat: int = option(4, "Frames per agent step", "frames", **REPEAT)
    size: Size = option((64, 64), "Image height and width", "pixels")


@group
class GymConfig:
    """Any Gymnasium environment."""

    repeat: int = option(1, "Environment steps per agent step", "steps", **REPEAT)
    render: bool = option(False, "Observe the rendered image instead of the environment's own observation")
    size: Size | None = option(None, "Resize images to height and width; null: as they come", "pixels")
    info_mask: bool = option(False, "Take only the actions that info['action_mask'] allows")
    kwargs: Annotated[dict[str, Any], BeforeValidator(plain)] = option(dict, "Keyword arguments for gymnasium.make")


@group
class GridworldConfig:
    """The built-in slippery grid."""

    layout: Literal["lake", "random"] = option("lake", "FrozenLake's 4 x 4 map, or one drawn from a seed")
    side: int = option(8, "Height and width of a random map", "cells", ge=3, le=64)
    seed: int = option(0, "Seed of a random map", ge=0, le=LARGEST_SEED)
    slip: float = option(2 / 3, "Chance that a move goes to one of the two sides instead", ge=0, le=1)
    starts: Literal["fixed", "anywhere"] = option(
        "fixed", "Begin at the map's start, or in a free cell drawn for each episode"
    )
    observe: Literal["image", "cell"] = option("image", "Observe a picture of the grid, or the number of the cell")


@group
class ToyConfig:
    """The built-in games: catch, and a slippery grid."""

    size: int = option(32, "Image height and width", "pixels", ge=16, le=4096)
    balls: int = option(3, "Balls that fall in one episode of catch", ge=1, le=1_000_000)
    background: Literal["plain", "moving"] = option(
        "plain", "Behind the game of catch: one color, or colored waves that drift, others in each episode"
    )
    grid: GridworldConfig = option(GridworldConfig, "Slippery grid")


@group
class EnvConfig:
    """Environments: how many, where they run, and each suite's own options."""

    num_envs: int = option(16, "Training environments stepped together (N)", gt=0, le=65_536)
    workers: Literal["auto", "inline", "process"] = option(
        "auto", "inline: in the training process; process: one worker each; auto: what the suite prefers"
    )
    timeout_seconds: float | None = option(
        600.0,
        "A worker process that takes longer for one step, or to start, is ended and replaced; null: wait "
        "forever. Environments in the training process cannot be interrupted",
        "seconds",
        resume=True,
        ge=0.01,
        le=1e6,
    )
    restart_seconds: float = option(
        1.0,
        "Wait before replacing a failed environment; doubles with each failure in an episode, up to a minute",
        "seconds",
        resume=True,
        ge=0,
        le=3600,
    )
    failure_limit: int | None = option(
        10,
        "Most failures of environments within env.failure_minutes; one more stops the run; null: no limit",
        resume=True,
        ge=0,
        le=1_000_000,
    )
    failure_minutes: float = option(
        10.0, "Time within which failures of environments are counted", "minutes", resume=True, gt=0, le=1e6
    )
    repeat: int = option(
        1, "Times each action is taken; not with a suite's own repeat above 1", "steps per agent step", **REPEAT
    )
    time_limit: int | None = option(
        None, "Longest episode, cut off there; null: the environment's own limit", "agent steps", **STEPS
    )
    resize: Size | None = option(
        None, "Resize images to height and width, after the suite's own size; null: as they come", "pixels"
    )
    grayscale: bool = option(False, "One gray channel instead of RGB")
    frame_noise: float | None = option(
        None, "Standard deviation of the noise on the agent's images; null: none", "of 255 levels", gt=0, le=255
    )
    reward_scale: float = option(
        1.0, "Factor on rewards that the agent learns from; scores stay unscaled", gt=0, le=1e6
    )
    atari: AtariConfig = option(AtariConfig, "Atari")
    dmc: DmcConfig = option(DmcConfig, "DeepMind Control")
    crafter: CrafterConfig = option(CrafterConfig, "Crafter")
    minigrid: MinigridConfig = option(MinigridConfig, "MiniGrid")
    memorymaze: MemoryMazeConfig = option(MemoryMazeConfig, "Memory Maze")
    vizdoom: VizdoomConfig = option(VizdoomConfig, "ViZDoom")
    procgen: ProcgenConfig = option(ProcgenConfig, "Procgen")
    minecraft: MinecraftConfig = option(MinecraftConfig, "Minecraft")
    dmlab: DmlabConfig = option(DmlabConfig, "DeepMind Lab")
    gym: GymConfig = option(GymConfig, "Gymnasium")
    toy: ToyConfig = option(ToyConfig, "Built-in toy")
