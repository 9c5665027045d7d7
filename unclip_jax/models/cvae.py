"""A conditional variational autoencoder of pictures, given a caption.

Kingma & Welling 2014 (arXiv 1312.6114); conditional: Sohn et al. 2015,
"Learning structured output representation using deep conditional generative
models", section 4. With the caption's state t, of a recurrent network:

  prior      p(z | t)     a perceptron; or N(0, I)
  posterior  q(z | x, t)  a convolutional network over the picture
  decoder    p(x | z, t)  transposed convolutions (Zeiler et al. 2010); normal,
                          with one standard deviation for all pixels, learned
                          (sigma-VAE: Rybkin et al. 2021, arXiv 2006.13202)

Where the sources are silent: the networks are residual, and t (with z) scales
and shifts their norms, as a timestep does in a U-Net (layers/resnet.py). The
last layers of prior and posterior start at 0: in a new network both are
N(0, I).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear, norms, recurrent, resnet, transposed
from unclip_jax.utils import errors

# Beyond these, exp is of no use: variances of e^-10 and e^10.
_MAX_LOG_VARIANCE = 10.0


class Gaussian(NamedTuple):
  """A normal distribution with a diagonal covariance, float32."""

  mean: jax.Array  # [B, Z]
  log_variance: jax.Array  # [B, Z]


class Prior(nn.Module):
  """p(z | t): Dense -> SiLU -> Dense.

  Attributes:
    latent_dim: Z.
    width: of the hidden layer.
    dtype: compute dtype.
  """

  latent_dim: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, text_embed: jax.Array) -> Gaussian:
    """[B, D] -> the distribution of z."""
    x = linear.Dense(self.width, dtype=self.dtype, name="dense_1")(text_embed)
    return _gaussian(nn.silu(x), self.latent_dim, "dense_2", self.dtype)


class ImageEncoder(nn.Module):
  """q(z | x, t): residual blocks that halve the picture, then Dense.

  Attributes:
    latent_dim: Z.
    channels: of the first convolution.
    channel_mult: of each level; a level halves height and width.
    dtype: compute dtype.
  """

  latent_dim: int
  channels: int
  channel_mult: tuple[int, ...]
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array, text_embed: jax.Array) -> Gaussian:
    """[B, S, S, 3] in [-1, 1] and [B, D] -> the distribution of z."""
    x = resnet.conv3x3(self.channels, dtype=self.dtype, name="conv_in")(image)
    for level, mult in enumerate(self.channel_mult):
      x = resnet.ResBlock(
        self.channels * mult,
        resample="down",
        dtype=self.dtype,
        name=f"down_{level}",
      )(x, text_embed)
    x = nn.silu(norms.GroupNorm(dtype=self.dtype, name="norm_out")(x))
    x = jnp.concatenate([x.reshape(len(x), -1), text_embed], axis=-1)
    return _gaussian(x, self.latent_dim, "output", self.dtype)


class Decoder(nn.Module):
  """p(x | z, t): Dense, then residual blocks and transposed convolutions.

  Attributes:
    image_size: S, pixels of a side.
    channels, channel_mult: as in the encoder, in the reverse order.
    width: of the embedding that z and t give.
    init_stddev: of the pixels, in a new network.
    dtype: compute dtype.
  """

  image_size: int
  channels: int
  channel_mult: tuple[int, ...]
  width: int
  init_stddev: float
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, z: jax.Array, text_embed: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """[B, Z] and [B, D] -> the mean [B, S, S, 3] and the log stddev []."""
    log_stddev = self.param(
      "log_stddev", nn.initializers.constant(math.log(self.init_stddev)), ()
    )
    emb = jnp.concatenate([z, text_embed], axis=-1)
    emb = linear.Dense(self.width, dtype=self.dtype, name="dense_1")(emb)
    emb = linear.Dense(self.width, dtype=self.dtype, name="dense_2")(
      nn.silu(emb)
    )
    side = self.image_size >> len(self.channel_mult)
    C = self.channels * self.channel_mult[-1]
    x = linear.Dense(side * side * C, dtype=self.dtype, name="dense_in")(emb)
    x = x.reshape(len(x), side, side, C)
    for level in reversed(range(len(self.channel_mult))):
      x = resnet.ResBlock(x.shape[-1], dtype=self.dtype, name=f"block_{level}")(
        x, emb
      )
      x = transposed.ConvTranspose(
        self.channels * self.channel_mult[max(level - 1, 0)],
        dtype=self.dtype,
        name=f"up_{level}",
      )(x)
    x = nn.silu(norms.GroupNorm(dtype=self.dtype, name="norm_out")(x))
    x = resnet.conv3x3(3, dtype=self.dtype, name="conv_out")(x)
    return x.astype(jnp.float32), log_stddev


class Model(nn.Module):
  """The four networks.

  Attributes:
    image_size: S, pixels of a side.
    latent_dim: Z, size of the latent variable.
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: the longest text, in tokens.
    word_width: size of the word vectors.
    text_width: D, size of the recurrent state.
    cell: "lstm" or "gru".
    channels: of the level next to the pixels.
    channel_mult: channels of each level in `channels`; each halves the size.
    text_prior: whether the prior sees the caption; False: it is N(0, I).
    init_stddev: standard deviation of the pixels in a new network.
    dtype: compute dtype; parameters are float32.
  """

  image_size: int
  latent_dim: int
  vocab_size: int
  context_length: int
  word_width: int
  text_width: int
  cell: str = "lstm"
  channels: int = 64
  channel_mult: tuple[int, ...] = (1, 2, 4)
  text_prior: bool = True
  init_stddev: float = 0.5
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    least = 2 ** len(self.channel_mult)
    if self.image_size % least:
      raise errors.UserError(
        f"image_size {self.image_size} cannot be halved "
        f"{len(self.channel_mult)} times: make it a multiple of {least}, or "
        "channel_mult shorter"
      )
    self.text_encoder = recurrent.TextEncoder(
      self.vocab_size,
      self.context_length,
      self.word_width,
      self.text_width,
      self.cell,
      dtype=self.dtype,
    )
    self.text_output = linear.Dense(self.vocab_size, dtype=self.dtype)
    if self.text_prior:
      self.prior_net = Prior(
        self.latent_dim, 2 * self.text_width, dtype=self.dtype
      )
    self.image_encoder = ImageEncoder(
      self.latent_dim, self.channels, self.channel_mult, dtype=self.dtype
    )
    self.decoder = Decoder(
      self.image_size,
      self.channels,
      self.channel_mult,
      4 * self.channels,
      self.init_stddev,
      dtype=self.dtype,
    )

  def __call__(
    self,
    image: jax.Array,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    noise: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array | Gaussian]]:
    """A picture through all networks: z of the posterior, then decoded.

    Args:
      image: [B, S, S, 3] in [-1, 1].
      text_tokens: [B, L] int32.
      text_mask: [B, L] bool, True = real token.
      noise: [B, Z] standard normal; None: z is the posterior's mean.

    Returns:
      The mean [B, S, S, 3] of the pixels, and `posterior`, `prior`,
      `log_stddev` [], `text_embed` [B, D] and `text_logits` [B, L, V].
    """
    text_logits = self.next_token_logits(text_tokens, text_mask)
    text_embed = self.encode_text(text_tokens, text_mask)
    posterior = self.posterior(image, text_embed)
    z = posterior.mean
    if noise is not None:
      z = z + jnp.exp(0.5 * posterior.log_variance) * noise
    mean, log_stddev = self.decode(z, text_embed)
    return mean, {
      "posterior": posterior,
      "prior": self.prior(text_embed),
      "log_stddev": log_stddev,
      "text_embed": text_embed,
      "text_logits": text_logits,
    }

  def encode_text(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> jax.Array:
    """t [B, D], the state at the last real token."""
    return self.text_encoder(text_tokens, text_mask)[1]

  def next_token_logits(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> jax.Array:
    """[B, L, V] float32: at each token, of the one that follows it."""
    states, _ = self.text_encoder(text_tokens, text_mask)
    return self.text_output(states).astype(jnp.float32)

  def prior(self, text_embed: jax.Array) -> Gaussian:
    """p(z | t)."""
    if self.text_prior:
      return self.prior_net(text_embed)
    zeros = jnp.zeros((len(text_embed), self.latent_dim), jnp.float32)
    return Gaussian(zeros, zeros)

  def posterior(self, image: jax.Array, text_embed: jax.Array) -> Gaussian:
    """q(z | x, t)."""
    return self.image_encoder(image, text_embed)

  def decode(
    self, z: jax.Array, text_embed: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """p(x | z, t): the mean [B, S, S, 3] and the log stddev [], float32."""
    return self.decoder(z, text_embed)


def _gaussian(
  x: jax.Array, latent_dim: int, name: str, dtype: DTypeLike
) -> Gaussian:
  """What a last layer, which starts at zero, gives."""
  x = linear.Dense(
    2 * latent_dim, kernel_init=nn.initializers.zeros, dtype=dtype, name=name
  )(x)
  mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  bound = _MAX_LOG_VARIANCE
  return Gaussian(mean, jnp.clip(log_variance, -bound, bound))
