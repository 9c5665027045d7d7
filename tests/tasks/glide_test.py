"""GLIDE: the decoder's and the upsampler's tasks where the text is all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import init_from_test, random_models, random_variables
from unclip_jax import pipelines, trainer
from unclip_jax.data import preprocess
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


def _ready(name):
  """(task, variables with random values, a batch of 4) of a smoke config."""
  run = trainer.setup(config_lib.load(f"configs/baselines/{name}.py:smoke"))
  batch = next(iter(run.data.eval_batches("train", 4, 4)))
  assert not run.frozen
  assert run.task.prepare({}, [batch]) == {}
  variables = random_variables.like(run.task.init, batch, {})
  return run.task, variables, batch


def _loss_fn(task, variables):
  @functools.partial(jax.jit, static_argnames=("train", "drop"))
  def loss(batch, train=False, drop=0.2):
    given = task
    if hasattr(task, "text_drop_prob"):
      given = dataclasses.replace(task, text_drop_prob=drop)
    # Keys of rows, so that a row's draws are its own.
    rngs = jax.random.split(jax.random.key(0), 4)
    return given.loss(variables, {}, batch, rngs, step=0, train=train).loss

  return loss


def _other_text(batch):
  return {**batch, "text_tokens": batch["text_tokens"][::-1]}


@pytest.fixture(name="glide", scope="module")
def _glide():
  return _ready("glide")


# Loss of the first examples. A change here means that the same config now
# trains something else: if that is what you want, say so in CHANGELOG.md and
# put the new numbers (the test prints them).
PINNED = {
  "glide": (1.032535, 0.985571),
  "glide_upsampler": (0.899100, 0.887435),
}


def test_the_caption_reaches_the_loss_unless_it_is_dropped(glide):
  task, variables, batch = glide
  loss = _loss_fn(task, variables)
  other = _other_text(batch)
  found = loss(batch, train=True, drop=0.2)
  print(f'"glide": ({found[0]:.6f}, {found[1]:.6f}),')
  np.testing.assert_allclose(found[:2], PINNED["glide"], rtol=2e-3)
  assert np.all(loss(batch) != loss(other))
  np.testing.assert_array_equal(
    loss(batch, train=True, drop=1.0), loss(other, train=True, drop=1.0)
  )
  # A row's loss is its own, so that microbatches add up to the batch.
  changed = {k: np.concatenate([v[:1], v[:0:-1]]) for k, v in batch.items()}
  some = loss(changed)
  np.testing.assert_allclose(some[0], loss(batch)[0], rtol=1e-5)
  assert np.all(some[1:2] != loss(batch)[1:2])


def test_it_draws_from_captions_alone(glide):
  task, variables, batch = glide
  text = {k: batch[k] for k in ("text_tokens", "text_mask")}

  @functools.partial(jax.jit, static_argnames=("scale", "use_text"))
  def draw(text, rngs, scale, use_text=True):
    return task.sample(
      variables, {}, text, rngs, guidance_scale=scale, use_text=use_text,
      num_sample_steps=2, sampler="ddim",
    )["image"]  # fmt: skip

  rngs = jax.random.split(jax.random.key(0), 4)
  image = draw(text, rngs, 1.5)
  assert image.shape == (4, 32, 32, 3)
  assert np.abs(image).max() <= 1 and np.all(np.isfinite(image))
  # A picture depends on its caption and its key, not on its neighbours.
  turned = {k: v[::-1] for k, v in text.items()}
  np.testing.assert_allclose(
    draw(turned, rngs[::-1], 1.5)[::-1], image, atol=1e-4
  )
  assert np.abs(draw(turned, rngs, 1.5) - image).max() > 1e-3
  # Guidance of scale 0 draws what no caption does.
  plain = draw(text, rngs, 0.0)
  np.testing.assert_allclose(draw(turned, rngs, 0.0), plain, atol=1e-4)
  np.testing.assert_allclose(
    draw(text, rngs, 1.0, use_text=False), plain, atol=1e-4
  )
  assert np.abs(plain - image).max() > 1e-3


def test_a_network_that_needs_a_clip_asks_for_one(glide):
  task, _, _ = glide
  for fields in (
    {"image_embed_dim": 8},
    {"text_encoder": None, "text_width": 8},
    {"text_encoder": None},
  ):
    with pytest.raises(errors.UserError, match=r"set config\.frozen\.clip"):
      dataclasses.replace(task, model=task.model.clone(**fields))


def test_a_run_of_the_inpainting_form_fills_in_pictures(tmp_path):
  config = config_lib.load("configs/baselines/glide_inpainting.py:smoke")
  random_models.save(tmp_path / "run", config)
  pipe = pipelines.load(str(tmp_path / "run"))
  image = np.tanh(random_variables.normal(32, 32, 3)) / 2 + 0.5
  mask = np.zeros((32, 32))
  mask[10:30, 4:20] = 1
  output = pipe.inpaint(image, mask, "a ring", num_images=2).images
  pixels = np.stack([np.asarray(x, np.int32) for x in output])
  given = np.asarray(preprocess.to_pil(image), np.int32)
  np.testing.assert_array_equal(pixels[0][mask == 0], given[mask == 0])
  assert np.abs(pixels[:, mask > 0] - given[mask > 0]).max() > 5
  assert np.any(pixels[0] != pixels[1])


def test_the_upsampler_reads_the_caption():
  task, variables, batch = _ready("glide_upsampler")
  loss = _loss_fn(task, variables)
  found = loss(batch, train=True)
  print(f'"glide_upsampler": ({found[0]:.6f}, {found[1]:.6f}),')
  np.testing.assert_allclose(found[:2], PINNED["glide_upsampler"], rtol=2e-3)
  assert np.all(loss(batch) != loss(_other_text(batch)))

  @jax.jit
  def draw(batch):
    return task.sample(
      variables, {}, batch, jax.random.key(0), num_sample_steps=2
    )["image"]

  given = {k: batch[k] for k in ("low_res", "text_tokens", "text_mask")}
  image = draw(given)
  assert image.shape == (4, 64, 64, 3) and np.abs(image).max() <= 1
  other = {**given, "text_tokens": given["text_tokens"][::-1]}
  assert np.abs(draw(other) - image).max() > 1e-4


def test_the_inpainting_form_starts_as_the_base_model(tmp_path):
  """With patches, whose pixels each have channels of what is known."""
  base = config_lib.load("configs/baselines/glide.py:smoke")
  assert base.model.patch_size == 2
  arrays = random_models.save(tmp_path / "base", base)
  config = config_lib.load("configs/baselines/glide_inpainting.py:smoke")
  config.evals = {}
  config.init_from.path = str(tmp_path / "base")
  state, found = init_from_test.start(tmp_path / "run", config)
  grown = found.pop("params.conv_in.kernel")
  assert grown.shape[2] == 4 * 7
  before = arrays.pop("params.conv_in.kernel")
  init_from_test.assert_equal(found, arrays)

  task, _, batch = _ready("glide")
  params = jax.device_get(state.params)
  plain = {
    **params,
    "conv_in": {**params["conv_in"], "kernel": before},
  }
  known = random_variables.normal(*batch["image"].shape)
  text = {k: batch[k] for k in ("text_tokens", "text_mask")}

  def run(model, params, **shown):
    timesteps = jnp.asarray([3, 50, 500, 999])
    apply = jax.jit(model.apply)
    return apply(
      {"params": params}, batch["image"], timesteps, **text, **shown
    )[0]

  expected = run(task.model, plain)
  inpainter = task.model.clone(inpainting=True)
  is_known = random_variables.normal(4, 32, 32, 1) > 0
  shown = dict(known=known, is_known=is_known)
  np.testing.assert_allclose(
    run(inpainter, params, **shown), expected, rtol=1e-4, atol=1e-4
  )
  # And learns to look at it.
  moved = {**params, "conv_in": {**params["conv_in"], "kernel": grown + 0.1}}
  assert np.abs(run(inpainter, moved, **shown) - expected).max() > 1e-2
