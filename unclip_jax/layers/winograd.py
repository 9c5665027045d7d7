"""3 x 3 convolutions by Winograd's minimal filtering, F(4 x 4, 3 x 3).

Lavin & Gray 2015 (arXiv 1509.09308, section 4): of every 6 x 6 square of the
picture, overlapping by 2, a linear map gives 36 numbers a channel; those of one
place are multiplied by the kernel's as one matrix; another linear map gives 4 x
4 pixels. That is a quarter of the multiplications, against three passes over
the picture and a relative error of 4e-6 in place of 7e-7. On CPU, where
multiplications are what a convolution waits for, it takes 0.55 to 0.8 of the
time for large pictures of many channels. Elsewhere the matrix units do better
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_TILE = 4
_TO_TILES = np.array(  # B^T of the source
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ],
  np.float32,
)
_OF_KERNEL = np.array(  # G
  [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
  ],
  np.float32,
)
_TO_PIXELS = np.array(  # A^T
  [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
  ],
  np.float32,
)

# For less of either the three passes cost more than they save; and a kernel
# that is large beside the picture costs its own map.
_MIN_CHANNELS = 256
_MIN_PIXELS = 128 * 128
_MIN_PIXELS_PER_CHANNEL = 8


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: Any,
  **options: Any,
) -> jax.Array:
  """`lax.conv_general_dilated` for `nn.Conv`, in Winograd's form where it pays.

  On CPU, in float32, for 3 x 3 kernels, one pixel of padding and no stride.
  """

  def direct(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
      lhs, rhs, window_strides, padding, **options
    )

  dilations = (options.get(f"{x}_dilation") or () for x in ("lhs", "rhs"))
  is_dilated = any(x != 1 for dilation in dilations for x in dilation)
  if is_dilated or not _pays(lhs, rhs, window_strides, padding):
    return direct(lhs, rhs)
  return lax.platform_dependent(lhs, rhs, cpu=conv3x3, default=direct)


def _pays(
  lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any
) -> bool:
  is_plain = (
    rhs.shape[:2] == (3, 3)
    and all(stride == 1 for stride in window_strides)
    and [tuple(pad) for pad in padding] == [(1, 1), (1, 1)]
    and lhs.dtype == rhs.dtype == jnp.float32
    and rhs.shape[2] == lhs.shape[-1]  # no groups
  )
  if not is_plain:
    return False
  B, H, W, C = lhs.shape
  channels = min(C, rhs.shape[-1]), max(C, rhs.shape[-1])
  return (
    H % _TILE == W % _TILE == 0
    and channels[0] >= _MIN_CHANNELS
    and B * H * W >= _MIN_PIXELS
    and _MIN_PIXELS_PER_CHANNEL * channels[1] <= B * H * W
  )


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[B, H, W, C] and [3, 3, C, D] -> [B, H, W, D], padded by one pixel.

  H and W are multiples of 4.
  """
  B, H, W, C = x.shape
  D = kernel.shape[-1]
  h, w, size = H // _TILE, W // _TILE, _TILE + 2
  kernels = jnp.einsum("ai,ijcd,bj->abcd", _OF_KERNEL, kernel, _OF_KERNEL)
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def pixels(y: int, x: int) -> jax.Array:
    """Pixel (y, x) of every square, [B, h, w, C]."""
    bottom, right = y + (h - 1) * _TILE + 1, x + (w - 1) * _TILE + 1
    return padded[:, y:bottom:_TILE, x:right:_TILE]

  squares = [[pixels(y, x) for x in range(size)] for y in range(size)]
  tiles = _map(_TO_TILES, squares)
  products = [
    [
      # The barrier keeps the map out of the product, which is no loop over it.
      (lax.optimization_barrier(tile.reshape(-1, C)) @ kernels[a, b]).reshape(
        B, h, w, D
      )
      for b, tile in enumerate(row)
    ]
    for a, row in enumerate(tiles)
  ]
  rows = [jnp.stack(row, axis=3) for row in _map(_TO_PIXELS, products)]
  return jnp.stack(rows, axis=2).reshape(B, H, W, D)


def _map(matrix: np.ndarray, grid: list[list[jax.Array]]) -> list[list]:
  """matrix @ grid @ matrix^T, for a grid of arrays."""
  by_rows = list(zip(*(_combine(matrix, row) for row in grid)))
  return list(zip(*(_combine(matrix, column) for column in by_rows)))


def _combine(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list:
  """matrix @ arrays, without the products by 0 and 1."""
  combined = []
  for row in matrix:
    terms = [x if c == 1 else c * x for c, x in zip(row, arrays) if c]
    combined.append(sum(terms[1:], terms[0]))
  return combined
