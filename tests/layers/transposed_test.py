"""The transposed convolution is that of Linen, and so is its gradient."""

import flax.linen as nn
import jax
import numpy as np

from tests import random_variables
from unclip_jax.layers import transposed


def test_it_is_that_of_linen():
  x = random_variables.normal(2, 3, 5, 4)
  ours = transposed.ConvTranspose(6)
  theirs = nn.ConvTranspose(6, (4, 4), strides=(2, 2))
  variables = random_variables.like(theirs.init, x)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(
    np.shape, random_variables.like(ours.init, x)
  )
  weights = random_variables.normal(2, 6, 10, 6)

  def both(module):
    @jax.jit
    def apply(variables, x):
      y, vjp = jax.vjp(module.apply, variables, x)
      return y, vjp(weights)

    return apply(variables, x)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    both(ours),
    both(theirs),
  )
