"""Maps are the weights of the result, and new branches are the identity."""

import jax
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import attention, attention_maps
from unclip_jax.utils import errors

B, N, L, M, K = 2, 3, 4, 5, 6
MASK = np.asarray([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)


def test_maps_are_the_weights_that_attention_uses():
  query = 3 * random_variables.normal(B, N, L, K)
  kv = attention.KeyValue(
    *(random_variables.normal(2, B, N, M, K)[i] for i in range(2))
  )
  mask = attention_maps.of_keys(MASK)
  maps = attention_maps.weights(query, kv.key, mask)
  assert maps.shape == (B, N, L, M)
  np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-6)
  expected = attention.attend(query, kv, mask)
  np.testing.assert_allclose(maps @ kv.value, expected, atol=1e-5)
  hidden = np.broadcast_to(~MASK[:, None, None], maps.shape)
  assert np.all(np.asarray(maps)[hidden] == 0)
  assert attention_maps.of_keys(None) is None


@pytest.mark.parametrize("kind", ["spatial", "block"])
def test_a_new_layer_changes_nothing_and_a_trained_one_reads_its_context(kind):
  context = random_variables.normal(B, M, 7)
  if kind == "spatial":
    layer, x = attention_maps.SpatialAttention(2), (B, 2, 2, 8)
  else:
    layer, x = attention_maps.Block(2), (B, 4, 8)
  x = random_variables.normal(*x)
  apply = jax.jit(layer.apply)
  new = jax.jit(layer.init)(jax.random.key(0), x, context, MASK)
  np.testing.assert_array_equal(apply(new, x, context, MASK)[0], x)

  trained = random_variables.like(layer.init, x, context, MASK)
  y, maps = apply(trained, x, context, MASK)
  assert maps["self"].shape == (B, 2, 4, 4)
  assert maps["cross"].shape == (B, 2, 4, M)
  other = np.where(MASK[..., None], context, 9.0)  # what no one may look at
  np.testing.assert_allclose(apply(trained, x, other, MASK)[0], y, atol=1e-5)
  assert np.abs(apply(trained, x, context[::-1], MASK)[0] - y).max() > 1e-3


def test_heads_divide_the_width():
  with pytest.raises(errors.UserError, match="multiple of 3 heads"):
    jax.eval_shape(
      attention_maps.Attention(8, 3).init,
      jax.random.key(0),
      random_variables.normal(1, 2, 8),
    )
