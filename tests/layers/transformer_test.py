"""Transformer blocks: identity at first, cached prefixes, remat, dropout."""

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

  dropout: float = 0.0
  remat: bool = False

  def setup(self):
    self.block = [
      transformer.Block(8, 2, dropout=self.dropout) for _ in range(2)
    ]

  def __call__(self, x, mask=None, prefixes=None, train=False):
    return transformer.run(
      self.block, x, mask, prefixes=prefixes, train=train, remat=self.remat
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


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_of_everything_leaves_the_identity_in_training_only(x, remat):
  stack = Stack(dropout=1.0, remat=remat)
  variables = random_variables.like(stack.init, x)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train):
    rngs = {"dropout": jax.random.key(0)}
    return stack.apply(variables, x, train=train, rngs=rngs)[0]

  np.testing.assert_array_equal(run(True), x)
  assert not np.allclose(run(False), x, atol=0.1)


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
