"""Differentiable augmentation of what a discriminator sees.

Zhao et al. 2020, arXiv 2006.10738, section 3: true and generated pictures alike
go through the same random policy before the discriminator, and the generator's
gradient through it, so that a small dataset is not learned by heart. The three
kinds of the source, in its order: colour (brightness, saturation, contrast),
translation, cutout.

Pictures are NHWC. Each has a key of its own, and what it draws depends on that
alone. Nothing is clipped: values may leave [-1, 1].
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class DiffAugment:
  """A policy; 0 switches a part off, and all 0 give back the pictures.

  Attributes:
    brightness: bound on what is added; 0.5 in the source.
    saturation: bound on the relative change of each pixel's distance from its
      grey; 1 in the source, in [0, 1].
    contrast: the same, from the picture's mean; 0.5 in the source.
    translation: bound on the shift, as a share of the side; 0.125 in the
      source. What comes in is 0, the middle grey.
    cutout: side of a square of zeros, as a share of the picture's; 0.5 in the
      source. Its centre is anywhere in the picture.
  """

  brightness: float = 0.0
  saturation: float = 0.0
  contrast: float = 0.0
  translation: float = 0.0
  cutout: float = 0.0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0.0 <= value <= 1.0:
        raise errors.UserError(
          f"the augmentation's {field.name} is {value}: choose 0 (off) to 1"
        )

  def __call__(self, image: jax.Array, rng: jax.Array) -> jax.Array:
    """[B, H, W, C] -> the same shape and dtype, differentiable.

    Args:
      rng: one key, or one key per picture, [B].
    """
    keys = jax.random.split(rng, len(image)) if rng.ndim == 0 else rng
    return jax.vmap(self._one)(image, keys)

  def _one(self, x: jax.Array, key: jax.Array) -> jax.Array:
    """One picture [H, W, C]."""
    H, W, _ = x.shape
    color_key, shift_key, cut_key = jax.random.split(key, 3)
    b, s, c = jax.random.uniform(color_key, (3,), x.dtype, -1.0, 1.0)
    if self.brightness:
      x = x + self.brightness * b
    if self.saturation:
      grey = x.mean(axis=-1, keepdims=True)
      x = grey + (1.0 + self.saturation * s) * (x - grey)
    if self.contrast:
      grey = x.mean()
      x = grey + (1.0 + self.contrast * c) * (x - grey)
    if self.translation:
      rows, columns = (
        _shifted(size, self.translation, k)
        for size, k in zip((H, W), jax.random.split(shift_key))
      )
      # Products with one 1 a row, where a gather would be slow on matrix units.
      x = jnp.einsum(
        "yi,xj,ijc->yxc",
        rows.astype(x.dtype),
        columns.astype(x.dtype),
        x,
        precision=jax.lax.Precision.HIGHEST,
      )
    if self.cutout:
      rows, columns = (
        _inside(size, self.cutout, k)
        for size, k in zip((H, W), jax.random.split(cut_key))
      )
      x = jnp.where((rows[:, None] & columns)[..., None], 0.0, x)
    return x


def _shifted(size: int, share: float, key: jax.Array) -> jax.Array:
  """Bool [size, size]: place y of the result shows place i of the picture."""
  most = round(size * share)
  shift = jax.random.randint(key, (), -most, most + 1)
  places = jnp.arange(size)
  return places[:, None] + shift == places


def _inside(size: int, share: float, key: jax.Array) -> jax.Array:
  """Bool [size]: what lies in a stretch around a random centre."""
  length = round(size * share)
  first = jax.random.randint(key, (), 0, size + 1 - length % 2) - length // 2
  places = jnp.arange(size)
  return (first <= places) & (places < first + length)
