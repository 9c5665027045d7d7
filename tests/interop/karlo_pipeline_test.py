"""A whole Karlo here against diffusers' UnCLIPPipeline, with the same noise."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.interop import torch_karlo  # noqa: E402
from unclip_jax import pipelines, stages  # noqa: E402
from unclip_jax.interop import karlo  # noqa: E402
from unclip_jax.utils import errors  # noqa: E402

PROMPTS = ["a red frog", "", "hello world of an unicorn and the bear's owl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  theirs, ours = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("a")
  torch_karlo.save_model(theirs)
  stages.write_index(str(ours), karlo.convert_in(str(theirs), str(ours)))
  return theirs, ours


@pytest.fixture(scope="module")
def pipe(folders):
  return pipelines.UnCLIPPipeline.from_pretrained(str(folders[1]))


def _noise(N: int, prior: int, decoder: int, upsampler: int):
  rng = np.random.default_rng(0)
  shapes = {
    "prior": (prior + 1, N, 32),
    "decoder": (decoder + 1, N, 16, 16, 3),
    "upsampler_32": (upsampler + 1, N, 32, 32, 3),
  }
  noise = {k: rng.standard_normal(v, np.float32) for k, v in shapes.items()}
  for x in noise.values():
    # x_T, away from what the networks predict: at timestep 999 the difference
    # is divided by 5e-5, and a small one would hang on the last bit.
    x[0] += np.copysign(1.0, x[0])
  return noise


@pytest.mark.parametrize(
  "is_exact, num_prompts, steps, scales",
  [
    (True, 1, (3, 4, 2), (4.0, 8.0)),
    (False, 1, (3, 4, 2), (4.0, 8.0)),
    (False, 3, (5, 3, 7), (4.0, 8.0)),
    (False, 3, (3, 4, 2), (1.0, 1.0)),
  ],
)
def test_pictures_are_those_of_diffusers(
  is_exact, num_prompts, steps, scales, folders, pipe, monkeypatch
):
  prompts = PROMPTS[:num_prompts]
  noise = _noise(num_prompts, *steps)
  theirs = torch_karlo.load_pipeline(folders[0])
  if is_exact:
    for name in ("prior", "decoder", "super_res"):
      torch_karlo.make_exact(getattr(theirs, f"{name}_scheduler"))
  torch_karlo.inject_noise(monkeypatch, list(noise.values()))
  expected = theirs(
    prompts,
    prior_num_inference_steps=steps[0],
    decoder_num_inference_steps=steps[1],
    super_res_num_inference_steps=steps[2],
    prior_guidance_scale=scales[0],
    decoder_guidance_scale=scales[1],
    output_type="np",
  ).images
  ours = pipe(
    prompts,
    prior_steps=steps[0],
    decoder_steps=steps[1],
    upsampler_steps=steps[2],
    prior_guidance_scale=scales[0],
    guidance_scale=scales[1],
    noise=noise,
    output_type="np",
  ).images
  assert expected.std() > 0.1
  assert np.abs(ours - expected).max() < (2e-5 if is_exact else 1 / 255)


def test_defaults_are_those_of_karlo(pipe):
  options = {name: pipe.options(name) for name in ("prior", "decoder")}
  assert options["prior"]["guidance_scale"] == 4.0
  assert options["prior"]["num_sample_steps"] == 25
  assert options["decoder"]["guidance_scale"] == 8.0
  assert options["decoder"]["num_sample_steps"] == 25
  assert pipe.options("upsampler_32")["num_sample_steps"] == 7
  assert pipe.parts["prior"].task.diffusion.clip_x_start == 5.0


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_any_sampler_may_be_taken(sampler, pipe):
  output = pipe("a red frog", sampler=sampler, decoder_steps=3, prior_steps=3)
  assert output.options["decoder"]["sampler"] == sampler
  assert output.images[0].size == (32, 32)


@pytest.mark.parametrize("scale", [8.0, 1.0])
def test_variations_are_those_of_diffusers(scale, folders, pipe, monkeypatch):
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8))
  noise = _noise(1, 1, 4, 3)
  del noise["prior"]
  theirs = torch_karlo.load_variations(folders[0])
  torch_karlo.inject_noise(monkeypatch, list(noise.values()))
  expected = theirs(
    picture,
    decoder_num_inference_steps=4,
    super_res_num_inference_steps=3,
    decoder_guidance_scale=scale,
    output_type="np",
  ).images
  monkeypatch.setitem(
    pipe.parts["upsampler_32"].task.sample_options, "num_sample_steps", 3
  )
  output = pipe.variations(
    picture,
    num_images=1,
    from_noise=True,
    guidance_scale=scale,
    decoder_steps=4,
    noise=noise,
  )
  ours = np.asarray(output.images[0], np.float32)
  # Half a step of the bytes, and the bound of the numbers behind them.
  assert np.abs(ours - 255 * expected[0]).max() < 1.5


def test_a_picture_is_varied_from_its_own_noise(pipe):
  picture = np.random.default_rng(0).random((40, 30, 3))
  output = pipe.variations(picture, num_images=2, decoder_steps=3)
  assert len(output.images) == 2


def test_bfloat16_weights_and_offloading(folders, pipe):
  noise = _noise(1, 3, 4, 2)
  options = dict(prior_steps=3, decoder_steps=4, upsampler_steps=2, noise=noise)

  def draw(**how):
    other = pipelines.UnCLIPPipeline.from_pretrained(str(folders[1]), **how)
    return other("a red frog", output_type="np", **options).images

  exact = pipe("a red frog", output_type="np", **options).images
  np.testing.assert_array_equal(draw(offload=True), exact)
  for how in (dict(), dict(compute_dtype="bfloat16")):
    images = draw(weights_dtype="bfloat16", **how)
    assert 0 < np.abs(images - exact).mean() < 0.1


def test_a_clip_of_another_size_is_refused(folders, tmp_path):
  with pytest.raises(errors.UserError, match="there is no"):
    karlo.convert_in(str(tmp_path / "nothing"), str(tmp_path / "out"))
