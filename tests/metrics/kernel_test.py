import numpy as np
import pytest

from unclip_jax.metrics import kernel


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


def direct(k, a, b, *, unbiased: bool) -> float:
  """The squared MMD, pair by pair."""

  def mean(x, y, skip):
    pairs = [
      k(x[i], y[j])
      for i in range(len(x))
      for j in range(len(y))
      if not (skip and i == j)
    ]
    return np.mean(pairs)

  return mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b, False)


def test_polynomial_mmd_is_that_of_all_pairs():
  a, b = random(7, 3), random(5, 3, seed=1) + 0.5
  expected = direct(lambda x, y: (x @ y / 3 + 1) ** 3, a, b, unbiased=True)
  np.testing.assert_allclose(kernel.polynomial_mmd(a, b), expected, rtol=1e-12)


def test_polynomial_mmd_has_no_bias():
  # Of equal distributions it is 0 on average, on both sides of it.
  a, b = random(4000, 10, 8), random(4000, 10, 8, seed=1)
  values = [kernel.polynomial_mmd(x, y) for x, y in zip(a, b)]
  error = np.std(values) / len(values) ** 0.5
  assert abs(np.mean(values)) < 3.5 * error
  assert np.min(values) < 0 < np.max(values)


def test_kid_of_all_rows_is_one_number():
  a, b = random(30, 4), random(30, 4, seed=1) + 1.0
  mean, std = kernel.kid(a, b, num_subsets=3, subset_size=30)
  np.testing.assert_allclose(mean, kernel.polynomial_mmd(a, b), rtol=1e-12)
  assert std < 1e-12 * mean
  spread = kernel.kid(a, b, num_subsets=20, subset_size=10)[1]
  assert spread > 0.01 * mean
  with pytest.raises(ValueError, match=r"must be in \[2, 30\]"):
    kernel.kid(a, b, subset_size=31)


def test_cmmd_is_that_of_all_pairs():
  a, b = random(7, 16), random(5, 16, seed=1) + 1.0
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
  expected = 1000 * direct(
    lambda x, y: np.exp(-((x - y) ** 2).sum() / 200), *unit, unbiased=False
  )
  np.testing.assert_allclose(kernel.cmmd(a, b), expected, rtol=1e-9)
  np.testing.assert_allclose(kernel.cmmd(3 * a, b), expected, rtol=1e-9)


def test_cmmd_is_zero_between_equals_and_grows_with_the_distance():
  a = random(200, 16)
  assert abs(kernel.cmmd(a, a)) < 1e-10
  values = [kernel.cmmd(a, a + shift) for shift in (0.1, 0.3, 1.0)]
  assert 0 < values[0] < values[1] < values[2]


def test_blocks_change_nothing(monkeypatch):
  a, b = random(23, 4), random(19, 4, seed=1)
  whole = kernel.cmmd(a, b), kernel.polynomial_mmd(a, b)
  monkeypatch.setattr(kernel, "_BLOCK", 5)
  parts = kernel.cmmd(a, b), kernel.polynomial_mmd(a, b)
  np.testing.assert_allclose(parts, whole, rtol=1e-9)
