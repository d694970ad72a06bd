"""Every option of the project: name, type, default, unit and meaning, each exactly once; those of environments are in
`env_config.py`, those of planners in `planner_config.py`.

The tree of frozen, validated dataclasses below *is* the configuration. YAML presets and command-line
overrides (see `presets.py`) only change values; an unknown key or a value of the wrong type is an error.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dreamer import contradictions, paths
from dreamer.env_config import EnvConfig
from dreamer.planner_config import PlannerConfig
from dreamer.values import COUNT, LARGEST_SEED, LAYERS, SCALE, STEPS, UNITS, group, option


def _path(value: Any) -> Any:
    """An absolute path, so that a changed working folder does not matter; anything else is left to the type check."""
    return str(paths.absolute(value)) if isinstance(value, str | os.PathLike) else value


@group
class RunConfig:
    """The training loop: how long, how often, how much."""

    agent_steps: int = option(1_100_000, "Length of the run", "agent steps", resume=True, **STEPS)
    train_ratio: float = option(256.0, "Replayed steps per collected agent step", gt=0, le=1e6)
    seeds: int | None = option(
        None,
        "Independent agents trained together, in folders seed_N of the logdir; null: one, in the logdir",
        ge=1,
        le=1024,
    )
    updates_per_dispatch: int = option(
        1, "Updates in one program on the device, where at least this many are due in the same step", gt=0, le=1024
    )
    batch_size: int = option(16, "Sequences per update (B)", gt=0, le=65_536)
    batch_length: int = option(
        64, "Trained steps per sequence (T), the context step not counted", "steps", ge=2, le=65_536
    )
    log_every: int = option(1000, "Interval between metric writes", "agent steps", resume=True, **STEPS)
    report_every: int | None = option(
        20_000,
        "Interval between reports: dream videos, health of the model; null: none",
        "agent steps",
        resume=True,
        **STEPS,
    )
    eval_every: int | None = option(
        None, "Interval between evaluations; null: none", "agent steps", resume=True, **STEPS
    )
    eval_episodes: int = option(10, "Episodes per evaluation", "episodes", resume=True, **COUNT)
    eval_envs: int = option(4, "Environments stepped together in evaluation", resume=True, gt=0, le=65_536)
    eval_policy: Literal["mode", "sample"] = option(
        "mode", "Actions in evaluation: most likely or sampled", resume=True
    )
    final_eval: bool = option(False, "Evaluate once more when the run ends", resume=True)
    checkpoint_every: int | None = option(
        None, "Interval between checkpoints; null: by time only", "agent steps", resume=True, **STEPS
    )
    checkpoint_minutes: float = option(
        15.0, "Interval between checkpoints by the clock", "minutes", resume=True, gt=0, le=1e9
    )
    checkpoint_keep: int = option(2, "Newest checkpoints kept", resume=True, ge=1, le=1_000_000)
    checkpoint_milestones: int | None = option(
        None, "Interval between checkpoints that are kept for good; null: none", "agent steps", resume=True, **STEPS
    )
    platform: Literal["auto", "cpu", "gpu", "tpu"] = option(
        "auto", "Device kind; auto: the fastest present", resume=True
    )
    mesh_data: int | None = option(
        None,
        "Devices that share a batch, times run.mesh_model; null: as many of those present as divide it",
        "devices",
        resume=True,
        ge=1,
        le=65_536,
    )
    mesh_model: int | None = option(
        None,
        "Devices that share one copy of the weights; null: 1, or for 100 million parameters and more as many as can",
        "devices",
        resume=True,
        ge=1,
        le=65_536,
    )
    coordinator: str | None = option(
        None,
        "Where the processes of one run meet: HOST:PORT of process 0, or auto in a cluster that knows; null: alone",
        resume=True,
    )
    processes: int | None = option(
        None, "How many processes share the run; null: what the cluster says", resume=True, ge=1, le=65_536
    )
    process_id: int | None = option(
        None, "Index of this process, from 0; null: what the cluster says", resume=True, ge=0, le=65_535
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Dtype of activations; auto: bfloat16 on accelerators, float32 on the CPU"
    )
    without: tuple[str, ...] = option(
        (),
        "Rewrites for speed to do without, such as in_one_kernel and in_few_kernels on a GPU; see docs/performance.md",
        resume=True,
    )
    collect: bool = option(
        True, "false: train on the preloaded data alone; run.agent_steps counts the steps that collecting would take"
    )
    display: bool = option(True, "Live progress display in a terminal", resume=True)


@group
class SelectionConfig:
    """Which sequences are trained on, after the online queue: a mixture by fractions, which need not sum to 1."""

    uniform: float = option(1.0, "Fraction drawn uniformly", **SCALE)
    prioritised: float = option(0.0, "Fraction drawn by priority", **SCALE)
    recency: float = option(0.0, "Fraction drawn by age, the newest most often", **SCALE)
    priority: Literal["loss", "curious"] = option(
        "loss", "The model's loss when last trained on, or first of all how seldom a sequence was trained on"
    )
    priority_exponent: float = option(0.8, "Chance proportional to the loss to this power", ge=0, le=10)
    priority_zero_on_sample: bool = option(False, "Priority is 0 from when a sequence is drawn until its loss is known")
    recency_half_life: float = option(
        100_000.0, "Age at which a sequence is half as likely", "agent steps", ge=1e-3, le=1e12
    )

    @pydantic.model_validator(mode="after")
    def _something(self) -> SelectionConfig:
        if not (self.uniform or self.prioritised or self.recency):
            raise ValueError("expected a fraction above 0 for uniform, prioritised or recency, got 0 for each")
        if self.priority != "loss" and not self.prioritised:
            raise ValueError(f"expected a fraction above 0 for prioritised with priority {self.priority}, got 0")
        return self


@group
class ReplayConfig:
    """The replay buffer."""

    capacity: int = option(5_000_000, "Steps kept, over all environments", "agent steps", **STEPS)
    gigabytes: float | None = option(None, "Size, in place of replay.capacity; null: none", "10^9 bytes", gt=0, le=1e6)
    storage: Literal["auto", "host", "disk", "device"] = option(
        "auto",
        "Where steps are kept: the machine's memory, files in the logdir, the accelerator; auto: the fastest that fits",
        resume=True,
    )
    online: bool = option(True, "Train once on each new stretch of data, ahead of other sequences")
    selection: SelectionConfig = option(SelectionConfig, "Which sequences are drawn after the online queue")
    preload: str | None = option(
        None, "Folder of episode files, or a Minari dataset, that replay holds from the start; null: none"
    )

    _places = pydantic.field_validator("preload", mode="before")(_path)


@group
class ModelConfig:
    """The world model's and the behaviour's networks. `configs/sizes/` set deter, hidden, classes, units, depth."""

    deter: int = option(2048, "Units of the deterministic state (D)", **UNITS)
    hidden: int = option(256, "Units of the layers inside the RSSM", **UNITS)
    latent: Literal["categorical", "gaussian", "deterministic", "mixture"] = option(
        "categorical",
        "Kind of the latent variables: classes (DreamerV2, V3), normals (PlaNet, V1), without chance, or normals with "
        "a mixture as prior (World Models)",
    )
    stoch: int = option(32, "Latent variables (S)", gt=0, le=4096)
    classes: int = option(16, "Classes per categorical latent variable (K)", ge=2, le=4096)
    components: int = option(5, "With mixture: normals in the prior of each latent variable", ge=1, le=256)
    temperature: float = option(
        1.0, "With mixture: of what dreams draw; above 1 they are less certain, and harder to exploit", gt=0, le=100
    )
    dynamics: Literal["block_gru", "gru", "normed_gru", "lstm"] = option(
        "block_gru",
        "How the deterministic state follows: a GRU in blocks (V3), dense (PlaNet, V1), normalised (V2); an LSTM, "
        "beside which the latent is drawn from the observation alone (World Models)",
    )
    blocks: int = option(8, "Blocks of the block-linear layers (G)", gt=0, le=4096)
    units: int = option(256, "Units of the layers outside the RSSM", **UNITS)
    depth: int = option(16, "Channels of the convolutions, times the multipliers", gt=0, le=4096)
    depth_multipliers: tuple[Annotated[int, Field(ge=1, le=64)], ...] = option(
        (2, 3, 4, 4), "Channel multipliers by stage; the last repeats", min_length=1, max_length=16
    )
    kernel: int = option(5, "Convolution kernel side", "pixels", gt=0, le=31)
    encoder_keys: str = option(".*", "Regular expression: observation keys the encoder reads")
    decoder_keys: str = option(".*", "Regular expression: observation keys the decoder predicts")
    encoder_layers: int = option(3, "Dense layers of the vector encoder", **LAYERS)
    decoder_layers: int = option(3, "Dense layers of the vector decoder", **LAYERS)
    prior_layers: int = option(2, "Dense layers before the prior logits", **LAYERS)
    posterior_layers: int = option(1, "Dense layers before the posterior logits", **LAYERS)
    reward_layers: int = option(1, "Dense layers of the reward head", **LAYERS)
    cont_layers: int = option(1, "Dense layers of the continue head", **LAYERS)
    policy_layers: int = option(3, "Dense layers of the policy", **LAYERS)
    value_layers: int = option(3, "Dense layers of the critic", **LAYERS)
    reward_head: Literal["two_hot", "normal"] = option(
        "two_hot", "What the reward is to the model: two-hot over bins, or normal: half the squared error"
    )
    value_head: Literal["two_hot", "normal"] = option("two_hot", "The same for the return, which the critic predicts")
    bins: int = option(255, "Two-hot bins of reward and value (odd)", ge=3, le=65_535)
    ensemble: int | None = option(
        None,
        "Small networks that predict what the prior does, and whose disagreement is measured; null: none",
        ge=2,
        le=64,
    )
    unimix: float = option(
        0.01, "Share of a uniform distribution mixed into categorical priors and posteriors", ge=0, le=1
    )
    min_std: float = option(0.1, "Least standard deviation of a continuous policy", ge=1e-6, le=1e6)
    max_std: float = option(1.0, "Largest standard deviation of a continuous policy", ge=1e-6, le=1e6)
    remat: bool = option(False, "Recompute the convolutions and scans in the backward pass: slower, less memory")


ObjectiveName = Literal[
    "reconstruction",
    "autoencoding",
    "redundancy_reduction",
    "predict_encoding",
    "self_prediction",
    "value_equivalence",
    "probe",
]


@group
class LossConfig:
    """Loss terms."""

    objective: tuple[ObjectiveName, ...] = option(
        ("reconstruction",),
        "What the latents are trained to predict, one or several: observations, by the whole state or (autoencoding) "
        "by the latent alone; encodings, by redundancy_reduction, predict_encoding or self_prediction; rewards, ends, "
        "values and policy by value_equivalence; beside these a "
        "probe, a decoder that teaches the latents nothing",
        max_length=8,
    )
    reconstruction: float = option(1.0, "Scale of each loss of reconstruction, autoencoding or probe", **SCALE)
    redundancy_reduction: float = option(0.05, "Scale of the loss of redundancy_reduction", **SCALE)
    predict_encoding: float = option(500.0, "Scale of the loss of predict_encoding", **SCALE)
    self_prediction: float = option(500.0, "Scale of the loss of self_prediction", **SCALE)
    target_rate: float = option(0.05, "Rate of self_prediction's slow encoder", "per update", gt=0, le=1)
    value_equivalence: float = option(
        1.0, "Scale of the four losses of value_equivalence, each beside the scale of its own kind", **SCALE
    )
    unroll: int = option(5, "Steps along the actions taken, which value_equivalence predicts from (K)", ge=1, le=100)
    reward: float = option(1.0, "Scale of the reward loss", **SCALE)
    cont: float = option(1.0, "Scale of the continue loss", **SCALE)
    dyn: float = option(1.0, "Scale of KL(sg(posterior) || prior)", **SCALE)
    rep: float = option(0.1, "Scale of KL(posterior || sg(prior))", **SCALE)
    policy: float = option(1.0, "Scale of the policy loss", **SCALE)
    value: float = option(1.0, "Scale of the imagined value loss", **SCALE)
    replay_value: float = option(0.3, "Scale of the replayed value loss", **SCALE)
    free_nats: float = option(1.0, "KL below which no gradient flows", "nats", **SCALE)
    free_nats_of: Literal["step", "mean", "rep"] = option(
        "step", "Which KL that is: of each step, the mean of the batch, or of each step that of rep alone"
    )
    discount_in_cont: bool = option(
        True, "The continue head learns the discount too; false: the returns multiply its predictions by the discount"
    )


@group
class EvolutionConfig:
    """With actor_critic.gradient evolution: CMA-ES over a policy's weights, tried in dreams of actor_critic.horizon."""

    population: int = option(64, "Candidates in a generation", ge=4, le=65_536)
    rollouts: int = option(16, "Dreams that each candidate is tried in, from the same states", ge=1, le=65_536)
    std: float = option(0.1, "First step size: the standard deviation of each weight", gt=0, le=1e3)
    every: int = option(100, "Interval between generations", "updates", ge=1, le=10**9)
    after: int = option(0, "Updates before them, in which the world model alone learns", "updates", ge=0, le=10**9)


