"""Does blurring `low_res` in training help the upsampler?

  unclip train --config configs/ablations/upsampler_no_blur.py \
    --workdir runs/ablations/no_blur

The paper blurs, so that the upsampler forgives what the decoder draws. Expect
a better loss without, and worse pictures in the whole pipeline; `blur=1.0` is
the other end.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import upsampler
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, blur=0.0, quick=False, smoke=False)
  config = upsampler.get_config(common.size(arg))
  config.data.preprocess.blur_prob = arg.blur
  return config
