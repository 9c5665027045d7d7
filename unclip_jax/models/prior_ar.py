"""The autoregressive prior of unCLIP (Ramesh et al. 2022, section 2.2).

Two transformers (table 3). The text encoder, bidirectional, reads the frozen
CLIP's text states. The latent decoder, causal, runs over

  [ text_embed | dot-product token | code 0 | ... | code K - 2 ]

and predicts code i from all before it. Text does not fit into its context
(384 < 256 + 319): in each of its layers the encoded text gives keys and values
that stand before those of the sequence, in one softmax, as in GLIDE (Nichol et
al. 2021, section 4). These depend on nothing that is drawn: `encode_text`
computes them once per caption, `prefill` adds the first two positions, and
`decode_step` runs one position per code with a cache of fixed length.

Where the paper is silent: one table of bucket embeddings serves all dimensions,
with a learned position for each (a table per dimension would have 544 M
parameters, and the same again for the output). The dot product is only given,
not predicted. A dropped text takes the dot product, a function of it, along:
what is left is the prior over images. With a vocab_size the text encoder reads
the caption's tokens, as the paper's does, else a frozen CLIP's states.
Deviations: of the 384 positions in the table only the K + 1 that are used
exist; the projections that end a residual branch, and the output, start at
zero.

Sizes (table 3): text encoder: context 256, width 2048, depth 24, 32 heads;
latent decoder: context 384, width 1664, depth 24, 26 heads; K = 319 codes of
1,024 buckets.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, embeddings, linear, norms, transformer

_NUM_GIVEN_POSITIONS = 2  # text_embed, dot-product token


class Text(NamedTuple):
  """What the latent decoder gets of a caption."""

  layers: tuple[attention.KeyValue, ...]  # each [B, N, L, K]
  mask: jax.Array  # [B, L] bool
  text_embed: jax.Array  # [B, D], projected


class Cache(NamedTuple):
  """What the latent decoder has seen, in room for all that it will see."""

  layers: tuple[attention.KeyValue, ...]  # each [B, N, L + num_codes + 1, K]
  mask: jax.Array  # [B, L] bool, of the text


class Model(nn.Module):
  """The autoregressive prior.

  Attributes:
    embed_dim: size of text_embed.
    text_width: size of the incoming text states; None: there are none.
    context_length: L, the number of text states.
    num_codes: codes that make up an image embedding.
    num_buckets: V, values of a code.
    num_dot_buckets: values of the dot-product token.
    encoder_width, encoder_depth, encoder_num_heads: the text encoder.
    width, depth, num_heads: the latent decoder.
    vocab_size: text tokens are 0 to vocab_size - 1; None: text states come in.
    mlp_ratio: hidden width of the MLPs, in widths.
    dropout: rate in the residual branches, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  embed_dim: int
  text_width: int | None
  context_length: int
  num_codes: int
  num_buckets: int
  num_dot_buckets: int
  encoder_width: int
  encoder_depth: int
  encoder_num_heads: int
  width: int
  depth: int
  num_heads: int
  vocab_size: int | None = None
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    embeddings.check_text_fields(self.text_width, self.vocab_size)
    normal = nn.initializers.normal(0.02)
    self.null_text_encodings = self.param(
      "null_text_encodings", normal, (self.text_width or self.encoder_width,)
    )
    self.null_text_embed = self.param(
      "null_text_embed", normal, (self.embed_dim,)
    )

    if self.vocab_size is None:
      self.text_encodings_proj = linear.Dense(
        self.encoder_width, dtype=self.dtype
      )
    else:
      self.encoder_token_embed = nn.Embed(
        self.vocab_size,
        self.encoder_width,
        embedding_init=normal,
        dtype=self.dtype,
      )
    self.encoder_position = self.param(
      "encoder_position", normal, (self.context_length, self.encoder_width)
    )
    self.encoder_block = [
      transformer.Block(
        self.encoder_width,
        self.encoder_num_heads,
        self.mlp_ratio,
        dropout=self.dropout,
        dtype=self.dtype,
      )
      for _ in range(self.encoder_depth)
    ]
    self.encoder_ln_final = norms.LayerNorm(dtype=self.dtype)

    self.text_embed_proj = linear.Dense(self.width, dtype=self.dtype)
    # The last row stands for "no dot product".
    self.dot_embed = nn.Embed(
      self.num_dot_buckets + 1,
      self.width,
      embedding_init=normal,
      dtype=self.dtype,
    )
    self.code_embed = nn.Embed(
      self.num_buckets, self.width, embedding_init=normal, dtype=self.dtype
    )
    self.position = self.param(
      "position",
      normal,
      (_NUM_GIVEN_POSITIONS + self.num_codes - 1, self.width),
    )
    self.block = [
      transformer.Block(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        dropout=self.dropout,
        has_context=True,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)
    # Zero: a new prior gives every bucket the same probability.
    self.output = linear.Dense(
      self.num_buckets, kernel_init=nn.initializers.zeros, dtype=self.dtype
    )

  def __call__(
    self,
    codes: jax.Array,
    dot_bucket: jax.Array,
    text_embed: jax.Array,
    text_encodings: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    text_tokens: jax.Array | None = None,
    text_drop: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts every code from those before it, in one pass.

    Args:
      codes: [B, num_codes] int32.
      dot_bucket: [B] int32; num_dot_buckets means that none is given.
      text_embed: [B, embed_dim], of components of order 1.
      text_encodings: [B, L, text_width], where there is a text_width.
      text_mask: [B, L] bool, True = real token; None: all are.
      text_tokens: [B, L] int32, where there is a vocab_size.
      text_drop: [B] bool, True = as if there were no text and no dot product.
      train: whether dropout is on.

    Returns:
      Logits [B, num_codes, num_buckets] float32, and the final states
      {"encodings": [B, num_codes + 1, D], "text_encodings": [B, L, the
      encoder's width]}.
    """
    encoded, text_mask, text_embed = self._encode_text(
      text_embed, text_encodings, text_mask, text_tokens, text_drop, train
    )
    if text_drop is not None:
      dot_bucket = jnp.where(text_drop, self.num_dot_buckets, dot_bucket)
    given = self._embed_given(text_embed, dot_bucket)
    x = jnp.concatenate([given, self.code_embed(codes[:, :-1])], axis=1)
    x = x + self.position.astype(x.dtype)
    x, _ = transformer.run(
      self.block,
      x,
      _causal_mask(text_mask, x.shape[1]),
      context=encoded,
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.ln_final(x)
    logits = self.output(x[:, _NUM_GIVEN_POSITIONS - 1 :])
    out = {"encodings": x, "text_encodings": encoded}
    return logits.astype(jnp.float32), out

  def encode_text(
    self,
    text_embed: jax.Array,
    text_encodings: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    text_tokens: jax.Array | None = None,
    text_drop: jax.Array | None = None,
  ) -> Text:
    """What `prefill` needs of the text; arguments as in `__call__`."""
    encoded, text_mask, text_embed = self._encode_text(
      text_embed, text_encodings, text_mask, text_tokens, text_drop, False
    )
    layers = tuple(block.encode_context(encoded) for block in self.block)
    return Text(layers, text_mask, text_embed)

  def prefill(
    self, text: Text, dot_bucket: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, num_buckets] of code 0, and the cache for `decode_step`.

    Args:
      text: from `encode_text`.
      dot_bucket: [B] int32; num_dot_buckets means that none is given.
    """
    x = self._embed_given(text.text_embed, dot_bucket)
    x = x + self.position[:_NUM_GIVEN_POSITIONS].astype(x.dtype)
    mask = _causal_mask(text.mask, _NUM_GIVEN_POSITIONS)
    x, given = transformer.run(self.block, x, mask, prefixes=text.layers)
    room = ((0, 0), (0, 0), (0, self.num_codes - 1), (0, 0))
    layers = jax.tree.map(
      lambda a, b: jnp.pad(jnp.concatenate([a, b], axis=2), room),
      text.layers,
      given,
    )
    return self._logits(x), Cache(layers, text.mask)

  def decode_step(
    self, codes: jax.Array, index: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, num_buckets] of code index + 1, and the cache with this code.

    Args:
      codes: [B] int32, code `index` of each row.
      index: [] int32, from 0 to num_codes - 2.
      cache: from `prefill`, with all codes before `index` in it.
    """
    position = _NUM_GIVEN_POSITIONS + index
    x = self.code_embed(codes)
    x = x + jnp.take(self.position, position, axis=0).astype(x.dtype)
    B, L = cache.mask.shape
    own = jnp.arange(len(self.position)) <= position
    mask = jnp.concatenate(
      [cache.mask, jnp.broadcast_to(own, (B, len(own)))], axis=1
    )
    x, layers = transformer.run(
      self.block,
      x[:, None],
      mask[:, None, None, :],
      prefixes=cache.layers,
      start=L + position,
    )
    return self._logits(x), Cache(layers, cache.mask)

  def _logits(self, x: jax.Array) -> jax.Array:
    return self.output(self.ln_final(x[:, -1])).astype(jnp.float32)

  def _encode_text(
    self,
    text_embed: jax.Array,
    text_encodings: jax.Array | None,
    text_mask: jax.Array | None,
    text_tokens: jax.Array | None,
    text_drop: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The encoder's states [B, L, width], their mask, projected text_embed."""
    is_given = self.vocab_size is None
    x, text_mask = embeddings.text_states(
      text_encodings,
      text_tokens,
      text_mask,
      text_drop,
      token_embed=None if is_given else self.encoder_token_embed,
      null=self.null_text_encodings,
      context_length=self.context_length,
    )
    text_embed = embeddings.replace_dropped(
      text_embed, self.null_text_embed, text_drop
    )
    if is_given:
      x = self.text_encodings_proj(x)
    x = x + self.encoder_position.astype(x.dtype)
    x, _ = transformer.run(
      self.encoder_block,
      x,
      text_mask[:, None, None, :],
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.encoder_ln_final(x)
    return x, text_mask, self.text_embed_proj(text_embed)

  def _embed_given(
    self, text_embed: jax.Array, dot_bucket: jax.Array
  ) -> jax.Array:
    """Tokens [B, 2, D] of text_embed and dot product, without positions."""
    return jnp.stack([text_embed, self.dot_embed(dot_bucket)], axis=1)


def _causal_mask(text_mask: jax.Array, length: int) -> jax.Array:
  """[B, L] -> [B, 1, length, L + length]: real text, own and earlier ones."""
  mask = jnp.pad(text_mask, ((0, 0), (0, length)), constant_values=True)
  causal = attention.causal_mask(length, text_mask.shape[1])
  return causal & mask[:, None, None, :]
