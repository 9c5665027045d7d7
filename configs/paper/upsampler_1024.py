"""The paper's second upsampler, 256 -> 1024 px, 282 million parameters.

  unclip train --config configs/paper/upsampler_1024.py \
    --workdir runs/paper/upsampler_1024

Quoted are the rows of Table 3 (Ramesh et al. 2022), column "256 -> 1024"; the
other fields are those of the first upsampler. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs.paper import data, upsampler_256
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = upsampler_256.get_config("smoke" if arg.smoke else None)
  image_size = 64 if arg.smoke else 1024
  config.data = data.pairs(
    smoke=arg.smoke,
    image_size=image_size,
    crop_size=image_size // 4,  # "Crop fraction" 0.25
    low_res_size=image_size // 4,  # of the whole picture
    bsr_prob=1.0,  # Appendix C
  )
  config.task.process.schedule = "linear"  # "Noise schedule"
  config.task.sample_options.step_placement = "uniform"
  config.model.dropout = 0.0  # "Dropout" -
  if arg.smoke:
    return config

  config.task.sample_options.num_sample_steps = 15  # "Sampling steps"
  config.model.image_size = image_size
  config.model.channels = 192  # "Channels"
  config.model.num_res_blocks = 2  # "Depth"
  config.model.channel_mult = (1, 1, 2, 2, 4, 4)  # "Channels multiple"
  config.batch_size = 512  # "Batch size"
  config.optim.learning_rate = 1.0e-4  # "Learning rate"
  return config
