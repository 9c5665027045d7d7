"""The U-Net: sizes, conditions, their cache, convolution everywhere."""

import dataclasses
import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax.models import unet
from unclip_jax.utils import errors

MODEL = unet.Model(
  image_size=8,
  out_channels=6,
  channels=8,
  channel_mult=(1, 2),
  num_res_blocks=1,
  attention_resolutions=(4,),
  head_channels=8,
  image_embed_dim=6,
  num_image_embed_tokens=2,
  text_width=10,
)
UPSAMPLER = unet.Model(
  image_size=8,
  out_channels=3,
  channels=8,
  channel_mult=(1, 2),
  num_res_blocks=1,
  attention_resolutions=(),
)
GLIDE = MODEL.clone(
  text_width=None,
  text_encoder=flax.core.freeze(  # hashable, for jit
    dict(vocab_size=20, context_length=6, width=12, depth=1, num_heads=2)
  ),
)
KEEP = np.zeros(2, bool)
DROP = np.asarray([True, False])
X_T = random_variables.normal(2, 8, 8, 3)
TIMESTEPS = np.asarray([1, 700], np.int32)
CONDITIONS = {
  "image_embed": random_variables.normal(2, 6),
  "text_encodings": random_variables.normal(2, 5, 10),
  "text_mask": np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool),
}
TOKENS = {
  "image_embed": CONDITIONS["image_embed"],
  "text_tokens": np.asarray([[1, 5, 2, 0, 0], [1, 6, 7, 8, 2]], np.int32),
  "text_mask": CONDITIONS["text_mask"],
}


@pytest.fixture(name="variables", scope="module")
def _variables():
  return random_variables.like(MODEL.init, X_T, TIMESTEPS, **CONDITIONS)


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables, x_t, timesteps, model=MODEL, **conditions):
  return model.apply(variables, x_t, timesteps, **conditions)


@jax.jit
def _weighted_gradients(variables, image_embed_drop, text_drop):
  """Of a weighted sum of the output: by image_embed, text and parameters."""

  def total(image_embed, text_encodings, variables):
    output, _ = MODEL.apply(
      variables,
      X_T,
      TIMESTEPS,
      image_embed=image_embed,
      text_encodings=text_encodings,
      text_mask=CONDITIONS["text_mask"],
      image_embed_drop=image_embed_drop,
      text_drop=text_drop,
    )
    return (output * random_variables.normal(2, 8, 8, 6)).sum()

  by_image_embed, by_text, by_variables = jax.grad(total, argnums=(0, 1, 2))(
    CONDITIONS["image_embed"], CONDITIONS["text_encodings"], variables
  )
  return by_image_embed, by_text, by_variables["params"]


def test_parameters_of_karlos_decoder():
  model = unet.Model(
    image_size=64,
    out_channels=6,
    channels=320,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    image_embed_dim=768,
    text_width=768,
    context_width=1536,
  )
  count = random_variables.count(
    model.init,
    jnp.zeros((1, 64, 64, 3)),
    jnp.zeros(1, jnp.int32),
    image_embed=jnp.zeros((1, 768)),
    text_encodings=jnp.zeros((1, 77, 768)),
  )
  null_text_encodings = 768  # Karlo has none
  assert count == 885_439_686 + 7_878_400 + null_text_encodings


def test_outputs(variables):
  output, out = _apply(variables, X_T, TIMESTEPS, **CONDITIONS)
  assert output.shape == (2, 8, 8, 6) and output.dtype == jnp.float32
  assert out["mid"].shape == (2, 4, 4, 16)
  names = set(variables["params"])
  units = {"down_0_0", "down_0_1", "down_1_0", "mid_0", "mid_1"}
  units |= {"up_0_0", "up_0_1", "up_1_0", "up_1_1", "up_1_2"}
  assert units <= names
  attending = {n for n in units if "attn" in variables["params"][n]}
  assert attending == {"down_1_0", "mid_0", "up_1_0", "up_1_1"}


def test_new_unet_predicts_zero(variables):
  @jax.jit
  def init_conv_out():  # only this layer, or it compiles for long
    return MODEL.init(jax.random.key(0), X_T, TIMESTEPS, **CONDITIONS)[
      "params"
    ]["conv_out"]

  variables = {"params": {**variables["params"], "conv_out": init_conv_out()}}
  output, out = _apply(variables, X_T, TIMESTEPS, **CONDITIONS)
  np.testing.assert_array_equal(output, 0)
  assert np.all(out["mid"] != 0)


@functools.partial(jax.jit, static_argnames="model")
def _encode_condition(variables, conditions, model=MODEL):
  return model.apply(variables, **conditions, method=model.encode_condition)


