"""What Table 3 of the paper does not tell, decided once for all stages."""

from __future__ import annotations

import ml_collections

from configs import common
from configs.paper import clip as clip_config


def base() -> ml_collections.ConfigDict:
  """`common.base` for runs of half a million steps and more."""
  config = common.base()
  config.optim.schedule = "constant"  # the paper speaks of no decay
  config.optim.warmup_steps = 5000  # against Adam's first, rough steps
  config.optim.clip_norm = 1.0  # against single bad batches
  config.log_every_steps = 100
  config.eval_every_steps = 10_000
  config.checkpoint.every_steps = 5000
  return config


def clip() -> dict:
  """`config.frozen.clip`: a trained CLIP; before there is one, its shapes."""
  return dict(path="runs/paper/clip", untrained=clip_config.get_config())
