"""GLIDE on emoji, trained on to fill in what is missing of a picture.

  unclip train --config configs/baselines/glide_inpainting.py \
    --workdir runs/baselines/glide_inpainting \
    --config.init_from.path=runs/baselines/glide

Nichol et al. 2021 (arXiv 2112.10741, section 4.3): the model of glide.py goes
on, with four input channels more, of the known part of the picture and where it
is. Their weights start at zero, so that the first step is the base model's. A
random part of every picture is shown. The grid of samples is drawn with nothing
shown: it should stay the base model's. `:smoke` trains two steps from scratch.
"""

from __future__ import annotations

import ml_collections

from configs.baselines import glide
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = glide.get_config("smoke" if arg.smoke else None)
  config.name = "glide_inpainting"
  config.model.inpainting = True
  config.task.known_prob = 1.0
  # The first convolution's inputs: the channels of each pixel of a patch.
  grown = ((r"\.conv_in\.kernel$", 2, config.model.patch_size**2),)
  config.init_from = dict(
    path="" if arg.smoke else "runs/baselines/glide", names=".*", grown=grown
  )
  if not arg.smoke:
    config.num_steps = 2000
    config.optim.learning_rate = 1e-4
  return config
