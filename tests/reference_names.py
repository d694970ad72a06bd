"""Where the tensors of the reference arrays live in this project's parameters, and how their layouts relate."""

from __future__ import annotations

import numpy as np

DETER, LATENT, BLOCKS = 32, 32, 4


def _dense(ours: str, linear: str, norm: str) -> dict[str, str]:
    return {
        f"{linear}/kernel": f"{ours}/linear/kernel",
        f"{linear}/bias": f"{ours}/linear/bias",
        f"{norm}/scale": f"{ours}/norm/scale",
    }


def _linear(ours: str, theirs: str) -> dict[str, str]:
    return {f"{theirs}/kernel": f"{ours}/kernel", f"{theirs}/bias": f"{ours}/bias"}


def _stack(ours: str, theirs: str, layers: int) -> dict[str, str]:
    names: dict[str, str] = {}
    for i in range(layers):
        names |= _dense(f"{ours}/layers/{i}", f"{theirs}/linear{i}", f"{theirs}/norm{i}")
    return names


def names(vectors: tuple[str, ...], images: bool, discrete: bool) -> dict[str, str]:
    """Reference name -> our parameter path."""
    rssm, objective = "world_model/rssm", "world_model/objective/decoder"
    table: dict[str, str] = {}
    for i, part in enumerate(("deter", "stoch", "action")):
        table |= _dense(f"{rssm}/from_{part}", f"dyn/dynin{i}", f"dyn/dynin{i}norm")
    table |= _linear(f"{rssm}/mix", "dyn/dynhid0") | {"dyn/dynhid0norm/scale": f"{rssm}/mix_norm/scale"}
    table |= _linear(f"{rssm}/gates", "dyn/dyngru")
    table |= _dense(f"{rssm}/posterior_mlp/layers/0", "dyn/obs0", "dyn/obs0norm")
    table |= _linear(f"{rssm}/posterior_logits", "dyn/obslogit")
    for i in range(2):
        table |= _dense(f"{rssm}/prior_mlp/layers/{i}", f"dyn/prior{i}", f"dyn/prior{i}norm")
    table |= _linear(f"{rssm}/prior_logits", "dyn/priorlogit")
    if vectors:
        for i in range(3):
            table |= _dense(f"world_model/encoder/mlp/layers/{i}", f"enc/mlp{i}", f"enc/mlp{i}norm")
        table |= _stack(f"{objective}/mlp", "dec/mlp", 3)
        for key in vectors:
            table |= _linear(f"{objective}/heads/{key}", f"dec/vec/{key}/pred")
    if images:
        for i in range(4):
            table |= _linear(f"world_model/encoder/cnn/convs/{i}", f"enc/cnn{i}")
            table |= {f"enc/cnn{i}norm/scale": f"world_model/encoder/cnn/norms/{i}/scale"}
        table |= _linear(f"{objective}/cnn/from_deter", "dec/sp0") | _dense(
            f"{objective}/cnn/from_stoch", "dec/sp1", "dec/sp1norm"
        )
        table |= _linear(f"{objective}/cnn/from_stoch_out", "dec/sp2")
        table |= {"dec/spnorm/scale": f"{objective}/cnn/start_norm/scale"}
        for i, stage in enumerate((2, 1, 0)):
            table |= _linear(f"{objective}/cnn/convs/{i}", f"dec/conv{stage}")
            table |= {f"dec/conv{stage}norm/scale": f"{objective}/cnn/norms/{i}/scale"}
        table |= _linear(f"{objective}/cnn/out", "dec/imgout")
    table |= _stack("world_model/reward/mlp", "rew/mlp", 1) | _linear("world_model/reward/out", "rew/head/logits")
    table |= _stack("world_model/cont/mlp", "con/mlp", 1) | _linear("world_model/cont/out", "con/head/logit")
    policy = "actor_critic/policy"
    table |= _stack(f"{policy}/mlp", "pol/mlp", 3)
    if discrete:
        table |= _linear(f"{policy}/heads/action/logits", "pol/head/action/logits")
    else:
        table |= _linear(f"{policy}/heads/action/mean", "pol/head/action/mean")
        table |= _linear(f"{policy}/heads/action/std", "pol/head/action/stddev")
    return table | _stack("actor_critic/value/mlp", "val/mlp", 3) | _linear("actor_critic/value/out", "val/head/logits")


def to_ours(name: str, value: np.ndarray) -> np.ndarray:
    """The one difference in layout: the reference's decoder reads [stoch, deter], ours [deter, stoch]."""
    if name == "dec/mlp/linear0/kernel":
        return np.concatenate([value[LATENT:], value[:LATENT]], 0)
    return value


def nest(flat: dict[str, np.ndarray]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `nest`."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: np.asarray(value)}
    return flat
