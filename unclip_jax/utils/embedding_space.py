"""How CLIP image embeddings are standardised before diffusion.

A CLIP's vectors have neither zero mean nor unit variance, which the noise
schedules of diffusion models assume. One affine map, computed once from data
and stored in every prior and decoder checkpoint, covers the usual choices:

  mean_std     (z - mean) / std per dimension, as Karlo (kakaobrain, 2022)
  unit_sqrt_d  z / |z| * sqrt(D), as DALLE2-pytorch
  scaled       z / |z| * scale; 17.2 in the unCLIP paper, for its own CLIP
  raw          z as it is: Karlo's decoder

A table is a plain dict of arrays, so that it is saved, sharded and passed to
jitted functions like any other: `mean` [D], `std` [D], `is_unit` [] bool
(whether z is normalised to unit length first).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

KINDS = ("mean_std", "unit_sqrt_d", "scaled", "raw")
Table = dict[str, jax.Array]


def fit(kind: str, image_embeds: jax.Array, scale: float = 17.2) -> Table:
  """The table of one kind.

  Args:
    kind: one of KINDS.
    image_embeds: [N, D] of the CLIP, not normalised; "mean_std" needs many.
    scale: of the kind "scaled".

  Raises:
    ValueError: an unknown kind.
  """
  D = image_embeds.shape[-1]
  zeros, ones = jnp.zeros(D), jnp.ones(D)
  if kind == "mean_std":
    image_embeds = image_embeds.astype(jnp.float32)
    std = jnp.maximum(image_embeds.std(axis=0), 1e-6)
    return dict(
      mean=image_embeds.mean(axis=0), std=std, is_unit=jnp.asarray(False)
    )
  if kind == "raw":
    return dict(mean=zeros, std=ones, is_unit=jnp.asarray(False))
  if kind == "unit_sqrt_d":
    return dict(mean=zeros, std=ones / D**0.5, is_unit=jnp.asarray(True))
  if kind == "scaled":
    return dict(mean=zeros, std=ones / scale, is_unit=jnp.asarray(True))
  raise ValueError(f"embedding space '{kind}' is not one of {KINDS}")


def encode(table: Table, image_embed: jax.Array) -> jax.Array:
  """[B, D] of the CLIP -> float32 [B, D], for "mean_std" standardised."""
  z = image_embed.astype(jnp.float32)
  norm = jnp.linalg.norm(z, axis=-1, keepdims=True)
  z = jnp.where(table["is_unit"], z / jnp.maximum(norm, 1e-8), z)
  return (z - table["mean"]) / table["std"]


def decode(table: Table, x_start: jax.Array) -> jax.Array:
  """The inverse of `encode`; of unit kinds up to the length, which is lost."""
  return x_start * table["std"] + table["mean"]
