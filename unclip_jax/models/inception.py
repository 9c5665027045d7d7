"""The Inception-v3 that the FID is defined by, in TensorFlow's release.

Szegedy et al. 2016 (arXiv 1512.00567), as the graph "inception-2015-12-05" that
Heusel et al. 2017 (arXiv 1706.08500) took, and everybody after them. Where that
graph differs from the paper and from other releases of the network, the figures
follow the graph:

  - pictures are enlarged or reduced to 299 x 299 by TensorFlow 1's bilinear
    resize: the corner of a pixel, not its middle, is its place, and what is
    reduced is not smoothed (Parmar et al. 2022, arXiv 2104.11222, on what that
    does)
  - averages over 3 x 3 pixels leave out what lies beyond the border
  - the last block takes the maximum of 3 x 3 pixels where the one before it
    takes the average
  - 1008 logits, for 1000 classes
  - norms have a scale, and an epsilon of 0.001

No weights come with the package: interop/inception.py reads the file. 23.9
million numbers, 92 MB; 11 GFLOP a picture, and by XLA's memory analysis 127 MB
beside the weights for 16 of them. Two CPU cores take 0.09 s a picture. All is
float32, at the highest precision of the device: FIDs are compared to the second
decimal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_SIZE = 299


class Conv(NamedTuple):
  """A convolution without bias, a norm and a relu."""

  name: str
  features: int
  kernel: tuple[int, int]
  stride: int = 1


class Pool(NamedTuple):
  """Of 3 x 3 pixels."""

  kind: str  # "avg" or "max"
  stride: int = 1


# Layers one after another; a tuple of them stands for branches side by side,
# whose channels are joined.
Layer = Conv | Pool | tuple[Conv, ...]
Branches = tuple[tuple[Layer, ...], ...]


def _block_a(pool_features: int) -> Branches:
  return (
    (Conv("branch1x1", 64, (1, 1)),),
    (Conv("branch5x5_1", 48, (1, 1)), Conv("branch5x5_2", 64, (5, 5))),
    (
      Conv("branch3x3dbl_1", 64, (1, 1)),
      Conv("branch3x3dbl_2", 96, (3, 3)),
      Conv("branch3x3dbl_3", 96, (3, 3)),
    ),
    (Pool("avg"), Conv("branch_pool", pool_features, (1, 1))),
  )


def _block_b() -> Branches:
  return (
    (Conv("branch3x3", 384, (3, 3), 2),),
    (
      Conv("branch3x3dbl_1", 64, (1, 1)),
      Conv("branch3x3dbl_2", 96, (3, 3)),
      Conv("branch3x3dbl_3", 96, (3, 3), 2),
    ),
    (Pool("max", 2),),
  )


def _block_c(features: int) -> Branches:
  return (
    (Conv("branch1x1", 192, (1, 1)),),
    (
      Conv("branch7x7_1", features, (1, 1)),
      Conv("branch7x7_2", features, (1, 7)),
      Conv("branch7x7_3", 192, (7, 1)),
    ),
    (
      Conv("branch7x7dbl_1", features, (1, 1)),
      Conv("branch7x7dbl_2", features, (7, 1)),
      Conv("branch7x7dbl_3", features, (1, 7)),
      Conv("branch7x7dbl_4", features, (7, 1)),
      Conv("branch7x7dbl_5", 192, (1, 7)),
    ),
    (Pool("avg"), Conv("branch_pool", 192, (1, 1))),
  )


def _block_d() -> Branches:
  return (
    (Conv("branch3x3_1", 192, (1, 1)), Conv("branch3x3_2", 320, (3, 3), 2)),
    (
      Conv("branch7x7x3_1", 192, (1, 1)),
      Conv("branch7x7x3_2", 192, (1, 7)),
      Conv("branch7x7x3_3", 192, (7, 1)),
      Conv("branch7x7x3_4", 192, (3, 3), 2),
    ),
    (Pool("max", 2),),
  )


def _block_e(pool: str) -> Branches:
  def fork(name: str) -> tuple[Conv, ...]:
    return (
      Conv(f"{name}a", 384, (1, 3)),
      Conv(f"{name}b", 384, (3, 1)),
    )

  return (
    (Conv("branch1x1", 320, (1, 1)),),
    (Conv("branch3x3_1", 384, (1, 1)), fork("branch3x3_2")),
    (
      Conv("branch3x3dbl_1", 448, (1, 1)),
      Conv("branch3x3dbl_2", 384, (3, 3)),
      fork("branch3x3dbl_3"),
    ),
    (Pool(pool), Conv("branch_pool", 192, (1, 1))),
  )


# The whole network, in order, by the released names.
BLOCKS: dict[str, Branches] = {
  "Mixed_5b": _block_a(32),
  "Mixed_5c": _block_a(64),
  "Mixed_5d": _block_a(64),
  "Mixed_6a": _block_b(),
  "Mixed_6b": _block_c(128),
  "Mixed_6c": _block_c(160),
  "Mixed_6d": _block_c(160),
  "Mixed_6e": _block_c(192),
  "Mixed_7a": _block_d(),
  "Mixed_7b": _block_e("avg"),
  "Mixed_7c": _block_e("max"),
}


class Model(nn.Module):
  """Pictures -> features of 2048 numbers, and logits of 1008 classes."""

  @nn.compact
  def __call__(
    self, image: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The features that the FID compares.

    Args:
      image: [B, H, W, 3] in [-1, 1], of any size; rounded to the 256 levels
        that a saved picture has.

    Returns:
      float32 [B, 2048], and `logits` and `logits_unbiased` [B, 1008], the
      latter without the bias of the classes, which the Inception score takes.
    """
    x = (jnp.clip(image.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5
    x = (resize(jnp.round(x), _SIZE) - 128.0) / 128.0
    x = _Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
    x = _Conv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = _Conv(64, (3, 3), 1, "SAME", name="Conv2d_2b_3x3")(x)
    x = _pool(x, Pool("max", 2))
    x = _Conv(80, (1, 1), 1, "VALID", name="Conv2d_3b_1x1")(x)
    x = _Conv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
    x = _pool(x, Pool("max", 2))
    for name, branches in BLOCKS.items():
      x = _Block(branches, name=name)(x)
    features = x.mean(axis=(1, 2))
    kernel = self.param(
      "fc_kernel", nn.initializers.lecun_normal(), (features.shape[-1], 1008)
    )
    bias = self.param("fc_bias", nn.initializers.zeros, (1008,))
    logits = jnp.dot(features, kernel, precision="highest")
    return features, {"logits": logits + bias, "logits_unbiased": logits}


class _Block(nn.Module):
  """Branches side by side, their channels joined in order."""

  branches: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def run(x: jax.Array, layer: Layer) -> jax.Array:
      if isinstance(layer, Pool):
        return _pool(x, layer)
      if isinstance(layer, Conv):
        padding = "SAME" if layer.stride == 1 else "VALID"
        conv = _Conv(
          layer.features, layer.kernel, layer.stride, padding, name=layer.name
        )
        return conv(x)
      return jnp.concatenate([run(x, branch) for branch in layer], axis=-1)

    outputs = []
    for branch in self.branches:
      y = x
      for layer in branch:
        y = run(y, layer)
      outputs.append(y)
    return jnp.concatenate(outputs, axis=-1)


class _Conv(nn.Module):
  """A convolution without bias, a norm by stored statistics, and a relu."""

  features: int
  kernel: tuple[int, int]
  stride: int
  padding: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(
      self.features,
      self.kernel,
      self.stride,
      self.padding,
      use_bias=False,
      precision="highest",
      name="conv",
    )(x)
    x = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(x)
    return nn.relu(x)


def _pool(x: jax.Array, layer: Pool) -> jax.Array:
  shape = dict(
    window_shape=(3, 3),
    strides=(layer.stride, layer.stride),
    padding="SAME" if layer.stride == 1 else "VALID",
  )
  if layer.kind == "max":
    return nn.max_pool(x, **shape)
  return nn.avg_pool(x, **shape, count_include_pad=False)


def resize(image: jax.Array, size: int) -> jax.Array:
  """TensorFlow 1's bilinear resize, [B, H, W, C] -> [B, size, size, C]."""

  def between(x: jax.Array, axis: int) -> jax.Array:
    length = x.shape[axis]
    place = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = place.astype(np.int32)
    share = np.expand_dims(place - low, [i for i in range(4) if i != axis])
    below = jnp.take(x, low, axis)
    above = jnp.take(x, np.minimum(low + 1, length - 1), axis)
    return below + (above - below) * share

  # Along the rows first: the order in which the release rounds.
  return between(between(image, 2), 1)
