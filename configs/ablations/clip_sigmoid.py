"""Does the pairwise sigmoid loss train a better CLIP than softmax?

  unclip train --config configs/ablations/clip_sigmoid.py \
    --workdir runs/ablations/clip_sigmoid

SigLIP (Zhai et al. 2023, arXiv 2303.15343) is ahead at batches below 16,384.
Compare eval/retrieval with that of `loss_type=softmax`, the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_collections

from configs import common
from configs.emoji import clip
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, loss_type="sigmoid", quick=False, smoke=False)
  config = clip.get_config(common.size(arg))
  config.task.loss_type = arg.loss_type
  if arg.loss_type == "sigmoid":
    config.model.logit_bias_init = -10.0  # Zhai et al., section 3.3
    config.model.logit_scale_init = math.log(10.0)
  return config


def sweep(add: Callable[..., None]) -> None:
  for batch_size in (32, 128):
    for loss_type in ("softmax", "sigmoid"):
      add({"batch_size": batch_size}, loss_type=loss_type)
