"""Does the decoder draw better where it sees its previous estimate?

  unclip train --config configs/ablations/decoder_self_conditioning.py \
    --workdir runs/ablations/self_conditioning \
    --config.frozen.clip.path=runs/emoji/clip

Self-conditioning (Chen et al. 2022, arXiv 2208.04202): the x_start that the
step before predicted comes beside x_t; half of the training steps see zeros,
the others a first prediction, which costs a second pass without a gradient.
Compare eval/match at equal steps. Chen et al. gain much on discrete data and a
little on pictures.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = decoder.get_config(common.size(arg))
  config.model.self_conditioning = True
  return config
