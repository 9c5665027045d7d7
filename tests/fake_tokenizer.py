"""A tokenizer without weights, for tests: a code is a patch's mean level."""

from __future__ import annotations

import dataclasses

import einops
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What tasks ask of a dVAE or VQGAN.

  Attributes:
    num_codes: V, levels between -1 and 1.
    grid_size: codes of a side.
    patch_size: pixels of a side that a code stands for.
  """

  num_codes: int
  grid_size: int
  patch_size: int

  def encode_tokens(self, variables: dict, image: jax.Array) -> jax.Array:
    """[B, S, S, 3] in [-1, 1] -> [B, h * w] int32."""
    p = self.patch_size
    mean = einops.reduce(image, "b (h i) (w j) c -> b (h w)", "mean", i=p, j=p)
    levels = jnp.floor((mean + 1) / 2 * self.num_codes)
    return jnp.clip(levels, 0, self.num_codes - 1).astype(jnp.int32)

  def decode_tokens(self, variables: dict, tokens: jax.Array) -> jax.Array:
    """[B, h * w] int32 -> [B, S, S, 3] in [-1, 1]."""
    p, h = self.patch_size, self.grid_size
    levels = (tokens + 0.5) / self.num_codes * 2 - 1
    return einops.repeat(levels, "b (h w) -> b (h i) (w j) 3", h=h, i=p, j=p)
