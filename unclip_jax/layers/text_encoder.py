"""GLIDE's text encoder (Nichol et al. 2021, section 4.1; its released code).

A transformer over the caption's tokens, trained with the network that it is a
part of. It is bidirectional and knows no mask: padded positions hold a learned
embedding of their own, token and position in one, and are attended to like
any other. A caption without tokens is thus the null caption. The state at the
last position, a padded one but for the longest captions, stands for the whole.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import embeddings, norms, transformer


class TextEncoder(nn.Module):
  """The encoder.

  Attributes:
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: the longest text, in tokens.
    width: D.
    depth: number of blocks.
    num_heads: attention heads.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype.
  """

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    normal = nn.initializers.normal(0.02)
    self.token_embed = nn.Embed(
      self.vocab_size, self.width, embedding_init=normal, dtype=self.dtype
    )
    shape = (self.context_length, self.width)
    self.position = self.param("position", normal, shape)
    self.padding = self.param("padding", normal, shape)
    self.block = [
      transformer.Block(self.width, self.num_heads, dtype=self.dtype)
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)

  def __call__(self, text_tokens: jax.Array, text_mask: jax.Array) -> jax.Array:
    """[B, L] and text_mask [B, L] bool, True = real token -> [B, L, D].

    Raises:
      UserError: L is more than context_length.
    """
    L = text_tokens.shape[1]
    embeddings.check_length(L, self.context_length)
    x = self.token_embed(text_tokens)
    x = x + self.position[:L].astype(x.dtype)
    x = jnp.where(text_mask[..., None], x, self.padding[:L].astype(x.dtype))
    x, _ = transformer.run(self.block, x, remat=self.remat, scan=self.scan)
    return self.ln_final(x)
