"""The masked transformer: what is hidden, and what captions add."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import mim
from unclip_jax.utils import errors, trees

B, S, PATCH, P, V, L = 2, 8, 2, 16, 7, 5
SIZES = dict(image_size=S, patch_size=PATCH, width=16, depth=2, num_heads=2)
PIXELS = mim.Model(**SIZES, channels=8, attention_resolutions=(4,))
TEXT = dict(
  vocab_size=9, context_length=L, text_width=12, text_depth=1, text_num_heads=2
)
TOKENS = mim.Model(**SIZES, num_codes=V, inputs="tokens")
CAPTIONED = TOKENS.clone(**TEXT)
IMAGE = np.clip(random_variables.normal(B, S, S, 3), -1, 1)
CODES = np.random.default_rng(0).integers(0, V, (B, P), np.int32)
IS_MASKED = np.random.default_rng(1).permuted(
  np.tile(np.arange(P) < 6, (B, 1)), axis=1
)
CAPTIONS = dict(
  text_tokens=np.random.default_rng(2).integers(1, 9, (B, L), np.int32),
  text_mask=np.arange(L) < np.asarray([[5], [2]]),
)


def test_patches_are_squares_in_raster_order():
  patches = mim.to_patches(IMAGE, PATCH)
  assert patches.shape == (B, P, PATCH**2 * 3)
  np.testing.assert_array_equal(patches[1, 6], IMAGE[1, 2:4, 4:6].reshape(-1))
  np.testing.assert_array_equal(mim.to_image(patches, PATCH), IMAGE)


@pytest.fixture(scope="module", name="pixels")
def _pixels():
  variables = random_variables.like(PIXELS.init, IMAGE, IS_MASKED)
  return variables


def test_a_prediction_depends_on_what_is_visible_and_on_nothing_else(pixels):
  """By gradient, of every patch with respect to the pixels of all patches."""
  weights = random_variables.normal(P, PATCH**2 * 3)

  @jax.jit
  @jax.jacrev
  def jacobian(patches):
    image = mim.to_image(patches[None], PATCH)
    output, _ = PIXELS.apply(pixels, image, IS_MASKED[:1])
    return (output[0] * weights).sum(-1)

  depends = np.any(jacobian(mim.to_patches(IMAGE, PATCH)[0]) != 0, axis=-1)
  expected = np.broadcast_to(~IS_MASKED[0], (P, P))  # also of visible ones
  np.testing.assert_array_equal(depends, expected)


def test_masked_codes_have_no_influence():
  apply = jax.jit(TOKENS.apply)
  variables = random_variables.like(TOKENS.init, CODES, IS_MASKED)
  logits, out = apply(variables, CODES, IS_MASKED)
  assert logits.shape == (B, P, V) and logits.dtype == jnp.float32
  assert out["encodings"].shape == (B, P, 16)
  other = np.where(IS_MASKED, (CODES + 1) % V, CODES)
  np.testing.assert_array_equal(apply(variables, other, IS_MASKED)[0], logits)
  other = np.where(IS_MASKED, CODES, (CODES + 1) % V)
  moved = np.abs(apply(variables, other, IS_MASKED)[0] - logits)
  assert np.all(moved.max(-1) > 1e-4)  # every place sees the visible ones
  # A masked place is none of the codes.
  zeros = np.zeros_like(CODES)
  shown = apply(variables, zeros, np.zeros_like(IS_MASKED))[0]
  assert np.abs(apply(variables, zeros, IS_MASKED)[0] - shown).max() > 1e-3


@pytest.fixture(scope="module", name="captioned")
def _captioned():
  return random_variables.like(CAPTIONED.init, CODES, IS_MASKED, **CAPTIONS)


def test_text_that_is_encoded_before_gives_the_same(captioned):
  logits, _ = jax.jit(CAPTIONED.apply)(captioned, CODES, IS_MASKED, **CAPTIONS)
  encode = functools.partial(CAPTIONED.apply, method=CAPTIONED.encode_text)
  text = jax.jit(encode)(captioned, **CAPTIONS)
  predict = functools.partial(CAPTIONED.apply, method=CAPTIONED.predict)
  np.testing.assert_allclose(
    jax.jit(predict)(captioned, CODES, IS_MASKED, text),
    logits,
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_caption_matters_and_its_padding_does_not(captioned):
  apply = jax.jit(CAPTIONED.apply)
  logits, _ = apply(captioned, CODES, IS_MASKED, **CAPTIONS)

  def moved(text_tokens):
    given = {**CAPTIONS, "text_tokens": text_tokens}
    other, _ = apply(captioned, CODES, IS_MASKED, **given)
    return np.abs(other - logits).max((1, 2))

  tokens, mask = CAPTIONS["text_tokens"], CAPTIONS["text_mask"]
  np.testing.assert_array_equal(moved(np.where(mask, tokens, 0)), 0)
  assert np.all(moved(np.where(mask, 8 - tokens, tokens)) > 1e-4)


def test_a_trained_trunk_is_the_same_function_at_the_start_with_captions():
  """All that is new ends in zeros, and the other names are the same."""
  trained = random_variables.like(TOKENS.init, CODES, IS_MASKED)
  fresh = CAPTIONED.init(jax.random.key(0), CODES, IS_MASKED, **CAPTIONS)
  flat, old = trees.flatten(fresh), trees.flatten(trained)
  assert set(old) < set(flat)
  assert all(flat[name].shape == old[name].shape for name in old)
  variables = trees.unflatten({**flat, **old})
  np.testing.assert_allclose(
    CAPTIONED.apply(variables, CODES, IS_MASKED, **CAPTIONS)[0],
    TOKENS.apply(trained, CODES, IS_MASKED)[0],
    atol=1e-6,
  )


def test_the_trunk_of_pixels_is_that_of_codes(pixels):
  """So that config.init_from may take it: only both ends differ."""
  tokens = random_variables.like(TOKENS.init, CODES, IS_MASKED)["params"]
  both = set(pixels["params"]) & set(tokens)
  assert both == {"block_0", "block_1", "ln_final", "position", "output"}
  for name in both - {"output"}:
    shapes = [
      jax.tree.map(np.shape, x[name]) for x in (tokens, pixels["params"])
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
  ("fields", "word"),
  [
    (dict(image_size=9), "9 is not a multiple of patch_size 2"),
    (dict(image_size=9, patch_size=3), "must be a power of 2"),
    (dict(inputs="pixels"), "'pixels' is not one of image, tokens"),
    (dict(inputs="tokens"), "needs config.model.num_codes"),
  ],
)
def test_wrong_fields_are_errors(fields, word):
  model = PIXELS.clone(**fields)
  image = jnp.zeros((1, model.image_size, model.image_size, 3))
  is_masked = jnp.zeros((1, model.num_patches), bool)
  with pytest.raises(errors.UserError, match=word):
    jax.eval_shape(model.init, jax.random.key(0), image, is_masked)
