"""The convolutional blocks of ADM (Dhariwal & Nichol 2021; guided-diffusion).

NHWC. Nothing here depends on the height and width of the picture.
"""

from __future__ import annotations

import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear, norms, remat, winograd
from unclip_jax.utils import axes


def downsample(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, H/2, W/2, C]: the mean of each 2 x 2 square."""
  return einops.reduce(x, "b (h i) (w j) c -> b h w c", "mean", i=2, j=2)


def upsample(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, 2H, 2W, C]: each pixel becomes a 2 x 2 square."""
  return einops.repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)


def _conv_general_dilated(*args: Any, **kwargs: Any) -> jax.Array:
  out = winograd.conv_general_dilated(*args, **kwargs)
  return remat.name(out, "convolution")


conv = functools.partial(
  nn.Conv,
  kernel_init=linear.lecun_normal,
  conv_general_dilated=_conv_general_dilated,
)
# Pads one pixel on every side, also under a stride, as torch does.
conv3x3 = functools.partial(conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))


_RESAMPLERS = {"down": downsample, "up": upsample}


class ResBlock(nn.Module):
  """GN -> SiLU -> [resample] -> conv, timestep, GN -> SiLU -> conv, plus skip.

  In a network without a timestep or another embedding, `emb` is None.

  Attributes:
    out_channels: channels of the result.
    resample: "down" halves, "up" doubles height and width, in both branches.
    scale_shift_norm: the embedding scales and shifts the second norm ("AdaGN")
      instead of being added before it.
    max_groups: of the norms.
    dropout: rate before the last convolution, when training.
    dtype: compute dtype.
  """

  out_channels: int
  resample: str | None = None
  scale_shift_norm: bool = True
  max_groups: int = 32
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, emb: jax.Array | None, *, train: bool = False
  ) -> jax.Array:
    """[B, H, W, C] and emb [B, D] -> [B, H', W', out_channels]."""
    norm = functools.partial(norms.GroupNorm, self.max_groups, dtype=self.dtype)
    h = nn.silu(norm(name="norm_1")(x))
    if self.resample is not None:
      h = _RESAMPLERS[self.resample](h)
      x = _RESAMPLERS[self.resample](x)
    h = conv3x3(self.out_channels, dtype=self.dtype, name="conv_1")(h)
    h = axes.constrain(h, "batch", "height", None, "channels")

    norm_2 = norm(name="norm_2")
    if emb is None:
      h = norm_2(h)
    else:
      emb = linear.Dense(
        self.out_channels * (2 if self.scale_shift_norm else 1),
        dtype=self.dtype,
        name="emb_proj",
      )(nn.silu(emb))[:, None, None]
      if self.scale_shift_norm:
        scale, shift = jnp.split(emb, 2, axis=-1)
        h = norm_2(h) * (1 + scale) + shift
      else:
        h = norm_2(h + emb)
    h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not train)
    # Zero: the residual branch that ends here starts as the identity.
    h = conv3x3(
      self.out_channels,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      name="conv_2",
    )(h)
    if x.shape[-1] != self.out_channels:
      x = conv(self.out_channels, (1, 1), dtype=self.dtype, name="skip")(x)
    return x + h


class Resample(nn.Module):
  """Halves by a strided convolution, or doubles and convolves.

  Attributes:
    out_channels: channels of the result.
    resample: "down" or "up".
    dtype: compute dtype.
  """

  out_channels: int
  resample: str
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    strides = 1
    if self.resample == "up":
      x = upsample(x)
    else:
      strides = 2
    return conv3x3(
      self.out_channels, strides=strides, dtype=self.dtype, name="conv"
    )(x)
