"""P(picture | caption) by an encoder and a decoder with cross-attention.

  unclip train --config configs/baselines/dalle_encoder_decoder.py \
    --workdir runs/baselines/dalle_encoder_decoder \
    --config.frozen.tokenizer.path=runs/baselines/dvae

In the manner of DALL-E Mini (Dayma et al. 2021), to be compared with
configs/baselines/dalle.py, whose data, codes and optimizer it has. `:smoke`
trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs.baselines import dalle


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = dalle.get_config(arg)
  config.name = "dalle_encoder_decoder"
  del config.task.text_loss_weight  # text is not modelled
  config.model_name = "unclip_jax.models.token_encoder_decoder"
  model = config.model
  # A block with cross-attention has 4/3 of another's parameters: together the
  # blocks have as many as there.
  config.model = dict(
    vocab_size=model.vocab_size,
    context_length=model.context_length,
    num_codes=model.num_codes,
    grid_size=model.grid_size,
    image_size=model.image_size,
    width=model.width,
    encoder_depth=model.depth // 3,
    depth=model.depth // 2,
    num_heads=model.num_heads,
    direction="text_to_image",
    dropout=model.dropout,
  )
  return config
