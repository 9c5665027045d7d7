"""How often should the decoder lose its conditions in training?

  unclip train --config configs/ablations/decoder_drop.py \
    --workdir runs/ablations/drop --config.frozen.clip.path=runs/emoji/clip

The default is section 2.1 of the paper: the embedding 10 %, the caption 50 %.
Its section 5.1 speaks of 5 %: `image_embed=0.05,text=0.05`. Expect little to
change at guidance_scale 1 and much where the text alone must do: see
`three_decodings` of the pipeline. `text=1.0` asks whether the decoder needs the
caption at all: it "offers little help" in section 2.1. Expect the same from
true embeddings, and a loss from the prior's, whose errors captions make up for.
`learned_null=false` puts zero in the place of a dropped embedding; the paper
allows both.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(
    arg, image_embed=0.1, text=0.5, learned_null=True, quick=False, smoke=False
  )
  config = decoder.get_config(common.size(arg))
  config.task.image_embed_drop_prob = arg.image_embed
  config.task.text_drop_prob = arg.text
  config.model.learned_null_image_embed = arg.learned_null
  return config


def sweep(add: Callable[..., None]) -> None:
  add()
  add(image_embed=0.05, text=0.05)
  add(text=1.0)
  add(learned_null=False)
