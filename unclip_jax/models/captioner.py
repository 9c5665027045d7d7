"""A captioner: a causal transformer that tells what a CLIP's ViT sees.

Show and Tell (Vinyals et al. 2015, arXiv 1411.4555, equation 2) with a
transformer in place of the LSTM, which attends to the states of all patches as
ClipCap's and CoCa's do to theirs (Mokady et al. 2021, arXiv 2111.09734; Yu et
al. 2022, arXiv 2205.01917, section 3.2). The context of every layer is

  [ image_embed | state of the class token | state of each patch ]

each projected, then normalised. Its keys and values stand before those of the
text, in one softmax, as in all networks here (GLIDE, Nichol et al. 2021,
section 4.1): the attention across, for which the original transformer has
layers of its own, and the causal one are one layer.

A caption of L tokens is [begin, x_1, ..., x_(L - 2), end], and what is shorter
is padded behind its end. Its last token can be nothing but the end and is not
predicted: the network runs over the L - 2 tokens before it and predicts x_1 to
x_(L - 2), of which one may be the end. So the probabilities of all captions add
up to 1.

The pictures come as a frozen CLIP's states, or the ViT is a part of the network
(`vision_tower`), by the names that its parameters have in models/clip.py.

Deviation: the projections that end a residual branch, and the output, start at
zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, linear, norms, transformer
from unclip_jax.models import clip
from unclip_jax.utils import errors

# Of each layer the keys and values [B, N, M + L - 2, K] of M context tokens and
# of the text, in room for all that will be seen.
Cache = tuple[attention.KeyValue, ...]

_BEGIN_AND_END = 2


class Model(nn.Module):
  """The captioner.

  Attributes:
    vocab_size: V; text tokens are 0 to vocab_size - 1.
    context_length: L, tokens of a caption with begin and end; 3 or more.
    width, depth, num_heads: the text decoder.
    vision_tower: fields of models.clip.VisionTower (image_size, patch_size,
      width, depth, num_heads, embed_dim), which then is a part of the network;
      None: image_embed and image_encodings are given.
    mlp_ratio: hidden width of the MLPs, in widths.
    dropout: rate in the residual branches of the decoder, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  vision_tower: Mapping[str, Any] | None = None
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    if self.context_length <= _BEGIN_AND_END:
      raise errors.UserError(
        f"a captioner's context_length is 3 or more, not {self.context_length}:"
        " begin and end of a caption alone are two tokens"
      )
    normal = nn.initializers.normal(0.02)
    if self.vision_tower is not None:
      self.vision = clip.VisionTower(
        **self.vision_tower,
        remat=self.remat,
        scan=self.scan,
        dtype=self.dtype,
      )
    self.image_embed_proj = linear.Dense(self.width, dtype=self.dtype)
    self.image_encodings_proj = linear.Dense(self.width, dtype=self.dtype)
    self.context_ln = norms.LayerNorm(dtype=self.dtype)
    self.token_embed = nn.Embed(
      self.vocab_size, self.width, embedding_init=normal, dtype=self.dtype
    )
    self.position = self.param(
      "position", normal, (self.context_length - _BEGIN_AND_END, self.width)
    )
    self.block = [
      transformer.Block(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        dropout=self.dropout,
        has_context=True,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)
    # Zero: a new captioner gives every token the same probability.
    self.output = linear.Dense(
      self.vocab_size, kernel_init=nn.initializers.zeros, dtype=self.dtype
    )

  def __call__(
    self,
    text_tokens: jax.Array,
    *,
    image: jax.Array | None = None,
    image_embed: jax.Array | None = None,
    image_encodings: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts every token of captions from those before it, in one pass.

    Args:
      text_tokens: [B, L] int32.
      image: [B, S, S, 3] in [-1, 1], where there is a vision_tower.
      image_embed: [B, any size], where there is none.
      image_encodings: [B, P, any size], goes with it.
      train: whether dropout is on.

    Returns:
      Logits [B, L - 2, V] float32 of text_tokens[:, 1:-1], and {"encodings":
      [B, L - 2, D], the final states, "context": [B, 1 + P, D]}.

    Raises:
      UserError: a caption of another length, or a picture that is missing or
        comes in the wrong form.
    """
    if text_tokens.shape[1] != self.context_length:
      raise errors.UserError(
        f"this captioner takes {self.context_length} text tokens, not"
        f" {text_tokens.shape[1]}: set its context_length to that of the"
        " tokenizer"
      )
    context = self._context(image, image_embed, image_encodings, train)
    x = self.token_embed(text_tokens[:, :-_BEGIN_AND_END])
    x = x + self.position.astype(x.dtype)
    x, _ = transformer.run(
      self.block,
      x,
      attention.causal_mask(x.shape[1], context.shape[1]),
      context=context,
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.ln_final(x)
    logits = self.output(x).astype(jnp.float32)
    return logits, {"encodings": x, "context": context}

  def prefill(
    self,
    begin: jax.Array,
    *,
    image: jax.Array | None = None,
    image_embed: jax.Array | None = None,
    image_encodings: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of x_1, and the cache for `decode_step`.

    Args:
      begin: [B] int32, the tokens with which the captions begin.
      image, image_embed, image_encodings: as in `__call__`.
    """
    context = self._context(image, image_embed, image_encodings, False)
    room = ((0, 0), (0, 0), (0, len(self.position)), (0, 0))
    cache = jax.tree.map(
      lambda x: jnp.pad(x, room),
      tuple(block.encode_context(context) for block in self.block),
    )
    return self.decode_step(begin, jnp.asarray(-1), cache)

  def decode_step(
    self, text_tokens: jax.Array, index: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of the token after this one, and the cache with this one.

    Args:
      text_tokens: [B] int32, x_(index + 1) of each row.
      index: [] int32, from 0 to L - 4, or -1 for the begin.
      cache: from `prefill`, with all tokens before this one in it.
    """
    position = index + 1
    x = self.token_embed(text_tokens)
    x = x + jnp.take(self.position, position, axis=0).astype(x.dtype)
    total = cache[0].key.shape[2]
    place = total - len(self.position) + position
    x, cache = transformer.run(
      self.block,
      x[:, None],
      (jnp.arange(total) <= place)[None],
      prefixes=cache,
      start=place,
    )
    return self.output(self.ln_final(x[:, 0])).astype(jnp.float32), cache

  def _context(
    self,
    image: jax.Array | None,
    image_embed: jax.Array | None,
    image_encodings: jax.Array | None,
    train: bool,
  ) -> jax.Array:
    """Context tokens [B, 1 + P, width]."""
    is_given = image_embed is not None and image_encodings is not None
    if (self.vision_tower is None) != is_given or (image is None) != is_given:
      raise errors.UserError(
        "a captioner takes pictures where it has a vision_tower of its own,"
        " else the image_embed and image_encodings of a CLIP: pass what it"
        " takes, or set vision_tower in the model's config"
      )
    if self.vision_tower is not None:
      image_embed, out = self.vision(image, train=train)
      image_encodings = out["image_encodings"]
    tokens = [
      self.image_embed_proj(image_embed)[:, None],
      self.image_encodings_proj(image_encodings),
    ]
    return self.context_ln(jnp.concatenate(tokens, axis=1))
