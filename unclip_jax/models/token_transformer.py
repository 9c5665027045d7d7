"""DALL-E's transformer: P(caption, picture) as one sequence of tokens.

Ramesh et al. 2021 (arXiv 2102.12092), section 2.2 and appendix B.1. A
decoder-only transformer runs over

  [ text 0 | ... | text L - 1 | start of picture | code 0 | ... | code K - 2 ]

and predicts text i + 1 at text i and code i at the position before it. Text
attends causally, the picture to all text and to the picture by a pattern that
changes from layer to layer (layers/sparse_masks.py); both in one softmax. Text
positions without a token hold a learned padding token, one for each position,
and are not masked: a caption without tokens is the null caption.

Where the paper is silent: its tokens share one softmax; here text and picture
have outputs of their own, so that no probability goes to the other kind.
Deviations: nothing predicts the first text token, which begins every caption;
the projections that end a residual branch, and the outputs, start at zero.

Sizes (section 2.2, appendix B.1): context 256 of 16,384 text tokens, a grid of
32 x 32 of 8,192 codes; width 3968, depth 64, 62 heads; row, column, row, row,
and a convolution of 11 x 11 in the last layer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from unclip_jax.layers import (
  attention,
  linear,
  norms,
  sparse_masks,
  token_embeddings,
  transformer,
)

Cache = tuple[attention.KeyValue, ...]  # each [B, N, L + K, head width]


class Model(nn.Module):
  """The decoder-only transformer.

  Attributes:
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: L, text positions.
    num_codes: V, image tokens are 0 to num_codes - 1.
    grid_size: image tokens of a side; K is its square.
    image_size: pixels of a side of the pictures that the tokens stand for.
    width, depth, num_heads: the transformer.
    attention_types: of the layers, from the first on, again and again; see
      layers/sparse_masks.py.
    last_attention_type: of the last layer; None: as the others.
    kernel_size: of "convolution", in tokens; odd.
    mlp_ratio: hidden width of the MLPs, in widths.
    dropout: rate in the residual branches, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  vocab_size: int
  context_length: int
  num_codes: int
  grid_size: int
  image_size: int
  width: int
  depth: int
  num_heads: int
  attention_types: tuple[str, ...] = ("row", "column", "row", "row")
  last_attention_type: str | None = "convolution"
  kernel_size: int = 11
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  direction = "text_to_image"

  def setup(self) -> None:
    self.text_embed = token_embeddings.TextTokens(
      self.vocab_size,
      self.context_length,
      self.width,
      has_padding=True,
      dtype=self.dtype,
    )
    self.image_embed = token_embeddings.ImageTokens(
      self.num_codes, self.grid_size, self.width, dtype=self.dtype
    )
    self.start_of_image = self.param(
      "start_of_image", nn.initializers.normal(0.02), (self.width,)
    )
    self.block = [
      transformer.Block(
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
    zeros = nn.initializers.zeros
    self.text_output = linear.Dense(
      self.vocab_size, kernel_init=zeros, dtype=self.dtype
    )
    self.image_output = linear.Dense(
      self.num_codes, kernel_init=zeros, dtype=self.dtype
    )

  def __call__(
    self,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    image_tokens: jax.Array,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts every token from those before it, in one pass.

    Args:
      text_tokens: [B, L] int32.
      text_mask: [B, L] bool, True = real token; elsewhere is padding.
      image_tokens: [B, K] int32 in raster order.
      train: whether dropout is on.

    Returns:
      Logits [B, K, V] of the image tokens, and {"text_logits": [B, L - 1,
      vocab_size] of the text tokens from the second on, "encodings": the
      final states [B, L + K, D]}. All logits are float32.
    """
    given = self._embed_given(text_tokens, text_mask)
    x = jnp.concatenate([given, self.image_embed(image_tokens[:, :-1])], axis=1)
    x, _ = transformer.run(
      self.block,
      x,
      self._masks(),
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.ln_final(x)
    L = self.context_length
    text_logits = self.text_output(x[:, : L - 1]).astype(jnp.float32)
    logits = self.image_output(x[:, L:]).astype(jnp.float32)
    return logits, {"text_logits": text_logits, "encodings": x}

  def prefill(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of image token 0, and the cache for `decode_step`."""
    x = self._embed_given(text_tokens, text_mask)
    length = x.shape[1]
    x, given = transformer.run(
      self.block, x, attention.causal_mask(length), scan=self.scan
    )
    room = ((0, 0), (0, 0), (0, self.grid_size**2 - 1), (0, 0))
    return self._logits(x), jax.tree.map(lambda a: jnp.pad(a, room), given)

  def decode_step(
    self, tokens: jax.Array, index: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of image token index + 1, and the cache with this one.

    Args:
      tokens: [B] int32, image token `index` of each row.
      index: [] int32, from 0 to K - 2.
      cache: from `prefill`, with all tokens before `index` in it.
    """
    x = self.image_embed(tokens[:, None], start=index)
    position = self.context_length + 1 + index
    masks = [
      jax.lax.dynamic_slice_in_dim(jnp.asarray(mask), position, 1)
      for mask in self._masks()
    ]
    x, cache = transformer.run(
      self.block, x, masks, prefixes=cache, start=position
    )
    return self._logits(x), cache

  def _logits(self, x: jax.Array) -> jax.Array:
    return self.image_output(self.ln_final(x[:, -1])).astype(jnp.float32)

  def _embed_given(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> jax.Array:
    """[B, L + 1, D]: text and the start of the picture."""
    x = self.text_embed(text_tokens, text_mask)
    start = jnp.broadcast_to(
      self.start_of_image.astype(x.dtype), (len(x), 1, self.width)
    )
    return jnp.concatenate([x, start], axis=1)

  def _masks(self) -> list[np.ndarray]:
    """[L + K, L + K] bool of each layer; layers of a type share one."""
    types = sparse_masks.layer_types(
      self.attention_types, self.depth, self.last_attention_type
    )
    masks = {}
    for name in set(types):
      image = sparse_masks.image_mask(name, self.grid_size, self.kernel_size)
      # The last token is predicted and never attended to.
      masks[name] = sparse_masks.sequence_mask(
        image[:-1, :-1], self.context_length + 1
      )
    return [masks[name] for name in types]
