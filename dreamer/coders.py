"""Encoder and decoder: observations to tokens, features to predicted observations; actions for networks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dreamer.config import ModelConfig
from dreamer.distributions import MultiOneHot, Output, SquaredError, symlog
from dreamer.kernels import in_parts
from dreamer.networks import MLP, BlockLinear, Conv, Dense, Linear, RMSNorm, at_least_float32
from dreamer.types import Space, Spaces, visible

Observations = Mapping[str, jax.Array]


def select_keys(spaces: Spaces, pattern: str, option: str) -> dict[str, Space]:
    """The observation spaces whose names match the regular expression `pattern`, in key order."""
    seen = dict(sorted(visible(spaces).items()))
    try:
        chosen = {k: s for k, s in seen.items() if re.search(pattern, k)}
    except re.error as error:
        raise ValueError(f"expected {option} to be a regular expression, got {pattern!r}: {error}") from None
    if not chosen:
        raise ValueError(
            f"expected {option} to match at least one of {list(seen)}, got {pattern!r}, which matches none"
        )
    return chosen


def one_hot(index: jax.Array, space: Space, dtype: jnp.dtype) -> jax.Array:
    """One-hots of a discrete space's entries side by side: (..., *shape) int -> (..., sum(classes))."""
    batch = index.shape[: index.ndim - len(space.shape)]
    entries = index.reshape(*batch, -1)
    parts = [jax.nn.one_hot(entries[..., i], n, dtype=dtype) for i, n in enumerate(space.classes or ())]
    return jnp.concatenate(parts, -1)


def flatten_vectors(observations: Observations, spaces: Spaces) -> jax.Array:
    """Vectors symlogged and discrete entries one-hot, concatenated in key order: at least float32 (..., width)."""
    parts = []
    for key, space in spaces.items():
        value = observations[key]
        if space.kind == "discrete":
            parts.append(one_hot(value, space, jnp.float32))
        else:
            batch = value.shape[: value.ndim - len(space.shape)]
            parts.append(symlog(at_least_float32(value)).reshape(*batch, -1))
    return jnp.concatenate(parts, -1)


def join_actions(actions: Mapping[str, jax.Array], spaces: Spaces, dtype: jnp.dtype) -> jax.Array:
    """Actions by name -> (..., A): one-hot where discrete, side by side in the order of `spaces`."""
    parts = []
    for key, space in spaces.items():
        value = actions[key]
        if space.kind == "discrete":
            parts.append(one_hot(value, space, dtype))
        else:
            batch = value.shape[: value.ndim - len(space.shape)]
            parts.append(value.reshape(*batch, -1).astype(dtype))
    return jnp.concatenate(parts, -1)


def split_actions(flat: jax.Array, spaces: Spaces) -> dict[str, jax.Array]:
    """(..., A) -> actions by name, as the environments take them: class indices int32, vectors float32."""
    actions, offset = {}, 0
    for key, space in spaces.items():
        part = flat[..., offset : offset + space.flat_width]
        offset += space.flat_width
        if space.classes is not None:
            cuts = [sum(space.classes[:i]) for i in range(1, len(space.classes))]
            index = [piece.argmax(-1) for piece in jnp.split(part, cuts, -1)]
            part = jnp.stack(index, -1).astype(jnp.int32)
        actions[key] = part.reshape(*flat.shape[:-1], *space.shape).astype(space.dtype)
    return actions


def rematerialised(stage: Callable[[jax.Array], jax.Array], remat: bool) -> Callable[[jax.Array], jax.Array]:
    """`stage`, recomputed in the backward pass if `remat`: less memory, more time, the same numbers."""
    return jax.checkpoint(stage) if remat else stage


