"""A causal transformer over a picture's patches or codes, in raster order.

Image GPT (Chen et al. 2020, "Generative pretraining from pixels"): each part of
a picture is predicted from those above it and to its left, so that a picture
is completed from its top rows.

Deviation: the source's parts are pixels of 512 colours. Here they are codes of
a tokenizer, as in DALL-E, or patches of pixels, of which the mean is predicted
(as in AIM, El-Nouby et al. 2024, arXiv 2401.08541): sequences of 64, not 1,024.

Drawing runs a position at a time with the keys and values of those before it:
`prefill`, then `decode_step`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, linear, norms, transformer
from unclip_jax.utils import errors

# Keys and values of all P positions, of each block, filled one by one.
Cache = tuple[attention.KeyValue, ...]


class Model(nn.Module):
  """The transformer.

  Attributes:
    image_size: S, pixels of a side.
    patch_size: pixels of a side that a part stands for.
    width, depth, num_heads: of the transformer.
    num_codes: codes are 0 to num_codes - 1; None: parts are patches of pixels.
    mlp_ratio: hidden width of the MLPs, in widths.
    dropout: rate in the residual branches, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_codes: int | None = None
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  @property
  def grid_size(self) -> int:
    """Parts of a side."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    """P."""
    return self.grid_size**2

  def setup(self) -> None:
    if self.image_size % self.patch_size:
      raise errors.UserError(
        f"image_size {self.image_size} is not a multiple of patch_size "
        f"{self.patch_size}: change one of them"
      )
    normal = nn.initializers.normal(0.02)
    if self.num_codes is None:
      self.patch_proj = linear.Dense(self.width, dtype=self.dtype)
    else:
      self.code_embed = nn.Embed(
        self.num_codes, self.width, embedding_init=normal, dtype=self.dtype
      )
    self.start = self.param("start", normal, (self.width,))
    self.position = self.param(
      "position", normal, (self.num_patches, self.width)
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
    # Zero: a new network predicts grey, or every code with one probability.
    self.output = linear.Dense(
      self.num_codes or self.patch_size**2 * 3,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )

  def __call__(
    self, x: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts every part from those before it, in one pass.

    Args:
      x: tokens [B, P] int32, or patches [B, P, patch_size^2 * 3].
      train: whether dropout is on.

    Returns:
      Logits [B, P, num_codes], or pixels [B, P, patch_size^2 * 3], float32,
      and the final states {"encodings": [B, P, D]}.
    """
    start = jnp.broadcast_to(self.start, (len(x), 1, self.width))
    x = jnp.concatenate(
      [start.astype(self.dtype), self._embed(x[:, :-1])], axis=1
    )
    x = x + self.position.astype(x.dtype)
    x, _ = transformer.run(
      self.block,
      x,
      attention.causal_mask(self.num_patches),
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.ln_final(x)
    return self.output(x).astype(jnp.float32), {"encodings": x}

  def prefill(self, rows: int) -> tuple[jax.Array, Cache]:
    """The prediction [rows, ...] of part 0, and the cache for `decode_step`."""
    x = (self.start + self.position[0]).astype(self.dtype)
    x = jnp.broadcast_to(x, (rows, 1, self.width))
    x, own = transformer.run(self.block, x)
    room = ((0, 0), (0, 0), (0, self.num_patches - 1), (0, 0))
    return self._predict(x), jax.tree.map(lambda a: jnp.pad(a, room), own)

  def decode_step(
    self, part: jax.Array, index: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """The prediction of part index + 1, and the cache with this part.

    Args:
      part: part `index` of each row: token [B] int32, or patch [B, ...].
      index: [] int32, from 0 to P - 2.
      cache: from `prefill`, with all parts before `index` in it.
    """
    position = index + 1
    x = self._embed(part)
    x = x + jnp.take(self.position, position, axis=0).astype(x.dtype)
    mask = jnp.arange(self.num_patches) <= position
    x, cache = transformer.run(
      self.block, x[:, None], mask, prefixes=cache, start=position
    )
    return self._predict(x), cache

  def _embed(self, x: jax.Array) -> jax.Array:
    return self.patch_proj(x) if self.num_codes is None else self.code_embed(x)

  def _predict(self, x: jax.Array) -> jax.Array:
    return self.output(self.ln_final(x[:, -1])).astype(jnp.float32)
