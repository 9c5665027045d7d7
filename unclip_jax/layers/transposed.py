"""A transposed convolution that doubles a picture (Zeiler et al. 2010).

What `nn.ConvTranspose(features, (4, 4), strides=(2, 2))` computes, with its
parameters. Of an output pixel (2 y + a, 2 x + b) only the taps of one parity
meet an input pixel, so that each of the four parities (a, b) is a plain 2 x 2
convolution of the picture (Shi et al. 2016, arXiv 1609.07009). All four are
done at once: with the gradient a tenth of the time on CPU, where XLA has no
fast convolution of a dilated picture.
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear


class ConvTranspose(nn.Module):
  """[B, H, W, C] -> [B, 2H, 2W, features], by kernels of 4 x 4.

  Attributes:
    features: channels of the result.
    dtype: compute dtype.
  """

  features: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    _, H, W, C = x.shape
    shape = (4, 4, C, self.features)
    kernel = self.param("kernel", linear.lecun_normal, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    # Tap 2 j + a is used by outputs of parity a, on input y - 1 + a + j.
    taps = einops.rearrange(
      kernel.astype(self.dtype), "(j a) (i b) c d -> j i c (a b d)", a=2, b=2
    )
    padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = jax.lax.conv_general_dilated(
      padded, taps, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = einops.rearrange(y, "n h w (a b d) -> a b n h w d", a=2, b=2)
    parities = [
      y[a, b, :, a : a + H, b : b + W] for a in (0, 1) for b in (0, 1)
    ]
    y = einops.rearrange(
      jnp.stack(parities), "(a b) n h w d -> n (h a) (w b) d", a=2
    )
    return y + bias.astype(self.dtype)
