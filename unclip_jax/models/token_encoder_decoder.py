"""P(picture | caption) or P(caption | picture), by an encoder and a decoder.

The transformer of Vaswani et al. 2017 (arXiv 1706.03762) over text tokens and
the codes of a picture: a bidirectional encoder reads one of the two, a causal
decoder with cross-attention predicts the other, as the open reproductions of
DALL-E do (DALL-E Mini: Dayma et al. 2021). Unlike DALL-E itself (Ramesh et al.
2021, models/token_transformer.py) it does not model what it is conditioned on.

  text_to_image   [ start | code 0 | ... | code K - 2 ], which predict all codes
  image_to_text   [ text 0 | ... | text L - 2 ], which predict all text tokens
                  but the first, which begins every caption

The text encoder is GLIDE's (layers/text_encoder.py): text positions without a
token hold learned padding, and a caption without tokens is the null caption.
Embeddings of a picture are DALL-E's (layers/token_embeddings.py). Deviations
from Vaswani et al.: norms before the branches; learned positions; the
projections that end a residual branch, and the output, start at zero.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import (
  attention,
  cross_attention,
  linear,
  norms,
  text_encoder,
  token_embeddings,
  transformer,
)
from unclip_jax.utils import errors

DIRECTIONS = ("text_to_image", "image_to_text")
Cache = tuple[cross_attention.Prefix, ...]


class ImageEncoder(nn.Module):
  """A bidirectional transformer over a picture's tokens.

  Attributes are those of `Model`.
  """

  num_codes: int
  grid_size: int
  width: int
  depth: int
  num_heads: int
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.embed = token_embeddings.ImageTokens(
      self.num_codes, self.grid_size, self.width, dtype=self.dtype
    )
    self.block = [
      transformer.Block(self.width, self.num_heads, dtype=self.dtype)
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)

  def __call__(self, image_tokens: jax.Array) -> jax.Array:
    """[B, K] int32 -> [B, K, D]."""
    x = self.embed(image_tokens)
    x, _ = transformer.run(self.block, x, remat=self.remat, scan=self.scan)
    return self.ln_final(x)


class Model(nn.Module):
  """The encoder-decoder.

  Attributes:
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: L, text positions.
    num_codes: V, image tokens are 0 to num_codes - 1.
    grid_size: image tokens of a side; K is its square.
    image_size: pixels of a side of the pictures that the tokens stand for.
    width, num_heads: of both transformers.
    encoder_depth, depth: blocks of the encoder and of the decoder.
    direction: "text_to_image" or "image_to_text".
    mlp_ratio: hidden width of the decoder's MLPs, in widths.
    dropout: rate in the decoder's residual branches, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for each stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  vocab_size: int
  context_length: int
  num_codes: int
  grid_size: int
  image_size: int
  width: int
  encoder_depth: int
  depth: int
  num_heads: int
  direction: str = "text_to_image"
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    if self.direction not in DIRECTIONS:
      raise errors.UserError(
        f"config.model.direction '{self.direction}' is unknown: use one of "
        f"{', '.join(DIRECTIONS)}"
      )
    same = dict(remat=self.remat, scan=self.scan, dtype=self.dtype)
    if self._draws_image:
      self.text_encoder = text_encoder.TextEncoder(
        self.vocab_size,
        self.context_length,
        self.width,
        self.encoder_depth,
        self.num_heads,
        **same,
      )
      self.embed = token_embeddings.ImageTokens(
        self.num_codes, self.grid_size, self.width, dtype=self.dtype
      )
      self.start = self.param(
        "start", nn.initializers.normal(0.02), (self.width,)
      )
    else:
      self.image_encoder = ImageEncoder(
        self.num_codes,
        self.grid_size,
        self.width,
        self.encoder_depth,
        self.num_heads,
        **same,
      )
      self.embed = token_embeddings.TextTokens(
        self.vocab_size, self.context_length, self.width, dtype=self.dtype
      )
    self.block = [
      cross_attention.CrossBlock(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        dropout=self.dropout,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)
    # Zero: a new network gives every token the same probability.
    self.output = linear.Dense(
      self.num_codes if self._draws_image else self.vocab_size,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )

  @property
  def _draws_image(self) -> bool:
    return self.direction == "text_to_image"

  @property
  def _length(self) -> int:
    """Positions of the decoder: one for each token that it predicts."""
    if self._draws_image:
      return self.grid_size**2
    return self.context_length - 1

  def __call__(
    self,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    image_tokens: jax.Array,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts every token of the target from those before it, in one pass.

    Args:
      text_tokens: [B, L] int32.
      text_mask: [B, L] bool, True = real token. Where text is predicted it is
        not read: what follows a token has no influence on it.
      image_tokens: [B, K] int32 in raster order.
      train: whether dropout is on.

    Returns:
      float32 logits, [B, K, V] of the image tokens or [B, L - 1, vocab_size]
      of the text tokens from the second on; and the final states {"encodings":
      of the decoder, "context": of the encoder}, [B, ., D].
    """
    if self._draws_image:
      context = self.text_encoder(text_tokens, text_mask)
      start = self._start(len(context))
      x = jnp.concatenate([start, self.embed(image_tokens[:, :-1])], axis=1)
    else:
      context = self.image_encoder(image_tokens)
      x = self.embed(text_tokens[:, :-1])
    x, _ = transformer.run(
      self.block,
      x,
      attention.causal_mask(x.shape[1]),
      context=context,
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.ln_final(x)
    logits = self.output(x).astype(jnp.float32)
    return logits, {"encodings": x, "context": context}

  def prefill(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of image token 0, and the cache for `decode_step`."""
    context = self.text_encoder(text_tokens, text_mask)
    cache = self._empty_cache(context)
    return self._step(self._start(len(context)), jnp.zeros((), int), cache)

  def prefill_text(
    self, image_tokens: jax.Array, first: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, vocab_size] of text token 1, given the first, [B] int32."""
    cache = self._empty_cache(self.image_encoder(image_tokens))
    return self._step(self.embed(first[:, None]), jnp.zeros((), int), cache)

  def decode_step(
    self, tokens: jax.Array, index: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Logits of the token after this one, and the cache with this one.

    Args:
      tokens: [B] int32, predicted token `index` of each row: image token
        `index` or text token index + 1.
      index: [] int32, from 0 on.
      cache: from `prefill`, with all tokens before `index` in it.
    """
    # Of the picture, position 0 is the start; of text, the first token.
    start = index if self._draws_image else index + 1
    x = self.embed(tokens[:, None], start=start)
    return self._step(x, index + 1, cache)

  def _start(self, rows: int) -> jax.Array:
    return jnp.broadcast_to(
      self.start.astype(self.dtype), (rows, 1, self.width)
    )

  def _empty_cache(self, context: jax.Array) -> Cache:
    """The encoder's keys and values, computed once, and room for the rest."""
    shape = (
      len(context),
      self.num_heads,
      self._length,
      self.width // self.num_heads,
    )
    room = jnp.zeros(shape, self.dtype)
    own = attention.KeyValue(room, room)
    return tuple(
      cross_attention.Prefix(own, block.encode_context(context))
      for block in self.block
    )

  def _step(
    self, x: jax.Array, position: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """One position [B, 1, D] of the decoder."""
    mask = (jnp.arange(self._length) <= position)[None]
    x, cache = transformer.run(
      self.block, x, mask, prefixes=cache, start=position
    )
    return self.output(self.ln_final(x[:, -1])).astype(jnp.float32), cache
