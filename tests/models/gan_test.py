"""The two players' networks: what depends on what, and the projection."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import gan
from unclip_jax.utils import errors, trees

B, L, Z, C, SIZE = 3, 5, 6, 12, 8
MODEL = gan.Model(
  vocab_size=20, context_length=L, image_size=SIZE, latent_dim=Z,
  generator_channels=(12, 8), discriminator_channels=(8, C), text_width=8,
  text_depth=1, text_num_heads=2, caption_dim=7, caption_augmentation=True,
  spectral_norm_iterations=300,
)  # fmt: skip
IMAGE = random_variables.normal(B, SIZE, SIZE, 3)
TEXT = {
  "text_tokens": np.asarray([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6] * 5]),
  "text_mask": np.asarray([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5], bool),
}
NOISE = {
  "z": random_variables.normal(B, Z),
  "caption_noise": random_variables.normal(B, 7),
}


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, IMAGE, **TEXT)


@jax.jit
def _generate(variables, noise, text):
  return MODEL.apply(variables, **noise, **text, method=MODEL.generate)


@jax.jit
def _judge(variables, image, text):
  features = MODEL.apply(variables, image, method=MODEL.encode_image)
  caption = MODEL.apply(variables, **text, method=MODEL.encode_text)
  logits = MODEL.apply(variables, features, caption, method=MODEL.score)
  return logits, features, caption


def test_no_parameter_is_both_players(variables):
  params = variables["params"]
  assert set(params) == {"generator", "discriminator"}
  alone, _ = _generate(
    {"params": {"generator": params["generator"]}}, NOISE, TEXT
  )
  np.testing.assert_array_equal(alone, _generate(variables, NOISE, TEXT)[0])
  _judge({"params": {"discriminator": params["discriminator"]}}, IMAGE, TEXT)


def test_logits_of_two_captions_differ_by_the_inner_product(variables):
  other = jax.tree.map(lambda x: x[::-1], TEXT)
  logits, features, caption = _judge(variables, IMAGE, TEXT)
  other_logits, same, other_caption = _judge(variables, IMAGE, other)
  np.testing.assert_array_equal(same, features)
  expected = np.sum((other_caption - caption) * features, axis=1)
  np.testing.assert_allclose(
    other_logits - logits, expected / math.sqrt(C), rtol=1e-4, atol=1e-4
  )
  assert np.abs(expected[::2]).min() > 1e-2


def test_pictures_and_logits_have_their_shapes_and_ranges(variables):
  image, out = _generate(variables, NOISE, TEXT)
  assert image.shape == (B, SIZE, SIZE, 3) and image.dtype == jnp.float32
  assert np.abs(image).max() <= 1 and np.std(image) > 0.05
  assert out["caption_mean"].shape == out["caption_log_variance"].shape
  logits, features, caption = _judge(variables, IMAGE, TEXT)
  assert logits.shape == (B,) and logits.dtype == jnp.float32
  assert features.shape == caption.shape == (B, C)


def test_no_row_sees_another(variables):
  """A row alone is what it is in the batch, in both players."""
  row = functools.partial(jax.tree.map, lambda x: x[1:2])
  whole, _ = _generate(variables, NOISE, TEXT)
  alone, _ = _generate(variables, row(NOISE), row(TEXT))
  np.testing.assert_allclose(alone[0], whole[1], atol=1e-5)
  whole = _judge(variables, IMAGE, TEXT)[0]
  alone = _judge(variables, row(IMAGE), row(TEXT))[0]
  np.testing.assert_allclose(alone[0], whole[1], rtol=1e-4, atol=1e-4)


def test_pictures_depend_on_all_that_is_drawn_and_on_real_text(variables):
  @jax.jit
  @jax.grad
  def gradient(noise):
    image, _ = MODEL.apply(variables, **noise, **TEXT, method=MODEL.generate)
    return jnp.sum(image * IMAGE)

  for name, value in gradient(NOISE).items():
    assert np.all(value != 0), name
  padding = ~TEXT["text_mask"]
  for changed, is_seen in ((padding, False), (~padding, True)):
    tokens = np.where(changed, 9, TEXT["text_tokens"])
    other = {**TEXT, "text_tokens": tokens}
    image, _ = _generate(variables, NOISE, TEXT)
    other_image, _ = _generate(variables, NOISE, other)
    moved = np.abs(other_image - image).max(axis=(1, 2, 3)) > 1e-4
    np.testing.assert_array_equal(moved, [is_seen] * B)


def test_normalized_kernels_stretch_nothing(variables):
  params = variables["params"]["discriminator"]
  flat = trees.flatten(params)
  found = trees.flatten(jax.jit(MODEL.normalize)(params))
  normalized = {
    name
    for name in flat
    if name.endswith("kernel") and not name.startswith("text_encoder.")
  }
  assert {"caption.kernel", "logit.kernel", "block_0.conv_1.kernel"} <= (
    normalized
  )
  for name, value in found.items():
    if name in normalized:
      matrix = np.asarray(value).reshape(-1, value.shape[-1])
      sigma = np.linalg.svd(matrix, compute_uv=False)[0]
      np.testing.assert_allclose(sigma, 1.0, rtol=1e-3, err_msg=name)
    else:
      np.testing.assert_array_equal(value, flat[name], err_msg=name)
  plain = MODEL.clone(spectral_norm_iterations=0)
  jax.tree.map(np.testing.assert_array_equal, plain.normalize(params), params)


def test_sizes_that_do_not_fit_are_user_errors(variables):
  with pytest.raises(errors.UserError, match="has 3 entries, which make 16 px"):
    jax.eval_shape(
      lambda: MODEL.clone(generator_channels=(8, 8, 8)).init(
        jax.random.key(0), IMAGE, **TEXT
      )
    )
  with pytest.raises(errors.UserError, match="have 8 px, not 16 x 8"):
    MODEL.apply(variables, np.zeros((1, 16, 8, 3)), method=MODEL.encode_image)
