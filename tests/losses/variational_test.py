"""Weights of a variational bound, and the bound on a case that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian
from unclip_jax.losses import variational


def test_the_weight_rises_linearly_and_stays():
  weights = [float(variational.warm_up(s, 8)) for s in (0, 2, 4, 8, 9, 1000)]
  assert weights == [0.0, 0.25, 0.5, 1.0, 1.0, 1.0]
  assert float(variational.warm_up(0, 0)) == 1.0


def test_free_bits_are_free():
  """A dimension below the floor has gradient 0, and others their own."""
  mean = jnp.asarray([[0.1, 3.0, -0.2], [-2.0, 0.0, 4.0]])

  def counted(mean, bits):
    kl = gaussian.normal_kl(mean, jnp.zeros_like(mean), 0.0, 0.0)
    return variational.free_bits(kl, bits)

  gradient = jax.grad(lambda mean: counted(mean, 1.0).sum())(mean)
  kl = np.asarray(mean) ** 2 / 2
  floor = np.log(2.0)
  np.testing.assert_array_equal(gradient != 0, kl > floor)
  np.testing.assert_allclose(gradient, np.where(kl > floor, mean, 0))
  np.testing.assert_allclose(
    counted(mean, 1.0), np.maximum(kl, floor).sum(1), rtol=1e-6
  )
  np.testing.assert_allclose(counted(mean, 0.0), kl.sum(1), rtol=1e-6)


def test_kl_of_matching_gaussians_is_0_and_else_what_draws_say():
  rng = np.random.default_rng(0)
  a, b = ((rng.normal(size=4), rng.normal(size=4)) for _ in range(2))
  np.testing.assert_array_equal(gaussian.normal_kl(*a, *a), 0.0)
  x = a[0] + np.exp(0.5 * a[1]) * rng.normal(size=(400_000, 4))
  ratios = gaussian.log_density(x, *a) - gaussian.log_density(x, *b)
  np.testing.assert_allclose(
    gaussian.normal_kl(*a, *b), ratios.mean(0), rtol=0.02, atol=0.01
  )


@pytest.mark.parametrize("is_exact", [True, False])
def test_the_bound_of_a_linear_gaussian_model(is_exact):
  """log p(x) of z ~ N(0, 1), x ~ N(w z, s^2): equal with the true posterior.

  In one dimension p(x) is N(0, w^2 + s^2), and the posterior has the variance
  s^2 / (w^2 + s^2) and the mean w x / (w^2 + s^2).
  """
  w, s, x = 1.5, 0.7, 0.9
  total = w**2 + s**2
  mean, variance = w * x / total, s**2 / total
  if not is_exact:
    mean, variance = mean + 0.3, 2 * variance
  z = mean + np.sqrt(variance) * np.random.default_rng(0).normal(size=400_000)
  reconstruction = gaussian.log_density(x, w * z, np.log(s**2)).mean()
  bound = reconstruction - gaussian.normal_kl(mean, np.log(variance), 0.0, 0.0)
  likelihood = gaussian.log_density(x, 0.0, np.log(total))
  if is_exact:
    np.testing.assert_allclose(bound, likelihood, atol=5e-3)
  else:
    # The gap is the divergence from the true posterior.
    gap = gaussian.normal_kl(
      mean, np.log(variance), w * x / total, np.log(s**2 / total)
    )
    np.testing.assert_allclose(likelihood - bound, gap, atol=2e-2)
    assert gap > 0.1
