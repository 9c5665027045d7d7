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


def picture(size=64):
  y, x = np.mgrid[0:size, 0:size] / size
  image = np.stack([np.sin(9 * x), np.cos(7 * y), (x > 0.5) * 2 - 1], axis=-1)
  return image.astype(np.float32)


@pytest.mark.parametrize("factor", [2, 4])
def test_bsr_is_a_function_of_its_generator(factor):
  image = picture()
  draws = [
    degradations.bsr(image, factor, np.random.default_rng(seed))
    for seed in (0, 0, 1)
  ]
  assert draws[0].shape == (64 // factor, 64 // factor, 3)
  assert draws[0].dtype == np.float32
  np.testing.assert_array_equal(draws[0], draws[1])
  assert np.abs(draws[0] - draws[2]).max() > 0.05


def test_bsr_shows_the_same_picture_worse():
  image = picture()
  small = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
  draws = np.stack(
    [
      degradations.bsr(image, 4, np.random.default_rng(seed))
      for seed in range(40)
    ]
  )
  assert draws.min() >= -1 and draws.max() <= 1
  errors = np.abs(draws - small).mean(axis=(1, 2, 3))
  assert 0.02 < np.median(errors) < 0.4  # worse, but not another picture
  assert errors.std() > 0.01  # and not always in the same way
  # On average it is the picture, neither moved nor turned.
  mean = draws.mean(axis=0)
  distance = {
    (dy, dx): np.abs(mean - np.roll(small, (dy, dx), axis=(0, 1))).mean()
    for dy in (-1, 0, 1)
    for dx in (-1, 0, 1)
  }
  assert min(distance, key=distance.get) == (0, 0)
  assert distance[0, 0] < np.abs(mean - small[::-1, ::-1]).mean()


def test_random_kernels_sum_to_one_and_are_not_all_round():
  kernels = [
    degradations.random_kernel(4, np.random.default_rng(seed))
    for seed in range(40)
  ]
  for kernel in kernels:
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert len(kernel) in range(7, 27, 2)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
  is_round = [np.allclose(kernel, kernel.T, atol=1e-5) for kernel in kernels]
  assert 8 < sum(is_round) < 32


@pytest.mark.parametrize("size", [11, 40])
def test_convolution_equals_scipy(size):
  kernel = degradations.random_kernel(4, np.random.default_rng(3))
  image = np.random.default_rng(0).uniform(0, 1, (size, 20, 3))
  image = image.astype(np.float32)
  radius = min(len(kernel) // 2, size - 1, 19)
  cut = slice(len(kernel) // 2 - radius, len(kernel) // 2 + radius + 1)
  cut_kernel = kernel[cut, cut] / kernel[cut, cut].sum()
  expected = scipy.ndimage.correlate(
    image, cut_kernel[..., None], mode="mirror"
  )
  np.testing.assert_allclose(
    degradations._convolve(image, kernel), expected, atol=1e-5
  )


def test_bsr_needs_a_size_that_divides():
  with pytest.raises(ValueError, match="multiple"):
    degradations.bsr(picture(30), 4, np.random.default_rng(0))
