"""The decoder on emoji in five styles.

  unclip train --config configs/emoji_styles/decoder.py \
    --workdir runs/emoji_styles/decoder \
    --config.frozen.clip.path=runs/emoji_styles/clip

As configs/emoji/decoder.py; `match_unseen` is on pairs of object and style that
training has apart. `:quick` has the groups of the quickstart; `:smoke` trains
two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import decoder
from configs.emoji_styles import clip, data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = decoder.get_config(common.size(arg))
  config.frozen.clip = dict(path="runs/emoji_styles/clip")
  if arg.smoke:
    upstream = clip.get_config("smoke")
    config.frozen.clip = dict(path="", untrained=upstream)
  config.evals.match_unseen = config.evals.match.copy_and_resolve_references()
  data.use(config, smoke=arg.smoke)
  return config