@group
class ActorCriticConfig:
    """Behaviour learned in imagination."""

    horizon: int = option(15, "Imagined steps (H)", "agent steps", ge=1, le=10_000)
    imagine_last: int | None = option(
        None, "Imagine from this many steps at the end of each sequence; null: from all", "steps", ge=2, le=65_536
    )
    imagine_mask: Literal["predict", "ignore"] = option(
        "predict", "Where actions are masked, imagine with the masks that the decoder predicts, or with every action"
    )
    discount_horizon: float = option(333.0, "Horizon of the discount, 1 / (1 - gamma)", "agent steps", gt=1, le=1e6)
    lambda_: float = option(0.95, "Mixing of the lambda-return", ge=0, le=1)
    gradient: Literal["reinforce", "dynamics", "mixed", "none", "search", "evolution"] = option(
        "reinforce",
        "How the policy learns: from the log-probability of its actions, through the dream's dynamics, by both; not at "
        "all: a planner acts; from what a tree search finds at replayed states; or as a linear controller that is "
        "evolved, without a gradient (World Models)",
    )
    simulations: int = option(16, "Nodes of each such tree, where actor_critic.gradient is search", ge=1, le=10_000)
    evolution: EvolutionConfig = option(EvolutionConfig, "How a controller is evolved")
    reinforce_share: float = option(0.1, "Share of reinforce where actor_critic.gradient is mixed", ge=0, le=1)
    noise: float = option(
        0.0,
        "Standard deviation of noise on the policy's sampled continuous actions, chance of a random discrete one",
        **SCALE,
    )
    entropy: float = option(3e-4, "Scale of the entropy bonus", "per nat", **SCALE)
    explore: float = option(0.0, "Scale of the ensemble's disagreement as a reward, in dreams and replay", **SCALE)
    task_reward: float = option(1.0, "With actor_critic.explore: scale of the task's reward beside it", **SCALE)
    return_scale: Literal["percentiles", "none"] = option(
        "percentiles", "What returns are divided by: their range between two percentiles, or nothing"
    )
    return_rate: float = option(0.01, "EMA rate of the return percentiles", "per update", gt=0, le=1)
    return_low: float = option(5.0, "Lower percentile of returns", "%", ge=0, le=100)
    return_high: float = option(95.0, "Upper percentile of returns", "%", ge=0, le=100)
    return_limit: float = option(1.0, "Least return scale", ge=1e-6, le=1e6)
    values: Literal["own", "slow"] = option("own", "Whose values returns are made of: the critic's, the slow critic's")
    slow_rate: float = option(0.02, "EMA rate of the slow critic; 1: a copy of the critic", gt=0, le=1)
    slow_every: int = option(1, "Interval between steps of the slow critic", "updates", ge=1, le=10**9)
    slow_scale: float = option(1.0, "Scale of the slow critic's part in both critic losses; 0: without it", **SCALE)


