"""Attention: the formula, masks, prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import attention
from unclip_jax.utils import errors


def _layer_and_input():
  layer = attention.SelfAttention(width=8, num_heads=2)
  x = random_variables.normal(2, 5, 8)
  return layer, random_variables.like(layer.init, x), x


def test_attend_is_the_formula():
  q = random_variables.normal(1, 2, 3, 4)
  kv = attention.KeyValue(*random_variables.normal(2, 1, 2, 5, 4))
  mask = np.asarray([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
  out = jax.jit(attention.attend)(q, kv, mask)
  for n in range(2):
    weights = np.exp(q[0, n] @ kv.key[0, n].T / 2) * mask
    weights = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(
      out[0, n], weights @ kv.value[0, n], rtol=1e-5, atol=1e-6
    )


def test_query_that_attends_to_nothing_is_finite():
  kv = attention.KeyValue(*jnp.ones((2, 1, 1, 3, 4)))
  out = attention.attend(jnp.ones((1, 1, 2, 4)), kv, jnp.zeros((2, 3), bool))
  np.testing.assert_allclose(out, 1)


def test_scores_are_float32_under_bfloat16():
  # Scores 100 and 100.625, which bfloat16 would round to 100.5.
  q, key, value = (
    jnp.asarray(x, jnp.bfloat16).reshape(1, 1, -1, 1)
    for x in ([10.0], [10.0, 10.0625], [0.0, 1.0])
  )
  out = attention.attend(q, attention.KeyValue(key, value))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(out, np.float32).item(), 1 / (1 + np.exp(-0.625)), rtol=0.01
  )


def test_causal_mask_with_prefix_is_the_lower_part_of_the_whole():
  whole = attention.causal_mask(7)
  np.testing.assert_array_equal(whole, np.tri(7, dtype=bool))
  np.testing.assert_array_equal(attention.causal_mask(3, 4), whole[4:])


def test_causal_attention_has_no_gradient_from_later_positions():
  layer, variables, x = _layer_and_input()
  mask = attention.causal_mask(5)

  @jax.jit
  @jax.jacobian
  def jacobian(x):
    return layer.apply(variables, x, mask)[0].sum((0, 2))

  depends = np.abs(jacobian(x)).sum((1, 3)) > 0
  np.testing.assert_array_equal(depends, np.tri(5, dtype=bool))


def test_masked_keys_have_exactly_zero_gradient():
  layer, variables, x = _layer_and_input()
  mask = jnp.asarray([True, True, False, True, False])[None, None, None]
  gradient = jax.jit(
    jax.grad(lambda x: layer.apply(variables, x, mask)[0][:, :2].sum())
  )(x)
  assert not np.any(gradient[:, jnp.asarray([2, 4])])
  assert np.all(np.abs(gradient[:, 3]).sum(-1) > 0)


def test_prefix_is_attended_to_like_earlier_positions():
  layer, variables, x = _layer_and_input()
  apply = jax.jit(layer.apply)
  whole, _ = apply(variables, x, attention.causal_mask(5))
  _, prefix = apply(variables, x[:, :3])
  rest, own = apply(
    variables, x[:, 3:], attention.causal_mask(2, 3), prefix=prefix
  )
  assert own.key.shape == (2, 2, 2, 4)
  np.testing.assert_allclose(rest, whole[:, 3:], rtol=1e-5, atol=1e-6)


def test_a_prefix_of_full_length_takes_x_in_its_place():
  layer, variables, x = _layer_and_input()
  apply = jax.jit(layer.apply)
  whole, kv = apply(variables, x, attention.causal_mask(5))
  # Junk where nothing is filled in yet, which the mask hides.
  buffer = jax.tree.map(lambda a: a.at[:, :, 3:].set(7.0), kv)
  for i in (3, 4):
    out, buffer = apply(
      variables,
      x[:, i : i + 1],
      np.arange(5) <= i,
      prefix=buffer,
      start=jnp.int32(i),
    )
    np.testing.assert_allclose(out, whole[:, i : i + 1], rtol=1e-5, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    buffer,
    kv,
  )


def test_context_tokens_become_a_prefix():
  layer = attention.SelfAttention(width=8, num_heads=2, has_context=True)
  context = random_variables.normal(2, 3, 6)
  variables = random_variables.like(
    layer.init, context, method=layer.encode_context
  )
  prefix = layer.apply(variables, context, method=layer.encode_context)
  for name in ("key", "value"):
    dense = variables["params"][f"context_{name}"]
    heads = (context @ dense["kernel"] + dense["bias"]).reshape(2, 3, 2, 4)
    np.testing.assert_allclose(
      getattr(prefix, name), heads.swapaxes(1, 2), rtol=1e-5, atol=1e-6
    )


def test_width_that_heads_do_not_divide_is_an_error():
  layer = attention.SelfAttention(width=8, num_heads=3)
  with pytest.raises(errors.UserError, match="8 is not a multiple of 3 heads"):
    layer.init(jax.random.key(0), jnp.ones((1, 2, 8)))


@pytest.mark.parametrize("mask", [None, (256,), (2, 1, 1, 256), (256, 256)])
def test_one_head_after_the_other_is_the_same(mask):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((2, 3, 256, 4), np.float32))
    for _ in range(3)
  )
  if mask is not None:
    mask = jnp.asarray(rng.random(mask) < 0.7)
  kv = attention.KeyValue(k, v)

  def loss(fn, q, kv):
    return jnp.sum(jnp.sin(fn(q, kv, mask)))

  for fn in (attention.attend, attention._attend_by_heads):
    value, grads = jax.value_and_grad(loss, (1, 2))(fn, q, kv)
    expected, expected_grads = jax.value_and_grad(loss, (1, 2))(
      attention._attend_at_once, q, kv
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      grads,
      expected_grads,
    )
