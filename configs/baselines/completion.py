"""Autoregressive image completion on emoji (Image GPT: Chen et al. 2020).

  unclip train --config configs/baselines/completion.py \
    --workdir runs/baselines/completion \
    --config.frozen.tokenizer.path=runs/baselines/dvae

target=token: the codes of configs/baselines/dvae.py, drawn one after another.
target=pixel: patches of pixels, completed by their means; needs no tokenizer.
It knows no captions: the lower half of a picture is drawn to the upper one.
`:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.baselines import mim
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, target="token", smoke=False)
  mim.check_target(arg.target)
  config = common.base()
  config.name = "completion"
  config.data = data.emoji(
    quick=False, smoke=arg.smoke, image_size=32, random_flip=True
  )

  config.task_name = "unclip_jax.tasks.completion"
  config.task = dict(
    sample_options=dict(
      num_known_rows=None,  # half of them
      temperature=1.0,
      top_k=None,
      top_p=0.9,
    ),
  )
  config.model_name = "unclip_jax.models.completion"
  config.model = dict(
    image_size=32,
    patch_size=4,
    width=192,
    depth=6,
    num_heads=6,
    num_codes=None,
    dropout=0.1,
  )
  if arg.target == "token":
    mim.add_tokenizer(config, arg.smoke)

  config.num_steps = 6000
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 5e-4
  config.optim.b2 = 0.95  # as Image GPT, with the weight decay
  config.optim.weight_decay = 0.01
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    mim.smoke(config)
  return config
