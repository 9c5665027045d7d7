"""Is a prior needed, or could the decoder start from the text embedding?

  unclip train --config configs/ablations/no_prior.py \
    --workdir runs/ablations/no_prior --config.frozen.clip.path=runs/emoji/clip

Section 5.1 of the paper trains such a decoder: FID 9.16, where the whole stack
of the same size has 7.99. `UnCLIPPipeline.from_parts` takes it without a prior;
compare its pictures with `three_decodings` of the base, which feeds the text
embedding to a decoder that was trained on pictures (FID 16.55).
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = decoder.get_config(common.size(arg))
  config.task.condition_on = "text_embed"
  return config