@group
class OptimizerConfig:
    """How weights follow their gradients."""

    kind: Literal["laprop", "adam"] = option(
        "laprop", "Adaptive gradient clipping and LaProp (V3), or Adam with a clipped global norm (PlaNet to V2)"
    )
    learning_rate: float = option(4e-5, "Learning rate after warm-up", gt=0, le=10)
    policy_rate: float | None = option(None, "Learning rate of the policy; null: optimizer.learning_rate", gt=0, le=10)
    value_rate: float | None = option(None, "Learning rate of the critic; null: optimizer.learning_rate", gt=0, le=10)
    warmup: int = option(1000, "Linear warm-up of the learning rate", "updates", ge=0, le=10**9)
    clip: float = option(0.3, "With laprop: largest gradient norm as a share of the tensor's norm", gt=0, le=1e6)
    clip_min_norm: float = option(1e-3, "With laprop: least tensor norm used for clipping", ge=1e-12, le=1e6)
    clip_norm: float = option(
        100.0,
        "With adam: largest norm of all gradients together, of policy and critic each if their rate is own",
        gt=0,
        le=1e6,
    )
    weight_decay: float = option(0.0, "With adam: share of every weight that an update takes away", ge=0, lt=1)
    beta1: float = option(0.9, "Decay of the momentum", ge=0, lt=1)
    beta2: float = option(0.999, "Decay of the second moment", ge=0, lt=1)
    eps: float = option(1e-20, "Added to the root of the second moment", ge=1e-30, le=1)
    accumulate: int = option(
        1,
        "Equal slices in which a batch is processed, to save memory: the same update, a little slower",
        ge=1,
        le=65_536,
    )


