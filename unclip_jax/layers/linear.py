"""Dense layers: float32 accumulation in every compute dtype; initialisation.

A bfloat16 product with a float32 result, rounded afterwards, is what matrix
units compute anyway; on CPU it is the form that reaches the native bfloat16
kernels (2 to 3 times faster than a bfloat16 result). The backward pass keeps
cotangents in the compute dtype: without the custom rule it would multiply
float32 by bfloat16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unclip_jax.layers import remat

# Standard deviation of a standard normal cut at -2 and 2.
_STDDEV_OF_CUT_NORMAL = 0.87962566103423978

DimensionNumbers = lax.DotDimensionNumbers


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: DimensionNumbers,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  """`lax.dot_general`, accumulated in float32, in the dtype of `lhs`."""
  out = _dot_general(lhs, rhs, dimension_numbers, precision)
  return remat.name(out, "dense")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: DimensionNumbers,
  precision: lax.PrecisionLike,
) -> jax.Array:
  out = lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  return out.astype(lhs.dtype)


def _dot_general_fwd(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: DimensionNumbers,
  precision: lax.PrecisionLike,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _dot_general(lhs, rhs, dimension_numbers, precision), (lhs, rhs)


def _dot_general_bwd(
  dimension_numbers: DimensionNumbers,
  precision: lax.PrecisionLike,
  residuals: tuple[jax.Array, jax.Array],
  cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  _, vjp = jax.vjp(
    lambda lhs, rhs: lax.dot_general(lhs, rhs, dimension_numbers, precision),
    *residuals,
  )
  return vjp(cotangent)


_dot_general.defvjp(_dot_general_fwd, _dot_general_bwd)


def lecun_normal(
  rng: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """LeCun's normal initialisation, the values of `nn.initializers`'.

  Drawn flat: XLA takes two to eight times as long to compile a draw of four
  axes, and a U-Net has some sixty of them.
  """
  x = jax.random.truncated_normal(rng, -2, 2, (math.prod(shape),), dtype)
  stddev = math.prod(shape[:-1]) ** -0.5 / _STDDEV_OF_CUT_NORMAL
  return (stddev * x).reshape(shape)


# `nn.Dense` with that product; fields and parameters are those of `nn.Dense`.
Dense = functools.partial(
  nn.Dense, dot_general=dot_general, kernel_init=lecun_normal
)
