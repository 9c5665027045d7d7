"""The logit-Laplace likelihood against its definition."""

import math

import numpy as np
import pytest

from unclip_jax.losses import reconstruction


def nll(x, mean, log_scale):
  """Of single values."""
  x = np.asarray(x, np.float32)[:, None]
  shape = np.ones_like(x)
  return np.asarray(
    reconstruction.logit_laplace(x, mean * shape, log_scale * shape)
  )


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.5), (1.2, 0.3), (-2, 0.8)])
def test_the_density_integrates_to_one(mean, scale):
  """Over (0, 1), on points that are dense at both ends."""
  t = np.linspace(-14, 14, 200_001)
  x = 1 / (1 + np.exp(-t))
  density = np.exp(-nll(x, mean, math.log(scale)).astype(np.float64))
  inside = (x > 1e-6) & (x < 1 - 1e-4)  # float32 knows no more near 1
  total = np.trapezoid(density[inside], x[inside])
  # Of the Laplace distribution of the logit, what was left out.
  low, high = t[inside][[0, -1]]
  outside = 0.5 * (
    math.exp(-(mean - low) / scale) + math.exp(-(high - mean) / scale)
  )
  assert total + outside == pytest.approx(1, abs=2e-3)
  assert outside < 0.01


def test_it_is_the_likelihood_of_the_logit_with_the_jacobian():
  """By the change of variables: Laplace density of logit(x) over dx/dt."""
  rng = np.random.default_rng(0)
  x, mean, log_scale = rng.uniform(0.1, 0.9, 50), 0.7, -1.3
  t, b = np.log(x / (1 - x)), np.exp(log_scale)
  laplace = np.exp(-np.abs(t - mean) / b) / (2 * b)
  sigmoid_slope = np.exp(-t) / (1 + np.exp(-t)) ** 2
  expected = -np.log(laplace / sigmoid_slope)
  np.testing.assert_allclose(nll(x, mean, log_scale), expected, rtol=1e-4)


def test_losses_are_means_per_example():
  rng = np.random.default_rng(0)
  x, y = rng.uniform(0.1, 0.9, (2, 3, 4, 4, 3)).astype(np.float32)
  mse = reconstruction.mse(x, y)
  np.testing.assert_allclose(mse, ((x - y) ** 2).reshape(3, -1).mean(1), 1e-5)
  whole = reconstruction.logit_laplace(x, y, y)
  assert whole.shape == (3,)
  alone = [
    reconstruction.logit_laplace(x[i:][:1], y[i:][:1], y[i:][:1])
    for i in range(3)
  ]
  np.testing.assert_allclose(whole, np.concatenate(alone), rtol=1e-5)


def test_pixels_are_mapped_into_the_open_interval_and_back():
  """Equation 3 of the source: levels 0 to 255 become 0.1 to 0.9."""
  levels = np.arange(256)
  image = (levels / 127.5 - 1).astype(np.float32)
  x = reconstruction.to_open_interval(image)
  np.testing.assert_allclose(x, 0.8 / 255 * levels + 0.1, rtol=1e-5)
  back = reconstruction.from_open_interval(x)
  np.testing.assert_allclose(back, image, atol=1e-6)
  cut = reconstruction.from_open_interval(np.float32([0, 1]))
  np.testing.assert_array_equal(cut, [-1, 1])