@group
class LogConfig:
    """What is written where."""

    jsonl: bool = option(True, "Write metrics.jsonl and scores.jsonl", resume=True)
    tensorboard: bool = option(True, "Write TensorBoard events", resume=True)
    wandb: str | None = option(None, "Project of Weights & Biases to record to; null: none", resume=True)
    mlflow: str | None = option(None, "Experiment of MLflow to record to; null: none", resume=True)
    videos: bool = option(True, "Write episode and dream videos, and pages of reports", resume=True)
    video_every: int = option(
        20_000, "Interval between recorded training episodes", "agent steps", resume=True, **STEPS
    )
    video_fps: int = option(15, "Frames per second of videos", "1/s", resume=True, gt=0, le=100)
    picture_megabytes: float | None = option(
        200.0,
        "Most space for pictures in TensorBoard, growing with the run: what comes too early is left out, and only the "
        "newest of its name is kept as a file; null: no limit",
        "10^6 bytes",
        resume=True,
        gt=0,
        le=1e9,
    )
    tensorboard_megabytes: float | None = option(
        100.0,
        "Most space for scalars in TensorBoard, likewise; metrics.jsonl has all; null: no limit",
        "10^6 bytes",
        resume=True,
        gt=0,
        le=1e9,
    )


@group
class Config:
    """The whole configuration of a run."""

    task: str = option("toy_catch", "Environment, as suite_name; `dreamer envs` lists them")
    logdir: str = option("", "Folder of the run; empty: runs/TASK-DATE-seedN", resume=True)
    seed: int = option(0, "Seed of everything random", ge=0, le=LARGEST_SEED)
    from_checkpoint: str | None = option(None, "Logdir whose best or newest weights start this run")
    from_checkpoint_parts: tuple[Literal["all", "world_model", "actor", "critic"], ...] = option(
        ("all",), "Which parts --from_checkpoint copies", min_length=1, max_length=4
    )
    run: RunConfig = option(RunConfig, "Training loop")
    env: EnvConfig = option(EnvConfig, "Environments")
    replay: ReplayConfig = option(ReplayConfig, "Replay buffer")
    model: ModelConfig = option(ModelConfig, "Networks")
    loss: LossConfig = option(LossConfig, "Loss terms")
    actor_critic: ActorCriticConfig = option(ActorCriticConfig, "Behaviour")
    planner: PlannerConfig = option(PlannerConfig, "Who acts, the policy or a planner")
    optimizer: OptimizerConfig = option(OptimizerConfig, "Optimizer")
    log: LogConfig = option(LogConfig, "Logging")

    _places = pydantic.field_validator("from_checkpoint", mode="before")(_path)

    @pydantic.field_validator("logdir", mode="before")
    @classmethod
    def _place(cls, value: Any) -> Any:
        return value if value == "" else _path(value)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Config:
        contradictions.check(self)
        return self

    @property
    def updates_per_step(self) -> float:
        """Gradient updates per agent step: train_ratio / (B * T)."""
        return self.run.train_ratio / (self.run.batch_size * self.run.batch_length)
