r"""Karlo's decoder, trained on with your own pictures.

  unclip convert --from karlo --src DIR --out models/karlo --image_encoder DIR
  unclip train --workdir runs/karlo/decoder \
    --config configs/karlo/decoder.py:model=models/karlo,pictures=DIR

The image tower (`--image_encoder`) is needed: the decoder learns to draw
pictures from their embeddings. `,lora` behind the pictures trains adapters in
place of all weights (configs/lora.py).
"""

from __future__ import annotations

import ml_collections

from configs.emoji import decoder
from configs.karlo import part


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = part.fine_tune(arg, "decoder", _smoke)
  if config.name == "decoder":
    config.model.dropout = 0.1
  return config


def _smoke() -> ml_collections.ConfigDict:
  config = decoder.get_config("smoke")
  config.model.learned_null_text = False
  config.model.text_embed_dim = config.model.image_embed_dim
  config.model.context_width = 24
  config.task.embedding_space = "raw"
  config.task.text_drop_prob = 0.3
  return config
