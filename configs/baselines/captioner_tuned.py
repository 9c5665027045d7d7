"""A captioner of emoji that trains the image tower of a CLIP on.

  unclip train --config configs/baselines/captioner_tuned.py \
    --workdir runs/baselines/captioner_tuned \
    --config.init_from.path=runs/emoji/clip

As configs/baselines/captioner.py, but the tower is a part of the model: it
starts as the CLIP's and learns at a tenth of the decoder's rate. The tower as
it is: --config.optim.rules="(('^vision', 'freeze'),)". `:smoke` trains two
steps from scratch.
"""

from __future__ import annotations

import ml_collections

from configs.baselines import captioner
from configs.emoji import clip
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  size = "smoke" if arg.smoke else None
  config = captioner.get_config(size)
  tower = clip.get_config(size).model
  config.name = "captioner_tuned"
  config.frozen = ml_collections.ConfigDict()
  config.model.vision_tower = dict(
    image_size=tower.image_size,
    patch_size=tower.patch_size,
    width=tower.vision_width,
    depth=tower.vision_depth,
    num_heads=tower.vision_num_heads,
    embed_dim=tower.embed_dim,
  )
  config.optim.rules = ((r"^vision\.", dict(lr_mult=0.1)),)
  if not arg.smoke:
    config.init_from = dict(path="runs/emoji/clip", names=r"^params\.vision\.")
  return config
