"""The diffusion prior of unCLIP (Ramesh et al. 2022, section 2.2).

A causal transformer over

  [ L text states | text_embed | timestep | noised x_t | learned query ]

whose output at the query is the prediction. Because it is causal, the first
L + 1 positions depend neither on the timestep nor on x_t: `prefill` computes
their keys and values once per prompt, and `denoise` runs 3 positions per
diffusion step instead of L + 4.

Layout and parameters are those of Karlo's prior, whose text states are a frozen
CLIP's, projected. The paper's prior encodes the caption itself: with a
vocab_size the text states are embeddings of the caption's tokens, and the
causal transformer is the text encoder. Deviations: the projections that end a
residual branch, and the output, start at zero; texts are dropped for guidance
by learned null states (one row, for every position) and a learned null
embedding, or, without learned_null_text, by whoever calls: Karlo's is given
the empty text.

Sizes: unCLIP: width 2048, depth 24, 32 heads, context 256 (table 3, "text
encoder"), with 1,225,927,680 parameters in Karlo's layout; Karlo: depth 20,
context 77.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, embeddings, linear, norms, transformer

_NUM_STEP_POSITIONS = 3  # timestep, x_t, query
_NUM_EXTRA_POSITIONS = 1 + _NUM_STEP_POSITIONS  # and text_embed


class Cache(NamedTuple):
  """What all diffusion steps share: keys and values of text and text_embed."""

  layers: tuple[attention.KeyValue, ...]  # each [B, N, L + 1, K]
  mask: jax.Array  # [B, L + 1] bool


class Model(nn.Module):
  """The diffusion prior.

  Attributes:
    embed_dim: size of image_embed (x_t, the output) and of text_embed.
    text_width: size of the incoming text states; None: text tokens come in.
    context_length: L, the number of text states.
    width: D of the transformer.
    depth: number of blocks.
    num_heads: attention heads.
    vocab_size: text tokens are 0 to vocab_size - 1; None: text states come in.
    learned_null_text: whether there are null states for `text_drop`.
    mlp_ratio: hidden width of the MLPs, in widths.
    dropout: rate in the residual branches, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  embed_dim: int
  text_width: int | None
  context_length: int
  width: int
  depth: int
  num_heads: int
  vocab_size: int | None = None
  learned_null_text: bool = True
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    embeddings.check_text_fields(self.text_width, self.vocab_size)
    normal = nn.initializers.normal(0.02)
    if self.vocab_size is None:
      self.text_encodings_proj = linear.Dense(self.width, dtype=self.dtype)
    else:
      self.token_embed = nn.Embed(
        self.vocab_size, self.width, embedding_init=normal, dtype=self.dtype
      )
    self.text_embed_proj = linear.Dense(self.width, dtype=self.dtype)
    self.x_proj = linear.Dense(self.width, dtype=self.dtype)
    self.time_embed = embeddings.TimestepEmbedding(
      self.width, self.width, dtype=self.dtype
    )
    self.query = self.param("query", normal, (self.width,))
    self.position = self.param(
      "position",
      normal,
      (self.context_length + _NUM_EXTRA_POSITIONS, self.width),
    )
    self.null_text_encodings = self.null_text_embed = None
    if self.learned_null_text:
      self.null_text_encodings = self.param(
        "null_text_encodings", normal, (self.text_width or self.width,)
      )
      self.null_text_embed = self.param(
        "null_text_embed", normal, (self.embed_dim,)
      )
    self.block = [
      transformer.Block(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        dropout=self.dropout,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)
    # Zero: a new prior predicts the mean of standardised embeddings.
    self.output = linear.Dense(
      self.embed_dim, kernel_init=nn.initializers.zeros, dtype=self.dtype
    )

  def __call__(
    self,
    x_t: jax.Array,
    timesteps: jax.Array,
    text_embed: jax.Array,
    text_encodings: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    text_tokens: jax.Array | None = None,
    text_drop: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts from a noised image embedding and a text, in one pass.

    Args:
      x_t: [B, embed_dim], noised.
      timesteps: [B] int32 of the full schedule, 0 = least noise.
      text_embed: [B, embed_dim], in the scale of x_start.
      text_encodings: [B, L, text_width], where there is a text_width.
      text_mask: [B, L] bool, True = real token; None: all are.
      text_tokens: [B, L] int32, where there is a vocab_size.
      text_drop: [B] bool, True = as if there were no text.
      train: whether dropout is on.

    Returns:
      model_output [B, embed_dim] float32, and the final states
      {"encodings": [B, L + 4, D]}.
    """
    prefix, prefix_mask = self._embed_prefix(
      text_embed, text_encodings, text_tokens, text_mask, text_drop
    )
    x = jnp.concatenate([prefix, self._embed_step(x_t, timesteps)], axis=1)
    mask = attention.causal_mask(x.shape[1]) & _extend(prefix_mask)
    x, _ = transformer.run(
      self.block, x, mask, train=train, remat=self.remat, scan=self.scan
    )
    x = self.ln_final(x)
    return self.output(x[:, -1]).astype(jnp.float32), {"encodings": x}

  def prefill(
    self,
    text_embed: jax.Array,
    text_encodings: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    text_drop: jax.Array | None = None,
    *,
    text_tokens: jax.Array | None = None,
  ) -> Cache:
    """What `denoise` needs of the text; arguments as in `__call__`."""
    x, prefix_mask = self._embed_prefix(
      text_embed, text_encodings, text_tokens, text_mask, text_drop
    )
    mask = attention.causal_mask(x.shape[1]) & prefix_mask[:, None, None, :]
    _, layers = transformer.run(self.block, x, mask)
    return Cache(layers, prefix_mask)

  def denoise(
    self, x_t: jax.Array, timesteps: jax.Array, cache: Cache
  ) -> jax.Array:
    """The output of `__call__`, given the text's cache: runs 3 positions."""
    causal = attention.causal_mask(_NUM_STEP_POSITIONS, cache.mask.shape[1])
    x, _ = transformer.run(
      self.block,
      self._embed_step(x_t, timesteps),
      causal & _extend(cache.mask),
      prefixes=cache.layers,
    )
    return self.output(self.ln_final(x[:, -1])).astype(jnp.float32)

  def _embed_prefix(
    self,
    text_embed: jax.Array,
    text_encodings: jax.Array | None,
    text_tokens: jax.Array | None,
    text_mask: jax.Array | None,
    text_drop: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, L + 1, D] and mask [B, L + 1] of the text."""
    states, text_mask = embeddings.text_states(
      text_encodings,
      text_tokens,
      text_mask,
      text_drop,
      token_embed=None if self.vocab_size is None else self.token_embed,
      null=self.null_text_encodings,
      context_length=self.context_length,
    )
    B, L = text_mask.shape
    if self.vocab_size is None:
      states = self.text_encodings_proj(states)
    text_embed = embeddings.replace_dropped(
      text_embed, self.null_text_embed, text_drop
    )
    x = jnp.concatenate(
      [states, self.text_embed_proj(text_embed)[:, None]], axis=1
    )
    x = x + self.position[: L + 1].astype(x.dtype)
    return x, jnp.concatenate([text_mask, jnp.ones((B, 1), bool)], axis=1)

  def _embed_step(self, x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
    """Tokens [B, 3, D] of timestep, x_t and query."""
    time, noised = self.time_embed(timesteps), self.x_proj(x_t)
    query = jnp.broadcast_to(self.query.astype(time.dtype), time.shape)
    x = jnp.stack([time, noised, query], axis=1)
    return x + self.position[-_NUM_STEP_POSITIONS:].astype(x.dtype)


def _extend(prefix_mask: jax.Array) -> jax.Array:
  """[B, L + 1] -> [B, 1, 1, L + 4]: the step's positions are always there."""
  mask = jnp.pad(
    prefix_mask, ((0, 0), (0, _NUM_STEP_POSITIONS)), constant_values=True
  )
  return mask[:, None, None, :]
