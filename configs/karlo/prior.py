r"""Karlo's prior, trained on with your own pictures.

  unclip convert --from karlo --src DIR --out models/karlo --image_encoder DIR
  unclip train --config configs/karlo/prior.py:model=models/karlo,pictures=DIR \
    --workdir runs/karlo/prior

The image tower (`--image_encoder`) is needed, for its embeddings are what the
prior learns to draw. `,lora` behind the pictures trains adapters in place of
all weights (configs/lora.py).
"""

from __future__ import annotations

import ml_collections

from configs.emoji import prior
from configs.karlo import part


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return part.fine_tune(arg, "prior", _smoke)


def _smoke() -> ml_collections.ConfigDict:
  config = prior.get_config("smoke")
  config.model.learned_null_text = False
  config.task.normalize_text_embed = False
  config.task.text_drop_prob = 0.2
  return config