@functools.partial(jax.jit, static_argnames="model")
def _denoise(variables, condition, model=MODEL):
  return model.apply(variables, X_T, TIMESTEPS, condition, method=model.denoise)


@pytest.mark.parametrize("drops", [{}, {"image_embed_drop", "text_drop"}])
def test_encode_condition_and_denoise_equal_the_whole(variables, drops):
  conditions = {**CONDITIONS, **dict.fromkeys(drops, DROP)}
  output, _ = _apply(variables, X_T, TIMESTEPS, **conditions)
  condition = _encode_condition(variables, conditions)
  np.testing.assert_allclose(
    _denoise(variables, condition), output, rtol=1e-5, atol=1e-5
  )
  assert set(condition.context) == {"down_1_0", "mid_0", "up_1_0", "up_1_1"}
  # 2 image tokens and 5 text states, in 2 heads of 8.
  assert condition.context["mid_0"].key.shape == (2, 2, 2 + 5, 8)


def _unread_by_denoise(variables, conditions, model):
  """Names of the parameters and conditions that a diffusion step leaves."""
  encode = functools.partial(_encode_condition, model=model)
  condition = jax.eval_shape(encode, variables, conditions)
  denoise = functools.partial(_denoise.__wrapped__, model=model)
  jaxpr = jax.make_jaxpr(denoise)(variables, condition).jaxpr
  read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
  paths = [
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, _ in jax.tree_util.tree_leaves_with_path((variables, condition))
  ]
  unread = {path for path, v in zip(paths, jaxpr.invars) if id(v) not in read}
  return unread, set(paths)


def test_denoise_reads_no_parameter_of_the_conditions(variables):
  unread, paths = _unread_by_denoise(variables, CONDITIONS, MODEL)
  assert unread == {
    path
    for path in paths
    if any(name in path for name in ("null_", "text_", "embed_", "context_"))
    and "time_embed." not in path
  }


@pytest.fixture(name="glide_variables", scope="module")
def _glide_variables():
  return random_variables.like(GLIDE.init, X_T, TIMESTEPS, **TOKENS)


def test_own_text_encoder_runs_once_per_prompt(glide_variables):
  unread, paths = _unread_by_denoise(glide_variables, TOKENS, GLIDE)
  encoder = {path for path in paths if ".params.text." in f".{path}"}
  assert len(encoder) > 10 and encoder <= unread
  output, _ = _apply(glide_variables, X_T, TIMESTEPS, model=GLIDE, **TOKENS)
  condition = _encode_condition(glide_variables, TOKENS, model=GLIDE)
  np.testing.assert_allclose(
    _denoise(glide_variables, condition, model=GLIDE),
    output,
    rtol=1e-5,
    atol=1e-5,
  )
  # 2 image tokens and 5 states of the caption, padded ones too.
  assert condition.mask.shape == (2, 2 + 5) and np.all(condition.mask)


def test_captions_dropped_from_the_own_encoder_are_empty(glide_variables):
  def output(**conditions):
    return _apply(
      glide_variables, X_T, TIMESTEPS, model=GLIDE, **{**TOKENS, **conditions}
    )[0]

  whole = output()
  dropped = output(text_drop=DROP)
  empty = output(text_mask=TOKENS["text_mask"] & ~DROP[:, None])
  np.testing.assert_array_equal(dropped, empty)
  np.testing.assert_allclose(dropped[~DROP], whole[~DROP], rtol=1e-5, atol=1e-5)
  assert np.abs(dropped[DROP] - whole[DROP]).max() > 1e-2
  other = output(text_drop=DROP, text_tokens=TOKENS["text_tokens"][::-1])
  np.testing.assert_allclose(other[DROP], dropped[DROP], rtol=1e-5, atol=1e-5)


def test_output_depends_on_the_conditions_and_on_no_padding(variables):
  by_image_embed, by_text, _ = _weighted_gradients(variables, KEEP, KEEP)
  assert np.all(by_image_embed != 0)
  by_position = np.abs(by_text).sum(-1)
  np.testing.assert_array_equal(by_position > 0, CONDITIONS["text_mask"])


def test_dropped_conditions_have_zero_gradient_independently(variables):
  by_image_embed, by_text, null = _weighted_gradients(variables, DROP, KEEP)
  assert not np.any(by_image_embed[DROP]) and np.any(by_image_embed[~DROP])
  assert np.any(by_text[0]) and np.any(by_text[1])
  assert np.any(null["null_image_embed"])
  assert not np.any(null["null_text_encodings"])

  by_image_embed, by_text, null = _weighted_gradients(variables, KEEP, DROP)
  assert not np.any(by_text[DROP]) and np.any(by_text[~DROP])
  assert np.any(by_image_embed[0]) and np.any(by_image_embed[1])
  assert np.any(null["null_text_encodings"])
  assert not np.any(null["null_image_embed"])


