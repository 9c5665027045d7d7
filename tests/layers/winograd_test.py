"""Winograd's convolutions against the direct ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unclip_jax.layers import resnet, winograd


def _direct(x, kernel, padding=((1, 1), (1, 1)), stride=1):
  dimensions = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=dimensions
  )


def _draw(*shape):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal(shape, np.float32))


@pytest.mark.parametrize("B, H, W, C, D", [(1, 4, 4, 3, 5), (2, 12, 8, 7, 2)])
def test_equals_the_direct_convolution(B, H, W, C, D):
  x, kernel = _draw(B, H, W, C), _draw(3, 3, C, D)
  expected = _direct(x, kernel)
  error = jnp.linalg.norm(winograd.conv3x3(x, kernel) - expected)
  assert error < 1e-5 * jnp.linalg.norm(expected)


def test_gradients_are_those_of_the_direct_convolution():
  x, kernel, y = _draw(1, 8, 8, 3), _draw(3, 3, 3, 4), _draw(1, 8, 8, 4)
  for i in range(2):
    ours, direct = (
      jax.grad(lambda x, k, f=f: jnp.sum(f(x, k) * y), i)(x, kernel)
      for f in (winograd.conv3x3, _direct)
    )
    np.testing.assert_allclose(ours, direct, atol=1e-4 * abs(direct).max())


def _uses_it(x, kernel, padding=((1, 1), (1, 1)), stride=1):
  jaxpr = jax.make_jaxpr(
    lambda x, k: winograd.conv_general_dilated(
      x,
      k,
      (stride, stride),
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
  )(x, kernel)
  return "optimization_barrier" in str(jaxpr)


def test_only_large_plain_convolutions_take_it():
  C = 256
  large, kernel = jnp.zeros((1, 128, 128, C)), jnp.zeros((3, 3, C, C))
  assert _uses_it(large, kernel)
  assert not _uses_it(large[:, :, :64], kernel)
  assert not _uses_it(large, jnp.zeros((3, 3, C, 16 * C)))
  assert not _uses_it(large[..., :128], kernel[:, :, :128])
  assert not _uses_it(jnp.zeros((1, 130, 128, C)), kernel)
  assert not _uses_it(large, kernel, stride=2)
  assert not _uses_it(large, kernel, padding=((0, 0), (0, 0)))
  assert not _uses_it(large, kernel[:1, :1], padding=((0, 0), (0, 0)))
  halves = large.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  assert not _uses_it(*halves)


def test_networks_convolve_by_it():
  conv = resnet.conv3x3(256)
  x = _draw(1, 128, 128, 256)
  variables = conv.init(jax.random.key(0), x)
  expected = _direct(x, variables["params"]["kernel"])
  ours = conv.apply(variables, x)
  assert jnp.abs(ours - expected).max() < 1e-3
  assert "optimization_barrier" in str(jax.make_jaxpr(conv.apply)(variables, x))
