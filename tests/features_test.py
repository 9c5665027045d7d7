"""A frozen network behind what draws pictures."""

import jax
import numpy as np
import pytest

from tests import random_variables, tiny_features
from unclip_jax import features, model_folder, trainer
from unclip_jax.tasks import clip as clip_task
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.uniform(-1, 1, (*shape, 3)).astype(np.float32)


def test_drawn_and_true_pictures_have_features_of_their_own(tmp_path):
  network = features.load(tiny_features.write(str(tmp_path), 3.0))
  drawn, true = pictures(4, 8, 8), pictures(4, 16, 16, seed=1)
  batch = {"image": true, "index": np.arange(4), "mask": np.ones(4, bool)}
  predict = network.beside(lambda b: {"image": drawn, "note": b["index"]}, None)
  found = predict(batch)
  for prefix, images in (("", drawn), ("true_", true)):
    expected = 3.0 * images.mean(axis=(1, 2))
    np.testing.assert_allclose(
      found[f"{prefix}features"], expected, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      found[f"{prefix}logits_unbiased"], 2 * expected, rtol=1e-4, atol=1e-6
    )
  assert found["image"] is drawn and found["note"] is batch["index"]


def test_what_draws_nothing_is_refused(tmp_path):
  network = features.load(tiny_features.write(str(tmp_path), 1.0))
  predict = network.beside(lambda b: {"loss": np.zeros(4)}, None)
  with pytest.raises(errors.UserError, match="needs 'image' in the prediction"):
    predict({"image": pictures(4, 8, 8)})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """(folder, run, variables) of a CLIP with random weights."""
  run = trainer.setup(config_lib.load("configs/emoji/clip.py:smoke"))
  batch = next(iter(run.data.eval_batches("train", 4)))
  variables = random_variables.like(run.task.init, batch, {})
  folder = str(tmp_path_factory.mktemp("clip"))
  model_folder.save_model(folder, run.config, variables, {}, run.data.assets())
  return folder, run, variables


def test_a_clip_sees_pictures_of_any_size_and_reads_the_captions(clip):
  folder, run, variables = clip
  network = features.load(folder)
  size = run.task.image_size
  batch = next(iter(run.data.eval_batches("train", 4)))
  captions = [f"a {i}" for i in range(4)]

  def info(index):
    return {"captions": (captions[index], "another")}

  drawn = pictures(4, 2 * size, 2 * size)
  batch = {"image": batch["image"], "index": np.arange(4)[::-1]}
  found = network.beside(lambda b: {"image": drawn}, info)(batch)
  # The true pictures have the CLIP's own size already.
  encode_image = jax.jit(run.task.encode_image)
  true = encode_image(variables, batch["image"])
  np.testing.assert_allclose(
    found["true_image_embed"], clip_task.normalize(true), atol=1e-5
  )
  tokens = run.data.tokenizer.encode(
    captions[::-1], run.task.model.context_length
  )
  text, _ = jax.jit(run.task.encode_text)(variables, *tokens)
  np.testing.assert_allclose(
    found["text_embed"], clip_task.normalize(text), atol=1e-5
  )
  small = jax.image.resize(drawn, (4, size, size, 3), "bicubic")
  image = encode_image(variables, np.clip(small, -1, 1))
  np.testing.assert_allclose(
    found["image_embed"], clip_task.normalize(image), atol=1e-5
  )
  assert "true_text_embed" not in found
  without = network.beside(lambda b: {"image": drawn}, None)(batch)
  assert "text_embed" not in without


def test_a_model_that_reads_no_pictures_is_refused(tmp_path):
  run = trainer.setup(config_lib.load("configs/emoji/upsampler.py:smoke"))
  batch = next(iter(run.data.eval_batches("train", 2)))
  variables = random_variables.like(run.task.init, batch, {})
  model_folder.save_model(tmp_path, run.config, variables, {}, {})
  with pytest.raises(errors.UserError, match="gives no features of pictures"):
    features.load(str(tmp_path))