def test_a_null_embedding_that_is_not_learned_is_zero(variables):
  model = MODEL.clone(learned_null_image_embed=False)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), X_T, TIMESTEPS, **CONDITIONS
  )
  params = dict(variables["params"])
  del params["null_image_embed"]
  assert jax.tree.structure(shapes["params"]) == jax.tree.structure(params)
  dropped, _ = _apply(
    {"params": params},
    X_T,
    TIMESTEPS,
    model=model,
    image_embed_drop=DROP,
    **CONDITIONS,
  )
  image_embed = CONDITIONS["image_embed"] * ~DROP[:, None]
  zero, _ = _apply(
    variables, X_T, TIMESTEPS, **{**CONDITIONS, "image_embed": image_embed}
  )
  np.testing.assert_allclose(dropped, zero, rtol=1e-5, atol=1e-5)


def test_dropped_text_does_not_depend_on_its_length(variables):
  dropped = {**CONDITIONS, "text_drop": np.ones(2, bool)}
  longer = {**dropped, "text_mask": np.ones((2, 5), bool)}
  jax.tree.map(
    np.testing.assert_array_equal,
    _encode_condition(variables, dropped),
    _encode_condition(variables, longer),
  )


def test_text_reaches_both_the_timestep_and_the_context(variables):
  """The pooled state is that of the last real token, not of the last."""
  condition = MODEL.apply(
    variables, **CONDITIONS, method=MODEL.encode_condition
  )
  params = variables["params"]
  expected = (
    CONDITIONS["image_embed"] @ (params["image_embed_time_proj"]["kernel"])
    + CONDITIONS["text_encodings"][[0, 1], [2, 4]]
    @ (params["text_time_proj"]["kernel"])
  )
  for name in ("image_embed_time_proj", "text_time_proj"):
    expected = expected + params[name]["bias"]
  np.testing.assert_allclose(condition.emb, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    condition.mask,
    np.pad(CONDITIONS["text_mask"], ((0, 0), (2, 0)), constant_values=True),
  )


def test_convolutional_net_runs_on_pictures_larger_than_its_crops():
  crop, low_crop = np.zeros((2, 8, 8, 3)), np.zeros((2, 2, 2, 3))
  variables = random_variables.like(
    UPSAMPLER.init, crop, TIMESTEPS, low_res=low_crop
  )
  output, _ = _apply(
    variables,
    random_variables.normal(2, 16, 12, 3),
    TIMESTEPS,
    model=UPSAMPLER,
    low_res=random_variables.normal(2, 4, 3, 3),
  )
  assert output.shape == (2, 16, 12, 3)


def test_convolutional_net_commutes_with_shifts():
  """By the stride of the lowest level; GroupNorm sees the same values."""
  variables = random_variables.like(UPSAMPLER.init, X_T, TIMESTEPS)
  # Nothing but a patch, further from the border than the net can see.
  picture = np.zeros((2, 96, 96, 3), np.float32)
  picture[:, 44:52, 44:52] = X_T

  def interior(shift):
    moved = np.roll(picture, shift, axis=(1, 2))
    output, _ = _apply(variables, moved, TIMESTEPS, model=UPSAMPLER)
    return np.roll(output, -shift, axis=(1, 2))[:, 40:56, 40:56]

  np.testing.assert_allclose(interior(2), interior(0), rtol=1e-3, atol=1e-3)
  assert not np.allclose(interior(1), interior(0), rtol=1e-3, atol=1e-3)


def test_low_res_is_resized_bilinearly_beside_x_t():
  variables = random_variables.like(UPSAMPLER.init, X_T, TIMESTEPS, low_res=X_T)
  low_res = random_variables.normal(2, 4, 4, 3)
  resized = jax.image.resize(low_res, (2, 8, 8, 3), "bilinear")
  given, doubled = (
    _apply(variables, X_T, TIMESTEPS, model=UPSAMPLER, low_res=x)[0]
    for x in (low_res, resized)
  )
  np.testing.assert_allclose(given, doubled, rtol=1e-4, atol=1e-4)
  other = _apply(variables, X_T, TIMESTEPS, model=UPSAMPLER, low_res=-resized)
  assert not np.allclose(other[0], doubled, atol=1e-2)


