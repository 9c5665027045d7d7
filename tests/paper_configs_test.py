"""The paper's configs have the paper's sizes."""

import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from unclip_jax.data import pipeline
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import trees

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load(name):
  return config_lib.load(str(ROOT / "configs" / "paper" / f"{name}.py"))


def counts(config, **inputs):
  """Parameters by name, for inputs of these shapes; none is made."""
  model = config_lib.instantiate(config.model_name, "Model", config.model)
  inputs["timesteps"] = ()
  shapes = jax.eval_shape(
    lambda inputs: model.init(jax.random.key(0), **inputs),
    {
      name: jax.ShapeDtypeStruct(
        (1, *shape), jnp.int32 if name in ("text_tokens", "timesteps") else "f4"
      )
      for name, shape in inputs.items()
    },
  )
  flat = trees.flatten(shapes["params"])
  return {name: math.prod(leaf.shape) for name, leaf in flat.items()}


def total(found, *prefixes):
  """Of the parameters under these names; without any, of all."""
  return sum(
    count
    for name, count in found.items()
    if not prefixes or name.split(".")[0] in prefixes
  )


def test_decoder():
  found = counts(
    load("decoder"),
    x_t=(64, 64, 3),
    image_embed=(1024,),
    text_tokens=(256,),
  )
  encoder, vocabulary = total(found, "text"), 49_408 * 2048
  assert encoder - vocabulary == 1_209_651_200
  # What unCLIP adds to GLIDE: the way in for the image embedding.
  image_embed = total(
    found,
    "image_embed_time_proj",
    "image_embed_tokens_proj",
    "null_image_embed",
  )
  assert image_embed == 2048 * 1025 + 4 * 2048 * 1025 + 1024
  # The guided-diffusion U-Net with keys and values of a context of width 2048
  # has this count; GLIDE adds the projection of the pooled text to it.
  text_time_proj = total(found, "text_time_proj")
  assert text_time_proj == 2048 * 2049
  unet = total(found) - encoder - image_embed - text_time_proj
  assert unet == 2_238_164_486


@pytest.mark.parametrize(
  ("name", "scale_shift_norm", "expected"),
  [
    ("upsampler_256", True, 729_702_083),
    ("upsampler_256", False, 691_579_523),
    ("upsampler_1024", True, 282_059_139),
    ("upsampler_1024", False, 267_146_691),
  ],
)
def test_upsamplers(name, scale_shift_norm, expected):
  config = load(name)
  assert config.model.scale_shift_norm
  config.model.scale_shift_norm = scale_shift_norm
  picture = (64, 64, 3)
  assert total(counts(config, x_t=picture, low_res=picture)) == expected


def test_prior_diffusion():
  found = counts(
    load("prior_diffusion"),
    x_t=(1024,),
    text_embed=(1024,),
    text_tokens=(256,),
  )
  assert total(found, "token_embed") == 49_408 * 2048
  ours = total(found, "token_embed", "null_text_encodings", "null_text_embed")
  # In Karlo's layout states of width 1024 come in by a projection, and a mean
  # and a standard deviation of embeddings are counted as parameters.
  karlo = 2048 * 1025 + 2 * 1024
  assert total(found) - ours + karlo == 1_225_927_680


@pytest.mark.parametrize(
  ("name", "side", "low_res"),
  [("upsampler_256", 64, 16), ("upsampler_1024", 256, 64), ("decoder", 64, 0)],
)
def test_sizes_of_the_pictures_in_training(name, side, low_res):
  config = load(name)
  data = pipeline.DataPipeline.from_config(config.data, seed=0)
  shapes = {k: v.shape[1:] for k, v in data.batch_spec(1).items()}
  assert shapes["image"] == (side, side, 3)
  assert not low_res or shapes["low_res"] == (low_res, low_res, 3)
  assert data.source.image_size == max(
    shape[0] for k, shape in data.preprocess.picture_shapes(train=False).items()
  )
