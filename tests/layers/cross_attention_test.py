"""Cross-attention against the formula, and the block of a decoder."""

import jax
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import attention, cross_attention
from unclip_jax.utils import errors

D, N = 8, 2
BLOCK = cross_attention.CrossBlock(D, N)


@pytest.fixture(name="x")
def _x():
  return random_variables.normal(2, 5, D)


@pytest.fixture(name="context")
def _context():
  return random_variables.normal(2, 3, 6)


def _attend(layer, x, context):
  return layer(x, layer.encode(context))


def test_cross_attention_is_the_formula(x, context):
  """Vaswani et al. 2017, equation 1, head by head in float64."""
  layer = cross_attention.CrossAttention(D, N)
  init = lambda rng: layer.init(rng, x, context, method=_attend)  # noqa: E731
  variables = random_variables.like(init)
  found = layer.apply(variables, x, context, method=_attend)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
  project = lambda name, a: a @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
  q, k, v = (
    project("query", x),
    project("key", context),
    project("value", context),
  )
  heads = []
  for n in range(N):
    own = slice(n * D // N, (n + 1) * D // N)
    scores = q[..., own] @ k[..., own].swapaxes(1, 2) / np.sqrt(D // N)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    heads.append(weights @ v[..., own])
  expected = project("out", np.concatenate(heads, axis=-1))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_block_is_causal_and_sees_all_context(x, context):
  variables = random_variables.like(BLOCK.init, x, context=context)
  mask = attention.causal_mask(5)

  @jax.jit
  @jax.jacobian
  def jacobian(inputs):
    y, _ = BLOCK.apply(variables, inputs[0], mask, context=inputs[1])
    return (y * random_variables.normal(D)).sum((0, 2))

  by_x, by_context = jacobian((x, context))
  depends = np.abs(by_x).max((1, 3)) > 0
  np.testing.assert_array_equal(depends, np.tri(5, dtype=bool))
  assert np.all(np.abs(by_context).max((1, 3)) > 0)


def test_a_new_block_is_the_identity(x, context):
  variables = BLOCK.init(jax.random.key(0), x, context=context)
  y, _ = BLOCK.apply(variables, x, context=context)
  np.testing.assert_array_equal(y, x)


def test_heads_that_do_not_fit_are_an_error(x, context):
  with pytest.raises(errors.UserError, match="multiple of 3 heads"):
    cross_attention.CrossBlock(D, 3).init(jax.random.key(0), x, context=context)
