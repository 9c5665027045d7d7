"""Masked image modelling: masks, targets, and what the loss counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import fake_tokenizer, pinned_step, random_variables
from unclip_jax import evaluation, trainer
from unclip_jax.models import mim as mim_model
from unclip_jax.tasks import image_tokens, mim
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

B, S, PATCH, P, V = 4, 8, 2, 16, 5
TOKENIZER = fake_tokenizer.Tokenizer(V, S // PATCH, PATCH)
MODEL = mim_model.Model(
  image_size=S, patch_size=PATCH, width=16, depth=1, num_heads=2, channels=8,
)  # fmt: skip
TASKS = {
  "pixel": mim.Task(MODEL, {}, mask_ratio=0.7),
  "token": mim.Task(
    MODEL.clone(num_codes=V), {"tokenizer": TOKENIZER}, mask_ratio=0.4
  ),
}
FROZEN = {"tokenizer": {}}
BATCH = {"image": np.clip(random_variables.normal(B, S, S, 3), -1, 1)}
KEYS = jax.random.split(jax.random.key(0), B)


@functools.cache
def _variables(name):
  return random_variables.like(TASKS[name].init, batch=BATCH, frozen=FROZEN)


@functools.cache
def _jitted(name, method="loss"):
  task = TASKS[name]
  if method == "sample":
    return jax.jit(lambda *args: task.sample(args[0], FROZEN, *args[1:]))
  return jax.jit(
    lambda variables, batch, rng: task.loss(
      variables, FROZEN, batch, rng, step=0, train=True
    )
  )


def test_masks_have_their_number_and_differ_by_key_alone():
  keys = jax.random.split(jax.random.key(3), 50)
  masks = np.asarray(mim.draw_masks(keys, (50, P), 11))
  np.testing.assert_array_equal(masks.sum(1), 11)
  assert len(np.unique(masks, axis=0)) > 45
  assert np.all(masks.mean(0) > 0.4) and np.all(masks.mean(0) < 0.95)
  np.testing.assert_array_equal(
    mim.draw_masks(keys[7:9], (2, P), 11), masks[7:9]
  )
  numbers = np.arange(50)[:, None] % 17
  masks = mim.draw_masks(keys, (50, P), numbers)
  np.testing.assert_array_equal(masks.sum(1), numbers[:, 0])
  # One key for all rows: rows differ nevertheless.
  masks = mim.draw_masks(keys[0], (50, P), 11)
  assert len(np.unique(masks, axis=0)) > 45


def test_pixel_targets_are_normalised_patch_by_patch():
  image = BATCH["image"]
  target = np.asarray(mim.pixel_target(image, PATCH, normalize=True))
  np.testing.assert_allclose(target.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(target.std(-1), 1, rtol=1e-4)
  np.testing.assert_allclose(
    mim.pixel_target(3 * image - 1, PATCH, normalize=True), target, atol=1e-4
  )
  flat = mim.pixel_target(np.ones_like(image), PATCH, normalize=True)
  np.testing.assert_array_equal(flat, 0)
  plain = mim.pixel_target(image, PATCH, normalize=False)
  np.testing.assert_array_equal(plain, mim_model.to_patches(image, PATCH))


def test_the_loss_does_not_depend_on_targets_that_are_visible():
  """By gradient with respect to what is compared with the target."""
  rng = np.random.default_rng(0)
  is_masked = np.asarray(mim.draw_masks(KEYS, (B, P), 6))
  target = rng.normal(size=(B, P, 3)).astype(np.float32)

  def loss(target, prediction):
    error = jnp.square(prediction - target).mean(-1)
    return mim.masked_mean(error, is_masked).sum()

  gradient = jax.grad(loss)(target, np.zeros_like(target))
  np.testing.assert_array_equal(np.any(gradient != 0, -1), is_masked)
  # The mean over the masked ones: the visible ones do not thin it out.
  error = (target**2).mean(-1)
  np.testing.assert_allclose(
    mim.masked_mean(error, is_masked)[1], error[1][is_masked[1]].mean()
  )

  logits = rng.normal(size=(B, P, V)).astype(np.float32)
  tokens = rng.integers(0, V, (B, P))
  grad = jax.grad(
    lambda x: mim.token_loss(x, tokens, is_masked, 0.1).loss.sum()
  )(logits)
  np.testing.assert_array_equal(np.any(grad != 0, -1), is_masked)


def test_token_loss_is_smoothed_cross_entropy():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(B, P, V)).astype(np.float32)
  tokens = rng.integers(0, V, (B, P))
  everything = np.ones((B, P), bool)
  output = mim.token_loss(logits, tokens, everything, 0.1)
  target = optax.smooth_labels(jax.nn.one_hot(tokens, V), 0.1)
  expected = optax.softmax_cross_entropy(logits, target).mean(-1)
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  np.testing.assert_allclose(
    output.metrics["accuracy"], (logits.argmax(-1) == tokens).mean(-1)
  )


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_counts_what_is_masked_alone(name):
  """By hand from the network's prediction."""
  task, variables = TASKS[name], _variables(name)
  output = _jitted(name)(variables, BATCH, KEYS)
  mask_rng = jax.vmap(jax.random.split)(KEYS)[:, 0]
  is_masked = np.asarray(mim.draw_masks(mask_rng, (B, P), task.num_masked))
  assert task.num_masked == {"pixel": 11, "token": 6}[name]
  prediction, _ = task.model.apply(variables, BATCH["image"], is_masked)
  if name == "pixel":
    target = mim.pixel_target(BATCH["image"], PATCH, normalize=True)
    errors_ = np.square(prediction - target).mean(-1)
  else:
    tokens = TOKENIZER.encode_tokens({}, BATCH["image"])
    logp = np.asarray(jax.nn.log_softmax(prediction))
    errors_ = -np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
  expected = [row[mask].mean() for row, mask in zip(errors_, is_masked)]
  np.testing.assert_allclose(output.loss, expected, rtol=1e-4)
  assert np.all(np.asarray(expected) > 0.1)


