"""Attention: the formula, masks, prefixes, and the same on every platform."""

import functools
import importlib.util
import textwrap

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


def _equal_products(fn, L, M, mask):
  """Asserts that values and gradients are those of `_attend_at_once`."""
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((2, 3, length, 8), np.float32))
    for length in (L, M, M)
  )
  if mask is not None:
    mask = jnp.asarray(rng.random(mask) < 0.7)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_grads(fn, q, kv, mask):
    def loss(q, kv):
      return jnp.sum(jnp.sin(fn(q, kv, mask)))

    return jax.value_and_grad(loss, (0, 1))(q, kv)

  kv = attention.KeyValue(k, v)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    value_and_grads(fn, q, kv, mask),
    value_and_grads(attention._attend_at_once, q, kv, mask),
  )


@pytest.mark.parametrize("mask", [None, (256,), (2, 1, 1, 256), (256, 256)])
def test_cpus_compute_the_same(mask):
  _equal_products(attention.attend, 256, 256, mask)


@pytest.mark.parametrize("mask", [None, (2, 1, 1, 140)])
def test_tpus_compute_the_same(mask, monkeypatch):
  monkeypatch.setattr(attention, "_MAX_BLOCK", 128)  # so that there are two
  fn = functools.partial(attention._attend_by_kernel, interpret=True)
  _equal_products(fn, 20, 140, mask)


@pytest.mark.parametrize("mask", [None, (2, 1, 1, 9), (1, 1, 5, 9)])
def test_gpus_compute_the_same(mask):
  # What stands around cuDNN: layouts, masks, the scale.
  fn = functools.partial(attention._attend_by_cudnn, implementation="xla")
  _equal_products(fn, 5, 9, mask)


@pytest.mark.parametrize(
  ("L", "mask", "by_kernel"),
  [
    (1024, None, True),
    (1024, (1284,), True),
    (1024, (2, 1, 1, 1284), True),
    (1024, (1024, 1284), False),  # that is not of keys alone
    (256, (2, 1, 1, 1284), False),
  ],
)
def test_the_kernel_is_for_many_scores_and_masks_of_keys(L, mask, by_kernel):
  q = jax.ShapeDtypeStruct((2, 3, L, 64), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((2, 3, 1284, 64), jnp.bfloat16)
  mask = mask and jax.ShapeDtypeStruct(mask, bool)
  program = jax.make_jaxpr(attention.attend)(
    q, attention.KeyValue(kv, kv), mask
  )
  assert ("pallas_call" in str(program)) == by_kernel


COMPILE_FOR_TPU = textwrap.dedent(
  """
  import sys
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
  from unclip_jax.layers import attention
  from unclip_jax.utils import axes

  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  )
  mesh = Mesh(np.asarray(topology.devices).reshape(2, 2), ("data", "tensor"))

  def attend(q, k, v, mask):
    with axes.use(mesh, {"batch": "data", "heads": "tensor"}):
      def total(q, k, v):
        out = attention.attend(q, attention.KeyValue(k, v), mask)
        return jnp.sum(out.astype(jnp.float32))

      return jax.grad(total, (0, 1, 2))(q, k, v)

  for L, M in ((1024, 1284), (256, 516)):
    shape = lambda *spec: lambda *shape, dtype=jnp.bfloat16: (
      jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    )
    heads = shape("data", "tensor")
    q, kv = heads(4, 4, L, 64), heads(4, 4, M, 64)
    mask = shape("data")(4, 1, 1, M, dtype=bool)
    # As `init` does: a trace that knows no mesh, which the step may not take.
    jax.eval_shape(attention.attend, q, attention.KeyValue(kv, kv), mask)
    program = jax.jit(attend).lower(q, kv, kv, mask).compile(
      compiler_options={"exec_time_optimization_effort": -1.0}
    )
    text = program.as_text()
    print(
      text.count("tpu_custom_call"),
      text.count("all-gather"),
      program.memory_analysis().temp_size_in_bytes,
    )
  """
)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler"
)
def test_tpus_get_the_kernel_where_there_are_many_scores(run_python):
  env = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  lines = run_python("-c", COMPILE_FOR_TPU, env=env).stdout.splitlines()
  large, small = ([int(x) for x in line.split()] for line in lines[-2:])
  kernels, gathers, temp = large
  assert kernels == 3  # forward, and two backward
  assert gathers == 0  # each chip has its own rows and heads
  assert temp < 2 * 2 * 1024 * 1284 * 4  # the scores alone, in float32
  assert small[0] == 0
