"""Counts against closed forms, and a model's FLOPs against its own parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from unclip_jax import flops, trainer
from unclip_jax.layers import transformer
from unclip_jax.utils import config as config_lib


def zeros(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(stride, x, kernel):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@pytest.mark.parametrize("stride, side", [(1, 13), (4, 4)])
def test_convolutions_and_their_gradients(stride, side):
  """Either gradient is as much work as the convolution, also with strides."""
  x, kernel = zeros(2, 16, 16, 3), zeros(4, 4, 3, 8)
  forward = 2 * (2 * side * side * 8) * (4 * 4 * 3)
  f = functools.partial(conv, stride)
  assert flops.count(f, x, kernel) == forward

  def loss(x, kernel):
    return jnp.sum(f(x, kernel) ** 2)

  both = flops.count(jax.grad(loss, argnums=(0, 1)), x, kernel)
  if stride == 1:
    # That of the picture runs over its padding, too.
    assert 3 * forward < both < 4 * forward
  else:
    assert both == 3 * forward


def test_loops_branches_and_devices():
  w = zeros(8, 8)
  product = 2 * 4 * 8 * 8

  def loop(w):
    def step(x, _):
      return x @ w, None

    return jax.lax.scan(step, jnp.ones((4, 8)), None, length=5)[0]

  assert flops.count(loop, w) == 5 * product
  assert flops.count(jax.jit(loop), w) == 5 * product

  def branch(w):
    x = jnp.ones((4, 8))
    return jax.lax.cond(w[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert flops.count(branch, w) == 2 * product
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
  mapped = jax.shard_map(
    loop, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  assert flops.count(mapped, w) == 5 * product


@pytest.mark.parametrize("remat, passes", [(False, 3), ("full", 4)])
def test_a_block(remat, passes):
  """24 B L D^2 + 4 B L^2 D a forward pass; remat adds one."""
  B, L, D = 2, 16, 32
  block = transformer.Block(D, 4)
  variables = jax.eval_shape(block.init, jax.random.key(0), zeros(B, L, D))

  def loss(variables, x):
    def call(variables, x):
      return jnp.sum(block.apply(variables, x)[0] ** 2)

    return (jax.checkpoint(call) if remat else call)(variables, x)

  forward = 24 * B * L * D**2 + 4 * B * L**2 * D
  assert flops.count(loss, variables, zeros(B, L, D)) == forward
  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  found = flops.count(gradient, variables, zeros(B, L, D))
  assert found == passes * forward


def test_model_flops_leave_out_what_is_done_twice():
  config = config_lib.load("configs/emoji/clip.py:smoke")
  plain = trainer.model_flops(config)
  config.num_microbatches = 2
  with config.unlocked():
    config.model.remat = "full"
  assert trainer.model_flops(config) == plain > 0
  config.batch_size *= 2
  assert trainer.model_flops(config) > 1.99 * plain


def test_peaks_are_those_of_the_longest_name():
  class Device:
    device_kind = "TPU v5 lite"

  assert flops.peak(Device()) == 197e12
  Device.device_kind = "TPU v5p"
  assert flops.peak(Device()) == 459e12
  assert flops.peak(jax.devices("cpu")[0]) is None
