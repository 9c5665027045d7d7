r"""Karlo's super-resolution, trained on with your own pictures.

  unclip train --workdir runs/karlo/upsampler_256 --config \
    configs/karlo/super_resolution.py:model=models/karlo,pictures=DIR

The network of all steps but the last is trained; that of the last step stays as
it is. As in the paper, on crops and with a blurred `low_res`. `,lora` trains
adapters; as the network has no attention, say which kernels
(`--config.model.pattern='conv_.\.kernel$'`). `:scratch` trains one of its size
anew.
"""

from __future__ import annotations

import ml_collections

from configs.emoji import upsampler
from configs.karlo import part
from configs.paper import upsampler_256


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = part.fine_tune(arg, "upsampler_256", _smoke, _scratch)
  if config.name == "upsampler_256":
    config.data.preprocess.crop_size = 64
    config.data.preprocess.blur_prob = 0.5
  return config


def _smoke() -> ml_collections.ConfigDict:
  config = upsampler.get_config("smoke")
  config.model.scale_shift_norm = False
  config.model.low_res_resize = "bicubic"
  config.task.process = dict(schedule="cosine", prediction="eps")
  config.task.separate_last_step = True
  config.task.sample_options.sampler = "ddpm"
  return config


def _scratch(arg: str | None) -> ml_collections.ConfigDict:
  config = upsampler_256.get_config(arg)
  config.task.sample_options = dict(sampler="ddpm", num_sample_steps=7)
  config.model.scale_shift_norm = False
  config.model.low_res_resize = "bicubic"
  return config
