"""The upsampler on shapes, 32 -> 64 px; it needs no other stage.

  unclip train --config configs/shapes/upsampler.py \
    --workdir runs/shapes/upsampler_64

That of configs/emoji/upsampler.py, on other data. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import upsampler
from configs.shapes import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = upsampler.get_config(common.size(arg))
  config.data = data.shapes(
    smoke=arg.smoke,
    image_size=64,
    crop_size=32,  # training sees crops, sampling whole pictures
    low_res_size=32,
    blur_prob=0.5,
  )
  config.task.scale = 2
  config.evals = common.diffusion_evals(("low_res", "true", "drawn"))
  config.evals.scenes = dict(
    type="unclip_jax.evaluators.scenes", pred="sample", max_examples=128
  )

  if not arg.smoke:
    config.model.channels = 64
    config.model.num_res_blocks = 1
    config.num_steps = 4000
  if arg.quick:
    config.num_steps = 600
  if arg.smoke:
    common.smoke(config)
  return config
