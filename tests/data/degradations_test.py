"""The blur of an upsampler's conditioning."""

import numpy as np
import pytest
import scipy.ndimage

from unclip_jax.data import degradations


def test_kernel_closed_form():
  edge = np.exp(-0.5 / 0.6**2)
  expected = np.array([edge, 1, edge]) / (1 + 2 * edge)
  np.testing.assert_allclose(
    degradations.gaussian_kernel(3, 0.6), expected, rtol=1e-6
  )


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 0.6), (5, 1.2)])
def test_blur_equals_scipy(kernel, sigma):
  image = np.random.default_rng(0).uniform(-1, 1, (9, 7, 3)).astype(np.float32)
  expected = scipy.ndimage.gaussian_filter(
    image.astype(np.float64),
    (sigma, sigma, 0),
    mode="mirror",
    radius=(kernel // 2, kernel // 2, 0),
  )
  blurred = degradations.gaussian_blur(image, kernel=kernel, sigma=sigma)
  assert blurred.dtype == np.float32
  np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_blur_keeps_a_plain_picture():
  image = np.full((6, 6, 3), 0.25, np.float32)
  np.testing.assert_allclose(
    degradations.gaussian_blur(image), image, rtol=1e-6
  )


@pytest.mark.parametrize(("kernel", "sigma"), [(2, 0.6), (3, 0.0), (-1, 1.0)])
def test_wrong_kernels(kernel, sigma):
  with pytest.raises(ValueError, match="odd kernel"):
    degradations.gaussian_kernel(kernel, sigma)
