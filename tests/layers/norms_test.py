"""Norms: equal to Flax's, statistics in float32, group counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import norms


@pytest.mark.parametrize(
  ("channels", "groups"),
  [(320, 32), (192, 32), (128, 32), (64, 16), (144, 24), (8, 2), (37, 1)],
)
def test_num_groups(channels, groups):
  assert norms.num_groups(channels) == groups


@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (3, 6, 12)])
def test_group_norm_equals_flax(shape):
  groups = 3  # of 4 channels
  x = 3 * random_variables.normal(*shape) + np.arange(12)
  params = {"scale": random_variables.normal(12), "bias": np.arange(12.0)}
  ours, flax = (
    jax.jit(norm.apply)({"params": params}, x)
    for norm in (
      norms.GroupNorm(),
      nn.GroupNorm(groups, epsilon=1e-5),
    )
  )
  np.testing.assert_allclose(ours, flax, rtol=1e-4, atol=1e-4)


def test_group_norm_statistics_are_float32():
  # A bfloat16 sum of 4,096 values near 1 would stop growing at 256.
  x = (1 + 0.5 * random_variables.normal(1, 64, 64, 2)).astype(jnp.bfloat16)
  norm = norms.GroupNorm(max_groups=1, dtype=jnp.bfloat16)
  y, _ = jax.jit(norm.init_with_output)(jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  y = np.asarray(y, np.float64)
  np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=0.01)


def test_group_norm_of_a_flat_picture_is_finite():
  # Here E[x^2] - E[x]^2 rounds to less than -epsilon.
  norm = norms.GroupNorm()
  x = np.ones((3, 32, 32, 4), np.float32)
  x *= np.asarray([12.3, 99.9, -777.7], np.float32)[:, None, None, None]
  y, _ = jax.jit(norm.init_with_output)(jax.random.key(0), x)
  assert np.all(np.isfinite(y))


def test_layer_norm_has_the_epsilon_of_clip():
  norm = norms.LayerNorm()
  x = jnp.asarray([[-1e-3, 1e-3]])
  y, _ = jax.jit(norm.init_with_output)(jax.random.key(0), x)
  np.testing.assert_allclose(y[0, 1], 1e-3 / np.sqrt(1e-6 + 1e-5), rtol=1e-4)
