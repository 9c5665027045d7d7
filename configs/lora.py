r"""Adapters (LoRA) on a trained model of any kind, in place of all its weights.

  unclip train --config configs/lora.py:base=models/x/decoder \
    --workdir runs/lora
  unclip convert --from lora --src runs/lora --out models/mine/decoder

`base` is a run folder or a part of a released model; task, data and evaluators
are those of its own config. The run's checkpoints hold the adapters alone. The
second command adds them to the base: with OUT in a copy of a released model
they take the place of that part. More kernels are adapted by
`--config.model.pattern='\.kernel$'`, as a network without attention needs.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax import checkpoints
from unclip_jax.models import lora
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, base="", smoke=False)
  if arg.smoke:
    base = decoder.get_config("smoke")
  elif arg.base:
    base = checkpoints.load_config(arg.base)
  else:
    raise errors.UserError(
      "name the model to adapt: --config configs/lora.py:base=FOLDER"
    )
  config = common.base()
  config.name = "lora"
  config.data = base.data
  config.evals = base.evals
  config.frozen.base = dict(path=arg.base)

  config.task_name = "unclip_jax.tasks.lora"
  config.task = ml_collections.ConfigDict()
  config.model_name = "unclip_jax.models.lora"
  config.model = dict(rank=8, alpha=8.0, pattern=lora.Model.pattern)

  config.num_steps = 1000
  config.batch_size = 16
  config.ema_decay = 0.99
  config.optim.schedule = "constant"
  config.eval_every_steps = 500
  config.checkpoint.every_steps = 500
  if arg.smoke:
    config.frozen.base.untrained = base
    common.smoke(config)
  return config
