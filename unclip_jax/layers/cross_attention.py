"""Cross-attention, and the decoder block that has it (Vaswani et al. 2017).

arXiv 1706.03762, section 3.2.3. The decoder of an encoder-decoder attends to
itself and then, in a softmax of its own, to what the encoder gave; a prefix
(layers/attention.py) is in one softmax with the sequence instead.

Deviation: norms stand before the branches (pre-LN), and each branch ends in a
zero-initialised projection, so that a new stack is the identity, as in
layers/transformer.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, linear, norms, remat, transformer
from unclip_jax.utils import axes


class CrossAttention(nn.Module):
  """Multi-head attention from one sequence to another.

  Attributes:
    width: D, size of input and output; a multiple of num_heads.
    num_heads: N.
    dtype: compute dtype.
  """

  width: int
  num_heads: int
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    attention.check_heads(self.width, self.num_heads)
    dense = functools.partial(linear.Dense, self.width, dtype=self.dtype)
    self.query = dense()
    self.key = dense()
    self.value = dense()
    # Zero: the residual branch that ends here starts as the identity.
    self.out = dense(kernel_init=nn.initializers.zeros)

  def encode(self, context: jax.Array) -> attention.KeyValue:
    """Keys and values of context tokens [B, M, any size]."""
    return attention.KeyValue(
      self._split_heads(self.key(context)),
      self._split_heads(self.value(context)),
    )

  def __call__(
    self,
    x: jax.Array,
    kv: attention.KeyValue,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """[B, L, D] and what `encode` gave -> [B, L, D]; mask as in attention."""
    query = self._split_heads(self.query(x))
    out = remat.name(attention.attend(query, kv, mask), "attention")
    out = einops.rearrange(out, "b n l k -> b l (n k)")
    return self.out(axes.constrain(out, "batch", "length", "heads"))

  def _split_heads(self, x: jax.Array) -> jax.Array:
    x = einops.rearrange(x, "b l (n k) -> b n l k", n=self.num_heads)
    return axes.constrain(x, "batch", "heads", "length", None)


class Prefix(NamedTuple):
  """What a decoder block attends to beside its input."""

  own: attention.KeyValue | None  # of earlier positions, as in attention
  context: attention.KeyValue  # of the encoder's states


class CrossBlock(nn.Module):
  """Self-attention, cross-attention and MLP, for `transformer.run`.

  Attributes:
    width: D.
    num_heads: attention heads.
    mlp_ratio: hidden width of the MLP, in D.
    dropout: rate after each branch, when training.
    dtype: compute dtype.
  """

  width: int
  num_heads: int
  mlp_ratio: float = 4
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.norm_1 = norms.LayerNorm(dtype=self.dtype)
    self.attn = attention.SelfAttention(
      self.width, self.num_heads, dtype=self.dtype
    )
    self.norm_cross = norms.LayerNorm(dtype=self.dtype)
    self.cross_attn = CrossAttention(
      self.width, self.num_heads, dtype=self.dtype
    )
    self.norm_2 = norms.LayerNorm(dtype=self.dtype)
    self.mlp = transformer.Mlp(
      round(self.width * self.mlp_ratio), dtype=self.dtype
    )
    self.drop = nn.Dropout(self.dropout)

  def encode_context(self, context: jax.Array) -> attention.KeyValue:
    """Keys and values of the encoder's states [B, M, any size]."""
    return self.cross_attn.encode(context)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    prefix: Prefix | None = None,
    context: jax.Array | None = None,
    start: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, Prefix]:
    """[B, L, D] -> [B, L, D], and the prefix with the keys and values of x.

    Args:
      mask, start: as in attention, of the self-attention.
      prefix: earlier positions and the encoder's keys and values.
      context: [B, M, any size], the encoder's states, in place of a prefix.
    """
    if context is not None:
      prefix = Prefix(None, self.encode_context(context))
    x = axes.constrain(x, "batch", "length", "width")
    y, own = self.attn(self.norm_1(x), mask, prefix=prefix.own, start=start)
    x = x + self.drop(y, deterministic=not train)
    y = self.cross_attn(self.norm_cross(x), prefix.context)
    x = x + self.drop(y, deterministic=not train)
    y = self.mlp(self.norm_2(x))
    x = x + self.drop(y, deterministic=not train)
    x = axes.constrain(x, "batch", "length", "width")
    return x, Prefix(own, prefix.context)
