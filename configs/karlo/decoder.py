r"""Karlo's decoder, trained on with your own pictures.

  unclip convert --from karlo --src DIR --out models/karlo --image_encoder DIR
  unclip train --workdir runs/karlo/decoder \
    --config configs/karlo/decoder.py:model=models/karlo,pictures=DIR

The image tower (`--image_encoder`) is needed: the decoder learns to draw
pictures from their embeddings. `,lora` behind the pictures trains adapters in
place of all weights (configs/lora.py). `:scratch` trains one of its size anew,
`:scratch,mxu` one of 384 channels, to which a TPU would fill up its 320.
"""

from __future__ import annotations

import ml_collections

from configs.emoji import decoder
from configs.karlo import part
from configs.paper import decoder as paper_decoder


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = part.fine_tune(arg, "decoder", _smoke, _scratch)
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


def _scratch(arg: str | None) -> ml_collections.ConfigDict:
  config = paper_decoder.get_config(arg)
  config.data.preprocess.update(clip_image_size=224, context_length=77)
  config.frozen.clip = part.clip()
  config.task.embedding_space = "raw"
  config.task.text_drop_prob = 0.3
  del config.model.text_encoder
  config.model.update(
    channels=384 if arg else 320,
    image_embed_dim=768,
    text_width=768,
    text_embed_dim=768,
    learned_null_text=False,
    context_width=1536,
  )
  return config
