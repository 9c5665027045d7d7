"""Random inputs and parameters for tests of networks.

Drawn by numpy: compiling a draw takes XLA up to seconds per shape on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def normal(*shape: int) -> np.ndarray:
  """Standard normal float32; the same for the same shape."""
  return np.random.default_rng(shape).standard_normal(shape, np.float32)


def like(init: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """Variables of the shapes that `init(rng, *args, **kwargs)` would return.

  The networks start as the identity or as 0, where many laws hold trivially:
  here nothing is 0.
  """
  return like_tree(
    jax.eval_shape(lambda: init(jax.random.key(0), *args, **kwargs))
  )


def like_tree(tree: Any) -> Any:
  """Variables of the shapes of others, arrays or shapes."""
  rng = np.random.default_rng(0)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
    x = rng.normal(scale=fan_in**-0.5, size=leaf.shape)
    if path[-1].key == "scale":  # of a norm
      x += 1
    return x.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, tree)


def count(init: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
  """The number of parameters that `init` would make, without making them."""
  shapes = jax.eval_shape(lambda: init(jax.random.key(0), *args, **kwargs))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
