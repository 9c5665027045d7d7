"""The attention masks of DALL-E (Ramesh et al. 2021, arXiv 2102.12092).

Section 2.2, appendix B.1 and figure 11: a sequence of text tokens and the
tokens of a square picture in raster order. Text attends to text before it, a
picture's token to all text and to some of the picture's tokens before it. With
a grid of S x S and token i at row i // S and column i % S, token i attends to
token j <= i where

  full         always
  row          i - j <= S: the last S tokens in raster order, the farthest of
               which is in the same column of the row above
  column       (i - j) % S == 0: its own column
  convolution  i - j = r S + c for rows 0 <= r <= h and columns -h <= c <= h of
               a kernel of 2 h + 1: where the kernel leaves the grid at the left
               or right, it goes on at the other end of the row above or below

Row and convolution wrap around, as the source says of both. The source
transposes the picture for its column attention, for the sake of its GPU
kernels; the tokens that are attended to are the same. All masks are made in
numpy, as constants of the program: what a position that is decoded may attend
to is a row of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.utils import errors

TYPES = ("full", "row", "column", "convolution")


def image_mask(
  attention_type: str, grid_size: int, kernel_size: int = 11
) -> np.ndarray:
  """[S * S, S * S] bool: which token (row) attends to which (column).

  Args:
    attention_type: one of TYPES.
    grid_size: S.
    kernel_size: of "convolution", odd; 11 in the source, where S is 32.

  Raises:
    UserError: an unknown type, or an even kernel.
  """
  if attention_type not in TYPES:
    raise errors.UserError(
      f"attention type '{attention_type}' is unknown: use one of "
      f"{', '.join(TYPES)}"
    )
  if kernel_size < 1 or kernel_size % 2 == 0:
    raise errors.UserError(
      f"kernel_size {kernel_size} has no middle: take an odd number"
    )
  index = np.arange(grid_size**2)
  distance = index[:, None] - index
  if attention_type == "row":
    attends = distance <= grid_size
  elif attention_type == "column":
    attends = distance % grid_size == 0
  elif attention_type == "convolution":
    half = kernel_size // 2
    rows = np.arange(half + 1)[:, None] * grid_size
    attends = np.isin(distance, rows + np.arange(-half, half + 1))
  else:
    attends = np.ones_like(distance, bool)
  return attends & (distance >= 0)


def sequence_mask(image: np.ndarray, num_given: int) -> np.ndarray:
  """`image_mask` behind a causal prefix that all of the picture attends to.

  Args:
    image: [K, K] bool.
    num_given: positions before the picture's: text, start of the picture.

  Returns:
    [num_given + K, num_given + K] bool.
  """
  total = num_given + len(image)
  mask = np.tri(total, dtype=bool)
  mask[num_given:, num_given:] = image
  return mask


def layer_types(
  cycle: Sequence[str], depth: int, last: str | None = None
) -> tuple[str, ...]:
  """The attention type of every layer: a cycle, and another type at the end.

  The source's: "row", "column", "row", "row", and so on, "convolution" last.

  Raises:
    UserError: the cycle is empty.
  """
  if not cycle:
    raise errors.UserError(
      "config.model.attention_types is empty: name at least one type"
    )
  types = [cycle[i % len(cycle)] for i in range(depth)]
  return tuple(types[: depth - 1]) + (last or types[-1],)
