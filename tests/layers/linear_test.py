"""Dense products: float32 accumulation, gradients in the compute dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import linear

MATMUL = (((1,), (0,)), ((), ()))


def _operands(dtype):
  lhs, rhs = random_variables.normal(5, 64), random_variables.normal(64, 3)
  return jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype)


def test_bfloat16_product_is_the_rounded_float32_product():
  lhs, rhs = _operands(jnp.bfloat16)
  out = linear.dot_general(lhs, rhs, MATMUL)
  exact = lhs.astype(jnp.float32) @ rhs.astype(jnp.float32)
  assert out.dtype == jnp.bfloat16
  forward = jax.make_jaxpr(linear.dot_general, static_argnums=2)
  assert "f32[5,3] = dot_general" in str(forward(lhs, rhs, MATMUL))
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_that_of_a_plain_product(dtype):
  lhs, rhs = _operands(dtype)

  def gradient(dot):
    return jax.grad(lambda a, b: (dot(a, b) ** 2).sum(), argnums=(0, 1))(
      lhs, rhs
    )

  ours = gradient(lambda a, b: linear.dot_general(a, b, MATMUL))
  plain = gradient(jnp.dot)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  for a, b in zip(ours, plain):
    assert a.dtype == dtype
    np.testing.assert_allclose(
      a.astype(jnp.float32),
      b.astype(jnp.float32),
      rtol=tolerance,
      atol=10 * tolerance,
    )


def test_backward_multiplies_in_the_compute_dtype():
  lhs, rhs = _operands(jnp.bfloat16)
  _, vjp = jax.vjp(lambda a, b: linear.dot_general(a, b, MATMUL), lhs, rhs)
  backward = str(jax.make_jaxpr(vjp)(jnp.ones((5, 3), jnp.bfloat16)))
  assert "dot_general" in backward
  assert "f32[" not in backward


@pytest.mark.parametrize("shape", [(8, 16), (3, 3, 8, 8)])
def test_initialisation_is_that_of_flax(shape):
  ours = linear.lecun_normal(jax.random.key(0), shape)
  flax = nn.initializers.lecun_normal()(jax.random.key(0), shape)
  np.testing.assert_allclose(ours, flax, rtol=1e-6)
