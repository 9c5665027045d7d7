"""Self- and cross-attention that also says where it looks.

Vaswani et al. 2017 (section 3.2), the maps beside the result: weights
[B, N, L, M] float32 that sum to 1 over M. A compiled program whose caller drops
them does not compute them, and the result itself is that of
`layers.attention.attend`, which holds no maps.
"""

from __future__ import annotations

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike

from unclip_jax.layers import attention, linear, norms, transformer
from unclip_jax.utils import axes


def weights(
  q_BxNxLxK: jax.Array, k_BxNxMxK: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """Attention weights [B, N, L, M] float32; arguments as in `attend`."""
  scores = jnp.einsum(
    "bnlk,bnmk->bnlm",
    q_BxNxLxK * q_BxNxLxK.shape[-1] ** -0.5,
    k_BxNxMxK,
    preferred_element_type=jnp.float32,
  )
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(scores)


class Attention(nn.Module):
  """Multi-head attention from x to itself, or to a context.

  Attributes:
    width: D, of the result; a multiple of num_heads.
    num_heads: N.
    out_init: of the last projection; zeros, so that a residual branch that ends
      here starts as the identity.
    dtype: compute dtype.
  """

  width: int
  num_heads: int
  out_init: Initializer = nn.initializers.zeros
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Attends from every position of x.

    Args:
      x: [B, L, any size].
      context: [B, M, any size], what is attended to; None: x.
      mask: bool, broadcasts to [B, N, L, M], True = attend.

    Returns:
      [B, L, D], and the maps [B, N, L, M] float32.

    Raises:
      UserError: the heads do not divide the width.
    """
    attention.check_heads(self.width, self.num_heads)
    context = x if context is None else context
    dense = functools.partial(linear.Dense, self.width, dtype=self.dtype)
    query = self._split_heads(dense(name="query")(x))
    kv = attention.KeyValue(
      self._split_heads(dense(name="key")(context)),
      self._split_heads(dense(name="value")(context)),
    )
    out = attention.attend(query, kv, mask)
    out = einops.rearrange(out, "b n l k -> b l (n k)")
    out = axes.constrain(out, "batch", "length", "heads")
    maps = weights(query, kv.key, mask)
    return dense(kernel_init=self.out_init, name="out")(out), maps

  def _split_heads(self, x: jax.Array) -> jax.Array:
    x = einops.rearrange(x, "b l (n k) -> b n l k", n=self.num_heads)
    return axes.constrain(x, "batch", "heads", "length", None)


class SpatialAttention(nn.Module):
  """x + attention(GN(x)) of a feature map; then, if given, to a context.

  Attributes:
    num_heads: N.
    max_groups: of the norms.
    dtype: compute dtype.
  """

  num_heads: int
  max_groups: int = 32
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B, H, W, C] -> the same, and maps "self" and "cross".

    Args:
      context: [B, M, any size].
      mask: [B, M] bool, of the context; None: all of it.

    Returns:
      The feature map, and "self" [B, N, H W, H W] and, with a context, "cross"
      [B, N, H W, M].
    """
    B, H, W, C = x.shape
    norm = functools.partial(norms.GroupNorm, self.max_groups, dtype=self.dtype)
    attend = functools.partial(Attention, C, self.num_heads, dtype=self.dtype)
    x = einops.rearrange(x, "b h w c -> b (h w) c")
    maps = {}
    y, maps["self"] = attend(name="attn")(norm(name="norm")(x))
    x = x + y
    if context is not None:
      y, maps["cross"] = attend(name="cross_attn")(
        norm(name="cross_norm")(x), context, of_keys(mask)
      )
      x = x + y
    return x.reshape(B, H, W, C), maps


class Block(nn.Module):
  """Pre-LN: x + attn(LN(x)), x + cross_attn(LN(x), context), x + mlp(LN(x)).

  Attributes:
    num_heads: N.
    mlp_ratio: hidden width of the MLP, in D.
    dtype: compute dtype.
  """

  num_heads: int
  mlp_ratio: float = 4
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """x [B, L, D] with context [B, M, any size], mask [B, M] -> as x, maps."""
    D = x.shape[-1]
    norm = functools.partial(norms.LayerNorm, dtype=self.dtype)
    attend = functools.partial(Attention, D, self.num_heads, dtype=self.dtype)
    x = axes.constrain(x, "batch", "length", "width")
    maps = {}
    y, maps["self"] = attend(name="attn")(norm(name="norm_1")(x))
    x = x + y
    y, maps["cross"] = attend(name="cross_attn")(
      norm(name="norm_2")(x), context, of_keys(mask)
    )
    x = x + y
    mlp = transformer.Mlp(
      round(D * self.mlp_ratio), dtype=self.dtype, name="mlp"
    )
    return x + mlp(norm(name="norm_3")(x)), maps


def of_keys(mask: jax.Array | None) -> jax.Array | None:
  """A mask [B, M] of what is attended to, as attention takes it."""
  return None if mask is None else mask[:, None, None, :]
