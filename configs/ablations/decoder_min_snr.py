"""Does min-SNR weighting of the loss help the decoder?

  unclip train --config configs/ablations/decoder_min_snr.py \
    --workdir runs/ablations/min_snr --config.frozen.clip.path=runs/emoji/clip

Hang et al. 2023 (arXiv 2303.09556) train faster on natural pictures with
gamma = 5. It weighs the noisy timesteps less, where emoji are learned: expect
it behind the base here.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, gamma=5.0, quick=False, smoke=False)
  config = decoder.get_config(common.size(arg))
  config.task.process.min_snr_gamma = arg.gamma
  return config
