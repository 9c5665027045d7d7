"""CLIP on shapes.

  unclip train --config configs/shapes/clip.py --workdir runs/shapes/clip

`:quick` is a quarter of it; `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.shapes import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = common.base()
  config.name = "clip"
  config.data = data.shapes(smoke=arg.smoke, image_size=32)

  config.task_name = "unclip_jax.tasks.clip"
  config.task = dict(loss_type="softmax", max_logit_scale=100.0)
  config.model_name = "unclip_jax.models.clip"
  config.model = dict(
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_depth=3,
    vision_num_heads=4,
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    text_width=128,
    text_depth=3,
    text_num_heads=4,
    embed_dim=128,
  )

  config.num_steps = 6000
  config.batch_size = 128
  config.ema_decay = 0.999
  config.optim.learning_rate = 5e-4
  config.optim.weight_decay = 0.2  # as Radford et al. 2021
  config.optim.b2 = 0.98
  config.optim.eps = 1e-6
  config.optim.warmup_steps = 200
  config.evals = data.on_every_split(
    type="unclip_jax.evaluators.retrieval", pred="embed", max_examples=512
  )

  if arg.quick:
    config.num_steps = 1500
    config.ema_decay = 0.995
    config.optim.learning_rate = 1e-3
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500
  if arg.smoke:
    config.model.vision_width = config.model.text_width = 16
    config.model.vision_depth = config.model.text_depth = 1
    config.model.vision_num_heads = config.model.text_num_heads = 2
    config.model.embed_dim = 16
    common.smoke(config)
  return config
