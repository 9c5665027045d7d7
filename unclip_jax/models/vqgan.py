"""VQGAN: an autoencoder with a codebook or a Gaussian between its halves.

Esser et al. 2021 (arXiv 2012.09841, section 3.1). Pictures become a feature map
h x w, 1/f of their size; each place of it is replaced by the nearest of V codes
(layers/quantize.py) or, as in latent diffusion's KL variant (Rombach et al.
2021, arXiv 2112.10752, section 3.1), drawn from a Gaussian; a decoder makes the
picture of it again. A patch discriminator judges what comes out. It is part of
the model, so that there is one set of parameters: `discriminator` is the one
player, everything else the other.

`conv_out`, the decoder's last layer, stands beside the decoder, because the
adaptive weight is taken at it (tasks/autoencoding.py).

Sizes of the paper (tables 7 and 8): channels 128, channel_mult (1, 1, 2, 2, 4)
for f = 16, two ResBlocks a level, code_dim 256, V = 1024 or 16384; the
discriminator has 64 channels and 3 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import autoencoder, quantize, resnet
from unclip_jax.utils import errors


class Model(nn.Module):
  """The autoencoder and its discriminator.

  Attributes:
    image_size: S, pixels of a side of the pictures.
    bottleneck: "vq" or "kl".
    num_codes: V, of a codebook.
    code_dim: D, channels of the feature map between the halves.
    channels: of the first level.
    channel_mult: factor on them at each level; each but the last halves the
      picture.
    num_res_blocks: per level.
    num_heads: of the attention at the lowest resolution.
    decay, restart_below: of the codebook, see layers/quantize.py.
    discriminator_channels, discriminator_layers: see
      layers.autoencoder.PatchDiscriminator.
    dropout: rate in the ResBlocks, when training.
    dtype: compute dtype; parameters and codebook are float32.
  """

  image_size: int
  bottleneck: str = "vq"
  num_codes: int = 1024
  code_dim: int = 256
  channels: int = 128
  channel_mult: Sequence[int] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  num_heads: int = 1
  decay: float = 0.99
  restart_below: float = 0.03
  discriminator_channels: int = 64
  discriminator_layers: int = 3
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @property
  def grid_size(self) -> int:
    """h, side of the feature map between the halves."""
    return autoencoder.latent_size(self.image_size, self.channel_mult)

  def setup(self) -> None:
    if self.bottleneck not in ("vq", "kl"):
      raise errors.UserError(
        f"config.model.bottleneck '{self.bottleneck}' is not 'vq' or 'kl'"
      )
    is_vq = self.bottleneck == "vq"
    half = dict(
      channels=self.channels,
      channel_mult=tuple(self.channel_mult),
      num_res_blocks=self.num_res_blocks,
      num_heads=self.num_heads,
      dropout=self.dropout,
      dtype=self.dtype,
    )
    self.encoder = autoencoder.Encoder(
      out_channels=self.code_dim * (1 if is_vq else 2), **half
    )
    if is_vq:
      self.quantize = quantize.VectorQuantizer(
        self.num_codes, self.code_dim, self.decay, self.restart_below
      )
    self.decoder = autoencoder.Decoder(**half)
    self.conv_out = resnet.conv3x3(3, dtype=self.dtype)
    self.discriminator = autoencoder.PatchDiscriminator(
      self.discriminator_channels, self.discriminator_layers, dtype=self.dtype
    )

  def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """The reconstruction, as `reconstruct` without noise, and "logits"."""
    features, out = self.reconstruct(image)
    image = self.to_image(features)
    return image, {**out, "logits": self.discriminate(image)}

  def reconstruct(
    self,
    image: jax.Array,
    noise: jax.Array | None = None,
    *,
    step: jax.Array | None = None,
    restart_noise: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Encodes and decodes, up to `to_image`.

    Args:
      image: [B, S, S, 3] in [-1, 1].
      noise: [B, h, h, D] standard normal, of the "kl" bottleneck; None: its
        mean.
      step, restart_noise: see layers.quantize.VectorQuantizer.
      train: whether dropout is on.

    Returns:
      What `to_image` takes, and the intermediates: "encoder_self_attention" and
      "decoder_self_attention" [B, N, h h, h h], "z" [B, h, h, D], and "tokens",
      "commitment", "perplexity" and "code_usage" or "posterior" (a
      `quantize.Gaussian`).

    Raises:
      UserError: pictures of another size.
    """
    z, out = self.encode(image, train=train)
    if self.bottleneck == "vq":
      z, vq_out = self.quantize(z, step=step, restart_noise=restart_noise)
      out |= vq_out
    else:
      posterior = quantize.gaussian(z)
      z = posterior.mean if noise is None else posterior.sample(noise)
      out["posterior"] = posterior
    features, maps = self.decoder(z.astype(self.dtype), train=train)
    out |= {"z": z, "decoder_self_attention": maps["self"]}
    return features, out

  def encode(
    self, image: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What enters the bottleneck, [B, h, h, D or 2 D], and the maps."""
    _, H, W, _ = image.shape
    if self.image_size != H or self.image_size != W:
      raise errors.UserError(
        f"this autoencoder takes pictures of {self.image_size} x"
        f" {self.image_size} pixels, not {H} x {W}: change image_size"
      )
    _ = self.grid_size
    z, maps = self.encoder(image, train=train)
    return z, {"encoder_self_attention": maps["self"]}

  def encode_tokens(self, image: jax.Array) -> jax.Array:
    """[B, S, S, 3] in [-1, 1] -> codes [B, h h] int32, row by row."""
    self.check_vq()
    z, _ = self.encode(image)
    _, out = self.quantize(z)
    return out["tokens"].reshape(len(image), -1)

  def decode_tokens(self, image_tokens: jax.Array) -> jax.Array:
    """Codes [B, h h] int32, row by row -> pictures [B, S, S, 3]."""
    self.check_vq()
    h = self.grid_size
    z = self.quantize.decode(image_tokens.reshape(-1, h, h))
    features, _ = self.decoder(z.astype(self.dtype))
    return self.to_image(features)

  def to_image(self, features: jax.Array) -> jax.Array:
    """What `reconstruct` gives -> pictures [B, S, S, 3] float32, unbounded."""
    return self.conv_out(features).astype(jnp.float32)

  def discriminate(self, image: jax.Array) -> jax.Array:
    """[B, S, S, 3] -> logits [B, h', w'] float32."""
    return self.discriminator(image.astype(self.dtype))

  def check_vq(self) -> None:
    """Raises UserError where there is no codebook."""
    if self.bottleneck != "vq":
      raise errors.UserError(
        "this autoencoder has no codes: train one with"
        " config.model.bottleneck='vq'"
      )
