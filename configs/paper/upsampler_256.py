"""The paper's first upsampler, 64 -> 256 px, 730 million parameters.

  unclip train --config configs/paper/upsampler_256.py \
    --workdir runs/paper/upsampler_256

Quoted are the rows of Table 3 (Ramesh et al. 2022), column "64 -> 256". It
needs no other stage. Emoji stand in for the data: configs/paper/data.py.
`:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.paper import data, stage
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = stage.base()
  config.name = "upsampler"
  image_size = 64 if arg.smoke else 256
  config.data = data.pairs(
    smoke=arg.smoke,
    image_size=image_size,
    crop_size=image_size // 4,  # "Crop fraction" 0.25
    low_res_size=image_size // 4,  # of the whole picture
    blur_kernel=3,  # Appendix C
    blur_sigma=0.6,  # Appendix C
    blur_prob=0.5,  # not given; as DALLE2-pytorch
  )

  config.task_name = "unclip_jax.tasks.upsampler"
  config.task = dict(
    process=dict(
      num_timesteps=1000,  # "Diffusion steps"
      schedule="cosine",  # "Noise schedule"
      prediction="eps",
      variance="fixed_small",
      clip_x_start=1.0,
    ),
    scale=4,
    sample_options=dict(
      sampler="ddim",  # "Sampling variance" DDIM
      num_sample_steps=27,  # "Sampling steps"
      # "Manually tuned" and not given: those of GLIDE's upsampler.
      step_placement="fast27",
    ),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=256,
    out_channels=3,
    channels=320,  # "Channels"
    num_res_blocks=3,  # "Depth"
    channel_mult=(1, 2, 3, 4),  # "Channels multiple"
    attention_resolutions=(),  # "Attention resolution" -
    scale_shift_norm=True,  # as GLIDE; Karlo has none
    dropout=0.1,  # "Dropout"
    remat="full",
    dtype="bfloat16",
  )

  config.num_steps = 1_000_000  # "Iterations" 1M
  config.batch_size = 1024  # "Batch size"
  config.ema_decay = 0.9999  # "EMA decay"
  config.optim.learning_rate = 1.2e-4  # "Learning rate"
  config.optim.weight_decay = 0.0  # "Weight decay" -
  config.optim.b2 = 0.999  # "Adam b2"
  config.optim.eps = 1e-8  # "Adam eps"
  config.evals = common.diffusion_evals(("low_res", "true", "drawn"))

  if arg.smoke:
    config.model.image_size = image_size
    config.model.channels = 16
    config.model.num_res_blocks = 1
    config.model.channel_mult = (1, 2)
    config.task.sample_options.num_sample_steps = 2
    config.task.sample_options.step_placement = "uniform"
    common.smoke(config)
  return config
