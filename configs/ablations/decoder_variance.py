"""Does a learned variance (the hybrid loss) help the decoder?

  unclip train --config configs/ablations/decoder_variance.py \
    --workdir runs/ablations/variance --config.frozen.clip.path=runs/emoji/clip

Compare with `variance=fixed_small` and `variance=fixed_large`, all sampled by
DDPM, which alone uses the variance. The paper learns it; expect a difference
at few sampling steps (Nichol & Dhariwal 2021, fig. 8).
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(
    arg, variance="learned_range", quick=False, smoke=False
  )
  config = decoder.get_config(common.size(arg))
  config.task.process.variance = arg.variance
  config.model.out_channels = 6 if arg.variance == "learned_range" else 3
  config.task.sample_options.sampler = "ddpm"
  return config


def sweep(add: Callable[..., None]) -> None:
  for variance in ("learned_range", "fixed_small", "fixed_large"):
    add(variance=variance)
