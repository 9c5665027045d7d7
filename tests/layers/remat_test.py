"""What is computed again by each policy, and that gradients stay."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import attention, linear, remat, resnet
from unclip_jax.utils import errors

PRODUCTS = ("dot_general", "conv_general_dilated")


class Net(nn.Module):
  """A convolution, an attention and a dense layer, each before a curve."""

  remat: bool | str

  def setup(self):
    self.conv = resnet.conv3x3(8)
    self.attn = attention.SelfAttention(8, 2)
    self.dense = linear.Dense(8)

  def __call__(self, x):
    def call(net, x):
      x = nn.silu(net.conv(x)).reshape(x.shape[0], -1, 8)
      return nn.silu(net.dense(nn.silu(net.attn(x)[0])))

    return remat.checkpoint(call, self.remat, nn.remat)(self, x)


X = random_variables.normal(2, 4, 4, 8)


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(Net(False).init, X)


def _trace(policy, variables):
  net = Net(policy)
  loss = jax.grad(lambda v, x: (net.apply(v, x) ** 2).sum(), (0, 1))
  return jax.jit(loss).trace(variables, X)


def test_the_less_is_kept_the_more_is_computed_again(variables):
  counts = {
    policy: [
      str(_trace(policy, variables).jaxpr).count(f" {name}[")
      for name in PRODUCTS
    ]
    for policy in ("none", "products", "dots", "full")
  }
  dots, convolutions = zip(*counts.values(), strict=True)
  # Products again: of "products" the scores; of "dots" the weighted values as
  # well; of "full" the five dense layers.
  assert [n - dots[0] for n in dots] == [0, 1, 2, 7]
  assert [n - convolutions[0] for n in convolutions] == [0, 0, 1, 1]


@pytest.mark.parametrize("policy", ["products", "dots", True, "offload"])
def test_gradients_stay(policy, variables):
  expected, gradients = (
    _trace(p, variables).lower().compile()(variables, X)
    for p in (False, policy)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    gradients,
    expected,
  )


def test_an_unknown_policy_is_an_error():
  with pytest.raises(errors.UserError, match=r"'dot' is unknown.*products, d"):
    jax.eval_shape(Net("dot").init, jax.random.key(0), X)
