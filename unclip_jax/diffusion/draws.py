"""Random draws for the rows of a batch, from one key or from one key a row.

With a key for each row, what a row draws depends on that key alone: neither on
the rows beside it nor on how many there are. So a batch may be cut into
microbatches or spread over devices, and every example draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# (key, shape) -> array of that shape
Draw = Callable[[jax.Array, Sequence[int]], jax.Array]


def draw(draw_fn: Draw, rng: jax.Array, shape: Sequence[int]) -> jax.Array:
  """draw_fn(rng, shape), or the same row by row.

  Args:
    rng: a typed key, or typed keys [B]; then row b depends on rng[b] only.
    shape: [B, ...].

  Raises:
    ValueError: rng is not typed, or there are not B keys.
  """
  shape = tuple(shape)
  check(rng, shape)
  if rng.ndim == 0:
    return draw_fn(rng, shape)
  return jax.vmap(lambda key: draw_fn(key, shape[1:]))(rng)


def normal(rng: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Standard normal float32 [B, ...]; see `draw`."""
  return draw(jax.random.normal, rng, shape)


def bernoulli(
  rng: jax.Array, prob: float | jax.Array, shape: Sequence[int]
) -> jax.Array:
  """Bool [B, ...], True with probability `prob`; see `draw`."""
  return draw(
    lambda key, shape: jax.random.bernoulli(key, prob, shape), rng, shape
  )


def integers(
  rng: jax.Array, low: int, high: int, shape: Sequence[int]
) -> jax.Array:
  """Uniform int32 [B, ...], low <= x < high; see `draw`."""
  return draw(
    lambda key, shape: jax.random.randint(key, shape, low, high), rng, shape
  )


def split(rng: jax.Array, num: int = 2) -> tuple[jax.Array, ...]:
  """`jax.random.split`, for one key or for one key a row."""
  if rng.ndim == 0:
    return tuple(jax.random.split(rng, num))
  keys = jax.vmap(lambda key: jax.random.split(key, num))(rng)
  return tuple(keys[:, i] for i in range(num))


def fold_in(rng: jax.Array, data: jax.Array | int) -> jax.Array:
  """`jax.random.fold_in`, for one key or for one key a row."""
  if rng.ndim == 0:
    return jax.random.fold_in(rng, data)
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng, data)


def first(rng: jax.Array) -> jax.Array:
  """One key for all rows, as dropout needs it: that of the first row."""
  return rng if rng.ndim == 0 else rng[0]


def check(rng: jax.Array, shape: Sequence[int]) -> None:
  """Raises ValueError unless rng is one typed key, or one for each row."""
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise ValueError("rng must be typed: use jax.random.key, not PRNGKey")
  if rng.ndim and rng.shape != tuple(shape[:1]):
    raise ValueError(
      f"rng must be one key or one per example: got {rng.shape} keys for"
      f" shape {tuple(shape)}"
    )
