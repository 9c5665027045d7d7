"""The FID's Inception network: its oddities, and numbers of another's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_inception
from unclip_jax.models import inception

# Of torch-fidelity 0.4.0 in float64; test_features_are_those_of_the_reference.
FEATURES = [2.7204657, 3.0114312, 7.7984624, 0.9355495]
LOGITS = [3.1000714, -8.6800728, 4.3593082, 3.6709268]
SUMS = [5627.1019194, 5604.4367693]


def tensorflow_resize(image: np.ndarray, size: int) -> np.ndarray:
  """Pixel by pixel: the source place is i * old / new."""
  H, W, C = image.shape
  result = np.empty((size, size, C))
  for i, j in np.ndindex(size, size):
    y, x = i * H / size, j * W / size
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
    top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (x - x0)
    low = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (x - x0)
    result[i, j] = top + (low - top) * (y - y0)
  return result


@pytest.mark.parametrize("height, width", [(5, 7), (40, 31), (20, 20)])
def test_resize_is_that_of_tensorflow_1(height, width):
  image = np.random.default_rng(0).uniform(size=(height, width, 3))
  found = inception.resize(jnp.asarray(image[None], jnp.float32), 20)
  np.testing.assert_allclose(
    found[0], tensorflow_resize(image, 20), rtol=1e-4, atol=1e-5
  )


def test_averages_leave_out_what_is_beyond_the_border():
  ones = jnp.ones((1, 5, 5, 1))
  pooled = inception._pool(ones, inception.Pool("avg"))
  np.testing.assert_array_equal(pooled, ones)


def test_only_the_last_block_takes_the_maximum():
  kinds = {
    name: layer.kind
    for name, branches in inception.BLOCKS.items()
    for branch in branches
    for layer in branch
    if isinstance(layer, inception.Pool) and layer.stride == 1
  }
  assert kinds.pop("Mixed_7c") == "max"
  assert set(kinds.values()) == {"avg"}


def test_features_are_those_of_the_reference():
  """What torch-fidelity's network gives, by tests/interop/inception_test.py.

  Its weights were these; the figures are the first of the second picture.
  """
  pictures = random_inception.pictures(2, 32, 24) / 127.5 - 1.0
  variables = random_inception.variables()
  # Levels are rounded: what is less than half of one changes nothing.
  pictures = pictures + 0.9 / 255 * np.sin(np.arange(24))[:, None]
  features, out = jax.jit(inception.Model().apply)(variables, pictures)
  assert features.shape == (2, 2048) and out["logits"].shape == (2, 1008)
  np.testing.assert_allclose(features[1, :4], FEATURES, rtol=1e-4)
  np.testing.assert_allclose(
    out["logits_unbiased"][1, :4], LOGITS, rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(
    out["logits"] - out["logits_unbiased"],
    np.tile(variables["params"]["fc_bias"], (2, 1)),
    atol=1e-5,
  )
  sums = np.asarray(features, np.float64).sum(axis=1)
  np.testing.assert_allclose(sums, SUMS, rtol=1e-5)
