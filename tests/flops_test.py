"""Counted arithmetic: a dense layer's backward pass is twice its forward."""

import jax
import jax.numpy as jnp

from unclip_jax import flops
from unclip_jax.layers import linear

ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))


def test_what_nothing_reads_is_not_counted():
  # Its rule of differentiation traces the forward product once more.
  def loss(x, kernels):
    def layer(x, kernel):
      return linear.dot_general(x, kernel, ROWS_BY_COLUMNS), None

    x, _ = jax.lax.scan(layer, x, kernels)
    return jnp.sum(x**2)

  x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  kernels = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32)
  forward = flops.count(loss, x, kernels)
  assert forward == 4 * 2 * 8 * 16 * 16
  assert flops.count(jax.grad(loss, (0, 1)), x, kernels) == 3 * forward