@dataclasses.dataclass(frozen=True)
class ImageGeometry:
    """How images of (height, width) shrink to a map and grow back.

    `stages` halvings take the padded size to `map`; a map has 3 to 7 units a side (4 stages for 64x64 and 96x96).
    """

    height: int
    width: int
    stages: int

    @classmethod
    def of(cls, height: int, width: int, usual: int) -> ImageGeometry:
        """The number of stages nearest to `usual` whose map is 3 to 7 a side; for long images the long side decides."""
        sides = lambda n: (math.ceil(height / 2**n), math.ceil(width / 2**n))  # noqa: E731
        fits = [n for n in range(1, 12) if min(sides(n)) >= 3 and max(sides(n)) <= 7]
        if not fits:
            fits = [n for n in range(1, 12) if max(sides(n)) <= 7][:1]
        if not fits:
            raise ValueError(
                f"expected images of at most {7 * 2**11} pixels a side, got {height} x {width}; make them smaller: "
                "--env.resize HEIGHT,WIDTH"
            )
        return cls(height, width, min(fits, key=lambda n: abs(n - usual)))

    @property
    def map(self) -> tuple[int, int]:
        return math.ceil(self.height / 2**self.stages), math.ceil(self.width / 2**self.stages)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns added at the bottom and right before the first stage."""
        return self.map[0] * 2**self.stages - self.height, self.map[1] * 2**self.stages - self.width

    def activations(self, config: ModelConfig) -> int:
        """Numbers in the largest layer for one image: the first convolution, before its pooling."""
        return math.prod(self.map) * 4**self.stages * config.depth * config.depth_multipliers[0]

    def depths(self, config: ModelConfig) -> list[int]:
        """Channels after each stage; the last multiplier repeats."""
        factors = config.depth_multipliers
        return [config.depth * factors[min(i, len(factors) - 1)] for i in range(self.stages)]


def image_geometry(images: Spaces, config: ModelConfig) -> ImageGeometry:
    """The geometry that all image keys share; different sizes are an error."""
    sizes = {key: space.shape[:2] for key, space in images.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"expected images of one size, got {sizes}; resize them or choose among them with "
            "model.encoder_keys and model.decoder_keys"
        )
    height, width = next(iter(sizes.values()))
    return ImageGeometry.of(height, width, len(config.depth_multipliers))


class ImageEncoder(nnx.Module):
    """Convolution stages: uint8 images (M, H, W, C) per key -> (M, map height * map width * channels).

    A stage is convolution -> 2x2 max-pool -> RMSNorm -> SiLU, in that order.
    """

    def __init__(self, spaces: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.geometry = image_geometry(spaces, config)
        self.keys, self.remat = tuple(spaces), config.remat
        depths = self.geometry.depths(config)
        inputs = [sum(space.shape[-1] for space in spaces.values()), *depths]
        pairs = list(zip(inputs, depths, strict=False))
        self.convs = nnx.List([Conv(i, o, config.kernel, rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([RMSNorm(o) for o in depths])
        self.width = math.prod(self.geometry.map) * depths[-1]
        self.activations = self.geometry.activations(config)

    def __call__(self, observations: Observations, dtype: jnp.dtype) -> jax.Array:
        images = jnp.concatenate([observations[key] for key in self.keys], -1)
        return in_parts(partial(self._encode, dtype), images, self.activations * jnp.dtype(dtype).itemsize)

    def _encode(self, dtype: jnp.dtype, images: jax.Array) -> jax.Array:
        x = images.astype(dtype) / 255 - 0.5
        bottom, right = self.geometry.padding
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
        stage = lambda conv, norm, x: jax.nn.silu(norm(conv.pooled(x)))  # noqa: E731
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = rematerialised(partial(stage, conv, norm), self.remat)(x)
        return x.reshape(x.shape[0], -1)


class Encoder(nnx.Module):
    """Observations (..., *shape) per key -> tokens (..., width): vector features followed by image features."""

    def __init__(self, spaces: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        spaces = select_keys(spaces, config.encoder_keys, "model.encoder_keys")
        images = {k: s for k, s in spaces.items() if s.kind == "image"}
        self.vectors = nnx.static({k: s for k, s in spaces.items() if s.kind != "image"})
        inputs = sum(space.flat_width for space in self.vectors.values())
        self.mlp = MLP(inputs, config.units, config.encoder_layers, rngs=rngs) if self.vectors else None
        self.cnn = ImageEncoder(images, config, rngs=rngs) if images else None
        self.width = (config.units if self.vectors else 0) + (self.cnn.width if self.cnn else 0)

    def __call__(self, observations: Observations, batch: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """`batch`: the leading axes of every observation, (B, T) in training or (N,) when acting."""
        tokens = []
        if self.mlp is not None:
            tokens.append(self.mlp(flatten_vectors(observations, self.vectors).astype(dtype)))
        if self.cnn is not None:
            flat = {k: observations[k].reshape(-1, *observations[k].shape[len(batch) :]) for k in self.cnn.keys}
            tokens.append(self.cnn(flat, dtype).reshape(*batch, -1))
        return jnp.concatenate(tokens, -1)


class ImageDecoder(nnx.Module):
    """Feature (M, F) -> image in [0, 1], (M, H, W, C) with all keys' channels side by side.

    The start map adds a block-linear view of the deterministic state to a dense view of the stochastic one.
    """

    def __init__(self, width: int, spaces: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.geometry = image_geometry(spaces, config)
        depths = self.geometry.depths(config)[::-1]
        if depths[0] % config.blocks:
            raise ValueError(
                f"expected the deepest image channels, model.depth x {config.depth_multipliers[-1]} = {depths[0]}, "
                f"to be a multiple of model.blocks = {config.blocks}; change model.depth or model.blocks"
            )
        self.channels = tuple((key, space.shape[-1]) for key, space in spaces.items())
        self.start, self.deter, self.remat = (*self.geometry.map, depths[0]), config.deter, config.remat
        self.activations = self.geometry.activations(config)
        units = math.prod(self.start)
        self.from_deter = BlockLinear(config.blocks, config.deter, units, rngs=rngs)
        self.from_stoch = Dense(width - config.deter, 2 * config.units, rngs=rngs)
        self.from_stoch_out = Linear(2 * config.units, units, rngs=rngs)
        self.start_norm = RMSNorm(depths[0])
        pairs = list(zip(depths, depths[1:], strict=False))
        self.convs = nnx.List([Conv(i, o, config.kernel, rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([RMSNorm(o) for _, o in pairs])
        self.out = Conv(depths[-1], sum(c for _, c in self.channels), config.kernel, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        deter, stoch = jnp.split(x, [self.deter], -1)
        height, width, depth = self.start
        blocks = self.from_deter.kernel.shape[0]
        x = self.from_deter(deter.reshape(-1, blocks, deter.shape[-1] // blocks))
        x = x.reshape(-1, blocks, height, width, depth // blocks).transpose(0, 2, 3, 1, 4)
        x = x.reshape(-1, height, width, depth)
        x = x + self.from_stoch_out(self.from_stoch(stoch)).reshape(-1, height, width, depth)
        x = in_parts(self._grow, jax.nn.silu(self.start_norm(x)), self.activations * x.dtype.itemsize)
        x = x[:, : self.geometry.height, : self.geometry.width]
        cuts = np.cumsum([c for _, c in self.channels])[:-1]
        parts = jnp.split(jax.nn.sigmoid(at_least_float32(x)), cuts, -1)
        return {key: part for (key, _), part in zip(self.channels, parts, strict=True)}

    def _grow(self, x: jax.Array) -> jax.Array:
        """The start map (M, h, w, depth) -> images before the sigmoid, with their padding."""
        stage = lambda conv, norm, x: jax.nn.silu(norm(conv.upsampled(x)))  # noqa: E731
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = rematerialised(partial(stage, conv, norm), self.remat)(x)
        return rematerialised(lambda x: self.out.upsampled(x), self.remat)(x)


class Decoder(nnx.Module):
    """Model feature -> one predicted observation per key, as something with ``loss(target)`` and ``mode()``.

    Vectors: squared error against symlog of the target. Discrete: cross entropy. Images: squared error on [0, 1].
    """

    def __init__(self, width: int, spaces: Spaces, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """width: of the feature."""
        self.spaces = nnx.static(select_keys(spaces, config.decoder_keys, "model.decoder_keys"))
        images = {k: s for k, s in self.spaces.items() if s.kind == "image"}
        vectors = {k: s for k, s in self.spaces.items() if s.kind != "image"}
        self.mlp = MLP(width, config.units, config.decoder_layers, rngs=rngs) if vectors else None
        self.heads = nnx.Dict({k: Linear(config.units, s.flat_width, rngs=rngs) for k, s in vectors.items()})
        self.cnn = ImageDecoder(width, images, config, rngs=rngs) if images else None

    def __call__(self, x: jax.Array) -> dict[str, Output]:
        """x: features (..., F)."""
        outputs = self.vectors(x, [k for k, s in self.spaces.items() if s.kind != "image"])
        if self.cnn is not None:
            for key, image in self.cnn(x.reshape(-1, x.shape[-1])).items():
                outputs[key] = SquaredError(image.reshape(*x.shape[:-1], *image.shape[1:]), rank=3)
        return outputs

    def vectors(self, x: jax.Array, keys: Sequence[str]) -> dict[str, Output]:
        """The same for some of the keys that are not images."""
        if self.mlp is None:
            return {}
        x = self.mlp(x)
        return {key: self._vector_output(self.heads[key](x), self.spaces[key]) for key in keys}

    def targets(self, observations: Observations) -> dict[str, jax.Array]:
        """Observations as the outputs' losses expect them: images in [0, 1], discrete one-hot, vectors as they are."""
        targets = {}
        for key, space in self.spaces.items():
            value = observations[key]
            if space.kind == "image":
                targets[key] = value.astype(jnp.float32) / 255
            elif space.kind == "discrete":
                targets[key] = one_hot(value, space, jnp.float32)
            else:
                targets[key] = at_least_float32(value)
        return targets

    @staticmethod
    def _vector_output(x: jax.Array, space: Space) -> Output:
        if space.classes is not None:
            return MultiOneHot(x, space.classes)
        return SquaredError(x.reshape(*x.shape[:-1], *space.shape), rank=len(space.shape), symlog_space=True)
