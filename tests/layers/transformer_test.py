"""Transformer blocks: identity at first, prefixes, remat, scan, dropout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import attention, transformer
from unclip_jax.utils import errors


class Stack(nn.Module):
  """Two blocks, as a model holds them."""

  depth: int = 2
  has_context: bool = False
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False

  def setup(self):
    self.block = [
      transformer.Block(
        8, 2, dropout=self.dropout, has_context=self.has_context
      )
      for _ in range(self.depth)
    ]

  def __call__(self, x, mask=None, prefixes=None, context=None, train=False):
    return transformer.run(
      self.block,
      x,
      mask,
      prefixes=prefixes,
      context=context,
      train=train,
      remat=self.remat,
      scan=self.scan,
    )


@pytest.fixture(name="x")
def _x():
  return random_variables.normal(2, 5, 8)


def test_new_stack_is_the_identity(x):
  apply = jax.jit(Stack().apply)
  new = jax.jit(Stack().init)(jax.random.key(0), x)
  np.testing.assert_array_equal(apply(new, x)[0], x)
  trained = random_variables.like(Stack().init, x)
  assert not np.allclose(apply(trained, x)[0], x, atol=0.1)


def test_prefixes_stand_for_the_earlier_positions(x):
  variables = random_variables.like(Stack().init, x)
  apply = jax.jit(Stack().apply)
  whole, _ = apply(variables, x, attention.causal_mask(5))
  _, prefixes = apply(variables, x[:, :3], attention.causal_mask(3))
  rest, _ = apply(variables, x[:, 3:], attention.causal_mask(2, 3), prefixes)
  np.testing.assert_allclose(rest, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_remat_changes_the_program_but_neither_names_nor_gradients(x):
  variables = random_variables.like(Stack().init, x)
  rematerialised = random_variables.like(Stack(remat=True).init, x)
  assert jax.tree.structure(variables) == jax.tree.structure(rematerialised)
  assert set(variables["params"]) == {"block_0", "block_1"}

  def gradient(remat):
    stack = Stack(remat=remat)
    return jax.jit(jax.grad(lambda v: (stack.apply(v, x)[0] ** 2).sum())).trace(
      variables
    )

  plain, remat = gradient(False), gradient(True)
  assert "remat" not in str(plain.jaxpr) and "remat" in str(remat.jaxpr)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    *(t.lower().compile()(variables) for t in (plain, remat)),
  )


def test_a_scanned_stack_is_the_unrolled_one(x):
  context = random_variables.normal(2, 4, 6)
  mask = attention.causal_mask(5, 4)

  def stack(**options):
    return Stack(has_context=True, **options)

  variables, same = (
    random_variables.like(stack(scan=scan).init, x, mask, context=context)
    for scan in (False, True)
  )
  assert jax.tree.structure(variables) == jax.tree.structure(same)

  def value_and_grads(stack):
    def loss(variables, x, context):
      out = stack.apply(variables, x, mask, context=context)
      return sum((y**2).sum() for y in jax.tree.leaves(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
      variables, x, context
    )

  expected = value_and_grads(stack())
  for remat in (False, "dots"):
    scanned = value_and_grads(stack(scan=True, remat=remat))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      scanned,
      expected,
    )


def test_a_mask_for_each_layer_is_that_layers(x):
  """In their order, unrolled and scanned; two layers share one."""
  masks = [np.tri(5, dtype=bool), np.eye(5, dtype=bool)]
  variables = random_variables.like(Stack(depth=3).init, x)

  def run(order, **options):
    stack = Stack(depth=3, **options)
    return stack.apply(variables, x, [masks[i] for i in order])[0]

  def layer_by_layer(order):
    y = x
    for i, which in enumerate(order):
      own = {"block_0": variables["params"][f"block_{i}"]}
      y, _ = Stack(depth=1).apply({"params": own}, y, masks[which])
    return y

  expected = layer_by_layer((0, 1, 0))
  for options in ({}, {"remat": True}, {"scan": True}):
    np.testing.assert_allclose(
      run((0, 1, 0), **options), expected, rtol=1e-4, atol=1e-5
    )
  assert np.abs(run((1, 0, 0)) - expected).max() > 1e-3


def test_the_program_of_a_scanned_stack_does_not_grow_with_its_depth(x):
  def products(depth, scan):
    stack = Stack(depth=depth, remat=True, scan=scan)
    variables = jax.eval_shape(stack.init, jax.random.key(0), x)
    gradient = jax.grad(lambda v: (stack.apply(v, x)[0] ** 2).sum())
    return str(jax.make_jaxpr(gradient)(variables)).count(" dot_general[")

  assert products(2, scan=True) == products(5, scan=True) > 0
  assert products(2, scan=False) < products(5, scan=False)


@pytest.mark.parametrize(
  "options", [{}, {"remat": True}, {"scan": True}], ids=str
)
def test_dropout_of_everything_leaves_the_identity_in_training_only(x, options):
  stack = Stack(dropout=1.0, **options)
  variables = random_variables.like(stack.init, x)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train):
    rngs = {"dropout": jax.random.key(0)}
    return stack.apply(variables, x, train=train, rngs=rngs)[0]

  np.testing.assert_array_equal(run(True), x)
  assert not np.allclose(run(False), x, atol=0.1)


@pytest.mark.parametrize("scan", [False, True])
def test_every_layer_draws_its_own_dropout(x, scan):
  stack = Stack(dropout=0.5, scan=scan)
  new = jax.tree.map(
    np.zeros_like, random_variables.like(stack.init, x)
  )  # nothing is added to x but these biases
  for block in new["params"].values():
    block["attn"]["out"]["bias"] += 1
  rngs = {"dropout": jax.random.key(0)}
  out, _ = jax.jit(functools.partial(stack.apply, train=True))(
    new, x, rngs=rngs
  )
  kept = np.rint((out - x) / 2)  # by how many layers, of two
  assert set(np.unique(kept)) == {0, 1, 2}


def test_activations():
  x = jnp.asarray([-1.0, 0.5, 2.0])
  np.testing.assert_allclose(
    transformer.gelu(x), [-0.158655, 0.345731, 1.954500], atol=1e-5
  )
  np.testing.assert_allclose(
    transformer.quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6
  )


def test_unknown_activation_is_an_error(x):
  with pytest.raises(errors.UserError, match=r"'swish'.*gelu, quick_gelu"):
    transformer.Mlp(16, activation="swish").init(jax.random.key(0), x)
