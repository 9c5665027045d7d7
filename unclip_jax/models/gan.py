"""Text-conditional GAN: a generator and a discriminator with text encoders.

Reed et al. 2016 (arXiv 1605.05396) with the networks of later work:

  generator      z and the caption -> 4 x 4 -> residual blocks that double the
                 picture (Miyato & Koyama 2018, arXiv 1802.05637, appendix);
                 every norm is scaled and shifted by (z, caption)
  discriminator  residual blocks that halve it, no norm, the sum over places,
                 and projection: D(x, c) = psi(phi(x)) + <V c, phi(x)> (ibid.,
                 equation 3)

Each player has a text encoder of its own, so that no parameter is both
players': top-level names are `generator` and `discriminator`, and pictures are
drawn with the first alone. The caption is the encoder's last state, projected;
with conditioning augmentation it is drawn around that (StackGAN, Zhang et al.
2017, arXiv 1612.03242, section 3.2).

Deviations: group norms in the place of batch norms, so that no example sees
another; the residual sums of the discriminator are divided by sqrt(2) (Karras
et al. 2020, arXiv 1912.04958), and <V c, phi> by sqrt(C); leaky ReLU there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear, norms, resnet, spectral_norm
from unclip_jax.layers import text_encoder as text_encoder_lib
from unclip_jax.utils import axes, errors

_BASE = 4  # pixels of a side where the generator starts
# Of the discriminator, what is spectrally normalised: all that lies between the
# picture and the logit. The text encoder does not.
_NORMALIZED = r"^(?!text_encoder\.).*\bkernel$"
_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)


class Model(nn.Module):
  """Both players.

  Attributes:
    image_size: pixels of a side, 4 times a power of 2.
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: the longest text, in tokens.
    latent_dim: size of z.
    generator_channels: at 4 px, then after each doubling.
    discriminator_channels: after each halving, and of a last block at 4 px.
    text_width, text_depth, text_num_heads: of each text encoder.
    caption_dim: size of the caption that the generator is given.
    caption_augmentation: it is drawn around the caption's projection.
    spectral_norm_iterations: of the discriminator's kernels, see `normalize`;
      0 = no normalisation.
    dtype: compute dtype.
  """

  vocab_size: int
  context_length: int
  image_size: int = 32
  latent_dim: int = 128
  generator_channels: tuple[int, ...] = (256, 256, 128, 64)
  discriminator_channels: tuple[int, ...] = (64, 128, 256, 256)
  text_width: int = 128
  text_depth: int = 2
  text_num_heads: int = 4
  caption_dim: int = 128
  caption_augmentation: bool = False
  spectral_norm_iterations: int = 0
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    for name in ("generator_channels", "discriminator_channels"):
      channels = getattr(self, name)
      if self.image_size != _BASE * 2 ** (len(channels) - 1):
        raise errors.UserError(
          f"config.model.{name} has {len(channels)} entries, which make"
          f" {_BASE * 2 ** (len(channels) - 1)} px of {_BASE} px, and"
          f" image_size is {self.image_size}: one entry for each doubling and"
          " one more"
        )
    text_encoder = functools.partial(
      text_encoder_lib.TextEncoder,
      vocab_size=self.vocab_size,
      context_length=self.context_length,
      width=self.text_width,
      depth=self.text_depth,
      num_heads=self.text_num_heads,
      dtype=self.dtype,
    )
    self.generator = Generator(
      make_text_encoder=text_encoder,
      channels=self.generator_channels,
      caption_dim=self.caption_dim,
      caption_augmentation=self.caption_augmentation,
      dtype=self.dtype,
    )
    self.discriminator = Discriminator(
      make_text_encoder=text_encoder,
      channels=self.discriminator_channels,
      dtype=self.dtype,
    )

  def __call__(
    self, image: jax.Array, text_tokens: jax.Array, text_mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The logits [B] of pictures, and pictures for z = 0: all of both."""
    z = jnp.zeros((len(image), self.latent_dim))
    drawn, _ = self.generate(z, text_tokens, text_mask)
    features = self.encode_image(image)
    return self.score(features, self.encode_text(text_tokens, text_mask)), drawn

  @nn.nowrap
  def normalize(self, discriminator: Any) -> Any:
    """The parameters to apply the discriminator with, from those of training.

    The same, or spectrally normalised (layers/spectral_norm.py): once a step,
    and not wherever the network is applied.
    """
    if not self.spectral_norm_iterations:
      return discriminator
    return spectral_norm.normalize(
      discriminator, _NORMALIZED, self.spectral_norm_iterations
    )

  def generate(
    self,
    z: jax.Array,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    caption_noise: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pictures [B, S, S, 3] float32 in [-1, 1].

    Args:
      z: [B, latent_dim], standard normal.
      text_tokens, text_mask: [B, L] int32 and bool, True = real token.
      caption_noise: [B, caption_dim], standard normal; read with
        caption_augmentation, where None is 0.

    Returns:
      The pictures, and `caption_mean` and, with caption_augmentation,
      `caption_log_variance` [B, caption_dim].
    """
    return self.generator(z, text_tokens, text_mask, caption_noise)

  def encode_image(self, image: jax.Array) -> jax.Array:
    """phi: [B, S, S, 3] -> [B, C], the discriminator's view of pictures.

    Raises:
      UserError: the pictures have another size.
    """
    size = (self.image_size, self.image_size)
    if image.shape[1:3] != size:
      raise errors.UserError(
        f"this GAN's pictures have {size[0]} px, not {image.shape[1]} x"
        f" {image.shape[2]}: set config.data.preprocess.image_size to"
        " config.model.image_size"
      )
    return self.discriminator.encode_image(image)

  def encode_text(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> jax.Array:
    """V c: captions [B, L] -> [B, C], for the inner product with phi."""
    return self.discriminator.encode_text(text_tokens, text_mask)

  def score(self, features: jax.Array, caption: jax.Array) -> jax.Array:
    """Logits [B] float32 that the pictures are true ones of the captions.

    Args:
      features: [B, C], of `encode_image`.
      caption: [B, C], of `encode_text`.
    """
    return self.discriminator.score(features, caption)


class Generator(nn.Module):
  """See Model.generate."""

  make_text_encoder: Callable[..., nn.Module]
  channels: tuple[int, ...]
  caption_dim: int
  caption_augmentation: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    z: jax.Array,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    caption_noise: jax.Array | None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    dense = functools.partial(linear.Dense, dtype=self.dtype)
    text_encoder = self.make_text_encoder(name="text_encoder")
    states = text_encoder(text_tokens, text_mask)
    caption = dense(self.caption_dim, name="caption")(states[:, -1])
    out = {"caption_mean": caption.astype(jnp.float32)}
    if self.caption_augmentation:
      # Zero: every caption starts with a deviation of 1.
      log_variance = dense(
        self.caption_dim,
        kernel_init=nn.initializers.zeros,
        name="caption_log_variance",
      )(states[:, -1]).astype(jnp.float32)
      out["caption_log_variance"] = log_variance
      if caption_noise is not None:
        deviation = jnp.exp(0.5 * log_variance)
        caption = caption + (deviation * caption_noise).astype(self.dtype)

    condition = jnp.concatenate([z.astype(self.dtype), caption], axis=-1)
    x = dense(_BASE * _BASE * self.channels[0], name="dense_in")(condition)
    x = einops.rearrange(x, "b (h w c) -> b h w c", h=_BASE, w=_BASE)
    for i, channels in enumerate(self.channels[1:]):
      x = _UpBlock(channels, dtype=self.dtype, name=f"block_{i}")(x, condition)
    x = nn.silu(norms.GroupNorm(dtype=self.dtype, name="norm_out")(x))
    x = resnet.conv3x3(3, dtype=self.dtype, name="conv_out")(x)
    return jnp.tanh(x.astype(jnp.float32)), out


class Discriminator(nn.Module):
  """See Model.encode_image, encode_text and score."""

  make_text_encoder: Callable[..., nn.Module]
  channels: tuple[int, ...]
  dtype: DTypeLike

  def setup(self) -> None:
    self.text_encoder = self.make_text_encoder()
    last = len(self.channels) - 1
    self.block = [
      _DownBlock(
        channels, is_first=i == 0, downsample=i != last, dtype=self.dtype
      )
      for i, channels in enumerate(self.channels)
    ]
    self.caption = linear.Dense(
      self.channels[-1], use_bias=False, dtype=self.dtype
    )
    self.logit = linear.Dense(1, dtype=self.dtype)

  def encode_image(self, image: jax.Array) -> jax.Array:
    x = image.astype(self.dtype)
    for block in self.block:
      x = block(x)
    return _leaky_relu(x).sum(axis=(1, 2), dtype=jnp.float32)

  def encode_text(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> jax.Array:
    states = self.text_encoder(text_tokens, text_mask)
    return self.caption(states[:, -1]).astype(jnp.float32)

  def score(self, features: jax.Array, caption: jax.Array) -> jax.Array:
    of_picture = self.logit(features)[:, 0].astype(jnp.float32)
    # sqrt(C): two random vectors have an inner product of the same size.
    match = jnp.einsum("bc,bc->b", features, caption)
    return of_picture + match / math.sqrt(features.shape[-1])


class _ConditionalNorm(nn.Module):
  """Group norm that a condition [B, D] scales and shifts."""

  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    x = norms.GroupNorm(dtype=self.dtype, name="norm")(x)
    affine = linear.Dense(2 * x.shape[-1], dtype=self.dtype, name="affine")(
      condition
    )
    scale, shift = jnp.split(affine[:, None, None], 2, axis=-1)
    return x * (1 + scale) + shift


class _UpBlock(nn.Module):
  """Norm -> SiLU -> double -> conv, norm -> SiLU -> conv, plus skip."""

  out_channels: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    conv3x3 = functools.partial(
      resnet.conv3x3, self.out_channels, dtype=self.dtype
    )
    norm = functools.partial(_ConditionalNorm, dtype=self.dtype)
    h = nn.silu(norm(name="norm_1")(x, condition))
    h = conv3x3(name="conv_1")(resnet.upsample(h))
    h = axes.constrain(h, "batch", "height", None, "channels")
    h = nn.silu(norm(name="norm_2")(h, condition))
    # Zero: the residual branch that ends here starts as the identity.
    h = conv3x3(kernel_init=nn.initializers.zeros, name="conv_2")(h)
    if x.shape[-1] != self.out_channels:
      x = resnet.conv(self.out_channels, (1, 1), dtype=self.dtype, name="skip")(
        x
      )
    return resnet.upsample(x) + h


class _DownBlock(nn.Module):
  """Leaky ReLU -> conv -> leaky ReLU -> conv -> [halve], plus skip.

  No branch starts at zero: spectral normalisation divides by kernels' norms.

  Attributes:
    is_first: takes pictures, which no activation comes before.
  """

  out_channels: int
  is_first: bool
  downsample: bool
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv3x3 = functools.partial(
      resnet.conv3x3, self.out_channels, dtype=self.dtype
    )
    h = conv3x3(name="conv_1")(x if self.is_first else _leaky_relu(x))
    h = axes.constrain(h, "batch", "height", None, "channels")
    h = conv3x3(name="conv_2")(_leaky_relu(h))
    if self.downsample:
      x, h = resnet.downsample(x), resnet.downsample(h)
    if x.shape[-1] != self.out_channels:
      x = resnet.conv(self.out_channels, (1, 1), dtype=self.dtype, name="skip")(
        x
      )
    return (x + h) * math.sqrt(0.5)
