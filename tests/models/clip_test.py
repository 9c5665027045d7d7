"""CLIP: sizes, causality, padding, pooling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import clip
from unclip_jax.utils import errors

MODEL = clip.Model(
  image_size=8,
  patch_size=4,
  vision_width=16,
  vision_depth=2,
  vision_num_heads=2,
  vocab_size=32,
  context_length=6,
  text_width=16,
  text_depth=2,
  text_num_heads=2,
  embed_dim=12,
)
PAD = 0
# Every token once, so that a row of the embedding table is a position.
TOKENS = np.asarray([[1, 5, 9, 2, PAD, PAD], [1, 6, 3, 4, 8, 2]], np.int32)
MASK = TOKENS != PAD


@pytest.fixture(name="image", scope="module")
def _image():
  return random_variables.normal(2, 8, 8, 3)


@pytest.fixture(name="variables", scope="module")
def _variables(image):
  return random_variables.like(MODEL.init, image, TOKENS, MASK)


@jax.jit
def _encode_text(variables, tokens, mask):
  return MODEL.apply(variables, tokens, mask, method=MODEL.encode_text)


@jax.jit
def _text_gradient(variables, embed_weight, encodings_weight):
  """Of the weighted sum of embed and encodings, by each token: [V]."""

  def total(params):
    embed, out = _encode_text({"params": params}, TOKENS, MASK)
    encodings = out["text_encodings"]
    return (embed * embed_weight).sum() + (encodings * encodings_weight).sum()

  gradient = jax.grad(total)(variables["params"])
  return jnp.abs(gradient["text"]["token_embed"]["embedding"]).sum(-1)


def test_parameters_of_vit_l_14():
  model = clip.Model(
    image_size=224,
    patch_size=14,
    vision_width=1024,
    vision_depth=24,
    vision_num_heads=16,
    vocab_size=49_408,
    context_length=77,
    text_width=768,
    text_depth=12,
    text_num_heads=12,
    embed_dim=768,
  )
  text = jnp.zeros((1, 77), jnp.int32), jnp.ones((1, 77), bool)
  image = jnp.zeros((1, 224, 224, 3))
  logit_scale = 1
  assert (
    random_variables.count(model.init, image, *text)
    == 303_966_208 + 123_650_304 + logit_scale
  )


def test_outputs(image, variables):
  output, out = jax.jit(MODEL.apply)(variables, image, TOKENS, MASK)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), {**output, **out})
  assert shapes == {
    "image_embed": ((2, 12), jnp.float32),
    "text_embed": ((2, 12), jnp.float32),
    "logit_scale": ((), jnp.float32),
    "image_encodings": ((2, 5, 16), jnp.float32),
    "text_encodings": ((2, 6, 16), jnp.float32),
  }
  norms = np.linalg.norm(output["text_embed"], axis=-1)
  assert np.all(np.abs(norms - 1) > 1e-3), "embeddings are not normalised here"


def test_logit_scale_and_bias_start_where_told(image):
  model = dataclasses.replace(MODEL, logit_scale_init=1.5, logit_bias_init=-10)

  @jax.jit
  def init():  # of these two only, or it compiles for long
    params = model.init(jax.random.key(0), image, TOKENS, MASK)["params"]
    return params["logit_scale"], params["logit_bias"]

  assert init() == (1.5, -10)
  variables = random_variables.like(model.init, image, TOKENS, MASK)
  output, _ = jax.eval_shape(model.apply, variables, image, TOKENS, MASK)
  assert output["logit_bias"].shape == ()


def test_text_states_depend_on_no_later_token(variables):
  for position in (0, 2, 4):
    weight = np.zeros((2, 6, 16), np.float32)
    weight[1, position] = random_variables.normal(16)
    gradient = _text_gradient(variables, np.zeros((2, 12), np.float32), weight)
    assert np.all(gradient[TOKENS[1, : position + 1]] > 0)
    assert not np.any(gradient[TOKENS[1, position + 1 :]])


def test_text_embed_depends_on_all_real_tokens_and_not_on_padding(variables):
  gradient = _text_gradient(
    variables, random_variables.normal(2, 12), np.zeros((2, 6, 16), np.float32)
  )
  assert np.all(gradient[TOKENS[MASK]] > 0)
  assert gradient[PAD] == 0


def test_masked_keys_are_invisible_wherever_they_are(variables):
  def apply(tokens, mask):
    return _encode_text(variables, tokens, mask)[0]

  mask = MASK.copy()
  mask[1, 2] = False
  tokens = TOKENS.copy()
  tokens[1, 2] = 30
  np.testing.assert_array_equal(apply(TOKENS, mask), apply(tokens, mask))
  assert not np.allclose(apply(TOKENS, MASK), apply(tokens, MASK), atol=1e-3)


def test_text_is_pooled_at_its_last_real_token(variables):
  embed, out = _encode_text(variables, TOKENS, MASK)
  kernel = variables["params"]["text"]["projection"]["kernel"]
  pooled = out["text_encodings"][np.arange(2), [3, 5]]
  np.testing.assert_allclose(embed, pooled @ kernel, rtol=1e-4, atol=1e-5)


def test_shorter_padding_gives_the_same_embedding(variables):
  short, _ = _encode_text(variables, TOKENS[:, :4], MASK[:, :4])
  long, _ = _encode_text(variables, TOKENS, MASK)
  np.testing.assert_allclose(short[0], long[0], rtol=1e-4, atol=1e-5)


def test_image_embed_depends_on_every_pixel(image, variables):
  gradient = jax.jit(
    jax.grad(
      lambda x: MODEL.apply(variables, x, method=MODEL.encode_image)[0].sum()
    )
  )(image)
  assert np.all(np.abs(gradient).sum(-1) > 0)


def test_bfloat16_is_close_to_float32(image, variables):
  model = dataclasses.replace(MODEL, dtype="bfloat16", remat="dots", scan=True)
  exact, _ = jax.jit(MODEL.apply)(variables, image, TOKENS, MASK)
  rounded, out = jax.jit(model.apply)(variables, image, TOKENS, MASK)
  assert out["text_encodings"].dtype == jnp.bfloat16
  for name in ("image_embed", "text_embed"):
    assert rounded[name].dtype == jnp.float32
    error = np.linalg.norm(rounded[name] - exact[name])
    assert 0 < error < 0.03 * np.linalg.norm(exact[name])


def test_scanned_stacks_change_nothing(image, variables):
  scanned = jax.jit(MODEL.clone(scan=True).apply).trace(
    variables, image, TOKENS, MASK
  )
  assert str(scanned.jaxpr).count(" scan[") == 2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    scanned.lower().compile()(variables, image, TOKENS, MASK),
    jax.jit(MODEL.apply)(variables, image, TOKENS, MASK),
  )


def test_one_tower_alone_is_that_of_the_whole(image, variables):
  whole, _ = jax.jit(MODEL.apply)(variables, image, TOKENS, MASK)
  for missing, kept in (("vision", "text"), ("text", "vision")):
    model = dataclasses.replace(
      MODEL, **{f"{missing}_width": None}, logit_scale_init=None
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, TOKENS, MASK)
    assert set(shapes["params"]) == {kept}
    params = {kept: variables["params"][kept]}
    output, _ = jax.jit(model.apply)({"params": params}, image, TOKENS, MASK)
    (name,) = output
    np.testing.assert_allclose(output[name], whole[name], rtol=1e-5, atol=1e-6)
  text_only = dataclasses.replace(MODEL, vision_width=None)
  with pytest.raises(errors.UserError, match="--image_encoder"):
    text_only.apply(variables, image, method=text_only.encode_image)
  vision_only = dataclasses.replace(MODEL, text_width=None)
  with pytest.raises(errors.UserError, match="no text tower"):
    vision_only.apply(variables, TOKENS, MASK, method=vision_only.encode_text)


def test_pictures_are_standardised_by_mean_and_std(image, variables):
  mean, std = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.3, 0.25])
  model = dataclasses.replace(
    MODEL, image_mean=tuple(mean.tolist()), image_std=tuple(std.tolist())
  )

  def encode(model, image):
    return model.apply(variables, image, method=model.encode_image)[0]

  np.testing.assert_allclose(
    encode(model, image),
    encode(MODEL, ((image + 1) / 2 - mean) / std),
    rtol=1e-4,
    atol=1e-5,
  )
  with pytest.raises(errors.UserError, match="go together"):
    encode(dataclasses.replace(MODEL, image_std=(1.0,) * 3), image)


def test_mlps_of_the_towers(image):
  # Widths of ViT-bigG/14: their quotient is no binary fraction.
  model = dataclasses.replace(
    MODEL, vision_width=1664, vision_num_heads=16, vision_mlp_ratio=8192 / 1664
  )
  for text_mlp_ratio, text_hidden in ((None, 64), (3, 48)):
    model = dataclasses.replace(model, text_mlp_ratio=text_mlp_ratio)
    rng = jax.random.key(0)
    params = jax.eval_shape(model.init, rng, image, TOKENS, MASK)["params"]
    hidden = {
      tower: params[tower]["block_0"]["mlp"]["dense_1"]["kernel"].shape[1]
      for tower in ("vision", "text")
    }
    assert hidden == {"vision": 8192, "text": text_hidden}


def test_user_mistakes(image):
  with pytest.raises(errors.UserError, match="not a multiple of its patch"):
    jax.eval_shape(
      dataclasses.replace(MODEL, patch_size=3).init,
      jax.random.key(0),
      image,
      TOKENS,
      MASK,
    )
  with pytest.raises(errors.UserError, match="8 x 8 pixels, not 4 x 8"):
    jax.eval_shape(MODEL.init, jax.random.key(0), image[:, :4], TOKENS, MASK)
  long = np.ones((2, 7), np.int32)
  with pytest.raises(errors.UserError, match="at most 6 text tokens, not 7"):
    jax.eval_shape(MODEL.init, jax.random.key(0), image, long, long > 0)
