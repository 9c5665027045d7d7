"""The upsampler on emoji, 16 -> 64 px; it needs no other stage.

  unclip train --config configs/emoji/upsampler.py \
    --workdir runs/emoji/upsampler_64

`:quick` is the last stage of `make quickstart`; `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = common.base()
  config.name = "upsampler"
  config.data = data.emoji(
    quick=arg.quick,
    smoke=arg.smoke,
    image_size=64,
    crop_size=32,  # training sees crops, sampling whole pictures
    low_res_size=16,  # of the whole picture
    blur_prob=0.5,
    random_flip=True,
  )

  config.task_name = "unclip_jax.tasks.upsampler"
  config.task = dict(
    # x_start, where the paper has eps: plain areas stay clean after few steps.
    process=dict(schedule="cosine", prediction="x_start"),
    scale=4,
    sample_options=dict(sampler="ddim", num_sample_steps=27),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=64,
    patch_size=2,
    out_channels=3,
    channels=96,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(),
    dropout=0.0,
  )

  config.num_steps = 6000
  config.batch_size = 16
  config.ema_decay = 0.999
  config.optim.learning_rate = 3e-4
  config.evals = common.diffusion_evals(("low_res", "true", "drawn"))

  if arg.quick:
    config.model.channels = 64
    config.model.num_res_blocks = 1
    common.evaluate_on(config, "train")  # nothing is held out
    config.num_steps = 600
    config.ema_decay = 0.99
    config.optim.learning_rate = 2e-3
    config.eval_every_steps = 600
    config.checkpoint.every_steps = 300
  if arg.smoke:
    config.model.patch_size = 1
    config.model.channels = 16
    config.model.num_res_blocks = 1
    config.task.sample_options.num_sample_steps = 2
    common.smoke(config)
  return config
