"""Embeddings of text tokens and of a picture's tokens, with their positions.

As in DALL-E (Ramesh et al. 2021, arXiv 2102.12092, section 2.2, appendix B.1
and figure 10): a picture's token is the sum of three embeddings, of its code,
its row and its column; a text position without a token holds an embedding of
its own, learned and attended to like any other.
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.utils import errors

_NORMAL = nn.initializers.normal(0.02)


class TextTokens(nn.Module):
  """Token and position.

  Attributes:
    vocab_size: tokens are 0 to vocab_size - 1.
    context_length: positions there are.
    width: D.
    has_padding: whether a text mask is taken.
    dtype: of the result; parameters are float32.
  """

  vocab_size: int
  context_length: int
  width: int
  has_padding: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.token = nn.Embed(
      self.vocab_size, self.width, embedding_init=_NORMAL, dtype=self.dtype
    )
    shape = (self.context_length, self.width)
    self.position = self.param("position", _NORMAL, shape)
    if self.has_padding:
      self.padding = self.param("padding", _NORMAL, shape)

  def __call__(
    self,
    text_tokens: jax.Array,
    text_mask: jax.Array | None = None,
    *,
    start: jax.Array | int = 0,
  ) -> jax.Array:
    """[B, L] int32 at positions start, start + 1, ... -> [B, L, D].

    Args:
      text_mask: [B, L] bool, True = real token; elsewhere is padding.

    Raises:
      UserError: L is more than context_length.
    """
    L = text_tokens.shape[1]
    if self.context_length < L:
      raise errors.UserError(
        f"this network takes at most {self.context_length} text tokens, not "
        f"{L}: set its context_length to that of the tokenizer"
      )

    def at(table: jax.Array) -> jax.Array:
      rows = jax.lax.dynamic_slice_in_dim(table, start, L)
      return rows.astype(self.dtype)

    x = self.token(text_tokens) + at(self.position)
    if text_mask is None:
      return x
    return jnp.where(text_mask[..., None], x, at(self.padding))


class ImageTokens(nn.Module):
  """Code, row and column.

  Attributes:
    num_codes: codes are 0 to num_codes - 1.
    grid_size: S; a picture is S * S tokens in raster order.
    width: D.
    dtype: of the result; parameters are float32.
  """

  num_codes: int
  grid_size: int
  width: int
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.code = nn.Embed(
      self.num_codes, self.width, embedding_init=_NORMAL, dtype=self.dtype
    )
    shape = (self.grid_size, self.width)
    self.row = self.param("row", _NORMAL, shape)
    self.column = self.param("column", _NORMAL, shape)

  def __call__(
    self, image_tokens: jax.Array, *, start: jax.Array | int = 0
  ) -> jax.Array:
    """[B, K] int32, the tokens start, start + 1, ... -> [B, K, D]."""
    positions = einops.rearrange(
      self.row[:, None] + self.column, "h w d -> (h w) d"
    )
    positions = jax.lax.dynamic_slice_in_dim(
      positions, start, image_tokens.shape[1]
    )
    return self.code(image_tokens) + positions.astype(self.dtype)
