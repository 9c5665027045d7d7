"""Spectral normalisation against numpy's singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.layers import spectral_norm


def matrix(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigma(kernel):
  kernel = np.asarray(kernel, np.float64)
  return np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)[
    0
  ]


@pytest.mark.parametrize(
  "shape", [(3, 3, 64, 64), (1, 1, 12, 40), (40, 12), (30, 1)]
)
def test_sigma_is_the_largest_singular_value(shape):
  kernel = matrix(shape)
  true = sigma(kernel)
  few, some, many = (
    spectral_norm.largest_singular_value(jnp.asarray(kernel), n)
    for n in (1, 16, 500)
  )
  np.testing.assert_allclose(many, true, rtol=1e-4)
  np.testing.assert_allclose(some, true, rtol=0.03)
  assert few <= some + 1e-4 and some <= true * (1 + 1e-5)


def test_a_normalised_kernel_has_sigma_1_whatever_its_scale():
  params = {
    "block": {"kernel": jnp.asarray(matrix((3, 3, 8, 12)))},
    "small": {"kernel": jnp.asarray(1e-3 * matrix((8, 4)))},
    "text": {"kernel": jnp.asarray(matrix((8, 8)))},
    "bias": jnp.ones(3),
  }
  found = spectral_norm.normalize(params, r"^(block|small)\.", 500)
  for name in ("block", "small"):
    np.testing.assert_allclose(sigma(found[name]["kernel"]), 1.0, rtol=1e-4)
    ratio = found[name]["kernel"] / params[name]["kernel"]
    np.testing.assert_allclose(ratio, ratio.ravel()[0], rtol=1e-4)
  for name in ("text", "bias"):
    jax.tree.map(np.testing.assert_array_equal, found[name], params[name])


def test_the_derivative_is_that_of_the_source():
  """Miyato et al., section 2.3: by W it is (d - <d, W'> u v^T) / sigma."""
  kernel, weights = matrix((6, 5)), matrix((6, 5), seed=1)

  def total(kernel):
    normal = spectral_norm.normalize({"kernel": kernel}, "kernel", 500)
    return jnp.sum(weights * normal["kernel"])

  u, s, v = np.linalg.svd(kernel)
  normal = kernel / s[0]
  expected = weights - np.sum(weights * normal) * np.outer(u[:, 0], v[0])
  np.testing.assert_allclose(
    jax.grad(total)(kernel), expected / s[0], rtol=1e-3, atol=1e-4
  )
