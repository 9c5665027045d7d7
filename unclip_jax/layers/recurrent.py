"""A recurrent text encoder: word vectors, then an LSTM or a GRU.

LSTM: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000;
GRU: Cho et al. 2014 (arXiv 1406.1078). Both read from left to right, so the
state at a token has seen that token and those before it, and the state at the
last real token stands for the whole caption: padding comes after it.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import embeddings
from unclip_jax.utils import errors

_CELLS = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}


class TextEncoder(nn.Module):
  """The encoder.

  Attributes:
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: the longest text, in tokens.
    word_width: size of the word vectors.
    width: D, size of the state.
    cell: "lstm" or "gru".
    dtype: compute dtype.
  """

  vocab_size: int
  context_length: int
  word_width: int
  width: int
  cell: str = "lstm"
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Reads texts.

    Args:
      text_tokens: [B, L] int32.
      text_mask: [B, L] bool, True = real token; these come first.

    Returns:
      The states [B, L, D], and the one at the last real token [B, D].

    Raises:
      UserError: L is more than context_length, or there is no such cell.
    """
    if self.cell not in _CELLS:
      raise errors.UserError(
        f"unknown recurrent cell {self.cell!r}: use one of {', '.join(_CELLS)}"
      )
    L = text_tokens.shape[1]
    embeddings.check_length(L, self.context_length)
    x = nn.Embed(
      self.vocab_size, self.word_width, dtype=self.dtype, name="token_embed"
    )(text_tokens)
    cell = _CELLS[self.cell](self.width, dtype=self.dtype, name="rnn")
    states = nn.RNN(cell)(x)
    return states, embeddings.pool_last_valid(states, text_mask)
