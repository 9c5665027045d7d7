"""Any model that draws from captions, as a pipeline of its own.

What is tried is not a network but what the pipeline does with one: a fake task
whose picture says what it was given.
"""

import dataclasses
import json
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import inference, stages, text_to_image, trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


class Model(nn.Module):
  image_size: int = 4


@dataclasses.dataclass(frozen=True)
class Task:
  """Draws a plane of one number; its red is a parameter, its green drawn."""

  model: nn.Module
  sample_options: Any = dataclasses.field(default_factory=dict)

  def sample(self, variables, frozen, batch, rng, *, blue=0.0):
    B = len(batch["text_tokens"])
    red = jnp.full(B, variables["params"]["red"])
    green = jax.vmap(jax.random.uniform)(rng)
    plane = jnp.stack([red, green, jnp.full(B, blue)], axis=-1)
    return {"image": jnp.broadcast_to(plane[:, None, None], (B, 4, 4, 3))}


@dataclasses.dataclass(frozen=True)
class Clip:
  """A picture fits a caption the better, the greener it is."""

  model: Any

  def predict_fns(self):
    def features(variables, frozen, batch, rng):
      green = batch["image"][:, 0, 0, 1]
      ones = jnp.ones((len(green), 1))
      return {"image_embed": green[:, None], "text_embed": ones}

    return {"features": features}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
  folder = tmp_path_factory.mktemp("assets")
  config = config_lib.load("configs/emoji/upsampler.py:smoke")
  for name, path in trainer.setup(config).data.assets().items():
    shutil.copy(path, folder / name)
  return str(folder)


@pytest.fixture
def parts(assets):
  config = config_lib.load("configs/emoji/upsampler.py:smoke")
  variables = {"params": {"red": np.float32(0.5)}}

  def loaded(task):
    return inference.Loaded(task, variables, {}, config, assets, "0")

  class Small:
    context_length = 8

  return {"clip": loaded(Clip(Small())), "generator": loaded(Task(Model()))}


def test_pictures_do_not_depend_on_the_batch(parts):
  pipe = text_to_image.TextToImagePipeline(parts)
  a = pipe(["a", "b", "c"], batch_size=2, output_type="np").images
  b = pipe(["a", "b", "c"], batch_size=3, output_type="np").images
  np.testing.assert_array_equal(a, b)
  assert a.shape == (3, 4, 4, 3) and len({*a[:, 0, 0, 1].tolist()}) == 3
  np.testing.assert_allclose(a[..., 0], 0.75)


def test_options_are_checked_and_used(parts):
  pipe = text_to_image.TextToImagePipeline(parts)
  output = pipe("a", options={"blue": 0.5}, output_type="np")
  np.testing.assert_allclose(output.images[..., 2], 0.75)
  assert output.options == {"generator": {"blue": 0.5}}
  with pytest.raises(errors.UserError, match="did you mean 'blue'"):
    pipe("a", options={"bleu": 0.5})
  with pytest.raises(errors.UserError, match="no prompt"):
    pipe([])


def test_the_clip_keeps_the_best_candidate(parts):
  pipe = text_to_image.TextToImagePipeline(parts)
  every = pipe("a", num_images_per_prompt=6, output_type="np").images
  kept = pipe(["a", "b"], num_candidates=3, output_type="np").images
  green = every[:, 0, 0, 1].reshape(2, 3)
  np.testing.assert_array_equal(kept[:, 0, 0, 1], green.max(axis=1))
  alone = text_to_image.TextToImagePipeline({"generator": parts["generator"]})
  with pytest.raises(errors.UserError, match="CLIP"):
    alone("a", num_candidates=2)


def test_a_model_that_draws_without_diffusion_fills_in_nothing(parts):
  pipe = text_to_image.TextToImagePipeline(parts)
  white = np.ones((4, 4, 3))
  with pytest.raises(errors.UserError, match="no option 'known'"):
    pipe.inpaint(white, white[..., 0], "a ring")
  with pytest.raises(errors.UserError, match="no option 'init'"):
    pipe.image_to_image(white, "a ring")


def test_a_model_without_a_generator_is_refused(parts):
  with pytest.raises(errors.UserError, match="generator"):
    text_to_image.TextToImagePipeline({"clip": parts["clip"]})


def test_upstream_models_are_found_by_the_configs(tmp_path):
  def run(name, **upstream):
    (tmp_path / name).mkdir(parents=True)
    frozen = {k: {"path": str(tmp_path / v)} for k, v in upstream.items()}
    text = json.dumps({"frozen": frozen})
    (tmp_path / name / "config.json").write_text(text)

  run("look")
  run("codes", perceptual="look")
  run("all/generator", tokenizer="codes")
  run("all/upsampler_64")
  run("all/upsampler_128")
  found = stages.run_folders(str(tmp_path / "all"), "generator")
  assert list(found) == [
    *("perceptual", "tokenizer", "generator", "upsampler_64", "upsampler_128"),
  ]
  assert found["perceptual"] == str(tmp_path / "look")
  run("other")
  run("clash", tokenizer="codes", perceptual="other")
  with pytest.raises(errors.UserError, match="perceptual"):
    stages.run_folders(str(tmp_path / "clash"), "generator")
  with pytest.raises(errors.UserError, match="neither"):
    stages.run_folders(str(tmp_path), "generator")
