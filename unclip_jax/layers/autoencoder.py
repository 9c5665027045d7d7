"""The convolutional halves of VQGAN, and its adversary. NHWC.

Encoder and decoder: Esser et al. 2021 (arXiv 2012.09841, table 7, appendix A),
of the ResBlocks of ADM (layers/resnet.py); attention stands at the lowest
resolution alone. Every level but the lowest halves (doubles) the picture, so
that S pixels become S / 2^(levels - 1). With an embedding [B, D] each ResBlock
is conditioned on it (AdaGN), with a context [B, M, any size] the lowest
resolution attends to it.

PatchDiscriminator: the "70 x 70" network of Isola et al. 2017 (arXiv
1611.07004, section 3.2.2, appendix 6.1.2), a logit for each patch, with a text
condition by projection (Miyato & Koyama 2018, arXiv 1802.05637, equation 3).

Deviations: the discriminator's batch norms are group norms, so that no example
sees another, and the projection is scaled by the root of its width. The
source's decoder has one ResBlock more at each level.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention_maps, linear, norms, resnet
from unclip_jax.utils import errors

Maps = dict[str, jax.Array]


def latent_size(image_size: int, channel_mult: Sequence[int]) -> int:
  """Side of the feature map between encoder and decoder.

  Raises:
    UserError: the levels do not halve the picture evenly.
  """
  factor = 2 ** (len(channel_mult) - 1)
  if image_size % factor:
    raise errors.UserError(
      f"image_size {image_size} cannot be halved {len(channel_mult) - 1} times,"
      " as config.model.channel_mult asks: change one of them"
    )
  return image_size // factor


class _Middle(nn.Module):
  """ResBlock, attention, ResBlock at the lowest resolution."""

  channels: int
  num_heads: int
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    emb: jax.Array | None,
    context: jax.Array | None,
    mask: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, Maps]:
    block = functools.partial(
      resnet.ResBlock, self.channels, dropout=self.dropout, dtype=self.dtype
    )
    x = block(name="block_1")(x, emb, train=train)
    x, maps = attention_maps.SpatialAttention(
      self.num_heads, dtype=self.dtype, name="attention"
    )(x, context, mask)
    return block(name="block_2")(x, emb, train=train), maps


class Encoder(nn.Module):
  """Picture -> feature map.

  Attributes:
    channels: of the first level.
    channel_mult: factor on them at each level, from the highest resolution on.
    num_res_blocks: per level.
    num_heads: of the attention.
    out_channels: of the feature map.
    dropout: rate in the ResBlocks, when training.
    dtype: compute dtype.
  """

  channels: int
  channel_mult: Sequence[int]
  num_res_blocks: int
  num_heads: int
  out_channels: int
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    emb: jax.Array | None = None,
    context: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, Maps]:
    """[B, H, W, 3] -> [B, h, w, out_channels], and the maps "self", "cross".

    Args:
      emb: [B, any size].
      context, mask: [B, M, any size], [B, M] bool.
      train: whether dropout is on.
    """
    x = resnet.conv3x3(self.channels, dtype=self.dtype, name="conv_in")(image)
    for level, mult in enumerate(self.channel_mult):
      if level > 0:
        x = resnet.Resample(
          x.shape[-1], "down", dtype=self.dtype, name=f"down_{level}"
        )(x)
      for i in range(self.num_res_blocks):
        x = resnet.ResBlock(
          mult * self.channels,
          dropout=self.dropout,
          dtype=self.dtype,
          name=f"level_{level}_block_{i}",
        )(x, emb, train=train)
    x, maps = _Middle(
      x.shape[-1], self.num_heads, self.dropout, self.dtype, name="middle"
    )(x, emb, context, mask, train)
    x = nn.silu(norms.GroupNorm(dtype=self.dtype, name="norm_out")(x))
    x = resnet.conv3x3(self.out_channels, dtype=self.dtype, name="conv_out")(x)
    return x, maps


class Decoder(nn.Module):
  """Feature map -> what the last convolution makes a picture of.

  That convolution is left to the caller: the adaptive weight of the adversarial
  loss needs its gradient alone. Fields as in `Encoder`, whose mirror this is.
  """

  channels: int
  channel_mult: Sequence[int]
  num_res_blocks: int
  num_heads: int
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    z: jax.Array,
    emb: jax.Array | None = None,
    context: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, Maps]:
    """[B, h, w, any size] -> [B, H, W, channels * channel_mult[0]], maps."""
    top = self.channels * self.channel_mult[-1]
    x = resnet.conv3x3(top, dtype=self.dtype, name="conv_in")(z)
    x, maps = _Middle(
      top, self.num_heads, self.dropout, self.dtype, name="middle"
    )(x, emb, context, mask, train)
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      for i in range(self.num_res_blocks):
        x = resnet.ResBlock(
          mult * self.channels,
          dropout=self.dropout,
          dtype=self.dtype,
          name=f"level_{level}_block_{i}",
        )(x, emb, train=train)
      if level > 0:
        x = resnet.Resample(
          x.shape[-1], "up", dtype=self.dtype, name=f"up_{level}"
        )(x)
    x = nn.silu(norms.GroupNorm(dtype=self.dtype, name="norm_out")(x))
    return x, maps


class PatchDiscriminator(nn.Module):
  """Pictures -> a logit for each patch.

  Attributes:
    channels: of the first layer; doubled by each up to 8 times as many.
    num_layers: that halve the picture. A logit sees 16, 34 or 70 pixels with 1,
      2 or 3 of them.
    dtype: compute dtype.
  """

  channels: int = 64
  num_layers: int = 3
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, image: jax.Array, condition: jax.Array | None = None
  ) -> jax.Array:
    """[B, H, W, 3], condition [B, D] -> logits [B, h, w] float32.

    Raises:
      UserError: the picture is too small for that many layers.
    """
    if min(image.shape[1:3]) < 2 ** (self.num_layers + 2):
      raise errors.UserError(
        f"a discriminator of {self.num_layers} layers needs pictures of"
        f" {2 ** (self.num_layers + 2)} pixels or more, not"
        f" {image.shape[1]}: lower config.model.discriminator_layers"
      )
    conv = functools.partial(
      resnet.conv,
      kernel_size=(4, 4),
      padding=((1, 1), (1, 1)),
      dtype=self.dtype,
    )
    x = image
    for i in range(self.num_layers + 1):
      channels = self.channels * min(2**i, 8)
      strides = 2 if i < self.num_layers else 1
      x = conv(channels, strides=strides, name=f"layer_{i}")(x)
      if i > 0:
        x = norms.GroupNorm(dtype=self.dtype, name=f"norm_{i}")(x)
      x = nn.leaky_relu(x, 0.2)
    logits = conv(1, name="logits")(x)[..., 0].astype(jnp.float32)
    if condition is not None:
      C = x.shape[-1]
      wanted = linear.Dense(C, dtype=self.dtype, name="projection")(condition)
      # At the places of the logits, whose kernel takes one row and column.
      found = nn.avg_pool(x, (4, 4), padding=((1, 1), (1, 1)))
      products = jnp.einsum("bhwc,bc->bhw", found, wanted * C**-0.5)
      logits = logits + products.astype(jnp.float32)
    return logits
