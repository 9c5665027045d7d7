"""The Inception network with random weights, the same everywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models import inception


def variables() -> Any:
  """Such that activations neither die nor explode over the layers."""
  shapes = jax.eval_shape(
    inception.Model().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  rng = np.random.default_rng(0)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = np.prod(leaf.shape[:-1])
    scale = np.sqrt(2 / fan_in) if len(leaf.shape) > 1 else 0.2
    x = rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)
    return np.abs(x) + 1 if path[-1].key in ("scale", "var") else x

  return jax.tree_util.tree_map_with_path(draw, shapes)


def pictures(count: int, height: int, width: int) -> np.ndarray:
  """uint8 [count, height, width, 3], smooth and noisy ones."""
  rng = np.random.default_rng(height)
  noise = rng.uniform(size=(count, height, width, 3))
  waves = np.sin(np.arange(height)[:, None, None] / 3 + np.arange(3)) / 2 + 0.5
  return np.uint8(255 * (0.5 * noise + 0.5 * waves))
