"""Encoders and decoders: geometry of images of any size, key filters, targets, and clear errors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from learner_data import weights

from dreamer.coders import Decoder, Encoder, ImageGeometry, flatten_vectors, one_hot
from dreamer.config import ModelConfig
from dreamer.distributions import MultiOneHot, SquaredError
from dreamer.types import Space

RNG = np.random.default_rng(0)

MIXED = {
    "image": Space("image", (16, 24, 3)),
    "depth": Space("image", (16, 24, 1)),
    "position": Space("vector", (2, 2)),
    "mass": Space("vector", ()),
    "item": Space("discrete", (), (3,)),
    "tools": Space("discrete", (2,), (2, 4)),
    "log/secret": Space("vector", (7,)),
}


def config(**changes: Any) -> ModelConfig:
    small = dict(deter=8, hidden=4, stoch=2, classes=2, blocks=2, units=6, depth=2, kernel=3)
    return ModelConfig(**small | changes)


def batch_of(spaces: dict[str, Space], *batch: int) -> dict[str, np.ndarray]:
    """Random observations with leading axes `batch`."""
    count = int(np.prod(batch))
    draw = lambda space: np.stack([space.sample(RNG) for _ in range(count)])  # noqa: E731
    return {k: draw(s).reshape(*batch, *s.shape) for k, s in spaces.items()}


#: Width of a feature.
FEATURE = 12


def model_state(c: ModelConfig, *batch: int) -> jax.Array:
    """A feature (..., F)."""
    stoch = jax.nn.one_hot(RNG.integers(0, c.classes, (*batch, c.stoch)), c.classes).reshape(*batch, -1)
    return jnp.concatenate([jnp.asarray(RNG.normal(0, 1, (*batch, c.deter)), jnp.float32), stoch], -1)


# Geometry

SIZES = {
    # (height, width): (stages, map)
    (64, 64): (4, (4, 4)),
    (96, 96): (4, (6, 6)),
    (48, 48): (4, (3, 3)),
    (32, 32): (3, (4, 4)),
    (84, 84): (4, (6, 6)),
    (210, 160): (5, (7, 5)),
    (32, 48): (3, (4, 6)),
    (128, 128): (5, (4, 4)),
}


@pytest.mark.parametrize("size", SIZES)
def test_geometry_of_usual_images(size):
    geometry = ImageGeometry.of(*size, usual=4)
    stages, small = SIZES[size]
    assert (geometry.stages, geometry.map) == (stages, small)
    assert all(3 <= side <= 7 for side in geometry.map)


def test_every_image_shrinks_to_a_small_map_and_grows_back():
    for height in range(5, 300, 7):
        for width in range(5, 300, 11):
            geometry = ImageGeometry.of(height, width, usual=4)
            scale = 2**geometry.stages
            for side, small, padding in zip((height, width), geometry.map, geometry.padding, strict=True):
                assert small * scale == side + padding
                assert 0 <= padding < scale
                assert 1 <= small <= 7
            # Three a side at least, wherever some number of halvings gives that.
            maps = [[-(-side // 2**n) for side in (height, width)] for n in range(1, 12)]
            if any(min(sides) >= 3 and max(sides) <= 7 for sides in maps):
                assert min(geometry.map) >= 3, (height, width)


def test_depths_repeat_the_last_multiplier():
    assert ImageGeometry.of(64, 64, 4).depths(config(depth=3)) == [6, 9, 12, 12]
    assert ImageGeometry.of(210, 160, 4).depths(config(depth=3)) == [6, 9, 12, 12, 12]
    assert ImageGeometry.of(32, 32, 4).depths(config(depth=3)) == [6, 9, 12]


@pytest.mark.parametrize("size", [(64, 64), (84, 84), (210, 160), (32, 48)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_come_back_in_their_size(size, channels):
    """Shapes only: nothing is computed."""
    spaces, c = {"image": Space("image", (*size, channels))}, config()

    def forward(image: jax.Array, feature: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoder, decoder = Encoder(spaces, c, rngs=weights()), Decoder(FEATURE, spaces, c, rngs=weights())
        tokens = encoder({"image": image}, (2, 3), jnp.float32)
        assert tokens.shape[-1] == encoder.width
        return tokens, decoder(feature)["image"].mode()

    image = jax.ShapeDtypeStruct((2, 3, *size, channels), jnp.uint8)
    feature = jax.ShapeDtypeStruct((2, 3, FEATURE), jnp.float32)
    tokens, decoded = jax.eval_shape(forward, image, feature)
    stages, (height, width) = SIZES[size]
    assert tokens.shape == (2, 3, height * width * 8)
    assert decoded.shape == image.shape and decoded.dtype == jnp.float32


# Encoder


def test_vectors_are_symlogged_and_choices_one_hot_in_key_order():
    spaces = {k: MIXED[k] for k in ("item", "mass", "position", "tools")}
    observations = {
        "item": jnp.array([2]),
        "mass": jnp.array([-3.0]),
        "position": jnp.array([[[0.0, 1.0], [10.0, -1.0]]]),
        "tools": jnp.array([[1, 3]]),
    }
    log = np.log
    oracle = [0, 0, 1, -log(4), 0, log(2), log(11), -log(2), 0, 1, 0, 0, 0, 1]
    np.testing.assert_allclose(flatten_vectors(observations, spaces)[0], oracle, rtol=1e-6)


def test_one_hot_of_nested_choices():
    space = Space("discrete", (2, 2), (2, 3, 4, 2))
    ours = one_hot(jnp.array([[[1, 0], [3, 0]]], jnp.int32), space, jnp.float32)
    np.testing.assert_array_equal(ours, [[0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]])


def test_tokens_are_vector_features_then_image_features():
    encoder = Encoder(MIXED, config(), rngs=weights())
    observations = batch_of(MIXED, 2, 3)
    tokens = np.asarray(encoder(observations, (2, 3), jnp.float32))
    assert tokens.shape == (2, 3, encoder.width)
    other = batch_of(MIXED, 2, 3)
    changed = np.asarray(encoder(observations | {"mass": other["mass"]}, (2, 3), jnp.float32)) != tokens
    assert changed[..., :6].any() and not changed[..., 6:].any()
    changed = np.asarray(encoder(observations | {"image": other["image"]}, (2, 3), jnp.float32)) != tokens
    assert not changed[..., :6].any() and changed[..., 6:].any()


def test_log_keys_are_invisible():
    encoder = Encoder(MIXED, config(encoder_keys="secret|mass"), rngs=weights())
    assert list(encoder.vectors) == ["mass"]
    assert "log/secret" not in Decoder(FEATURE, MIXED, config(), rngs=weights()).spaces
    observations = batch_of(MIXED, 2)
    before = encoder(observations, (2,), jnp.float32)
    broken = observations | {"log/secret": np.full_like(observations["log/secret"], np.nan)}
    np.testing.assert_array_equal(encoder(broken, (2,), jnp.float32), before)
    with pytest.raises(ValueError, match="model.encoder_keys"):
        Encoder(MIXED, config(encoder_keys="log/"), rngs=weights())


def test_key_filters_choose_what_is_read_and_predicted():
    encoder = Encoder(MIXED, config(encoder_keys="^(mass|image)$"), rngs=weights())
    assert list(encoder.vectors) == ["mass"] and encoder.cnn.keys == ("image",)
    encoder = Encoder(MIXED, config(encoder_keys="tools"), rngs=weights())
    assert encoder.cnn is None and encoder.width == 6
    decoder = Decoder(FEATURE, MIXED, config(decoder_keys="^(depth|item)$"), rngs=weights())
    outputs = decoder(model_state(config(), 2))
    assert set(outputs) == set(decoder.targets(batch_of(MIXED, 2))) == {"depth", "item"}
    decoder = Decoder(FEATURE, MIXED, config(decoder_keys="mass"), rngs=weights())
    assert decoder.cnn is None and set(decoder(model_state(config(), 2))) == {"mass"}


def test_constant_padding_is_gray_and_only_at_the_bottom_and_right():
    """20x20 is padded to 24x24: as if mid-gray (127.5 of 255) pixels had been appended."""
    c = config(depth=1, blocks=1)
    small, large = Space("image", (20, 20, 1)), Space("image", (24, 24, 1))
    assert ImageGeometry.of(1, 1, 4).map == (1, 1) and ImageGeometry.of(2, 200, 4).map == (1, 7)
    with pytest.raises(ValueError, match="at most 14336 pixels a side, got 2 x 14337"):
        ImageGeometry.of(2, 14337, 4)
    assert ImageGeometry.of(20, 20, 4).padding == (4, 4) and ImageGeometry.of(24, 24, 4).padding == (0, 0)
    first, second = Encoder({"image": small}, c, rngs=weights()), Encoder({"image": large}, c, rngs=weights())
    image = RNG.integers(0, 256, (2, 20, 20, 1)).astype(np.float32)
    padded = np.pad(image, ((0, 0), (0, 4), (0, 4), (0, 0)), constant_values=127.5)
    ours = first({"image": jnp.asarray(image)}, (2,), jnp.float32)
    np.testing.assert_allclose(ours, second({"image": jnp.asarray(padded)}, (2,), jnp.float32), rtol=1e-5, atol=1e-6)


# Decoder


def test_decoder_predicts_every_observation_as_its_kind():
    c = config()
    decoder, observations = Decoder(FEATURE, MIXED, c, rngs=weights()), batch_of(MIXED, 2, 3)
    outputs, targets = decoder(model_state(c, 2, 3)), decoder.targets(observations)
    assert set(outputs) == set(targets) == {k for k in MIXED if not k.startswith("log/")}
    for key, output in outputs.items():
        loss = output.loss(targets[key])
        assert loss.shape == (2, 3) and loss.dtype == jnp.float32
        assert np.isfinite(loss).all() and (np.asarray(loss) >= 0).all(), key
        assert output.mode().shape == targets[key].shape, key
        assert isinstance(output, MultiOneHot if MIXED[key].classes else SquaredError)
    for key in ("image", "depth"):
        mode = np.asarray(outputs[key].mode())
        assert (mode > 0).all() and (mode < 1).all()
        np.testing.assert_allclose(targets[key], observations[key] / 255, rtol=1e-6)
        pixels = (mode - observations[key] / 255) ** 2
        np.testing.assert_allclose(outputs[key].loss(targets[key]), pixels.sum((-1, -2, -3)), rtol=1e-5)
    vector = outputs["position"].prediction - np.sign(targets["position"]) * np.log1p(np.abs(targets["position"]))
    np.testing.assert_allclose(outputs["position"].loss(targets["position"]), (vector**2).sum((-1, -2)), rtol=1e-5)


@pytest.mark.parametrize("key", ["items", "keys", "0", "a/b", "params", "_private"])
def test_observations_may_have_any_name(key):
    spaces, c = {key: Space("vector", (2,)), "z": Space("image", (8, 8, 1))}, config()
    state = model_state(c, 3)
    tree = nnx.to_pure_dict(nnx.state(Decoder(FEATURE, spaces, c, rngs=weights()), nnx.Param))
    assert key in tree["heads"]
    assert set(Decoder(FEATURE, spaces, c, rngs=weights())(state)) == {key, "z"}


def test_rematerialisation_changes_no_number():
    spaces = {"image": Space("image", (12, 16, 1))}
    observations = batch_of(spaces, 2)

    def gradient(remat: bool) -> tuple[int, Any]:
        """How many parts are recomputed, and the gradient."""
        c = config(remat=remat)
        graph, state = nnx.split((Encoder(spaces, c, rngs=weights()), Decoder(FEATURE, spaces, c, rngs=weights())))

        def loss(state: Any) -> jax.Array:
            encoder, decoder = nnx.merge(graph, state)
            tokens = encoder(observations, (2,), jnp.float32)
            outputs, targets = decoder(tokens[:, :FEATURE]), decoder.targets(observations)
            return outputs["image"].loss(targets["image"]).mean()

        return str(jax.make_jaxpr(loss)(state)).count("remat"), jax.jit(jax.grad(loss))(state)

    (few, kept), (more, recomputed) = gradient(False), gradient(True)
    # Dense layers always recompute their norm; the option adds every convolution of encoder and decoder.
    assert more > few
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, recomputed)


# Errors


def test_images_of_different_sizes_are_refused():
    spaces = {"left": Space("image", (16, 16, 3)), "right": Space("image", (16, 24, 3))}
    for coder in (Encoder, functools.partial(Decoder, FEATURE)):
        with pytest.raises(ValueError, match=r"images of one size.*left.*16, 16.*right.*16, 24.*encoder_keys"):
            coder(spaces, config(), rngs=weights())
    Encoder(spaces, config(encoder_keys="left"), rngs=weights())


def test_a_filter_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"model.encoder_keys to match at least one of \['depth', .*'pixels'"):
        Encoder(MIXED, config(encoder_keys="pixels"), rngs=weights())
    with pytest.raises(ValueError, match="model.decoder_keys to match"):
        Decoder(FEATURE, MIXED, config(decoder_keys="$^"), rngs=weights())


def test_a_broken_filter_is_refused():
    with pytest.raises(ValueError, match=r"model.encoder_keys to be a regular expression, got '\(image'"):
        Encoder(MIXED, config(encoder_keys="(image"), rngs=weights())


def test_image_channels_that_the_blocks_do_not_divide_are_refused():
    spaces = {"image": Space("image", (32, 32, 3))}
    with pytest.raises(ValueError, match=r"model.depth x 4 = 12, to be a multiple of model.blocks = 8"):
        Decoder(FEATURE, spaces, config(depth=3, blocks=8), rngs=weights())
