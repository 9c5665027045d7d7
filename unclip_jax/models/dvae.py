"""The discrete VAE of DALL-E: pictures to a grid of codes and back.

Ramesh et al. 2021 (arXiv 2102.12092), section 2.1 and appendix A.1, in detail
the public weights' code (openai/DALL-E): two ResNets of bottleneck blocks,
whose branches are multiplied by 1 / (number of blocks)^2, so that a new network
is stable. The encoder opens with a 7 x 7 convolution, halves the picture
between groups of blocks by max-pooling and ends in a 1 x 1 convolution to the
logits of the codes. The decoder opens with a 1 x 1 convolution of the codes,
one-hot or relaxed, which is the codebook, and doubles by repeating pixels.

Sides are kept by padding with zeros and there is no normalisation, as there;
compute in `dtype`, but the two layers at the codes are float32.

Deviations: the encoder sees pictures around 0, and `logit_scale` makes the
logits of a new network larger. Then it gives unlike patches unlike codes from
the start, by chance, and the decoder has something to learn from; else almost
all patches get one code, and a short training ends with three.

Sizes (appendix A.1; the code): 256 px, a grid of 32 x 32 of 8,192 codes;
channels 256 x (1, 2, 4, 8), two blocks in a group, a codebook of width 128.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear, resnet
from unclip_jax.layers import remat as remat_lib
from unclip_jax.utils import axes, errors

_OUT_CHANNELS = 6  # mean and log scale of three colours


class Bottleneck(nn.Module):
  """x + gain * branch(x), a branch of four convolutions, a ReLU before each.

  Attributes:
    out_channels: channels of the result, a multiple of 4; the branch has a
      quarter of them.
    kernels: sides of the four convolutions.
    gain: what the branch is multiplied by.
    dtype: compute dtype.
  """

  out_channels: int
  kernels: tuple[int, int, int, int]
  gain: float
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, out_channels]."""
    h = x
    for i, kernel in enumerate(self.kernels):
      is_last = i == len(self.kernels) - 1
      h = resnet.conv(
        self.out_channels if is_last else self.out_channels // 4,
        (kernel, kernel),
        dtype=self.dtype,
        name=f"conv_{i + 1}",
      )(nn.relu(h))
    if x.shape[-1] != self.out_channels:
      x = resnet.conv(self.out_channels, (1, 1), dtype=self.dtype, name="skip")(
        x
      )
    x = x + self.gain * h
    return axes.constrain(x, "batch", "height", None, "channels")


class Model(nn.Module):
  """Encoder and decoder.

  Attributes:
    image_size: pixels of a side.
    num_codes: V, size of the codebook.
    channels: of the blocks at the picture's full size.
    channel_mult: times `channels`, of each group of blocks; between two groups
      sides are halved.
    num_res_blocks: blocks of a group.
    codebook_width: of what a code becomes in the decoder.
    logit_scale: what the encoder's output is multiplied by; 1 in the source.
    remat: what the backward pass keeps of each block (layers/remat.py).
    dtype: compute dtype; parameters are float32.
  """

  image_size: int
  num_codes: int = 8192
  channels: int = 256
  channel_mult: tuple[int, ...] = (1, 2, 4, 8)
  num_res_blocks: int = 2
  codebook_width: int = 128
  logit_scale: float = 1.0
  remat: bool | str = False
  dtype: DTypeLike = jnp.float32

  @property
  def grid_size(self) -> int:
    """Codes of a side of the grid."""
    return self.image_size // 2 ** (len(self.channel_mult) - 1)

  def setup(self) -> None:
    factor = 2 ** (len(self.channel_mult) - 1)
    if self.image_size % factor:
      raise errors.UserError(
        f"a dVAE with {len(self.channel_mult)} groups halves pictures to "
        f"1/{factor}: image_size {self.image_size} must be a multiple of that"
      )
    if self.channels % 4:
      raise errors.UserError(
        f"config.model.channels {self.channels} must be a multiple of 4"
      )
    conv = functools.partial(resnet.conv, dtype=self.dtype)
    widths = [self.channels * mult for mult in self.channel_mult]
    self.encoder_in = conv(self.channels, (7, 7))
    self.encoder_block = self._groups(widths, (3, 3, 3, 1))
    self.encoder_out = linear.Dense(self.num_codes)
    self.codebook = linear.Dense(self.codebook_width)
    self.decoder_block = self._groups(widths[::-1], (1, 3, 3, 3))
    self.decoder_out = conv(_OUT_CHANNELS, (1, 1))

  def _groups(
    self, widths: list[int], kernels: tuple[int, int, int, int]
  ) -> list[list[Bottleneck]]:
    gain = (len(widths) * self.num_res_blocks) ** -2
    return [
      [
        Bottleneck(width, kernels, gain, dtype=self.dtype)
        for _ in range(self.num_res_blocks)
      ]
      for width in widths
    ]

  def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A picture through codes relaxed at temperature 1, without noise.

    Args:
      x: [B, S, S, 3] in (0, 1).

    Returns:
      What `decode` gives, and {"logits": what `encode` gives}.
    """
    logits = self.encode(x)
    return self.decode(jax.nn.softmax(logits)), {"logits": logits}

  def encode(self, x: jax.Array) -> jax.Array:
    """[B, S, S, 3] in (0, 1) -> logits of the codes [B, h, w, V] float32."""
    x = self.encoder_in((4 * (x - 0.5)).astype(self.dtype))
    for i, group in enumerate(self.encoder_block):
      if i:
        x = nn.max_pool(x, (2, 2), (2, 2))
      x = self._run(group, x)
    logits = self.encoder_out(nn.relu(x).astype(jnp.float32))
    return self.logit_scale * logits

  def decode(self, codes: jax.Array) -> jax.Array:
    """[B, h, w, V], rows that sum to 1 -> [B, S, S, 6] float32."""
    x = self.codebook(codes).astype(self.dtype)
    for i, group in enumerate(self.decoder_block):
      if i:
        x = resnet.upsample(x)
      x = self._run(group, x)
    return self.decoder_out(nn.relu(x)).astype(jnp.float32)

  def _run(self, group: list[Bottleneck], x: jax.Array) -> jax.Array:
    call = remat_lib.checkpoint(lambda m, x: m(x), self.remat, nn.remat)
    for block in group:
      x = call(block, x)
    return x
