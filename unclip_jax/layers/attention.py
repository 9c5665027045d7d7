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
import jax.extend
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from unclip_jax.layers import linear, remat
from unclip_jax.utils import axes, errors


class KeyValue(NamedTuple):
  """Keys and values of M positions, each [B, N, M, K]."""

  key: jax.Array
  value: jax.Array


# From so many scores a head on, CPUs are faster one head after the other.
_MIN_SCORES = 256 * 256

# And TPUs keep them on the chip by a kernel. By the v5e compiler's memory
# analysis, forward and backward in bfloat16 (x: batch x heads):
#
#    queries  keys      K  x       products  kernel
#       1024  1284     64  8 x 16       966     173  MB, decoder at 32 x 32
#        256   516     64  8 x 24        98      32  decoder at 16 x 16
#        257   257     80  32 x 16      297     241  CLIP, ViT-H
#        260   260     64  16 x 32      297     241  prior
#
# In the last three what surrounds a kernel (padding, layouts) alone costs 1.2
# times the cycles that the compiler estimates for the products and all.
_MIN_KERNEL_SCORES = 512 * 1024
_MAX_BLOCK = 512  # queries or keys that the kernel sees at a time
_LANES = 128  # blocks are multiples of a TPU's vectors


def attend(
  q_BxNxLxK: jax.Array, kv: KeyValue, mask: jax.Array | None = None
) -> jax.Array:
  """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

  On each platform by what is best there for these sizes: two products and a
  softmax, on CPU head after head, cuDNN's fused attention on GPUs, a Pallas
  kernel on TPUs. The last two never hold all scores in memory.

  Args:
    q_BxNxLxK: queries, not yet scaled.
    kv: keys and values, [B, N, M, K].
    mask: bool, broadcasts to [B, N, L, M], True = attend; a query that may
      attend to nothing gets something finite, not NaN.

  Returns:
    [B, N, L, K] in the dtype of the values.
  """
  (_, _, L, K), M = q_BxNxLxK.shape, kv.key.shape[2]
  if L * M < _MIN_SCORES:
    return _attend_at_once(q_BxNxLxK, kv, mask)
  if mask is not None:
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
  platforms = {"cpu": _attend_by_heads}
  if L * M >= _MIN_KERNEL_SCORES and _is_of_keys(mask):
    # A function of its own for each trace: JAX would take the trace of the same
    # one, from where there was no mesh or another.
    platforms["tpu"] = functools.partial(
      _attend_by_kernel, rules=axes.current()
    )
  if _has_cudnn() and q_BxNxLxK.dtype.itemsize == 2 and K <= 128 and K % 8 == 0:
    platforms["cuda"] = _attend_by_cudnn
  return jax.lax.platform_dependent(
    q_BxNxLxK, kv, mask, default=_attend_at_once, **platforms
  )


def _is_of_keys(mask: jax.Array | None) -> bool:
  """Whether all queries of all heads may attend to the same keys."""
  return mask is None or mask.shape[1:3] == (1, 1)


def _has_cudnn() -> bool:
  """Whether this process has it, without which it cannot be traced."""
  return "cuda" in jax.extend.backend.get_backend().platform_version.lower()


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
    mask = jnp.broadcast_to(mask, (B, N, *mask.shape[2:]))
  heads = jax.tree.map(
    lambda x: x.reshape(B * N, 1, 1, *x.shape[2:]), (q_BxNxLxK, kv, mask)
  )
  out = jax.lax.map(lambda head: _attend_at_once(*head), heads)
  return out.reshape(q_BxNxLxK.shape)


def _attend_by_cudnn(
  q_BxNxLxK: jax.Array,
  kv: KeyValue,
  mask: jax.Array | None,
  implementation: str = "cudnn",
) -> jax.Array:
  """The same by cuDNN, which takes [B, L, N, K] and masks of all scores."""
  (B, _, L, _), M = q_BxNxLxK.shape, kv.key.shape[2]
  if mask is not None:
    mask = jnp.broadcast_to(mask, (B, mask.shape[1], L, M))
  q, key, value = (x.swapaxes(1, 2) for x in (q_BxNxLxK, *kv))
  out = jax.nn.dot_product_attention(
    q, key, value, mask=mask, implementation=implementation
  )
  return out.swapaxes(1, 2)


def _attend_by_kernel(
  q_BxNxLxK: jax.Array,
  kv: KeyValue,
  mask: jax.Array | None,
  rules: axes.AxisRules | None = None,
  interpret: bool = False,
) -> jax.Array:
  """The same by JAX's splash attention, each device with its rows and heads.

  XLA does not divide kernels among devices: `jax.shard_map` does.

  Args:
    mask: None or [B or 1, 1, 1, M].
    rules: where rows and heads lie; None: nowhere, or on the device that is
      being traced.
    interpret: runs on CPU, for tests.
  """
  (B, N, _, _), M = q_BxNxLxK.shape, kv.key.shape[2]
  if mask is None:
    mask = jnp.ones((1, 1, 1, M), bool)
  mask_BxM = jnp.broadcast_to(mask[:, 0, 0], (B, M))
  own = functools.partial(_splash, interpret=interpret)
  if rules is not None:
    batch = rules.mesh_axes("batch", B) or None
    heads = P(batch, rules.mesh_axes("heads", N) or None)
    own = jax.shard_map(
      own,
      mesh=rules.mesh,
      in_specs=(heads, heads, P(batch)),
      out_specs=heads,
      check_vma=False,
    )
  return own(q_BxNxLxK, kv, mask_BxM)


def _splash(
  q_BxNxLxK: jax.Array, kv: KeyValue, mask_BxM: jax.Array, *, interpret: bool
) -> jax.Array:
  """One device's part: pads to whole blocks, whose keys are masked."""
  B, N, L, K = q_BxNxLxK.shape
  block_L, padded_L = _blocks(L)
  block_M, padded_M = _blocks(mask_BxM.shape[1])

  def pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

  everything = splash_attention_mask.FullMask((padded_L, padded_M))
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([everything] * N),
    block_sizes=splash_attention_kernel.BlockSizes(
      **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_L),
      **dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), block_M),
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # Queries attend to keys of their own segment: all of them to segment 1.
  segments = splash_attention_kernel.SegmentIds(
    jnp.ones((B, padded_L), jnp.int32),
    jnp.pad(mask_BxM, ((0, 0), (0, padded_M - mask_BxM.shape[1]))).astype(
      jnp.int32
    ),
  )
  key, value = (pad(x, padded_M) for x in kv)
  out = jax.vmap(kernel)(
    pad(q_BxNxLxK * K**-0.5, padded_L), key, value, segments
  )
  return out[:, :, :L]


def _blocks(length: int) -> tuple[int, int]:
  """The size of a block, and of as many of them as hold a length."""
  count = -(-length // _MAX_BLOCK)
  block = -(-length // (count * _LANES)) * _LANES
  return block, count * block


def causal_mask(length: int, num_prefix: int = 0) -> jax.Array:
  """[length, num_prefix + length] bool: own and earlier positions, prefix."""
  total = num_prefix + length
  return jnp.tril(jnp.ones((length, total), bool), k=num_prefix)


def check_heads(width: int, num_heads: int) -> None:
  """Raises UserError unless heads share the width evenly."""
  if num_heads < 1 or width % num_heads:
    raise errors.UserError(
      f"attention width {width} is not a multiple of {num_heads} heads: "
      "change the width or the number of heads"
    )


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
    check_heads(self.width, self.num_heads)
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