def test_nothing_that_is_unknown_is_seen():
  model = UPSAMPLER.clone(inpainting=True)
  variables = random_variables.like(model.init, X_T, TIMESTEPS)
  assert variables["params"]["conv_in"]["kernel"].shape[2] == 3 + 3 + 1
  known = random_variables.normal(2, 8, 8, 3) + 1
  is_known = np.zeros((2, 8, 8, 1), bool)
  plain, _ = _apply(variables, X_T, TIMESTEPS, model=model)
  hidden, _ = _apply(
    variables, X_T, TIMESTEPS, model=model, known=known, is_known=is_known
  )
  np.testing.assert_array_equal(hidden, plain)

  is_known[:, :4] = True
  by_known = jax.grad(
    lambda known: (
      _apply(
        variables, X_T, TIMESTEPS, model=model, known=known, is_known=is_known
      )[0]
      * X_T
    ).sum()
  )(known)
  assert np.all(by_known[:, :4] != 0) and not np.any(by_known[:, 4:])
  with pytest.raises(errors.UserError, match="not built for inpainting"):
    _apply(
      variables, X_T, TIMESTEPS, model=UPSAMPLER, known=known, is_known=is_known
    )


def test_an_estimate_of_x_start_is_seen_and_none_is_zeros():
  model = UPSAMPLER.clone(self_conditioning=True)
  variables = random_variables.like(model.init, X_T, TIMESTEPS)
  assert variables["params"]["conv_in"]["kernel"].shape[2] == 3 + 3
  none, zeros, other = (
    _apply(variables, X_T, TIMESTEPS, model=model, x_start=x)[0]
    for x in (None, 0 * X_T, X_T)
  )
  np.testing.assert_array_equal(none, zeros)
  assert np.abs(other - zeros).max() > 1e-2


def test_plain_resamplers_and_additive_embedding_run():
  model = dataclasses.replace(
    UPSAMPLER, resblock_updown=False, scale_shift_norm=False
  )
  variables = random_variables.like(model.init, X_T, TIMESTEPS)
  assert set(variables["params"]["down_0_1"]) == {"conv"}
  output, _ = _apply(variables, X_T, TIMESTEPS, model=model)
  later, _ = _apply(variables, X_T, TIMESTEPS + 100, model=model)
  assert output.shape == (2, 8, 8, 3)
  assert not np.allclose(output, later, atol=1e-3)


def test_bfloat16_is_close_to_float32(variables):
  model = dataclasses.replace(MODEL, dtype="bfloat16", remat=True)
  exact, _ = _apply(variables, X_T, TIMESTEPS, **CONDITIONS)
  rounded, out = _apply(variables, X_T, TIMESTEPS, model=model, **CONDITIONS)
  assert out["mid"].dtype == jnp.bfloat16
  assert rounded.dtype == jnp.float32
  error = np.linalg.norm(rounded - exact)
  assert 0 < error < 0.05 * np.linalg.norm(exact)


def test_user_mistakes():
  def init(model=MODEL, x_t=X_T, **conditions):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), x_t, TIMESTEPS, **conditions)
    )

  with pytest.raises(errors.UserError, match="multiples of 2, not 7 x 8"):
    init(UPSAMPLER, X_T[:, :7])
  with pytest.raises(errors.UserError, match="conditioned on image_embed"):
    init(text_encodings=CONDITIONS["text_encodings"])
  with pytest.raises(errors.UserError, match="not conditioned on text"):
    init(UPSAMPLER, text_encodings=CONDITIONS["text_encodings"])
  with pytest.raises(errors.UserError, match=r"\[5\] are no level"):
    init(dataclasses.replace(MODEL, attention_resolutions=(4, 5)), **CONDITIONS)
  with pytest.raises(errors.UserError, match="leave out text_width"):
    init(GLIDE.clone(text_width=10), **TOKENS)
  with pytest.raises(errors.UserError, match="conditioned on text_tokens"):
    init(GLIDE, image_embed=CONDITIONS["image_embed"])
  with pytest.raises(errors.UserError, match="head_channels 5"):
    init(dataclasses.replace(MODEL, head_channels=5), **CONDITIONS)


def test_patches_are_squares_of_pixels():
  """A network of patches is one of pixels on pictures turned into channels."""
  fields = dict(
    image_size=16,
    out_channels=3,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
  )
  model = unet.Model(**fields, patch_size=2)
  twin = unet.Model(**{**fields, "image_size": 8, "out_channels": 12})
  x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  t = jnp.array([3, 500])
  # Channels of a patch in the order row, column, colour.
  patches = x.reshape(2, 8, 2, 8, 2, 3).transpose(0, 1, 3, 2, 4, 5)
  patches = patches.reshape(2, 8, 8, 12)
  variables = random_variables.like(model.init, x, t)
  out, _ = model.apply(variables, x, t)
  expected, _ = twin.apply(variables, patches, t)
  expected = expected.reshape(2, 8, 8, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
  assert jnp.std(out) > 1e-3
  assert jnp.allclose(out, expected.reshape(2, 16, 16, 3), atol=1e-5)
