"""The pipeline with an autoregressive prior (tests/quickstart_test.py has the
diffusion prior)."""

import dataclasses
import json

import numpy as np
import pytest

from tests import random_pipelines
from unclip_jax import pipelines, trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

PROMPTS = ["a red circle", "a blue square", "a ring"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  return random_pipelines.make(tmp_path_factory.mktemp("assets"), "prior_ar")


def draw(pipe, prompts=PROMPTS, **options):
  return pipe(prompts, output_type="np", **options)


def test_same_seed_same_pictures_whatever_the_batch(pipe):
  together = draw(pipe, seed=5)
  one_by_one = draw(pipe, seed=5, batch_size=1)
  np.testing.assert_allclose(
    one_by_one.image_embeds, together.image_embeds, atol=1e-4
  )
  np.testing.assert_allclose(one_by_one.images, together.images, atol=1e-3)
  other = draw(pipe, seed=6)
  assert np.abs(other.image_embeds - together.image_embeds).max() > 0.01
  twice = draw(pipe, PROMPTS[:1], seed=5, num_images_per_prompt=3)
  np.testing.assert_allclose(
    twice.image_embeds[0], together.image_embeds[0], atol=1e-4
  )
  assert np.abs(np.diff(twice.image_embeds, axis=0)).max() > 0.01


def test_an_ar_prior_has_no_steps_no_noise_and_no_sampler(pipe):
  with pytest.raises(errors.UserError, match="leave prior_steps out"):
    draw(pipe, prior_steps=10)
  noise = {
    "decoder": np.ones((3, 3, 16, 16, 3), np.float32),
    "upsampler_64": np.ones((3, 3, 64, 64, 3), np.float32),
  }
  a = draw(pipe, noise=noise, sampler="ddim")
  assert "sampler" not in a.options["prior"]
  assert a.options["decoder"]["sampler"] == "ddim"
  with pytest.raises(errors.UserError, match="draws codes, not noise"):
    draw(pipe, noise={**noise, "prior": noise["decoder"]})
  with pytest.raises(errors.UserError, match="lacks the stage 'decoder'"):
    draw(pipe, noise={"upsampler_64": noise["upsampler_64"]})


def _changed(pipe, name, **fields):
  """The pipeline with another network in one part."""
  part = pipe.parts[name]
  task = dataclasses.replace(part.task, model=part.task.model.copy(**fields))
  return pipelines.UnCLIPPipeline(
    {**pipe.parts, name: part._replace(task=task)}
  )


def test_texts_are_as_long_as_the_networks_take(pipe):
  def length(pipe):
    return pipe.tokenize(["a circle"])["text_tokens"].shape[1]

  known = pipe.parts["prior"].task.model.context_length
  assert length(pipe) == known
  # A prior may have been trained on fewer tokens than its CLIP takes.
  assert length(_changed(pipe, "prior", context_length=known - 3)) == known - 3
  encoder = dict(context_length=known + 5)
  assert length(_changed(pipe, "decoder", text_encoder=encoder)) == known + 5


def test_a_converted_part_names_no_data(pipe):
  parts = dict(pipe.parts)
  for name in ("decoder", "upsampler_64"):
    config = parts[name].config.copy_and_resolve_references()
    with config.unlocked():
      del config.data
    parts[name] = parts[name]._replace(config=config)
  converted = pipelines.UnCLIPPipeline(parts)
  with pytest.raises(errors.UserError, match="decoder was converted"):
    converted.data()
  with pytest.raises(errors.UserError, match="upsampler_64 was converted"):
    converted.fit_variance("upsampler_64")


def test_guidance_of_the_prior_reaches_it(pipe):
  plain, guided = (
    draw(pipe, prior_guidance_scale=scale).image_embeds for scale in (1.0, 4.0)
  )
  assert np.abs(plain - guided).max() > 0.01


def test_callback_counts_codes_and_steps(pipe):
  calls = []
  draw(pipe, PROMPTS[:1], callback=lambda *args: calls.append(args))
  num_codes = pipe.parts["prior"].task.model.num_codes
  expected = [("prior", i + 1, num_codes) for i in range(num_codes)]
  for stage in ("decoder", "upsampler_64"):
    expected += [(stage, i + 1, 2) for i in range(2)]
  assert calls == expected


def test_a_trained_run_saved_loaded_and_drawn_from(pipe, tmp_path, run_python):
  model, run, again = (str(tmp_path / x) for x in ("model", "run", "again"))
  pipe.save_pretrained(model)
  config = config_lib.load("configs/emoji/prior_ar.py:smoke")
  with config.unlocked():
    config.frozen.clip = dict(path=f"{model}/clip")
  trainer.train(config, run)
  folders = {name: f"{model}/{name}" for name in pipe.parts}
  whole = pipelines.UnCLIPPipeline.from_parts({**folders, "prior": run})
  whole.save_pretrained(again)
  loaded = pipelines.UnCLIPPipeline.from_pretrained(again)
  a, b = draw(whole), draw(loaded)
  np.testing.assert_array_equal(a.images, b.images)
  np.testing.assert_array_equal(a.image_embeds, b.image_embeds)
  assert np.abs(a.image_embeds - draw(pipe).image_embeds).max() > 0.01

  command = ["-m", "unclip_jax.sample", f"--model={again}", "--prompt=a ring"]
  out = tmp_path / "out"
  run_python(*command, f"--out={out}", "--num_images=2")
  rows = [json.loads(x) for x in (out / "samples.jsonl").open()]
  assert len(rows) == 2
  assert rows[0]["options"]["prior"]["dot_quantile"] == 0.5
  failed = run_python(*command, f"--out={out}", "--prior_steps=4", check=False)
  assert failed.returncode == 2 and "prior_steps" in failed.stderr


def test_a_decoder_that_drops_the_embedding_needs_no_prior(pipe):
  parts = {k: v for k, v in pipe.parts.items() if k in ("clip", "decoder")}
  decoder = parts["decoder"]
  options = {**decoder.task.sample_options, "use_image_embed": False}
  task = dataclasses.replace(decoder.task, sample_options=options)
  parts["decoder"] = decoder._replace(task=task)
  alone = pipelines.UnCLIPPipeline(parts)
  drawn = alone(["a ring"], output_type="np").images
  given = {**alone.tokenize(["a ring"]), "image_embed": np.ones((1, 16))}
  again = alone.draw(given, {"decoder": {}}).images
  np.testing.assert_array_equal(drawn, again)
  assert drawn.std() > 0
