"""Does a decoder inpaint better that is trained for it?

  unclip train --config configs/ablations/decoder_inpainting.py \
    --workdir runs/ablations/inpainting \
    --config.frozen.clip.path=runs/emoji/clip

A trained plain decoder is a start for all but the first convolution, which has
more input channels here:

    --config.init_from.path=runs/emoji/decoder \
    --config.init_from.names='^(?!params.conv_in.kernel)'

As GLIDE's (Nichol et al. 2021, section 4.3): the network sees the known part of
the picture and where it is. `inpaint` of the pipeline shows it both; with the
base it can only put the known pixels into every prediction. Expect edges that
fit where the base leaves seams, and at `known=0` the base's own loss.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, known=0.5, quick=False, smoke=False)
  config = decoder.get_config(common.size(arg))
  config.model.inpainting = True
  config.task.known_prob = arg.known
  return config
