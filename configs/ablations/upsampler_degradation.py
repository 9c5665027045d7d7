"""Does corrupting `low_res` in training help the upsampler?

  unclip train --config configs/ablations/upsampler_degradation.py \
    --workdir runs/ablations/degradation

Compare none at all with `blur=1.0` and `bsr=1.0`. The paper blurs for its first
upsampler and degrades by BSR for its second, so that they forgive what the
stage before draws. Expect the better loss without, and worse pictures in the
whole pipeline.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import common
from configs.emoji import upsampler
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, blur=0.0, bsr=0.0, quick=False, smoke=False)
  config = upsampler.get_config(common.size(arg))
  config.data.preprocess.blur_prob = arg.blur
  config.data.preprocess.bsr_prob = arg.bsr
  return config


def sweep(add: Callable[..., None]) -> None:
  add()
  add(blur=1.0)
  add(bsr=1.0)
