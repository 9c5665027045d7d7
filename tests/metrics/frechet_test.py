import numpy as np
import pytest
import scipy.linalg

from unclip_jax.metrics import frechet


def features(count: int, size: int, seed: int = 0) -> np.ndarray:
  """Correlated, on different scales, off the origin."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(size, size)) * np.geomspace(0.01, 3.0, size)
  return rng.normal(size=(count, size)) @ mixing + rng.normal(size=size)


def assert_equal_moments(a: frechet.Moments, b: frechet.Moments) -> None:
  assert a.count == b.count
  np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(a.scatter, b.scatter, rtol=1e-10, atol=1e-10)


def test_moments_are_those_of_numpy():
  x = features(50, 6)
  moments = frechet.Moments.of(x)
  np.testing.assert_allclose(moments.mean, x.mean(axis=0))
  np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False))


def test_moments_of_parts_merge_in_any_order_and_grouping():
  x = features(50, 6) + 1e4  # far off: sums of squares would lose digits
  whole = frechet.Moments.of(x)
  parts = [frechet.Moments.of(p) for p in np.split(x, [1, 9, 30])]
  a, b, c, d = parts
  assert_equal_moments(whole, a.merge(b).merge(c).merge(d))
  assert_equal_moments(whole, d.merge(b).merge(a.merge(c)))
  assert_equal_moments(whole, a.update(x[1:9]).update(x[9:]))


def test_moments_of_float32_are_summed_in_float64():
  x = np.float32(1e3) + np.random.default_rng(0).normal(size=(4000, 2))
  x = x.astype(np.float32)
  moments = frechet.Moments.of(x[:10]).update(x[10:])
  assert moments.mean.dtype == moments.scatter.dtype == np.float64
  expected = np.cov(x.astype(np.float64), rowvar=False)
  np.testing.assert_allclose(moments.covariance, expected, rtol=1e-9)


def test_distance_of_commuting_normals_has_a_closed_form():
  # sum of (m - n)^2 + (s - t)^2 along the common axes.
  turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
  s, t = (
    np.array([1.0, 2.0, 0.1, 3.0, 0.0]),
    np.array([2.0, 2.0, 0.3, 1.0, 1.0]),
  )
  a, b = turn * s**2 @ turn.T, turn * t**2 @ turn.T
  mean = np.arange(5.0)
  found = frechet.distance_of(mean, a, np.zeros(5), b)
  np.testing.assert_allclose(found, 30.0 + ((s - t) ** 2).sum(), rtol=1e-12)


@pytest.mark.parametrize("count", [400, 8])  # more and fewer than features
def test_distance_is_symmetric_and_zero_between_equals(count):
  a = frechet.Moments.of(features(count, 20, seed=1))
  b = frechet.Moments.of(features(count, 20, seed=2))
  scale = np.trace(a.covariance)
  assert frechet.distance(a, a) < 1e-12 * scale
  there, back = frechet.distance(a, b), frechet.distance(b, a)
  np.testing.assert_allclose(there, back, rtol=1e-10)
  assert there > 0.1 * scale


def test_distance_is_that_of_sqrtm():
  a = frechet.Moments.of(features(400, 30, seed=1))
  b = frechet.Moments.of(features(300, 30, seed=2))
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
  expected = ((a.mean - b.mean) ** 2).sum() + np.trace(
    a.covariance + b.covariance - 2.0 * root.real
  )
  np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-6)


def test_what_cannot_be_compared_is_refused():
  a = frechet.Moments.of(features(4, 3))
  with pytest.raises(ValueError, match="different features"):
    frechet.distance(a, frechet.Moments.of(features(4, 5)))
  with pytest.raises(ValueError, match="two rows"):
    frechet.distance(a, frechet.Moments.of(features(1, 3)))
  with pytest.raises(ValueError, match=r"\[B, D\]"):
    frechet.Moments.of(np.zeros((0, 3)))
