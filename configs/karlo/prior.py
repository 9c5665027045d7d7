r"""Karlo's prior, trained on with your own pictures.

  unclip convert --from karlo --src DIR --out models/karlo --image_encoder DIR
  unclip train --config configs/karlo/prior.py:model=models/karlo,pictures=DIR \
    --workdir runs/karlo/prior

The image tower (`--image_encoder`) is needed, for its embeddings are what the
prior learns to draw. `,lora` behind the pictures trains adapters in place of
all weights (configs/lora.py). `:scratch` trains one of its size anew.
"""

from __future__ import annotations

import ml_collections

from configs.emoji import prior
from configs.karlo import part
from configs.paper import prior_diffusion


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return part.fine_tune(arg, "prior", _smoke, _scratch)


def _smoke() -> ml_collections.ConfigDict:
  config = prior.get_config("smoke")
  config.model.learned_null_text = False
  config.task.normalize_text_embed = False
  config.task.text_drop_prob = 0.2
  return config


def _scratch(arg: str | None) -> ml_collections.ConfigDict:
  config = prior_diffusion.get_config(arg)
  config.data.preprocess.update(clip_image_size=224, context_length=77)
  config.frozen.clip = part.clip()
  config.task.normalize_text_embed = False
  config.task.text_drop_prob = 0.2
  config.model.update(
    embed_dim=768,
    text_width=768,
    vocab_size=None,
    learned_null_text=False,
    context_length=77,
    width=2048,
    depth=20,
    num_heads=32,
  )
  return config
