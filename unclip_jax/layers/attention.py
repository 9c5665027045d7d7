"""Self-attention over positions and, in the same softmax, over a given prefix.

The prefix is keys and values computed elsewhere: those of the tokens before
(a key/value cache) or those of a conditioning context (GLIDE, Nichol et al.
2021, section 4, and guided-diffusion's `encoder_kv`). A cache that grows token
by token is a prefix of full length, into which each token's keys and values
are put in their place. Scores, softmax and accumulation are float32.

Keys and values are kept as [B, N, M, K]: both products then read them as they
lie, and a prefix is laid out once, not at every diffusion step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import linear, remat
from unclip_jax.utils import axes, errors


class KeyValue(NamedTuple):
  """Keys and values of M positions, each [B, N, M, K]."""

  key: jax.Array
  value: jax.Array


# From so many scores a head on, CPUs are faster one head after the other.
_MIN_SCORES = 256 * 256


def attend(
  q_BxNxLxK: jax.Array, kv: KeyValue, mask: jax.Array | None = None
) -> jax.Array:
  """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

  Args:
    q_BxNxLxK: queries, not yet scaled.
    kv: keys and values, [B, N, M, K].
    mask: bool, broadcasts to [B, N, L, M], True = attend; a query that may
      attend to nothing gets the mean of all values, not NaN.

  Returns:
    [B, N, L, K] in the dtype of the values.
  """
  L, M = q_BxNxLxK.shape[2], kv.key.shape[2]
  if L * M < _MIN_SCORES:
    return _attend_at_once(q_BxNxLxK, kv, mask)
  return jax.lax.platform_dependent(
    q_BxNxLxK, kv, mask, cpu=_attend_by_heads, default=_attend_at_once
  )


def _attend_at_once(
  q_BxNxLxK: jax.Array, kv: KeyValue, mask: jax.Array | None
) -> jax.Array:
  scores_BxNxLxM = jnp.einsum(
    "bnlk,bnmk->bnlm",
    q_BxNxLxK * q_BxNxLxK.shape[-1] ** -0.5,
    kv.key,
    preferred_element_type=jnp.float32,
  )
  if mask is not None:
    lowest = jnp.finfo(jnp.float32).min
    scores_BxNxLxM = jnp.where(mask, scores_BxNxLxM, lowest)
  weights_BxNxLxM = jax.nn.softmax(scores_BxNxLxM).astype(kv.value.dtype)
  out_BxNxLxK = jnp.einsum(
    "bnlm,bnmk->bnlk",
    weights_BxNxLxM,
    kv.value,
    preferred_element_type=jnp.float32,
  )
  return out_BxNxLxK.astype(kv.value.dtype)


def _attend_by_heads(
  q_BxNxLxK: jax.Array, kv: KeyValue, mask: jax.Array | None
) -> jax.Array:
  """The same in 0.4 of the time, on CPU: a head's scores stay in its cache."""
  B, N = q_BxNxLxK.shape[:2]
  if mask is not None:
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = jnp.broadcast_to(mask, (B, N, *mask.shape[2:]))
  heads = jax.tree.map(
    lambda x: x.reshape(B * N, 1, 1, *x.shape[2:]), (q_BxNxLxK, kv, mask)
  )
  out = jax.lax.map(lambda head: _attend_at_once(*head), heads)
  return out.reshape(q_BxNxLxK.shape)


def causal_mask(length: int, num_prefix: int = 0) -> jax.Array:
  """[length, num_prefix + length] bool: own and earlier positions, prefix."""
  total = num_prefix + length
  return jnp.tril(jnp.ones((length, total), bool), k=num_prefix)


class SelfAttention(nn.Module):
  """Multi-head self-attention with an optional prefix.

  Attributes:
    width: D, size of input and output; a multiple of num_heads.
    num_heads: N.
    has_context: whether `encode_context` exists.
    dtype: compute dtype.
  """

  width: int
  num_heads: int
  has_context: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    if self.num_heads < 1 or self.width % self.num_heads:
      raise errors.UserError(
        f"attention width {self.width} is not a multiple of "
        f"{self.num_heads} heads: change the width or the number of heads"
      )
    dense = functools.partial(linear.Dense, self.width, dtype=self.dtype)
    self.query = dense()
    self.key = dense()
    self.value = dense()
    # Zero: the residual branch that ends here starts as the identity.
    self.out = dense(kernel_init=nn.initializers.zeros)
    if self.has_context:
      self.context_key = dense()
      self.context_value = dense()

  def encode_context(self, context: jax.Array) -> KeyValue:
    """Keys and values of context tokens [B, M, any size], to be a prefix."""
    return KeyValue(
      self._split_heads(self.context_key(context)),
      self._split_heads(self.context_value(context)),
    )

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    prefix: KeyValue | None = None,
    start: jax.Array | None = None,
  ) -> tuple[jax.Array, KeyValue]:
    """Attends from every position of x to the prefix and to x.

    Args:
      x: [B, L, D].
      mask: bool, broadcasts to [B, N, L, M], True = attend; M is the prefix
        length + L, with `start` the prefix length.
      prefix: keys and values that stand before those of x.
      start: [] int32, where in the prefix the keys and values of x are put, in
        place of behind it; the mask then hides what is not yet filled.

    Returns:
      [B, L, D], and the keys and values of x (without the prefix); with
      `start` the prefix that they were put into.
    """
    query = self._split_heads(self.query(x))
    own = KeyValue(
      self._split_heads(self.key(x)), self._split_heads(self.value(x))
    )
    kv = own
    if start is not None:
      kv = own = jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=2),
        prefix,
        own,
      )
    elif prefix is not None:
      kv = jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), prefix, own)
    out = remat.name(attend(query, kv, mask), "attention")
    out = einops.rearrange(out, "b n l k -> b l (n k)")
    return self.out(axes.constrain(out, "batch", "length", "heads")), own

  def _split_heads(self, x: jax.Array) -> jax.Array:
    x = einops.rearrange(x, "b l (n k) -> b n l k", n=self.num_heads)
    return axes.constrain(x, "batch", "heads", "length", None)
