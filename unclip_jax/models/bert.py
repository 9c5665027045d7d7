"""BERT as a text encoder (Devlin et al. 2018, arXiv 1810.04805, section 3).

A bidirectional transformer over tokens, learned positions and token types, all
three added and normalised; layer norms stand behind each residual sum (post-LN,
Vaswani et al. 2017), the GELU is exact, masked positions are attended to by
none. The pooler, a dense layer with tanh on the first state ([CLS]), gives one
vector per text. The heads of its pretraining are not here: it is loaded with
its weights (interop/bert_hf.py) or trained as a part of what reads it.

The network lies under the name `text_encoder`, as in models/vae_gan.py, so that
`config.init_from` fits the one into the other.

Sizes (section 3): base: width 768, depth 12, 12 heads; large: 1024, 24, 16.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import (
  attention_maps,
  embeddings,
  linear,
  norms,
  transformer,
)
from unclip_jax.utils import axes

_EPSILON = 1e-12  # of the layer norms, in the released code and weights


class _Block(nn.Module):
  """LN(x + attn(x)), then LN(x + mlp(x)); fields as in `Encoder`."""

  num_heads: int
  mlp_width: int
  dropout: float
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    D = x.shape[-1]
    drop = nn.Dropout(self.dropout)
    y, maps = attention_maps.Attention(
      D,
      self.num_heads,
      out_init=linear.lecun_normal,
      dtype=self.dtype,
      name="attn",
    )(x, mask=mask)
    x = x + drop(y, deterministic=not train)
    x = norms.LayerNorm(_EPSILON, dtype=self.dtype, name="norm_1")(x)
    y = linear.Dense(self.mlp_width, dtype=self.dtype, name="dense_1")(x)
    y = axes.constrain(y, "batch", "length", "mlp")
    y = transformer.gelu(y)
    y = linear.Dense(D, dtype=self.dtype, name="dense_2")(y)
    x = x + drop(y, deterministic=not train)
    x = norms.LayerNorm(_EPSILON, dtype=self.dtype, name="norm_2")(x)
    return axes.constrain(x, "batch", "length", "width"), maps


class Encoder(nn.Module):
  """The network; see `Model` for the fields."""

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  mlp_width: int | None = None
  num_token_types: int = 2
  has_pooler: bool = True
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    token_types: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array | tuple[jax.Array, ...]]]:
    """As `Model.__call__`."""
    L = text_tokens.shape[1]
    embeddings.check_length(L, self.context_length)
    normal = nn.initializers.normal(0.02)

    def look_up(name: str, rows: int, indices: jax.Array) -> jax.Array:
      table = self.param(name, normal, (rows, self.width))
      return jnp.take(table, indices, axis=0)

    if token_types is None:
      token_types = jnp.zeros_like(text_tokens)
    x = look_up("token_embed", self.vocab_size, text_tokens)
    x = x + look_up("position", self.context_length, jnp.arange(L))
    x = x + look_up("type_embed", self.num_token_types, token_types)
    x = norms.LayerNorm(_EPSILON, dtype=self.dtype, name="norm")(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    mask = attention_maps.of_keys(text_mask)
    maps = []
    for i in range(self.depth):
      x, found = _Block(
        self.num_heads,
        self.mlp_width or 4 * self.width,
        self.dropout,
        self.dtype,
        name=f"block_{i}",
      )(x, mask, train)
      maps.append(found)
    out = {"attention_maps": tuple(maps)}
    if self.has_pooler:
      pooled = linear.Dense(self.width, dtype=self.dtype, name="pooler")(
        x[:, 0]
      )
      out["text_embed"] = jnp.tanh(pooled).astype(jnp.float32)
    return x, out


class Model(nn.Module):
  """BERT.

  Attributes:
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: the longest text, in tokens.
    width: D.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_width: hidden width of the MLPs; None: 4 D.
    num_token_types: of the segments that a text may have.
    has_pooler: whether there is one.
    dropout: rate after the embeddings and each branch, when training; 0.1 in
      the paper.
    dtype: compute dtype; parameters are float32.
  """

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  mlp_width: int | None = None
  num_token_types: int = 2
  has_pooler: bool = True
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    self.text_encoder = Encoder(
      vocab_size=self.vocab_size,
      context_length=self.context_length,
      width=self.width,
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_width=self.mlp_width,
      num_token_types=self.num_token_types,
      has_pooler=self.has_pooler,
      dropout=self.dropout,
      dtype=self.dtype,
    )

  def __call__(
    self,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    token_types: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array | tuple[jax.Array, ...]]]:
    """Encodes texts.

    Args:
      text_tokens: [B, L] int32, L up to context_length.
      text_mask: [B, L] bool, True = real token.
      token_types: [B, L] int32, below num_token_types; None: all are 0.
      train: whether dropout is on.

    Returns:
      `text_encodings` [B, L, D]; and {"attention_maps": one [B, N, L, L] per
      block, "text_embed": [B, D] float32 in [-1, 1], of the pooler if there is
      one}.

    Raises:
      UserError: texts that are too long.
    """
    return self.text_encoder(text_tokens, text_mask, token_types, train=train)
