"""Whole updates against a trusted implementation's arrays: forward values, losses, gradients, three updates.

The reference fixed every random draw: a categorical draw is the most likely class, a normal draw is 0.5.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_names as rn

from dreamer import distributions
from dreamer.agent import Agent
from dreamer.config import Config
from dreamer.types import Space

DATA = Path(__file__).parent / "fixtures" / "reference"
TOLERANCE = 1e-4

CASES = {
    "proprio_continuous": (
        {"position": Space("vector", (5,)), "velocity": Space("vector", (3,))},
        {"action": Space("vector", (2,))},
    ),
    "image_discrete": ({"image": Space("image", (48, 48, 3))}, {"action": Space("discrete", (), (5,))}),
}


def config(**behaviour: float) -> Config:
    model = dict(deter=32, hidden=16, stoch=4, classes=8, blocks=4, units=16, depth=4, bins=31)
    return Config(
        model=model,
        run=dict(batch_size=3, batch_length=8),
        actor_critic=dict(horizon=5, **behaviour),
        optimizer=dict(learning_rate=1e-2, warmup=2),
    )


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative L2 error of one tensor."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-6))


def check(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    wrong = {k: e for k in theirs if not (e := error(ours[k], theirs[k])) < tolerance}
    assert not wrong, wrong


@dataclasses.dataclass
class Reference:
    name: str
    arrays: dict[str, np.ndarray]
    names: dict[str, str]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def params(self, prefix: str) -> dict[str, np.ndarray]:
        """Reference tensors under `prefix` by our flat parameter path, in our layout."""
        group = self.group(prefix)
        return {ours: rn.to_ours(theirs, group[theirs]) for theirs, ours in self.names.items()}

    def slow(self, prefix: str) -> dict[str, np.ndarray]:
        group = self.group(f"{prefix}slowval/")
        value = {t.removeprefix("val/"): o for t, o in self.names.items() if t.startswith("val/")}
        return {o.removeprefix("actor_critic/value/"): group[t] for t, o in value.items()}

    def batch(self, index: int) -> dict[str, np.ndarray]:
        batch = self.group(f"batch{index}/")
        stoch = batch.pop("dyn/stoch")
        assert np.array_equal(stoch.max(-1), stoch.sum(-1))
        batch |= {"deter": batch.pop("dyn/deter"), "stoch": stoch.argmax(-1).astype(np.uint8)}
        return {k: v for k, v in batch.items() if k not in ("consec", "stepid")}

    def state(self, agent: Agent) -> dict:
        state = agent.init(0)
        ours, theirs = rn.flatten(state["params"]), self.params("init/")
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        return state | {
            "params": jax.tree.map(jnp.array, rn.nest(theirs)),
            "slow": {"value": jax.tree.map(jnp.array, rn.nest(self.slow("init/")))},
            "return_scale": {"low": jnp.float32(-1.2), "high": jnp.float32(2.3)},
        }


@pytest.fixture(params=list(CASES))
def reference(request):
    arrays = dict(np.load(DATA / f"{request.param}.npz"))
    observations, _ = CASES[request.param]
    images = "image" in observations
    names = rn.names(() if images else tuple(observations), images, discrete=images)
    return Reference(request.param, arrays, names)


@pytest.fixture(autouse=True)
def fixed_draws(monkeypatch):
    monkeypatch.setattr(distributions, "draw_class", lambda key, probs: probs.argmax(-1))
    monkeypatch.setattr(distributions, "draw_normal", lambda key, shape, dtype: jnp.full(shape, 0.5, dtype))


def test_every_reference_parameter_is_mapped(reference):
    theirs = {k for k in reference.group("init/") if not k.startswith(("slowval", "retnorm"))}
    assert set(reference.names) == theirs


def test_forward(reference):
    # A vanishing rate leaves the return scale where it was, as the reference's forward pass does.
    agent = Agent(*CASES[reference.name], config(return_rate=1e-30))
    state, batch = reference.state(agent), reference.batch(0)
    expected = reference.group("forward/")
    args = (state["params"], state["slow"], state["return_scale"], batch, jax.random.key(0))
    metrics = jax.jit(agent.loss)(*args)[1][2]
    theirs = {k.removeprefix("metrics/"): v for k, v in expected.items() if k.startswith("metrics/")}
    ours = {k: v for k, v in metrics.items() if k != "opt/loss"}
    check(ours, theirs)
    assert error(metrics["opt/loss"], expected["loss"]) < TOLERANCE


def test_forward_tensors(reference):
    agent = Agent(*CASES[reference.name], config(return_rate=1e-30))
    state, batch = reference.state(agent), reference.batch(0)
    expected = reference.group("forward/")
    model = agent.model(state["params"])
    context, actions, trained = model.split_batch(batch)
    key = jax.random.key(0)
    slow = agent.slow_modules(state["slow"])
    observed = model.world_model.loss(context, actions, trained, model.actor_critic, slow, key)
    seen, x = observed.seen, observed.seen.feature
    # The reference keeps vector predictions in symlog space.
    recon = {k: v.prediction for k, v in model.world_model.objective.predict(x).items()}
    ours = {
        "tokens": seen.tokens,
        "deter": seen.states["deter"],
        "stoch": seen.states["stoch"],
        "post": seen.posterior,
        "prior": seen.prior,
        "reward": model.world_model.reward(x).mode(),
        "cont": model.world_model.cont(x).mode(),
        "value": model.actor_critic.value(x).mode(),
        "slowvalue": slow["value"](x).mode(),
    }
    ours |= {f"recon/{k}": v for k, v in recon.items()}
    ours |= {f"losses/{k}": v for k, v in observed.losses.items()}
    starts = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), seen.states)
    dream = model.dream(slow, starts, key)
    losses, returns, _, _ = model.actor_critic.imagination_loss(dream, state["return_scale"])
    bootstrap = returns[0].reshape(actions.shape[:2])
    # The reference keeps the imagined losses averaged over the horizon.
    ours |= {f"losses/{k}": v.mean(0).reshape(actions.shape[:2]) for k, v in losses.items()}
    ours["losses/repval"] = model.actor_critic.replay_loss(x, slow, trained, bootstrap)
    theirs = {k: v for k, v in expected.items() if not k.startswith("metrics/") and k != "loss"}
    check(ours, theirs)


def test_gradients(reference):
    agent = Agent(*CASES[reference.name], config())
    state, batch = reference.state(agent), reference.batch(0)
    args = (state["params"], state["slow"], state["return_scale"], batch, jax.random.key(0))
    (loss, _), grads = jax.jit(jax.value_and_grad(agent.loss, has_aux=True))(*args)
    assert error(loss, reference.arrays["grad/loss"]) < TOLERANCE
    check(rn.flatten(grads), reference.params("grad/"))


def test_three_updates(reference):
    agent = Agent(*CASES[reference.name], config())
    state = reference.state(agent)
    initial = {k: np.array(v) for k, v in rn.flatten(state["params"]).items()}
    for i in range(3):
        state, latents, metrics = agent.train_step(state, reference.batch(i))
        expected = reference.group(f"train{i}/")
        replay = {k: expected.pop(f"replay/dyn/{k}") for k in ("deter", "stoch")}
        del expected["opt/param_count"]
        # The reference has no norms by module; together they are the norm it has.
        parts = [float(metrics.pop(name)) for name in list(metrics) if name.startswith("opt/module_grad_norm/")]
        assert error(np.linalg.norm(parts), expected["opt/grad_norm"]) < TOLERANCE
        check(metrics, expected)
        # Replay stores the deterministic part in bfloat16: 8 bits of mantissa.
        np.testing.assert_allclose(np.float32(latents["deter"]), replay["deter"], rtol=2**-8, atol=1e-6)
        np.testing.assert_array_equal(latents["stoch"], replay["stoch"].argmax(-1))
    final = reference.params("final/")
    ours = rn.flatten(state["params"])
    check(ours, final)
    check({k: ours[k] - initial[k] for k in ours}, {k: final[k] - initial[k] for k in final})
    check(rn.flatten(state["slow"]["value"]), reference.slow("final/"))
    laprop = state["opt"]["laprop"]
    check(rn.flatten(laprop["rms"]), reference.params("final/opt/state/1/1/"))
    check(rn.flatten(laprop["momentum"]), reference.params("final/opt/state/2/1/"))
    scale = {k: reference.arrays[f"final/retnorm/{k}/value"] for k in ("lo", "hi")}
    check({"lo": state["return_scale"]["low"], "hi": state["return_scale"]["high"]}, scale)


def test_a_shifted_action_is_noticed(reference):
    """The check above can fail: actions shifted by one step change the losses far beyond the tolerance."""
    agent = Agent(*CASES[reference.name], config(return_rate=1e-30))
    state, batch = reference.state(agent), reference.batch(0)
    shifted = batch | {"action": np.roll(batch["action"], -1, axis=1)}
    args = (state["params"], state["slow"], state["return_scale"])
    loss = jax.jit(agent.loss)(*args, shifted, jax.random.key(0))[0]
    assert error(loss, reference.arrays["forward/loss"]) > 10 * TOLERANCE


def test_a_missing_reset_mask_is_noticed(reference):
    """Nor does a sequence whose is_first flags were lost pass."""
    agent = Agent(*CASES[reference.name], config(return_rate=1e-30))
    state, batch = reference.state(agent), reference.batch(0)
    assert batch["is_first"][:, 1:].any()
    unmasked = batch | {"is_first": np.zeros_like(batch["is_first"])}
    args = (state["params"], state["slow"], state["return_scale"])
    loss = jax.jit(agent.loss)(*args, unmasked, jax.random.key(0))[0]
    assert error(loss, reference.arrays["forward/loss"]) > 10 * TOLERANCE
