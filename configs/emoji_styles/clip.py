"""CLIP on emoji in five styles: does it know "a noto style frog" unseen?

  unclip train --config configs/emoji_styles/clip.py \
    --workdir runs/emoji_styles/clip

As configs/emoji/clip.py. On pairs of object and style that training has apart,
`retrieval_unseen` has to tell an object's styles apart, `style_unseen` and
`object_unseen` name them by the captions of the other pairs. `:quick` has the
groups of the quickstart; `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import clip
from configs.emoji_styles import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = clip.get_config(common.size(arg))
  config.model.context_length = data.CONTEXT_LENGTH
  classify = dict(type="unclip_jax.evaluators.zero_shot", pred="embed")
  config.evals.update(
    retrieval_unseen=dict(type="unclip_jax.evaluators.retrieval", pred="embed"),
    style_unseen=dict(classify, class_field="style"),
    object_unseen=dict(classify, class_field="object"),
  )
  data.use(config, smoke=arg.smoke)
  return config
