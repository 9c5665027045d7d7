"""GLIDE's upsampler on emoji, 32 -> 64 px, which reads the caption too.

  unclip train --config configs/baselines/glide_upsampler.py \
    --workdir runs/baselines/glide_upsampler_64

Nichol et al. 2021 (arXiv 2112.10741, section 4.1): conditioned on text as the
base model (glide.py) by a smaller encoder. Unlike unCLIP's it attends, and sees
whole pictures in training. `low_res` is blurred in half of the examples, as
unCLIP's. 2.5 million parameters; `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.baselines import glide
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  config.name = "glide_upsampler"
  config.data = data.emoji(
    quick=False,
    smoke=arg.smoke,
    image_size=64,
    low_res_size=32,
    blur_prob=0.5,
  )

  config.task_name = "unclip_jax.tasks.upsampler"
  config.task = dict(
    process=dict(schedule="cosine", prediction="x_start"),
    scale=2,
    sample_options=dict(sampler="ddim", num_sample_steps=27),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=64,
    patch_size=2,
    out_channels=3,
    channels=32,
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
    text_encoder=glide.text_encoder(width=64, depth=4, smoke=arg.smoke),
    dropout=0.0,
  )

  config.num_steps = 4000
  config.batch_size = 16
  config.ema_decay = 0.999
  config.optim.learning_rate = 3e-4
  config.evals = common.diffusion_evals(("low_res", "true", "drawn"))

  if arg.smoke:
    config.model.channels = 16
    config.model.head_channels = 16
    config.task.sample_options.num_sample_steps = 2
    common.smoke(config)
  return config
