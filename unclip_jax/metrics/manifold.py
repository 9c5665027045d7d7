"""Precision, recall, density and coverage: what is drawn, and what is missed.

Around each picture of a set lies a ball in the space of features that reaches
to its k-th nearest neighbour in the set; the balls together stand for the
manifold of the set.

  precision  share of drawn pictures in a ball of a true one: are they real?
  recall     share of true pictures in a ball of a drawn one: are all there?
             (Kynkaanniemi et al. 2019, arXiv 1904.06991, eqs. 1 to 3; k = 3)
  density    how many balls of true pictures a drawn one is in, over k; 1 where
             both are one distribution, above 1 where modes collapse onto dense
             places. One outlier among the true pictures weighs little.
  coverage   share of true pictures whose ball holds a drawn one
             (Naeem et al. 2020, arXiv 2002.09797, eqs. 3 and 4; k = 5)

Deviation: one k for all four, and a point on the surface of a ball is outside,
both as in Naeem et al.'s released code; it matters for copies alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Rows of a distance matrix that are in memory at once.
_BLOCK = 1024


def prdc(true: np.ndarray, drawn: np.ndarray, k: int = 5) -> dict[str, float]:
  """`precision`, `recall`, `density` and `coverage`.

  Args:
    true: [N, D] features.
    drawn: [M, D].
    k: which neighbour a ball reaches to, the picture itself not counted.

  Raises:
    ValueError: k is not in [1, N) and [1, M).
  """
  smaller = min(len(true), len(drawn))
  if not 1 <= k < smaller:
    raise ValueError(
      f"k {k} must be in [1, {smaller}), below the size of the smaller set"
    )
  # Common offsets would cost the distances their digits.
  centre = np.asarray(true, np.float64).mean(axis=0)
  true = np.asarray(true, np.float64) - centre
  drawn = np.asarray(drawn, np.float64) - centre
  true_radii, drawn_radii = _radii(true, k), _radii(drawn, k)
  balls = np.zeros(len(drawn), np.int64)  # of true ones, that hold it
  recalled, covered = [], []
  for rows, squares in _squared_distances(true, drawn):
    radii = true_radii[rows, None]
    balls += (squares < radii).sum(axis=0)
    recalled.append((squares < drawn_radii).any(axis=1))
    covered.append((squares < radii).any(axis=1))
  return {
    "precision": float((balls > 0).mean()),
    "recall": float(np.concatenate(recalled).mean()),
    "density": float(balls.mean() / k),
    "coverage": float(np.concatenate(covered).mean()),
  }


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """The squared distance [N] of every row to its k-th nearest other row."""
  found = []
  for rows, squares in _squared_distances(x, x):
    squares[np.arange(len(squares)), rows] = -1.0  # of itself, always first
    found.append(np.partition(squares, k, axis=1)[:, k])
  return np.concatenate(found)


def _squared_distances(
  x: np.ndarray, y: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(rows of x, squared distances [rows, M]) block by block."""
  y_squares = (y**2).sum(axis=1)
  for start in range(0, len(x), _BLOCK):
    rows = np.arange(start, min(start + _BLOCK, len(x)))
    block = x[rows]
    squares = (block**2).sum(axis=1)[:, None] + y_squares - 2.0 * block @ y.T
    yield rows, np.maximum(squares, 0.0)
