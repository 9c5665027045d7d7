"""What the tasks promise beyond their networks and the diffusion maths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import trainer
from unclip_jax.tasks import base, prior_diffusion, upsampler
from unclip_jax.tasks import clip as clip_task
from unclip_jax.tasks import decoder as decoder_task
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import embedding_space, errors


@pytest.fixture(scope="module", params=["prior", "prior_ar", "decoder"])
def run(request):
  return _ready(request.param)


def _ready(name, folder="emoji"):
  """(task, variables with random values, frozen, batch) of a smoke config."""
  run = trainer.setup(config_lib.load(f"configs/{folder}/{name}.py:smoke"))
  batches = run.data.eval_batches("train", 4, 8)
  # Random too: in a fresh CLIP every picture has the same embedding.
  upstream = random_variables.like_tree(run.frozen)
  frozen = {**upstream, **run.task.prepare(upstream, batches)}
  batch = next(iter(batches))
  shapes = jax.eval_shape(run.task.init, jax.random.key(0), batch, frozen)
  return run.task, random_variables.like_tree(shapes), frozen, batch


@pytest.fixture(scope="module")
def prior():
  return _ready("prior")


@pytest.fixture(scope="module")
def decoder():
  return _ready("decoder")


def test_prior_keeps_the_candidate_nearest_to_the_text(prior):
  task, variables, frozen, batch = prior
  draw = lambda n, noise: task.sample(  # noqa: E731
    variables, frozen, batch, None, num_candidates=n, num_sample_steps=2,
    noise=noise,
  )  # fmt: skip
  D = task.model.embed_dim
  B = len(batch["index"])
  noise = np.random.default_rng(1).normal(size=(3, B, 3, D)).astype("f4")
  singles = [draw(1, noise[:, :, i]) for i in range(3)]
  best = draw(3, noise.reshape(3, B * 3, D))
  unit = clip_task.normalize
  scores = np.stack(
    [np.sum(unit(s["image_embed"]) * s["text_embed"], -1) for s in singles]
  )
  assert len(set(np.argmax(scores, 0))) > 1  # the choice is a choice
  for b, i in enumerate(np.argmax(scores, axis=0)):
    np.testing.assert_allclose(
      best["image_embed"][b], singles[i]["image_embed"][b], rtol=2e-3, atol=1e-4
    )


def test_guided_prior_is_guided_per_candidate(prior):
  """The cache of 2 * B * n rows puts conditions and candidates in order."""
  task, variables, frozen, batch = prior
  D, B = task.model.embed_dim, len(batch["index"])
  noise = np.random.default_rng(1).normal(size=(3, B * 2, D)).astype("f4")
  options = dict(num_candidates=2, num_sample_steps=2, guidance_scale=3.0)
  whole = task.sample(variables, frozen, batch, None, noise=noise, **options)
  for b in range(B):
    row = {k: v[b : b + 1] for k, v in batch.items()}
    alone = task.sample(
      variables, frozen, row, None, noise=noise[:, 2 * b : 2 * b + 2], **options
    )
    np.testing.assert_allclose(
      alone["image_embed"][0], whole["image_embed"][b], rtol=2e-3, atol=1e-4
    )


def test_decoder_takes_given_embeddings_in_place_of_the_picture(decoder):
  task, variables, frozen, batch = decoder
  options = dict(num_sample_steps=2, guidance_scale=2.0, sampler="ddim")
  rng = jax.random.key(0)
  from_picture = task.sample(variables, frozen, batch, rng, **options)
  embed = task.upstream["clip"].encode_image(
    frozen["clip"], batch["clip_image"]
  )
  given = {k: batch[k] for k in ("text_tokens", "text_mask")}
  given["image_embed"] = embed
  from_embed = task.sample(variables, frozen, given, rng, **options)
  np.testing.assert_allclose(
    from_picture["image"], from_embed["image"], atol=1e-5
  )
  given["image_embed"] = embed[::-1]
  other = task.sample(variables, frozen, given, rng, **options)
  assert np.abs(other["image"] - from_embed["image"]).max() > 1e-3


def test_stored_embeddings_serve_in_place_of_the_clip(run):
  task, variables, frozen, batch = run
  clip, clip_variables = task.upstream["clip"], frozen["clip"]
  stored = {k: v for k, v in batch.items() if k != "clip_image"}
  stored["image_embed"] = clip.encode_image(clip_variables, batch["clip_image"])
  text = {k: batch[k] for k in ("text_tokens", "text_mask")}
  stored["text_embed"], stored["text_encodings"] = clip.encode_text(
    clip_variables, **text
  )
  without = {**frozen, "clip": {}}  # nothing is left for it to do

  def loss(frozen, batch):
    rng = jax.random.key(0)
    return task.loss(variables, frozen, batch, rng, step=0, train=True).loss

  np.testing.assert_array_equal(loss(without, stored), loss(frozen, batch))
  tables = task.prepare(without, [stored])
  assert {k: frozen[k].keys() for k in tables} == {
    k: v.keys() for k, v in tables.items()
  }


def test_dropped_conditions_do_not_reach_the_loss(run):
  """With probability 1 the loss is the same for any caption and picture."""
  task, variables, frozen, batch = run
  drops = {
    f.name: 1.0
    for f in dataclasses.fields(task)
    if f.name.endswith("drop_prob")
  }
  dropped = dataclasses.replace(task, **drops)
  other = dict(batch, text_tokens=batch["text_tokens"][::-1])
  if "image_embed_drop_prob" in drops:
    other["clip_image"] = batch["clip_image"][::-1]

  def loss(task, batch, train=True):
    output = task.loss(
      variables, frozen, batch, jax.random.key(0), step=0, train=train
    )
    return np.asarray(output.loss)

  np.testing.assert_array_equal(loss(dropped, batch), loss(dropped, other))
  # And in evaluation nothing is dropped.
  assert np.abs(loss(dropped, batch, False) - loss(dropped, other, False)).max()
  np.testing.assert_array_equal(
    loss(dropped, batch, False), loss(task, batch, False)
  )


def test_embedding_space_is_that_of_the_pictures(prior):
  task, _, frozen, batch = prior
  tables = prior_diffusion.fit_embedding_space(
    "mean_std", task.upstream["clip"], frozen["clip"], [batch]
  )
  embeds = task.upstream["clip"].encode_image(
    frozen["clip"], batch["clip_image"]
  )
  np.testing.assert_allclose(
    tables["embedding_space"]["mean"], embeds.mean(0), rtol=1e-4, atol=1e-5
  )


def test_clip_scale_is_clamped():
  task, variables, frozen, batch = _ready("clip")
  losses = []
  for scale in (np.log(100.0), 20.0):
    params = dict(variables["params"], logit_scale=jnp.float32(scale))
    output = task.loss(
      {"params": params}, frozen, batch, jax.random.key(0), step=0, train=True
    )
    assert output.metrics["logit_scale"] == pytest.approx(100, rel=1e-4)
    losses.append(output.loss)
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_clip_cuts_long_captions_as_the_tokenizer_does():
  task, variables, _, _ = _ready("clip")
  context = task.model.context_length
  rng = np.random.default_rng(0)
  lengths = np.array([3, context, context + 1, context + 9])
  mask = np.arange(context + 9) < lengths[:, None]
  tokens = np.where(mask, rng.integers(4, 99, mask.shape), 0).astype(np.int32)
  tokens[range(4), lengths - 1] = 3  # the end of sequence
  cut, cut_mask = tokens[:, :context].copy(), mask[:, :context]
  cut[cut_mask[:, -1], -1] = 3

  expected = task.encode_text(variables, cut, cut_mask)
  jax.tree.map(
    np.testing.assert_array_equal,
    task.encode_text(variables, tokens, mask),
    expected,
  )
  without_end = task.encode_text(variables, tokens[:, :context], cut_mask)
  changed = np.abs(without_end[0] - expected[0]).max(-1) > 1e-4
  np.testing.assert_array_equal(changed, [0, 0, 1, 1])


def test_the_sigmoid_loss_asks_for_a_bias():
  task, variables, frozen, batch = _ready("clip")
  task = dataclasses.replace(task, loss_type="sigmoid")
  with pytest.raises(errors.UserError, match="logit_bias_init"):
    task.loss(variables, frozen, batch, jax.random.key(0), step=0, train=True)


def test_two_guidance_scales_that_are_equal_are_one(decoder):
  task, variables, frozen, batch = decoder
  options = dict(guidance_scale=3.0, num_sample_steps=2, sampler="ddim")
  rng = jax.random.key(0)
  one = task.sample(variables, frozen, batch, rng, **options)
  two = task.sample(
    variables, frozen, batch, rng, text_guidance_scale=3.0, **options
  )
  np.testing.assert_allclose(one["image"], two["image"], atol=1e-4)
  # Without guidance on the text only the embedding counts.
  less = dict(options, text_guidance_scale=0.0)
  other = dict(batch, text_tokens=batch["text_tokens"][::-1])
  a, b = (
    task.sample(variables, frozen, x, rng, **less) for x in (batch, other)
  )
  np.testing.assert_allclose(a["image"], b["image"], atol=1e-4)
  assert np.abs(a["image"] - one["image"]).max() > 1e-3


def test_masks_are_rectangles_or_their_surroundings_or_nothing():
  shape, prob = (400, 12, 10, 3), 0.7
  masks = decoder_task.draw_is_known(jax.random.key(0), shape, prob)
  assert masks.shape == (400, 12, 10, 1) and masks.dtype == bool
  masks = np.asarray(masks)[..., 0]

  def is_rectangle(mask):
    rows, columns = mask.any(1), mask.any(0)
    return np.array_equal(mask, np.outer(rows, columns)) and all(
      np.abs(np.diff(np.pad(x.astype(int), 1))).sum() <= 2
      for x in (rows, columns)
    )

  assert all(is_rectangle(mask) or is_rectangle(~mask) for mask in masks)
  # Half of the masks surround a rectangle, and some rectangles are empty.
  corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]]
  assert 0.25 < corners.all(axis=1).mean() < 0.4
  assert 0.3 < (~masks.any(axis=(1, 2))).mean() < 0.45
  nothing = decoder_task.draw_is_known(jax.random.key(1), shape, 0.0)
  assert not np.any(nothing)


@pytest.fixture(scope="module")
def inpainter():
  return _ready("decoder_inpainting", "ablations")


def test_an_inpainter_sees_what_is_known(inpainter):
  task, variables, frozen, batch = inpainter
  known = np.asarray(batch["image"])
  is_known = np.zeros((*known.shape[:3], 1), bool)
  is_known[:, :, :8] = True

  @functools.partial(jax.jit, static_argnames="plain")
  def draw(known, is_known, plain=False):
    # A plain network has no weights for what it does not see.
    conv_in = variables["params"]["conv_in"]
    conv_in = {**conv_in, "kernel": conv_in["kernel"][:, :, :3]}
    params = {**variables["params"], "conv_in": conv_in}
    return (
      dataclasses.replace(task, model=task.model.clone(inpainting=False))
      if plain
      else task
    ).sample(
      {"params": params} if plain else variables,
      frozen,
      batch,
      jax.random.key(0),
      known=known,
      is_known=is_known,
      guidance_scale=2.0,
      num_sample_steps=2,
      sampler="ddim",
    )["image"]

  image = draw(known, is_known)
  np.testing.assert_array_equal(image[:, :, :8], known[:, :, :8])
  assert np.abs(image[:, :, 8:] - known[:, :, 8:]).max() > 0.1
  # What is masked changes nothing; being shown the rest does.
  np.testing.assert_array_equal(
    draw(np.where(is_known, known, 0.5), is_known), image
  )
  assert np.abs(draw(known, is_known, plain=True) - image).max() > 1e-2


def test_training_shows_an_inpainter_a_part_and_evaluation_nothing(inpainter):
  task, variables, frozen, batch = inpainter

  def loss(known_prob, train):
    given = dataclasses.replace(task, known_prob=known_prob)
    return given.loss(
      variables, frozen, batch, jax.random.key(0), step=0, train=train
    ).loss

  assert np.abs(loss(1.0, True) - loss(0.0, True)).max() > 1e-3
  np.testing.assert_array_equal(loss(1.0, False), loss(0.0, False))


def test_a_decoder_of_text_embeddings_sees_no_picture():
  task, _, frozen, batch = _ready("no_prior", "ablations")
  text_embed, _ = task.upstream["clip"].encode_text(
    frozen["clip"], batch["text_tokens"], batch["text_mask"]
  )
  expected = embedding_space.encode(frozen["embedding_space"], text_embed)
  np.testing.assert_array_equal(task._image_embed(frozen, batch), expected)
  without = {k: v for k, v in batch.items() if k != "clip_image"}
  np.testing.assert_array_equal(task._image_embed(frozen, without), expected)
  table = task.prepare(frozen, [without])["embedding_space"]
  np.testing.assert_allclose(table["mean"], text_embed.mean(0), atol=1e-5)
  with pytest.raises(errors.UserError, match="condition_on 'text'"):
    dataclasses.replace(task, condition_on="text")


def test_upsampler_draws_any_size():
  task, variables, frozen, _ = _ready("upsampler")
  for h, w in ((16, 16), (8, 12)):
    low_res = jnp.zeros((2, h, w, 3))
    image = task.sample(
      variables,
      frozen,
      {"low_res": low_res},
      jax.random.key(0),
      num_sample_steps=2,
    )["image"]
    assert image.shape == (2, 4 * h, 4 * w, 3)
    assert np.abs(image).max() <= 1


@pytest.mark.parametrize("height, width", [(48, 80), (16, 40)])
def test_tiles_give_what_the_whole_gives_where_pixels_stand_alone(
  height, width
):
  rng = np.random.default_rng(0)
  x_t, enlarged = rng.normal(size=(2, 2, height, width, 3)).astype("f4")

  def denoise(x_t, timesteps, low_res):
    both = jnp.concatenate([x_t * low_res, jnp.sin(x_t)], axis=-1)
    return both + timesteps[:, None, None, None]

  timesteps = jnp.asarray([3, 5])
  tiled = upsampler._tiled(denoise, enlarged, 32, x_t, timesteps)
  whole = denoise(x_t, timesteps, enlarged)
  np.testing.assert_allclose(tiled, whole, atol=1e-5)


def test_tiles_are_near_the_whole_and_take_less_memory():
  task, variables, frozen, _ = _ready("upsampler")
  low_res = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3))
  low_res = jax.image.resize(
    jnp.asarray(low_res, jnp.float32), (1, 32, 32, 3), "cubic"
  )

  def draw(tile_size):
    sample = jax.jit(
      lambda variables, low_res: task.sample(
        variables,
        frozen,
        {"low_res": low_res},
        jax.random.key(0),
        num_sample_steps=2,
        tile_size=tile_size,
      )["image"]
    )
    compiled = sample.lower(variables, low_res).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return np.asarray(compiled(variables, low_res)), memory

  whole, whole_memory = draw(None)
  tiled, tiled_memory = draw(64)
  assert tiled_memory < 0.5 * whole_memory
  assert 0 < np.abs(tiled - whole).mean() < 0.2 * np.abs(whole).mean()
  np.testing.assert_array_equal(draw(128)[0], whole)


def test_the_error_of_x_start_is_estimated_timestep_by_timestep(prior):
  """Of a network that predicts 0 the error is the data's second moment."""
  task, variables, frozen, batch = prior
  batch = {k: v for k, v in batch.items() if k != "timesteps"}
  silent = jax.tree.map(jnp.zeros_like, variables)
  table = base.fit_x_start_mse(
    task, silent, frozen, [batch] * 500, jax.random.key(0)
  )
  assert table.shape == (1000,)
  # Row i % 4 of the batch stands at timestep i, and comes twice in 500 calls.
  x_start = embedding_space.encode(
    frozen["embedding_space"],
    task.upstream["clip"].encode_image(frozen["clip"], batch["clip_image"]),
  )
  by_row = np.mean(x_start**2, axis=1)
  np.testing.assert_allclose(table, np.tile(by_row, 250), rtol=1e-4)


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler"])
def test_the_bound_has_parts_and_heeds_the_condition(name):
  task, variables, frozen, batch = _ready(name)
  task = dataclasses.replace(task, process={**task.process, "num_vlb_terms": 3})
  B = len(batch["index"])
  vlb = jax.jit(task.predict_fns()["vlb"])
  found = vlb(variables, frozen, batch, jax.random.key(0))
  assert found["terms"].shape == found["timesteps"].shape == (B, 3)
  np.testing.assert_allclose(
    found["bits_per_dim"],
    found["prior_term"] + found["terms"].sum(axis=1),
    rtol=1e-5,
  )
  assert np.all(found["timesteps"][:, 0] == 0)
  # A level's mass is cut at 1e-12, 40 bits; a wrong guess's density is not.
  assert np.all(found["terms"][:, 0] > 0)
  assert np.all((found["terms"][:, 0] < 40) == (name != "prior"))
  condition = "low_res" if name == "upsampler" else "text_tokens"
  other = dict(batch, **{condition: batch[condition][::-1]})
  changed = vlb(variables, frozen, other, jax.random.key(0))
  np.testing.assert_array_equal(changed["prior_term"], found["prior_term"])
  difference = np.abs(changed["terms"] - found["terms"])
  assert np.all(difference.max(axis=0) > 0)
