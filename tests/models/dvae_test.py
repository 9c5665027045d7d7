"""The dVAE's networks: shapes, the source's sizes, what sees what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import dvae
from unclip_jax.utils import errors

V = 5
MODEL = dvae.Model(
  image_size=8, num_codes=V, channels=8, channel_mult=(1, 2, 2),
  num_res_blocks=1, codebook_width=4,
)  # fmt: skip


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, jnp.zeros((1, 8, 8, 3)))


@jax.jit
def _apply(variables, x):
  return MODEL.apply(variables, x)


def test_shapes_and_dtypes(variables):
  x = random_variables.normal(2, 8, 8, 3)
  output, out = _apply(variables, x)
  assert MODEL.grid_size == 2
  assert output.shape == (2, 8, 8, 6) and output.dtype == jnp.float32
  assert out["logits"].shape == (2, 2, 2, V)
  assert out["logits"].dtype == jnp.float32


def test_bfloat16_and_remat_are_close_to_float32(variables):
  model = MODEL.clone(dtype="bfloat16", remat=True)
  x = random_variables.normal(2, 8, 8, 3)
  exact, _ = _apply(variables, x)
  rounded, out = jax.jit(model.apply)(variables, x)
  assert rounded.dtype == out["logits"].dtype == jnp.float32
  error = np.linalg.norm(rounded - exact)
  assert 0 < error < 0.05 * np.linalg.norm(exact)


def test_a_new_network_tells_colours_apart_by_its_codes():
  """By nats of the codes about the picture: the scale makes them many."""
  model = dvae.Model(
    image_size=8, num_codes=512, channels=16, channel_mult=(1, 2, 4)
  )
  colours = np.random.default_rng(0).uniform(0.1, 0.9, (64, 1, 1, 3))
  x = jnp.asarray(np.broadcast_to(colours, (64, 8, 8, 3)), jnp.float32)
  variables = model.init(jax.random.key(0), x)

  def information(scale):
    _, out = jax.jit(model.clone(logit_scale=scale).apply)(variables, x)
    log_q = jax.nn.log_softmax(out["logits"][:, 1, 1])
    log_mean = jax.nn.logsumexp(log_q, axis=0) - np.log(len(x))
    return jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_mean), axis=-1))

  assert information(1.0) < 0.2
  assert information(4.0) > 0.6


def conv_params(kernel, n_in, n_out):
  return kernel**2 * n_in * n_out + n_out


def test_parameters_are_those_of_the_public_architecture():
  """Counted from openai/DALL-E's encoder.py and decoder.py."""
  model = dvae.Model(image_size=256)
  count = random_variables.count(model.init, jnp.zeros((1, 256, 256, 3)))
  expected = conv_params(7, 3, 256) + conv_params(1, 2048, 8192)
  expected += conv_params(1, 8192, 128) + conv_params(1, 256, 6)
  encoder, decoder = (256, 512, 1024, 2048), (2048, 1024, 512, 256)
  for widths, first, kernels in (
    (encoder, 256, (3, 3, 3, 1)),
    (decoder, 128, (1, 3, 3, 3)),
  ):
    n_in = first
    for width in (w for w in widths for _ in range(2)):
      sides = (n_in, *[width // 4] * 3, width)
      expected += sum(
        conv_params(k, a, b) for k, a, b in zip(kernels, sides, sides[1:])
      )
      expected += 0 if n_in == width else conv_params(1, n_in, width)
      n_in = width
  assert count == expected
  assert model.grid_size == 32


@pytest.mark.parametrize(
  ("options", "word"),
  [({"image_size": 10}, "multiple of"), ({"channels": 6}, "multiple of 4")],
)
def test_sizes_that_do_not_fit_are_errors(options, word):
  with pytest.raises(errors.UserError, match=word):
    MODEL.clone(**options).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