def test_stored_codes_serve_in_place_of_the_tokenizer():
  tokens = TOKENIZER.encode_tokens({}, BATCH["image"])
  variables, loss = _variables("token"), _jitted("token")
  np.testing.assert_array_equal(
    loss(variables, {**BATCH, "image_tokens": tokens}, KEYS).loss,
    loss(variables, BATCH, KEYS).loss,
  )


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_the_same_in_any_batch(name):
  variables = _variables(name)
  part = {"image": BATCH["image"][2:]}
  whole = _jitted(name)(variables, BATCH, KEYS).loss
  alone = _jitted(name)(variables, part, KEYS[2:]).loss
  np.testing.assert_allclose(alone, whole[2:], rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_visible_stays_and_the_rest_is_filled_in(name):
  output = _jitted(name, "sample")(_variables(name), BATCH, KEYS)
  is_masked = np.asarray(output["is_masked"])
  np.testing.assert_array_equal(is_masked.sum(1), TASKS[name].num_masked)
  patches, drawn, shown = (
    np.asarray(mim_model.to_patches(jnp.asarray(x), PATCH))
    for x in (BATCH["image"], output["image"], output["shown"])
  )
  np.testing.assert_array_equal(drawn[~is_masked], patches[~is_masked])
  np.testing.assert_array_equal(shown[~is_masked], patches[~is_masked])
  np.testing.assert_array_equal(shown[is_masked], 0)
  moved = np.abs(drawn - patches)[is_masked].max(-1)
  assert np.all(moved > 1e-3) and np.abs(drawn).max() <= 1


# Loss and gradient norm of the first step: tests/pinned_step.py.
PINNED = {"pixel": (1.506159, 3.138833), "token": (1.553034, 4.434313)}


@pytest.mark.parametrize("name", TASKS)
def test_the_first_step_is_pinned_and_parts_of_it_are_the_whole(name):
  pinned_step.check(
    TASKS[name], _variables(name)["params"], FROZEN, BATCH, PINNED[name]
  )


@pytest.mark.parametrize(
  ("name", "fields", "word"),
  [
    ("pixel", dict(mask_ratio=0.01), "masks 0 of 16 patches"),
    ("pixel", dict(mask_ratio=1.0), "masks 16 of 16 patches"),
    ("token", dict(upstream={}), "needs config.frozen.tokenizer"),
    (
      "token",
      dict(model=MODEL.clone(num_codes=9)),
      "num_codes is 9, but that of the tokenizer is 5",
    ),
    (
      "token",
      dict(model=MODEL.clone(num_codes=V, patch_size=4)),
      "grid_size is 2, but that of the tokenizer is 4",
    ),
  ],
)
def test_what_does_not_fit_is_an_error(name, fields, word):
  with pytest.raises(errors.UserError, match=word):
    dataclasses.replace(TASKS[name], **fields)


def test_a_tokenizer_of_other_pictures_is_an_error():
  small = dataclasses.replace(TOKENIZER, patch_size=1)
  task = dataclasses.replace(TASKS["token"], upstream={"tokenizer": small})
  with pytest.raises(errors.UserError, match="pictures have 4 pixels"):
    image_tokens.decode(task, FROZEN, jnp.zeros((1, P), jnp.int32))


@pytest.mark.parametrize(
  "config", ["mim.py:target=token", "completion.py:target=pixel"]
)
def test_the_other_target_of_a_config_can_be_trained(config):
  """Traced and not compiled."""
  config = config_lib.load(f"configs/baselines/{config},smoke")
  run = trainer.setup(config, abstract=True)
  assert set(evaluation.build(run)) == set(config.evals)
  _, metrics = jax.eval_shape(run.train_step(), *trainer.step_shapes(run))
  assert metrics["loss"].shape == ()
  with pytest.raises(errors.UserError, match="target=sound is not one of"):
    config_lib.load("configs/baselines/mim.py:target=sound")
