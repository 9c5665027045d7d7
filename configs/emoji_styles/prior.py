"""The diffusion prior on emoji in five styles.

  unclip train --config configs/emoji_styles/prior.py \
    --workdir runs/emoji_styles/prior \
    --config.frozen.clip.path=runs/emoji_styles/clip

As configs/emoji/prior.py; `report_unseen` is on pairs of object and style that
training has apart. `:quick` has the groups of the quickstart; `:smoke` trains
two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import prior
from configs.emoji_styles import clip, data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = prior.get_config(common.size(arg))
  config.model.context_length = data.CONTEXT_LENGTH
  config.frozen.clip = dict(path="runs/emoji_styles/clip")
  if arg.smoke:
    upstream = clip.get_config("smoke")
    config.frozen.clip = dict(path="", untrained=upstream)
  config.evals.report_unseen = dict(
    type="unclip_jax.evaluators.prior_report", pred="sample", max_examples=256
  )
  data.use(config, smoke=arg.smoke)
  return config
