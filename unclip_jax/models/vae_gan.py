"""Text-conditional VAE-GAN: pictures from captions in one pass.

A conditional variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114;
Sohn et al. 2015, "Learning Structured Output Representation using Deep
Conditional Generative Models") with an adversary (Larsen et al. 2016, arXiv
1512.09300). Four parts, all conditioned on the text y:

  text encoder   bidirectional, BERT's (models/bert.py), or states given by a
                 frozen one
  posterior      q(z | x, y): VQGAN's encoder, Gaussian moments at each place
  prior          p(z | y): a transformer over the places of z that attends to
                 the text, and gives mean and log variance
  decoder        x from z and y: VQGAN's, whose lowest resolution attends to
                 itself and to the text

and a patch discriminator, conditioned by projection, that judges pictures
reconstructed and drawn. The mean of the text's states conditions every ResBlock
too. Self- and cross-attention maps come with every result.

The prior starts as N(0, I). `discriminator` is the one player's parameters, the
rest the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import (
  attention_maps,
  autoencoder,
  linear,
  norms,
  quantize,
  resnet,
)
from unclip_jax.models import bert
from unclip_jax.utils import errors


class Text(NamedTuple):
  """What the parts get of a caption."""

  encodings: jax.Array  # [B, L, W]
  mask: jax.Array  # [B, L] bool
  embed: jax.Array  # [B, W], the mean of the real tokens' states


class _Prior(nn.Module):
  """p(z | text): moments of a grid [B, h, h, D]."""

  grid_size: int
  code_dim: int
  width: int
  depth: int
  num_heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, text: Text
  ) -> tuple[quantize.Gaussian, dict[str, tuple[jax.Array, ...]]]:
    B, h = len(text.embed), self.grid_size
    position = self.param(
      "position", nn.initializers.normal(0.02), (h * h, self.width)
    )
    embed = linear.Dense(self.width, dtype=self.dtype, name="text_embed_proj")
    x = position.astype(self.dtype) + embed(text.embed)[:, None]
    maps = []
    for i in range(self.depth):
      x, found = attention_maps.Block(
        self.num_heads, dtype=self.dtype, name=f"block_{i}"
      )(x, text.encodings, text.mask)
      maps.append(found)
    x = norms.LayerNorm(dtype=self.dtype, name="ln_final")(x)
    moments = linear.Dense(
      2 * self.code_dim,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      name="moments",
    )(x)
    out = {
      f"prior_{name}_attention": tuple(found[name] for found in maps)
      for name in ("self", "cross")
    }
    return quantize.gaussian(moments.reshape(B, h, h, -1)), out


class Model(nn.Module):
  """The VAE-GAN.

  Attributes:
    image_size: S, pixels of a side of the pictures.
    context_length: L, the longest text, in tokens.
    text_width: W, of the text states.
    vocab_size: text tokens are 0 to vocab_size - 1; None: text states come in.
    text_depth, text_num_heads: of the text encoder, where there is one.
    code_dim: D, channels of z.
    prior_width, prior_depth: of the prior's transformer.
    channels, channel_mult, num_res_blocks, num_heads, dropout: of the encoder
      and the decoder, see models/vqgan.py; num_heads is the prior's too.
    discriminator_channels, discriminator_layers: see
      layers.autoencoder.PatchDiscriminator.
    dtype: compute dtype; parameters are float32.
  """

  image_size: int
  context_length: int
  text_width: int
  vocab_size: int | None = None
  text_depth: int = 4
  text_num_heads: int = 4
  code_dim: int = 8
  prior_width: int = 256
  prior_depth: int = 4
  channels: int = 64
  channel_mult: Sequence[int] = (1, 2, 2)
  num_res_blocks: int = 1
  num_heads: int = 4
  discriminator_channels: int = 64
  discriminator_layers: int = 2
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @property
  def grid_size(self) -> int:
    """h, side of z."""
    return autoencoder.latent_size(self.image_size, self.channel_mult)

  def setup(self) -> None:
    if self.vocab_size is not None:
      self.text_encoder = bert.Encoder(
        vocab_size=self.vocab_size,
        context_length=self.context_length,
        width=self.text_width,
        depth=self.text_depth,
        num_heads=self.text_num_heads,
        has_pooler=False,
        dropout=self.dropout,
        dtype=self.dtype,
      )
    half = dict(
      channels=self.channels,
      channel_mult=tuple(self.channel_mult),
      num_res_blocks=self.num_res_blocks,
      num_heads=self.num_heads,
      dropout=self.dropout,
      dtype=self.dtype,
    )
    self.encoder = autoencoder.Encoder(out_channels=2 * self.code_dim, **half)
    self.prior = _Prior(
      self.grid_size,
      self.code_dim,
      self.prior_width,
      self.prior_depth,
      self.num_heads,
      self.dtype,
    )
    self.decoder = autoencoder.Decoder(**half)
    self.conv_out = resnet.conv3x3(3, dtype=self.dtype)
    self.discriminator = autoencoder.PatchDiscriminator(
      self.discriminator_channels, self.discriminator_layers, dtype=self.dtype
    )

  def __call__(
    self,
    image: jax.Array,
    text_tokens: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    text_encodings: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The reconstruction, as `reconstruct` without noise, and "logits"."""
    features, out = self.reconstruct(
      image, text_tokens, text_mask, text_encodings=text_encodings
    )
    image = self.to_image(features)
    logits = self.discriminate(image, out["text_embed"])
    return image, {**out, "logits": logits}

  def reconstruct(
    self,
    image: jax.Array,
    text_tokens: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    text_encodings: jax.Array | None = None,
    noise: jax.Array | None = None,
    draw_noise: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Encodes and decodes, up to `to_image`, and draws from the prior too.

    Args:
      image: [B, S, S, 3] in [-1, 1].
      text_tokens, text_mask, text_encodings: see `encode_text`.
      noise: [B, h, h, D] standard normal, of the posterior; None: its mean.
      draw_noise: the same, of the prior; None: nothing is drawn.
      train: whether dropout is on.

    Returns:
      What `to_image` takes, [B, ...], or [2 B, ...] with the drawn ones behind
      the reconstructions; and the intermediates: "posterior" and "prior"
      (`quantize.Gaussian`, [B, h, h, D]), "text_embed" [B, W], "z", and the
      maps of `encode_text`, `draw_prior` and `decode`, and
      "encoder_self_attention" [B, N, h h, h h] and "encoder_cross_attention"
      [B, N, h h, L].

    Raises:
      UserError: pictures of another size, or no text.
    """
    if image.shape[1:3] != (self.image_size, self.image_size):
      raise errors.UserError(
        f"this autoencoder takes pictures of {self.image_size} x"
        f" {self.image_size} pixels, not {image.shape[1]} x {image.shape[2]}:"
        " change image_size"
      )
    text, out = self.encode_text(
      text_tokens, text_mask, text_encodings=text_encodings, train=train
    )
    moments, maps = self.encoder(
      image, text.embed, text.encodings, text.mask, train=train
    )
    posterior = quantize.gaussian(moments)
    prior, prior_maps = self.prior(text)
    z = posterior.mean if noise is None else posterior.sample(noise)
    out |= {f"encoder_{name}_attention": x for name, x in maps.items()}
    out |= {**prior_maps, "posterior": posterior, "prior": prior, "z": z}
    out["text_embed"] = text.embed
    if draw_noise is not None:
      z = jnp.concatenate([z, prior.sample(draw_noise)])
      text = jax.tree.map(lambda x: jnp.concatenate([x, x]), text)
    features, maps = self.decode(z, text, train=train)
    return features, out | maps

  def encode_text(
    self,
    text_tokens: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    text_encodings: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[Text, dict[str, Any]]:
    """What the other parts get of the captions.

    Args:
      text_tokens: [B, L] int32, read where there is a vocab_size.
      text_mask: [B, L] bool, True = real token.
      text_encodings: [B, L, W], read where there is none.
      train: whether dropout is on.

    Returns:
      The text, and "text_attention", one [B, N, L, L] for each block of the
      text encoder (none, where the states come in).

    Raises:
      UserError: the text is missing.
    """
    name = "text_encodings" if self.vocab_size is None else "text_tokens"
    given = text_encodings if self.vocab_size is None else text_tokens
    if given is None or text_mask is None:
      raise errors.UserError(
        f"this model reads {name} and text_mask: pass both, or change"
        " config.model.vocab_size"
      )
    maps = ()
    if self.vocab_size is not None:
      given, out = self.text_encoder(text_tokens, text_mask, train=train)
      maps = out["attention_maps"]
    real = text_mask[..., None].astype(given.dtype)
    count = jnp.maximum(real.sum(1), 1)
    text = Text(given, text_mask, (given * real).sum(1) / count)
    return text, {"text_attention": maps}

  def draw_prior(
    self, text: Text
  ) -> tuple[quantize.Gaussian, dict[str, tuple[jax.Array, ...]]]:
    """p(z | text), [B, h, h, D], and its maps, one a block.

    "prior_self_attention" [B, N, h h, h h], "prior_cross_attention"
    [B, N, h h, L].
    """
    return self.prior(text)

  def decode(
    self, z: jax.Array, text: Text, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """z [B, h, h, D] -> what `to_image` takes, and the maps.

    "decoder_self_attention" [B, N, h h, h h], "decoder_cross_attention"
    [B, N, h h, L].
    """
    features, maps = self.decoder(
      z.astype(self.dtype), text.embed, text.encodings, text.mask, train=train
    )
    return features, {f"decoder_{k}_attention": x for k, x in maps.items()}

  def to_image(self, features: jax.Array) -> jax.Array:
    """What `decode` gives -> pictures [B, S, S, 3] float32, unbounded."""
    return self.conv_out(features).astype(jnp.float32)

  def discriminate(self, image: jax.Array, text_embed: jax.Array) -> jax.Array:
    """[B, S, S, 3] and text_embed [B, W] -> logits [B, h', w'] float32."""
    return self.discriminator(image.astype(self.dtype), text_embed)
