"""What should the decoder's network predict: eps, x_start or v?

  unclip train --config configs/ablations/decoder_prediction.py:prediction=eps \
    --workdir runs/ablations/eps --config.frozen.clip.path=runs/emoji/clip

The paper predicts eps. Expect x_start to be ahead on few, plain pictures and
few steps: after 600 steps of `:quick` at snr_scale=0.2 the share of training
pictures nearest to their own was 93 % for x_start and 65 % for v, and for v at
snr_scale=1.0 about a quarter.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(
    arg, prediction="eps", snr_scale=1.0, quick=False, smoke=False
  )
  config = decoder.get_config(common.size(arg))
  config.task.process.prediction = arg.prediction
  config.task.process.snr_scale = arg.snr_scale
  return config


def sweep(add: Callable[..., None]) -> None:
  for snr_scale in (1.0, 0.2):
    for prediction in ("eps", "x_start", "v"):
      add(prediction=prediction, snr_scale=snr_scale)
