"""Pre-LN transformer blocks (Radford et al. 2019) and how to run a stack.

Both residual branches of a block end in a zero-initialised projection, so a
new stack is the identity; the sources start it at a small random value.

A stack is unrolled, or scanned: one block's program, run over the parameters of
all, which are stacked inside of the step. What is compiled then does not grow
with the depth, names and checkpoints stay. Under sharded parameters shards are
stacked, and a layer's are gathered when its turn comes, in the compute dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, linear, norms
from unclip_jax.layers import remat as remat_lib
from unclip_jax.utils import axes, errors


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016, equation 1)."""
  return nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x): the activation of OpenAI's CLIP weights."""
  return x * nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "quick_gelu": quick_gelu,
}


class Mlp(nn.Module):
  """Dense -> activation -> Dense (zero-initialised).

  Attributes:
    hidden: width of the hidden layer.
    activation: "gelu" or "quick_gelu".
    dtype: compute dtype.
  """

  hidden: int
  activation: str = "gelu"
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.activation not in _ACTIVATIONS:
      raise errors.UserError(
        f"unknown activation {self.activation!r}: use one of "
        f"{', '.join(_ACTIVATIONS)}"
      )
    D = x.shape[-1]
    x = linear.Dense(self.hidden, dtype=self.dtype, name="dense_1")(x)
    x = axes.constrain(x, "batch", "length", "mlp")
    x = _ACTIVATIONS[self.activation](x)
    return linear.Dense(
      D,
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros,
      name="dense_2",
    )(x)


class Block(nn.Module):
  """x + attention(LN(x)), then x + mlp(LN(x)).

  Attributes:
    width: D.
    num_heads: attention heads.
    mlp_ratio: hidden width of the MLP, in D.
    activation: of the MLP, "gelu" or "quick_gelu".
    dropout: rate after each branch, when training.
    has_context: whether `encode_context` exists.
    dtype: compute dtype.
  """

  width: int
  num_heads: int
  mlp_ratio: float = 4
  activation: str = "gelu"
  dropout: float = 0.0
  has_context: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.norm_1 = norms.LayerNorm(dtype=self.dtype)
    self.attn = attention.SelfAttention(
      self.width, self.num_heads, self.has_context, dtype=self.dtype
    )
    self.norm_2 = norms.LayerNorm(dtype=self.dtype)
    self.mlp = Mlp(
      round(self.width * self.mlp_ratio), self.activation, dtype=self.dtype
    )
    self.drop = nn.Dropout(self.dropout)

  def encode_context(self, context: jax.Array) -> attention.KeyValue:
    """The prefix for `__call__` that context tokens [B, M, any size] give."""
    return self.attn.encode_context(context)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    prefix: attention.KeyValue | None = None,
    context: jax.Array | None = None,
    start: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, attention.KeyValue]:
    """[B, L, D] -> [B, L, D] and the keys and values of x; see attention.

    `context` [B, M, any size] stands for the prefix that it gives.
    """
    if context is not None:
      prefix = self.encode_context(context)
    x = axes.constrain(x, "batch", "length", "width")
    y, kv = self.attn(self.norm_1(x), mask, prefix=prefix, start=start)
    x = x + self.drop(y, deterministic=not train)
    x = axes.constrain(x, "batch", "length", "width")
    y = self.mlp(self.norm_2(x))
    x = x + self.drop(y, deterministic=not train)
    return axes.constrain(x, "batch", "length", "width"), kv


def run(
  blocks: Sequence[Block],
  x: jax.Array,
  mask: jax.Array | Sequence[jax.Array] | None = None,
  *,
  prefixes: Sequence[attention.KeyValue] | None = None,
  context: jax.Array | None = None,
  start: jax.Array | None = None,
  train: bool = False,
  remat: bool | str = False,
  scan: bool = False,
) -> tuple[jax.Array, tuple[attention.KeyValue, ...]]:
  """Runs a stack of blocks, submodules of the caller.

  Args:
    blocks: one per layer.
    x: [B, L, D].
    mask: as in attention, the same for every layer; a sequence has one for
      each, of one shape.
    prefixes: keys and values that stand before x, one per layer.
    context: [B, M, any size], of which each layer makes its own prefix, and
      again in the backward pass with remat.
    start: as in attention: x is put into the prefixes.
    train: whether dropout is on.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: whether one program runs all blocks, which are alike. Dropout then
      draws otherwise. With prefixes, which would be copied, and in `init`
      stacks are unrolled nevertheless.

  Returns:
    [B, L, D] and each layer's keys and values of x; with `start` the prefixes
    that they were put into.
  """
  if scan and prefixes is None and not blocks[0].is_initializing():
    return _scan(blocks, x, mask, context, train=train, remat=remat)

  def call(
    block: Block,
    x: jax.Array,
    mask: jax.Array | None,
    prefix: attention.KeyValue | None,
  ) -> tuple[jax.Array, attention.KeyValue]:
    return block(
      x, mask, prefix=prefix, context=context, start=start, train=train
    )

  call = remat_lib.checkpoint(call, remat, nn.remat)
  masks = mask if isinstance(mask, Sequence) else [mask] * len(blocks)
  kvs = []
  for block, own, prefix in zip(
    blocks, masks, prefixes or [None] * len(blocks), strict=True
  ):
    x, kv = call(block, x, own, prefix)
    kvs.append(kv)
  return x, tuple(kvs)


def _scan(
  blocks: Sequence[Block],
  x: jax.Array,
  mask: jax.Array | Sequence[jax.Array] | None,
  context: jax.Array | None,
  *,
  train: bool,
  remat: bool | str,
) -> tuple[jax.Array, tuple[attention.KeyValue, ...]]:
  """`run` as one `jax.lax.scan`."""
  block, _ = blocks[0].unbind()

  def stack(*leaves: jax.Array) -> jax.Array:
    # Kernels are used in the compute dtype; cast first, less is stacked.
    dtype = block.dtype if leaves[0].ndim > 1 else leaves[0].dtype
    return jnp.stack([leaf.astype(dtype) for leaf in leaves])

  variables = jax.tree.map(stack, *(block.variables for block in blocks))
  rngs = {}
  if blocks[0].has_rng("dropout"):
    key = blocks[0].make_rng("dropout")
    rngs = {"dropout": jax.random.split(key, len(blocks))}

  masks, which = None, None
  if isinstance(mask, Sequence):
    # Layers share masks: each is kept once.
    kinds = {id(own): own for own in mask}
    order = list(kinds)
    masks = jnp.stack(list(kinds.values()))
    which = jnp.asarray([order.index(id(own)) for own in mask])

  def layer(x: jax.Array, own: tuple) -> tuple[jax.Array, attention.KeyValue]:
    variables, rngs, i = own
    return block.apply(
      variables,
      x,
      mask if masks is None else masks[i],
      context=context,
      train=train,
      rngs=rngs,
    )

  layer = remat_lib.checkpoint(layer, remat, prevent_cse=False)
  x, kvs = jax.lax.scan(layer, x, (variables, rngs, which))
  return x, tuple(
    jax.tree.map(operator.itemgetter(i), kvs) for i in range(len(blocks))
  )
