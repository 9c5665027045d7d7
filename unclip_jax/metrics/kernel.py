"""Distances between sets of features by the mean of a kernel: KID and CMMD.

The squared maximum mean discrepancy of sets X and Y (Gretton et al. 2012, "A
Kernel Two-Sample Test", JMLR 13) is E k(x, x') + E k(y, y') - 2 E k(x, y).

  KID   Binkowski et al. 2018 (arXiv 1801.01401, section 4): Inception features,
        k(x, y) = (x y / D + 1)^3, and the unbiased estimate (eq. 3 of Gretton
        et al.), averaged over random subsets. Without bias at any number of
        pictures, where FID needs tens of thousands; it may be below 0.
  CMMD  Jayasumana et al. 2024 (arXiv 2401.09603, section 4): CLIP embeddings
        of length 1, a Gaussian kernel with sigma 10, times 1000. As the
        authors' released code the biased estimate, which counts pairs of a row
        with itself (eq. 5 of Gretton et al.), and is never below 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unclip_jax.metrics import similarity

_SIGMA = 10.0
_SCALE = 1000.0
# Rows of a kernel matrix that are in memory at once.
_BLOCK = 1024


def kid(
  a: np.ndarray,
  b: np.ndarray,
  *,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 2020,
) -> tuple[float, float]:
  """Mean and standard deviation of the squared MMD over random subsets.

  Args:
    a: [N, D] features.
    b: [M, D].
    num_subsets: pairs of subsets.
    subset_size: rows drawn from each set without repetition; 1000 in most of
      the literature.
    seed: of the subsets, which are those of torch-fidelity with that seed.

  Raises:
    ValueError: a set or a subset is too small.
  """
  if not 2 <= subset_size <= min(len(a), len(b)):
    raise ValueError(
      f"subset_size {subset_size} must be in [2, {min(len(a), len(b))}], the"
      " size of the smaller set"
    )
  rng = np.random.RandomState(seed)
  values = []
  for _ in range(num_subsets):
    rows_a = rng.choice(len(a), subset_size, replace=False)
    rows_b = rng.choice(len(b), subset_size, replace=False)
    values.append(polynomial_mmd(a[rows_a], b[rows_b]))
  return float(np.mean(values)), float(np.std(values))


def polynomial_mmd(a: np.ndarray, b: np.ndarray) -> float:
  """The unbiased squared MMD of [N, D] and [M, D] under KID's kernel."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  N, M = len(a), len(b)
  own_a = _kernel_sum(_polynomial, a, a) - _polynomial_of_self(a).sum()
  own_b = _kernel_sum(_polynomial, b, b) - _polynomial_of_self(b).sum()
  cross = _kernel_sum(_polynomial, a, b)
  return own_a / (N * (N - 1)) + own_b / (M * (M - 1)) - 2 * cross / (N * M)


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
  """CMMD of CLIP embeddings [N, D] and [M, D] of any length."""
  a, b = similarity.normalize(a), similarity.normalize(b)
  N, M = len(a), len(b)
  # The kernels are near 1, their differences a ten-thousandth of that: sums of
  # k - 1 keep the digits.
  own_a = _kernel_sum(_gaussian_less_one, a, a) / N**2
  own_b = _kernel_sum(_gaussian_less_one, b, b) / M**2
  cross = _kernel_sum(_gaussian_less_one, a, b) / (N * M)
  return _SCALE * (own_a + own_b - 2.0 * cross)


def _polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return (x @ y.T / x.shape[1] + 1.0) ** 3


def _polynomial_of_self(x: np.ndarray) -> np.ndarray:
  return ((x**2).sum(axis=1) / x.shape[1] + 1.0) ** 3


def _gaussian_less_one(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  # Of rows of length 1: |x - y|^2 = 2 - 2 x y.
  return np.expm1((x @ y.T - 1.0) / _SIGMA**2)


def _kernel_sum(
  kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
  x: np.ndarray,
  y: np.ndarray,
) -> float:
  """The sum of k(x_i, y_j) over all pairs."""
  starts = range(0, len(x), _BLOCK)
  return float(sum(kernel(x[i : i + _BLOCK], y).sum() for i in starts))
