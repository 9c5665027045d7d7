"""A transformer over a VQGAN's codes (Esser et al. 2021, arXiv 2012.09841).

  unclip train --config configs/baselines/dalle_vqgan.py \
    --workdir runs/baselines/dalle_vqgan \
    --config.frozen.tokenizer.path=runs/baselines/vqgan

The transformer of configs/baselines/dalle.py with captions as its condition,
over the codes of configs/baselines/vqgan.py; in the source classes and pictures
are. Beside that config it asks what the tokenizer does. `:smoke` trains two
steps.
"""

from __future__ import annotations

import ml_collections

from configs.baselines import dalle, vqgan
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  size = "smoke" if arg.smoke else None
  config = dalle.get_config(size)
  upstream = vqgan.get_config(size)
  config.name = "dalle_vqgan"
  config.model.num_codes = upstream.model.num_codes
  levels = len(upstream.model.channel_mult)
  config.model.grid_size = upstream.model.image_size // 2 ** (levels - 1)
  config.frozen.tokenizer = dict(path="runs/baselines/vqgan")
  if arg.smoke:
    config.frozen.tokenizer = dict(path="", untrained=upstream)
  return config
