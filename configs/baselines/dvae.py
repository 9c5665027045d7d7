"""DALL-E's discrete VAE on emoji (Ramesh et al. 2021, arXiv 2102.12092).

  unclip train --config configs/baselines/dvae.py --workdir runs/baselines/dvae

The first stage: pictures of 32 px become 8 x 8 codes of 512. The tokenizer of
configs/baselines/dalle.py and its relatives. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  config.name = "dvae"
  config.data = data.emoji(
    quick=False, smoke=arg.smoke, image_size=32, random_flip=True
  )

  config.task_name = "unclip_jax.tasks.dvae"
  config.task = dict(
    # 6.6 in the paper, where a code stands for 192 values and not for 48.
    kl_weight=1.0,
    kl_steps=0,  # 5,000 of 3 million there
    start_temperature=1.0,
    end_temperature=1 / 16,
    temperature_steps=1500,
    min_log_scale=-2.0,  # backgrounds are exactly white
  )
  config.model_name = "unclip_jax.models.dvae"
  config.model = dict(
    image_size=32,
    num_codes=512,  # few pictures: most of 8,192 would never be seen
    channels=64,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    codebook_width=128,
    logit_scale=4.0,
  )

  config.num_steps = 3500  # of 1 s of one core each
  config.batch_size = 32
  config.ema_decay = 0.999  # as the paper, like what follows
  config.optim.learning_rate = 1e-3  # 1e-4 there, for a hundred times as long
  config.optim.end_factor = 0.0125
  config.optim.weight_decay = 1e-4
  config.evals = common.diffusion_evals(("true", "drawn"))
  config.evals.codes = dict(
    type="unclip_jax.evaluators.code_usage",
    pred="reconstruct",
    split="train",
    num_codes=config.model.num_codes,
    max_examples=512,
  )

  if arg.smoke:
    config.model.num_codes = config.evals.codes.num_codes = 16
    config.model.channels = 16
    config.model.num_res_blocks = 1
    config.model.codebook_width = 16
    common.smoke(config)
  return config
