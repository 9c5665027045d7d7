"""The diffusion prior on shapes, over the CLIP of configs/shapes/clip.py.

  unclip train --config configs/shapes/prior.py --workdir runs/shapes/prior \
    --config.frozen.clip.path=runs/shapes/clip

That of configs/emoji/prior.py, on other data. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import prior
from configs.shapes import clip, data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = prior.get_config(common.size(arg))
  upstream = clip.get_config(common.size(arg))
  config.data = data.shapes(
    smoke=arg.smoke,
    image_size=32,
    clip_image_size=upstream.model.image_size,
  )
  config.model.embed_dim = upstream.model.embed_dim
  config.model.text_width = upstream.model.text_width
  config.model.context_length = data.CONTEXT_LENGTH
  config.frozen.clip = dict(path="runs/shapes/clip")
  config.evals = data.on_every_split(
    type="unclip_jax.evaluators.prior_report", pred="sample", max_examples=256
  )

  if not arg.smoke:
    config.model.width = 128
    config.model.depth = 4
    config.num_steps = 10_000
    config.optim.learning_rate = 1e-3
  if arg.quick:
    config.num_steps = 1500
    config.ema_decay = 0.995
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500
  if arg.smoke:
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
