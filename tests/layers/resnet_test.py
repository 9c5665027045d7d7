"""ADM blocks: identity at first, resampling, the timestep's two ways in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.layers import resnet


@pytest.fixture(name="inputs")
def _inputs():
  return random_variables.normal(2, 4, 6, 8), random_variables.normal(2, 16)


def test_resampling():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(
    resnet.downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]]
  )
  up = resnet.upsample(x)
  assert up.shape == (1, 8, 8, 1)
  np.testing.assert_array_equal(up[0, :2, 2:4, 0], [[1, 1], [1, 1]])
  np.testing.assert_array_equal(resnet.downsample(up), x)


@pytest.mark.parametrize(
  ("resample", "plain"),
  [(None, lambda x: x), ("down", resnet.downsample), ("up", resnet.upsample)],
)
def test_new_block_only_resamples(inputs, resample, plain):
  x, emb = inputs
  block = resnet.ResBlock(8, resample=resample)
  apply = jax.jit(block.apply)
  trained = random_variables.like(block.init, x, emb)

  @jax.jit
  def init_conv_2():  # only this layer, or it compiles for long
    return block.init(jax.random.key(0), x, emb)["params"]["conv_2"]

  new = {"params": {**trained["params"], "conv_2": init_conv_2()}}
  np.testing.assert_allclose(apply(new, x, emb), plain(x), atol=1e-6)
  trained = apply(trained, x, emb)
  assert trained.shape == plain(x).shape
  assert not np.allclose(trained, plain(x))


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_without_an_embedding_a_block_is_one_whose_embedding_says_nothing(
  inputs, scale_shift_norm
):
  x, emb = inputs
  block = resnet.ResBlock(8, scale_shift_norm=scale_shift_norm)
  params = random_variables.like(block.init, x, emb)["params"]
  nothing = jax.tree.map(np.zeros_like, params["emb_proj"])
  silent = {**params, "emb_proj": nothing}
  without = {k: v for k, v in params.items() if k != "emb_proj"}
  apply = jax.jit(block.apply)
  np.testing.assert_allclose(
    apply({"params": without}, x, None),
    apply({"params": silent}, x, emb),
    atol=1e-6,
  )
  names = random_variables.like(block.init, x, None)["params"].keys()
  assert names == without.keys()


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_every_example_depends_on_its_own_embedding(inputs, scale_shift_norm):
  x, emb = inputs
  block = resnet.ResBlock(12, scale_shift_norm=scale_shift_norm)
  variables = random_variables.like(block.init, x, emb)
  features = variables["params"]["emb_proj"]["bias"].shape[0]
  assert features == (24 if scale_shift_norm else 12)
  gradient = jax.jit(jax.grad(lambda e: block.apply(variables, x, e)[0].sum()))(
    emb
  )
  assert np.any(gradient[0]) and not np.any(gradient[1])


def test_channels_change_by_a_1x1_skip(inputs):
  x, emb = inputs
  block = resnet.ResBlock(12)
  y, variables = jax.eval_shape(
    lambda: block.init_with_output(jax.random.key(0), x, emb)
  )
  assert variables["params"]["skip"]["kernel"].shape == (1, 1, 8, 12)
  assert y.shape == (2, 4, 6, 12)


def test_dropout_of_everything_leaves_the_last_bias_in_training_only(inputs):
  block = resnet.ResBlock(8, dropout=1.0)
  variables = random_variables.like(block.init, *inputs)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train):
    rngs = {"dropout": jax.random.key(0)}
    return block.apply(variables, *inputs, train=train, rngs=rngs)

  expected = inputs[0] + variables["params"]["conv_2"]["bias"]
  np.testing.assert_allclose(run(True), expected, atol=1e-6)
  assert not np.allclose(run(False), expected, atol=0.1)


def test_scale_and_shift_of_zero_change_nothing(inputs):
  params = random_variables.like(resnet.ResBlock(8).init, *inputs)["params"]

  def run(scale_shift_norm, features):
    emb_proj = {"kernel": np.zeros((16, features)), "bias": np.zeros(features)}
    block = resnet.ResBlock(8, scale_shift_norm=scale_shift_norm)
    variables = {"params": {**params, "emb_proj": emb_proj}}
    return jax.jit(block.apply)(variables, *inputs)

  np.testing.assert_allclose(run(True, 16), run(False, 8), atol=1e-5)
  assert not np.allclose(run(True, 16), inputs[0], atol=0.1)


@pytest.mark.parametrize(("resample", "size"), [("down", 2), ("up", 8)])
def test_lone_resampler(inputs, resample, size):
  x, _ = inputs
  layer = resnet.Resample(5, resample)
  y = jax.jit(layer.apply)(random_variables.like(layer.init, x), x)
  assert y.shape == (2, size, size * 6 // 4, 5)
