"""A decoder on shapes that is given captions alone, in the manner of GLIDE.

  unclip train --config configs/shapes/decoder_text.py \
    --workdir runs/shapes/decoder_text \
    --config.frozen.clip.path=runs/shapes/clip

The same network as configs/shapes/decoder.py, the CLIP embedding always
dropped (so that which CLIP it is does not matter), the caption in 20 %
(GLIDE, Nichol et al. 2021, section 4.2). `:quick` and `:smoke` are as there.
"""

from __future__ import annotations

import ml_collections

from configs.shapes import decoder


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = decoder.get_config(arg)
  config.name = "decoder_text"
  config.task.image_embed_drop_prob = 1.0
  config.task.text_drop_prob = 0.2
  config.task.sample_options.use_image_embed = False
  return config
