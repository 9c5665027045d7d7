"""Timestep embeddings, pooling and dropping of conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import embeddings


def test_sinusoid_is_cosines_then_sines_of_falling_frequencies():
  emb = embeddings.sinusoidal(jnp.asarray([0, 7]), 6)
  angles = 7 * 10_000.0 ** (-np.arange(3) / 3)
  expected = [
    [1, 1, 1, 0, 0, 0],
    np.concatenate([np.cos(angles), np.sin(angles)]),
  ]
  np.testing.assert_allclose(emb, expected, atol=1e-6)


def test_sinusoid_tells_all_timesteps_apart():
  emb = np.asarray(embeddings.sinusoidal(jnp.arange(1000), 32))
  distances = np.linalg.norm(emb[:, None] - emb[None], axis=-1)
  assert distances[~np.eye(1000, dtype=bool)].min() > 0.1


def test_sinusoid_refuses_an_odd_size():
  with pytest.raises(ValueError, match="even"):
    embeddings.sinusoidal(jnp.arange(2), 5)


def test_pool_last_valid_takes_the_last_true_position():
  encodings = jnp.arange(12.0).reshape(3, 4, 1)
  mask = jnp.asarray(
    [[True, True, False, False], [True] * 4, [False] * 4], dtype=bool
  )
  pooled = embeddings.pool_last_valid(encodings, mask)
  np.testing.assert_array_equal(pooled[:, 0], [1, 7, 8])


def test_replaced_rows_have_zero_gradient_and_kept_rows_do_not():
  x = random_variables.normal(3, 2, 4)
  null = jnp.arange(4.0)
  drop = jnp.asarray([True, False, True])

  def total(x, null):
    return (embeddings.replace_dropped(x, null, drop) ** 2).sum()

  out = embeddings.replace_dropped(x, null, drop)
  np.testing.assert_array_equal(out[0], np.tile(null, (2, 1)))
  np.testing.assert_array_equal(out[1], x[1])
  x_grad, null_grad = jax.grad(total, argnums=(0, 1))(x, null)
  assert not np.any(x_grad[0]) and not np.any(x_grad[2])
  assert np.all(x_grad[1] != 0)
  np.testing.assert_allclose(null_grad, 2 * 4 * null)
