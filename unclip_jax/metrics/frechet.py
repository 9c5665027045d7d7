"""The Frechet distance between two sets of features (FID), and its moments.

Heusel et al. 2017 (arXiv 1706.08500, eq. 6): of two normal distributions with
means m, n and covariances A, B

  d^2 = |m - n|^2 + tr(A + B - 2 (A B)^(1/2))

With Inception features (models/inception.py) it is the FID. `Moments` are
gathered batch by batch and merged (Chan et al. 1979), all in float64: parts of
a data set, on one host or many, give what the whole gives at once. Evaluators
see whole batches on every host (evaluation.compile_predict), so that nothing is
left to be merged there.

Deviation: released code takes the matrix root by scipy.linalg.sqrtm, or the
eigenvalues of A B, which is not symmetric; with fewer examples than features
both leave complex rounding of the size of the root of a float's precision. With
A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the singular values of
F^T G: real by construction, 0 for equal sets, and little work for few examples,
for F has no more columns than A has rank. 5 s on one core for 2048 features.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and scatter of features.

  Attributes:
    count: number of rows seen.
    mean: float64 [D].
    scatter: float64 [D, D], the sum of outer products of centred rows.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray) -> Moments:
    """Those of rows [B, D], B >= 1.

    Raises:
      ValueError: the features are no [B, D], or there is no row.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
      raise ValueError(f"features must be [B, D], got {features.shape}")
    mean = features.mean(axis=0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  def merge(self, other: Moments) -> Moments:
    """Those of both sets of rows together."""
    count = self.count + other.count
    step = other.mean - self.mean
    weight = self.count * other.count / count
    return Moments(
      count,
      self.mean + step * (other.count / count),
      self.scatter + other.scatter + weight * np.outer(step, step),
    )

  def update(self, features: np.ndarray) -> Moments:
    """Those of the rows seen and of further ones [B, D]."""
    return self.merge(Moments.of(features))

  @property
  def covariance(self) -> np.ndarray:
    """The unbiased covariance [D, D], as numpy.cov.

    Raises:
      ValueError: there is but one row.
    """
    if self.count < 2:
      raise ValueError("a covariance needs two rows or more")
    return self.scatter / (self.count - 1)


def distance(a: Moments, b: Moments) -> float:
  """The squared Frechet distance d^2, at least 0; "the FID" is this square.

  Raises:
    ValueError: a covariance of one row, or sizes that differ.
  """
  return distance_of(a.mean, a.covariance, b.mean, b.covariance)


def distance_of(
  mean_a: np.ndarray,
  covariance_a: np.ndarray,
  mean_b: np.ndarray,
  covariance_b: np.ndarray,
) -> float:
  """As `distance`, of means [D] and covariances [D, D].

  Raises:
    ValueError: the sizes differ.
  """
  shapes = [np.shape(x) for x in (mean_a, mean_b, covariance_a, covariance_b)]
  (D,) = shapes[0]
  if shapes != [(D,), (D,), (D, D), (D, D)]:
    raise ValueError(f"statistics of different features: {shapes}")
  step = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
  factors = _factor(covariance_a).T @ _factor(covariance_b)
  cross = np.linalg.svd(factors, compute_uv=False).sum()
  total = np.trace(covariance_a) + np.trace(covariance_b)
  return max(float(step @ step + total - 2.0 * cross), 0.0)


def _factor(covariance: np.ndarray) -> np.ndarray:
  """F [D, rank] with F F^T the positive semi-definite matrix, float64."""
  values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
  # What is rounding counts as 0: the root of 1e-16 would be 1e-8, D times.
  kept = values > np.finfo(np.float64).eps * len(values) * values[-1]
  return vectors[:, kept] * np.sqrt(values[kept])
