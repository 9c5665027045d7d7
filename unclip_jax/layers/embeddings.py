"""Timestep embeddings and small helpers on conditioning sequences.

The sinusoid is that of guided-diffusion and Karlo: frequencies
10000^(-i / (dim / 2)), cosines first.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear
from unclip_jax.utils import errors


def check_length(length: int, context_length: int) -> None:
  """Raises UserError where a text is longer than a text encoder's context."""
  if context_length < length:
    raise errors.UserError(
      f"this text encoder takes at most {context_length} tokens, not {length}: "
      "set the tokenizer's context_length to that of the model"
    )


def sinusoidal(
  timesteps: jax.Array, dim: int, max_period: float = 10_000.0
) -> jax.Array:
  """Sinusoidal embedding, [cos, sin] (Vaswani et al. 2017, section 3.5).

  Args:
    timesteps: [B], int or float, in timesteps of the full schedule.
    dim: embedding size, even.
    max_period: the longest wave is 2 pi times this many timesteps.

  Returns:
    [B, dim] float32 in [-1, 1].
  """
  if dim % 2:
    raise ValueError(f"a sinusoidal embedding has an even size, not {dim}")
  exponents = jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2)
  frequencies = jnp.exp(-math.log(max_period) * exponents)
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
  """Sinusoid -> Dense -> SiLU -> Dense.

  Attributes:
    sinusoid_dim: size of the sinusoidal embedding.
    width: size of the hidden layer and of the result.
    dtype: compute dtype.
  """

  sinusoid_dim: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, timesteps: jax.Array) -> jax.Array:
    """[B] timesteps -> [B, width]."""
    x = sinusoidal(timesteps, self.sinusoid_dim)
    x = linear.Dense(self.width, dtype=self.dtype, name="dense_1")(x)
    return linear.Dense(self.width, dtype=self.dtype, name="dense_2")(
      nn.silu(x)
    )


def pool_last_valid(encodings: jax.Array, mask: jax.Array) -> jax.Array:
  """The state at the last True position of `mask`.

  Args:
    encodings: [B, L, D].
    mask: [B, L] bool; a row without any True gives position 0.

  Returns:
    [B, D].
  """
  last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
  return jnp.take_along_axis(encodings, last[:, None, None], axis=1)[:, 0]


def replace_dropped(
  x: jax.Array, null: jax.Array | None, drop: jax.Array | None
) -> jax.Array:
  """Puts `null` in place of the dropped rows of a batch.

  Args:
    x: [B, ...].
    null: broadcasts to one row of `x`; None: there is none.
    drop: [B] bool, True = replaced, so that the gradient with respect to that
      row of `x` is exactly 0; None drops nothing.

  Raises:
    UserError: there is nothing to put in their place.
  """
  if drop is None:
    return x
  if null is None:
    raise errors.UserError(
      "this network has no learned null text: give it the empty text in place "
      "of text_drop, or set learned_null_text in the model's config"
    )
  drop = drop.reshape((-1,) + (1,) * (x.ndim - 1))
  return jnp.where(drop, null.astype(x.dtype), x)


def check_text_fields(text_width: int | None, vocab_size: int | None) -> None:
  """A prior is given text states or encodes tokens itself: one of the two.

  Raises:
    UserError: both fields are set, or neither.
  """
  if (text_width is None) == (vocab_size is None):
    raise errors.UserError(
      "this prior needs either text_width, of the text states that it is "
      "given, or vocab_size, of the tokens that it encodes itself: set one"
    )


def text_states(
  text_encodings: jax.Array | None,
  text_tokens: jax.Array | None,
  text_mask: jax.Array | None,
  text_drop: jax.Array | None,
  *,
  token_embed: nn.Embed | None,
  null: jax.Array | None,
  context_length: int,
) -> tuple[jax.Array, jax.Array]:
  """A prior's caption, before any projection or position.

  Args:
    text_encodings: [B, L, D], read where there is no token_embed.
    text_tokens: [B, L] int32, read where there is one.
    text_mask: [B, L] bool, True = real token; None: all are.
    text_drop: [B] bool, True = as if there were no text.
    null: [D], what a dropped caption has at every position; None: nothing.

  Returns:
    States [B, L, D], and the mask [B, L] of what may be attended to.

  Raises:
    UserError: the text is missing, or not context_length long.
  """
  name = "text_encodings" if token_embed is None else "text_tokens"
  states = text_encodings if token_embed is None else text_tokens
  if states is None:
    raise errors.UserError(f"this prior is conditioned on {name}: pass it")
  B, L = states.shape[:2]
  if context_length != L:
    raise errors.UserError(
      f"this prior takes {context_length} text states, not {L}: set its "
      f"context_length to that of the tokenizer"
    )
  if token_embed is not None:
    states = token_embed(states)
  if text_mask is None:
    text_mask = jnp.ones((B, L), bool)
  if text_drop is not None:
    text_mask = text_mask | text_drop[:, None]
  return replace_dropped(states, null, text_drop), text_mask
